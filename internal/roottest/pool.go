package roottest

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// mkfs holds the tool and its arguments for each type Pool knows.
var mkfs = map[string][]string{
	"ext4":  {"mkfs.ext4", "-q", "-F", "-m", "0"},
	"xfs":   {"mkfs.xfs", "-q", "-f", "-m", "reflink=1"},
	"btrfs": {"mkfs.btrfs", "-q", "-f"},
}

// Pool mounts a new file system of the given type ("ext4", "xfs" or "btrfs") and
// returns its mount point. Size is that of the file behind it in bytes; xfs
// wants 300 MiB, btrfs 128 MiB at least. Options are for mkfs. It calls Require.
//
// The test's clean-up unmounts it, and fails the test when that does not succeed
// within a minute or its loop device stays: somebody still uses the pool.
func Pool(tb testing.TB, fsType string, size int64, options ...string) string {
	tb.Helper()
	Require(tb)
	tool, ok := mkfs[fsType]
	if !ok {
		tb.Fatalf("no pool of type %q", fsType)
	}
	dir := tb.TempDir()
	image, mountPoint := filepath.Join(dir, "pool.img"), filepath.Join(dir, "pool")
	if err := os.Mkdir(mountPoint, 0o755); err != nil {
		tb.Fatal(err)
	}
	f, err := os.Create(image)
	if err != nil {
		tb.Fatal(err)
	}
	err = f.Truncate(size)
	if cerr := f.Close(); err != nil || cerr != nil {
		tb.Fatal(err, cerr)
	}
	Run(tb, slices.Concat(tool, options, []string{image})...)
	retry(tb, "mount", "-o", "loop", "-t", fsType, image, mountPoint)
	tb.Cleanup(func() {
		retry(tb, "umount", mountPoint)
		WaitUnbound(tb, dir)
	})
	return mountPoint
}

// holders lists who has a device open or mounted, of those that Loops lists: a process,
// and the descriptor or the mount point; and devices that outlive their last close.
func holders(loops []string) []string {
	var found []string
	for _, l := range loops {
		name, _, _ := strings.Cut(l, " ")
		node := "/dev/" + name
		if b, err := os.ReadFile(filepath.Join("/sys/block", name, "loop/autoclear")); err == nil && string(b) == "0\n" {
			found = append(found, name+" has no autoclear")
		}
		processes, _ := filepath.Glob("/proc/[0-9]*")
		for _, p := range processes {
			comm, _ := os.ReadFile(p + "/comm")
			who := filepath.Base(p) + " " + strings.TrimSpace(string(comm)) + ": "
			descriptors, _ := filepath.Glob(p + "/fd/*")
			for _, fd := range descriptors {
				if to, err := os.Readlink(fd); err == nil && to == node {
					found = append(found, who+"fd "+filepath.Base(fd))
				}
			}
			table, _ := os.ReadFile(p + "/mountinfo")
			for line := range strings.Lines(string(table)) {
				left, right, _ := strings.Cut(line, " - ")
				fields, source := strings.Fields(left), strings.Fields(right)
				if len(fields) > 4 && len(source) > 1 && source[1] == node {
					found = append(found, who+"mount "+fields[4])
				}
			}
		}
	}
	return found
}

// Run runs a command, fails the test when it fails, and returns its output
// (both streams).
func Run(tb testing.TB, argv ...string) string {
	tb.Helper()
	out, err := Output(argv...)
	if err != nil {
		tb.Fatalf("%v: %v\n%s", argv, err, out)
	}
	return out
}

// Losetup binds a free loop device and returns its node; whoever calls it detaches it.
// The arguments are those of losetup beside --find and --show. The number that it finds
// may be another's or gone when it takes it: it tries again.
func Losetup(tb testing.TB, args ...string) string {
	tb.Helper()
	return strings.TrimSpace(retry(tb, append([]string{"losetup", "--find", "--show"}, args...)...))
}

// WaitUnbound waits until no loop device shows a file below dir, and fails the test if one
// does for a minute. A stranger who looks at a device meanwhile delays its end.
func WaitUnbound(tb testing.TB, dir string) {
	tb.Helper()
	for deadline := time.Now().Add(settle); len(Loops(dir)) > 0; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			left := Loops(dir)
			tb.Errorf("loop devices stay: %v; who has them: %q", left, holders(left))
			return
		}
	}
}

// retry is Run for commands that a stranger's short use of the same kernel
// objects can make fail: another test's losetup, udev.
func retry(tb testing.TB, argv ...string) string {
	tb.Helper()
	deadline := time.Now().Add(settle)
	for {
		out, err := Output(argv...)
		if err == nil {
			return out
		}
		if time.Now().After(deadline) {
			tb.Fatalf("%v: %v\n%s", argv, err, out)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// Output runs a command as Run does, and leaves it to the caller what an error means.
func Output(argv ...string) (string, error) {
	out, err := once(argv)
	// mkfs.btrfs looks at each loop device that is mounted, and gives up when another
	// test's goes meanwhile.
	for try := 0; err != nil && try < 20 && os.Geteuid() == 0 && strings.Contains(out, " check mount status of "); try++ {
		time.Sleep(10 * time.Millisecond)
		out, err = once(argv)
	}
	return out, err
}

func once(argv []string) (string, error) {
	cmd := exec.Command(argv[0], argv[1:]...)
	// Words in errors must not depend on the machine's language.
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	out, err := cmd.CombinedOutput()
	return string(out), err
}
