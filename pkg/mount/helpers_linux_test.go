package mount

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

// loopOver binds a loop device with the losetup tool and detaches it at the end.
func loopOver(tb testing.TB, image string, args ...string) string {
	tb.Helper()
	var node string
	for try := 0; ; try++ {
		argv := append([]string{"--show", "-f", "-b", "4096"}, append(args, image)...)
		out, err := exec.Command("losetup", argv...).CombinedOutput()
		if err == nil {
			node = strings.TrimSpace(string(out))
			break
		}
		// Somebody else took the number that the tool had found.
		if try == 20 {
			tb.Fatalf("losetup: %v: %s", err, out)
		}
		time.Sleep(20 * time.Millisecond)
	}
	tb.Cleanup(func() { roottest.Run(tb, "losetup", "-d", node) })
	return node
}

// loopFS is a loop device with a new filesystem on it.
func loopFS(tb testing.TB, fsType string) (device, image string) {
	tb.Helper()
	size := 64 * miB
	switch fsType {
	case "xfs":
		size = 300 * miB
	case "btrfs":
		size = 256 * miB // with less it cannot grow
	}
	image = mkfsImage(tb, fsType, size)
	return loopOver(tb, image), image
}

func mustMount(tb testing.TB, m *Mounter, spec Spec) {
	tb.Helper()
	if err := m.Mount(context.Background(), spec); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { mustUnmount(tb, m, spec.Target) })
}

func mustBind(tb testing.TB, m *Mounter, spec BindSpec) {
	tb.Helper()
	if err := m.Bind(context.Background(), spec); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { mustUnmount(tb, m, spec.Target) })
}

func mustUnmount(tb testing.TB, m *Mounter, target string) {
	tb.Helper()
	if err := m.Unmount(context.Background(), target); err != nil {
		tb.Error(err)
	}
}

func mustAt(tb testing.TB, m *Mounter, path string) Mount {
	tb.Helper()
	got, ok, err := m.At(path)
	if err != nil || !ok {
		tb.Fatalf("at %s: %t, %v", path, ok, err)
	}
	return got
}

func notAt(tb testing.TB, m *Mounter, path string) {
	tb.Helper()
	if got, ok, err := m.At(path); err != nil || ok {
		tb.Errorf("at %s: %+v, %v", path, got, err)
	}
}

func write(tb testing.TB, path, text string) {
	tb.Helper()
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		tb.Fatal(err)
	}
}

func read(tb testing.TB, path string) string {
	tb.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		tb.Fatal(err)
	}
	return string(b)
}

func rdev(tb testing.TB, node string) (major, minor uint32) {
	tb.Helper()
	var st unix.Stat_t
	if err := unix.Stat(node, &st); err != nil {
		tb.Fatal(err)
	}
	return unix.Major(st.Rdev), unix.Minor(st.Rdev)
}

// foreign fails unless err is a *ForeignError.
func foreign(tb testing.TB, err error) {
	tb.Helper()
	f, ok := errors.AsType[*ForeignError](err)
	if !ok {
		tb.Errorf("got %v, want *ForeignError", err)
	} else if f.Reason == "" || f.Found.Path == "" {
		tb.Errorf("%+v", f)
	}
}

// inNamespace runs the calling test again, alone, in a process with a mount
// namespace of its own, and reports true in that process. What the test mounts
// there cannot reach the machine.
func inNamespace(t *testing.T, wrap ...string) bool {
	t.Helper()
	roottest.Require(t)
	const env = "CSI_LOOP_TEST_CHILD"
	if os.Getenv(env) == t.Name() {
		return true
	}
	argv := append(slices.Clone(wrap), "unshare", "--mount", "--propagation", "private", os.Args[0], "-test.run", "^"+t.Name()+"$", "-test.v", "-test.count=1")
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Env = append(os.Environ(), env+"="+t.Name())
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS: "+t.Name()) {
		t.Errorf("%v\n%s", err, out)
	}
	return false
}

// mayResize reports CAP_SYS_RESOURCE.
func mayResize(tb testing.TB) bool {
	tb.Helper()
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		tb.Fatal(err)
	}
	return data[0].Effective&(1<<unix.CAP_SYS_RESOURCE) != 0
}

// openFDs counts this process' descriptors.
func openFDs(tb testing.TB) int {
	tb.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		tb.Fatal(err)
	}
	return len(entries)
}

func isErrno(tb testing.TB, err error, want syscall.Errno) {
	tb.Helper()
	if !errors.Is(err, want) {
		tb.Errorf("got %v, want %v", err, want)
	}
}

func newDir(tb testing.TB, elem ...string) string {
	tb.Helper()
	dir := filepath.Join(elem...)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		tb.Fatal(err)
	}
	return dir
}

func name(i int) string { return fmt.Sprintf("n%03d", i) }

func deviceAt(t testing.TB, m *Mounter, node string) Device {
	t.Helper()
	d, err := m.DeviceAt(node)
	if err != nil {
		t.Fatal(err)
	}
	return d
}
