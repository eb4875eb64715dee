package cgroup

import (
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

func TestMain(m *testing.M) {
	if job := os.Getenv("CSI_LOOP_CGROUP_WRITER"); job != "" {
		if err := write(job); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	roottest.Main(m)
}

// write is what a pod does, in a process of its own: "direct|buffered PATH BYTES".
func write(job string) error {
	var how, path string
	var size int
	if _, err := fmt.Sscan(job, &how, &path, &size); err != nil {
		return err
	}
	flags := os.O_RDWR | os.O_CREATE
	if how == "direct" {
		flags |= unix.O_DIRECT
	}
	f, err := os.OpenFile(path, flags, 0o600)
	if err != nil {
		return err
	}
	const piece = 64 << 10
	// Memory of its own: pages are aligned, as direct I/O wants it.
	data, err := unix.Mmap(-1, 0, piece, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return err
	}
	for at := 0; at < size; at += piece {
		if _, err := f.WriteAt(data, int64(at)); err != nil {
			return err
		}
	}
	return errors.Join(f.Sync(), f.Close())
}

// pod is a cgroup as the kubelet makes it, below one of the test's own.
type pod struct {
	pods *Pods
	dir  string
}

// realPod makes one. Where version 1 has the io controller nothing can be tested; that
// is so on some development machines, and never in test/vm.
func realPod(t *testing.T, layout string) pod {
	t.Helper()
	roottest.Require(t)
	if err := NewPods("").Supported(); err != nil {
		if os.Getenv("CSI_LOOP_VM") == "" && versionOneHasIO(t) {
			t.Skipf("%v: make test-vm runs it on kernels where it can", err)
		}
		t.Fatal(err)
	}
	root := filepath.Join(DefaultRoot, "csi-loop-test-"+rand.Text())
	var made []string
	t.Cleanup(func() {
		for _, dir := range slices.Backward(made) {
			if err := os.Remove(dir); err != nil {
				t.Error(err)
			}
		}
	})
	parent := DefaultRoot
	for _, name := range append([]string{filepath.Base(root)}, strings.Split(layout, "/")...) {
		if err := os.WriteFile(filepath.Join(parent, "cgroup.subtree_control"), []byte("+io +memory"), 0o600); err != nil {
			t.Fatal(err)
		}
		parent = filepath.Join(parent, name)
		if err := os.Mkdir(parent, 0o755); err != nil {
			t.Fatal(err)
		}
		made = append(made, parent)
	}
	return pod{NewPods(root), parent}
}

// versionOneHasIO reads /proc/cgroups: the hierarchy of blkio is 0 when it is free.
func versionOneHasIO(t *testing.T) bool {
	b, err := os.ReadFile("/proc/cgroups")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == "blkio" {
			return f[1] != "0"
		}
	}
	return false
}

// start runs write in the pod.
func (p pod) start(t *testing.T, how, path string, size int) *exec.Cmd {
	t.Helper()
	f, err := os.Open(p.dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), fmt.Sprintf("CSI_LOOP_CGROUP_WRITER=%s %s %d", how, path, size))
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(f.Fd())}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return cmd
}

// run is start to the end, and tells how long it took.
func (p pod) run(t *testing.T, how, path string, size int) time.Duration {
	t.Helper()
	begin := time.Now()
	if err := p.start(t, how, path, size).Wait(); err != nil {
		t.Fatal(err)
	}
	return time.Since(begin)
}

// written is what io.stat says that the pod wrote to a device.
func (p pod) written(t *testing.T, d Device) (bytes int64) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(p.dir, "io.stat"))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		fields := strings.Fields(line)
		if len(fields) == 0 || fields[0] != d.String() {
			continue
		}
		for _, pair := range fields[1:] {
			if text, ok := strings.CutPrefix(pair, "wbytes="); ok {
				bytes, _ = strconv.ParseInt(text, 10, 64)
			}
		}
	}
	return bytes
}

func (p pod) max(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(p.dir, "io.max"))
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}

// deviceOf is that of the filesystem at path.
func deviceOf(t *testing.T, path string) Device {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return Device{unix.Major(st.Dev), unix.Minor(st.Dev)}
}

const mib = 1 << 20

// TestLimitHolds: a pod that may write 1 MiB a second to a loop device does not write
// more, directly or by the page cache, until it may. Only lower bounds of time are
// looked at, which a slow machine cannot break.
func TestLimitHolds(t *testing.T) {
	for _, how := range []string{"direct", "buffered"} {
		t.Run(how, func(t *testing.T) {
			p := realPod(t, "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod"+systemdUID+".slice")
			mnt := roottest.Pool(t, "ext4", 256*mib)
			d := deviceOf(t, mnt)
			if err := p.pods.Limit(uid, d, Limits{WriteBandwidth: new(int64(mib)), ReadIOPS: new(int64(500))}); err != nil {
				t.Fatal(err)
			}
			if got, want := p.max(t), d.String()+" rbps=max wbps=1048576 riops=500 wiops=max"; got != want {
				t.Errorf("io.max is %q, want %q", got, want)
			}
			const size = 5 * mib
			if took := p.run(t, how, filepath.Join(mnt, "a"), size); took < 3*time.Second {
				t.Errorf("%d bytes at 1 MiB a second took only %v", size, took)
			}
			if got := p.written(t, d); got < size {
				t.Errorf("the kernel counted %d bytes written by the pod, of %d", got, size)
			}
			if err := p.pods.Limit(uid, d, Limits{WriteBandwidth: new(int64(0)), ReadIOPS: new(int64(0))}); err != nil {
				t.Fatal(err)
			}
			if got := p.max(t); got != "" {
				t.Errorf("io.max is %q after the limits were taken off", got)
			}
		})
	}
}

// TestLimitChangesAtOnce: a process that would take hours ends when its limit is
// taken off.
func TestLimitChangesAtOnce(t *testing.T) {
	p := realPod(t, "kubepods/besteffort/pod"+uid)
	mnt := roottest.Pool(t, "ext4", 256*mib)
	d := deviceOf(t, mnt)
	if err := p.pods.Limit(uid, d, Limits{WriteIOPS: new(int64(10)), WriteBandwidth: new(int64(64 << 10))}); err != nil {
		t.Fatal(err)
	}
	cmd := p.start(t, "direct", filepath.Join(mnt, "a"), 64*mib) // 17 minutes
	for deadline := time.Now().Add(time.Minute); p.written(t, d) == 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			_ = cmd.Process.Kill()
			t.Fatal("nothing was written in a minute")
		}
	}
	if err := p.pods.Limit(uid, d, Limits{WriteIOPS: new(int64(0)), WriteBandwidth: new(int64(0))}); err != nil {
		t.Fatal(err)
	}
	kill := time.AfterFunc(5*time.Minute, func() { _ = cmd.Process.Kill() })
	defer kill.Stop()
	if err := cmd.Wait(); err != nil {
		t.Errorf("it went on as slowly: %v", err)
	}
}

// TestNoController: a hierarchy whose controllers are elsewhere is told from one that
// can limit.
func TestNoController(t *testing.T) {
	roottest.Require(t)
	dir := t.TempDir()
	if err := NewPods(dir).Supported(); !errors.Is(err, ErrUnsupported) {
		t.Errorf("an ordinary directory: %v", err)
	}
	if err := NewPods(filepath.Join(dir, "none")).Supported(); !errors.Is(err, ErrUnsupported) {
		t.Errorf("no directory: %v", err)
	}
}
