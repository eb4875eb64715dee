package roottest

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// settle bounds the wait for what goes away by itself: the kernel finishes an
// autoclear a moment after the last close when a stranger (udev, mkfs.btrfs, which
// opens the loop devices that are mounted) looked at the device meanwhile. On a busy
// machine that moment is long; what was forgotten stays for ever.
const settle = time.Minute

// Option changes what Main accepts as clean.
type Option func(*config)

type config struct{ goleak []goleak.Option }

// IgnoreGoroutine accepts goroutines whose top function is name, such as
// "internal/poll.runtime_pollWait".
func IgnoreGoroutine(name string) Option {
	return func(c *config) { c.goleak = append(c.goleak, goleak.IgnoreTopFunction(name)) }
}

// Main runs the package's tests and exits. It is the whole body of TestMain.
//
// For the tests it makes a temporary directory and points TMPDIR at it, so that
// t.TempDir is below it. After the tests it fails the package (exit status 1,
// one line for each leftover) when there is still a loop device over a file
// below that directory, a mount below it, a file descriptor that was not open
// before, or a goroutine.
//
// As root it starts the program anew in a mount namespace of its own first, unless it
// has one: nobody else's namespace has a copy of what the tests mount.
func Main(m *testing.M, opts ...Option) {
	os.Exit(run(m, opts))
}

func run(m *testing.M, opts []Option) int {
	c := config{goleak: []goleak.Option{
		// Importing klog starts it; it never ends.
		goleak.IgnoreTopFunction("k8s.io/klog/v2.(*flushDaemon).run.func1"),
	}}
	for _, o := range opts {
		o(&c)
	}
	if err := OwnMounts(); err != nil {
		fmt.Fprintln(os.Stderr, "roottest:", err)
		return 1
	}
	root, err := os.MkdirTemp("", "csi-loop-test-")
	if err != nil {
		fmt.Fprintln(os.Stderr, "roottest:", err)
		return 1
	}
	if err := os.Setenv("TMPDIR", root); err != nil {
		fmt.Fprintln(os.Stderr, "roottest:", err)
		return 1
	}
	before := descriptors()
	code := m.Run()
	left := waitClean(root, before)
	if err := goleak.Find(c.goleak...); err != nil {
		left = append(left, err.Error())
	}
	for _, l := range left {
		fmt.Fprintln(os.Stderr, "roottest: left behind:", l)
	}
	if len(left) > 0 && code == 0 {
		code = 1
	}
	if len(left) == 0 {
		// With a mount left, RemoveAll would go through it.
		_ = os.RemoveAll(root)
	}
	return code
}

// waitClean returns what is left once it stops changing for the better.
func waitClean(root string, before map[string]int) []string {
	deadline := time.Now().Add(settle)
	for {
		left := append(Loops(root), mounts(root)...)
		for target, n := range descriptors() {
			if n > before[target] {
				left = append(left, fmt.Sprintf("%d descriptor(s) of %s", n-before[target], target))
			}
		}
		if len(left) == 0 || time.Now().After(deadline) {
			return left
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// Loops lists the loop devices bound to a file below root, one line for people
// each, beginning with the device's name.
func Loops(root string) []string {
	var found []string
	files, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			continue // unbound meanwhile
		}
		if path := strings.TrimSuffix(string(b), "\n"); strings.HasPrefix(path, root+"/") {
			name := filepath.Base(filepath.Dir(filepath.Dir(f)))
			found = append(found, name+" over "+path)
		}
	}
	return found
}

// mounts lists the mount points below root.
func mounts(root string) []string {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil
	}
	var found []string
	for line := range strings.Lines(string(b)) {
		if fields := strings.Fields(line); len(fields) > 4 && strings.HasPrefix(fields[4], root+"/") {
			found = append(found, "mount "+fields[4])
		}
	}
	return found
}

// descriptors counts the process's open files by what they show.
func descriptors() map[string]int {
	counts := map[string]int{}
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return counts
	}
	for _, e := range entries {
		target, err := os.Readlink("/proc/self/fd/" + e.Name())
		if err != nil {
			continue // the descriptor of this very listing
		}
		// The Go runtime opens these on first use and keeps them.
		switch target {
		case "anon_inode:[eventpoll]", "anon_inode:[eventfd]", "anon_inode:[pidfd]", "/dev/null":
			continue
		}
		if strings.HasPrefix(target, "/sys/fs/cgroup/") { // GOMAXPROCS updates
			continue
		}
		// Sockets and pipes carry an inode number; their kind is what counts.
		kind, _, _ := strings.Cut(target, ":[")
		counts[kind]++
	}
	return counts
}
