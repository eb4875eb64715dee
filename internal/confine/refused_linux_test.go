//go:build amd64 || arm64

package confine

import (
	"errors"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

// try is what one of probes prints, where run starts programs.
func try(t *testing.T, run func(func() error) error, name string, args ...string) string {
	t.Helper()
	var out []byte
	err := run(func() (err error) {
		cmd := exec.Command(os.Args[0], args...)
		// The race detector would have each of them sleep for a second at its end.
		cmd.Env = append(os.Environ(), probeVariable+"="+name, "GORACE=atexit_sleep_ms=0")
		out, err = cmd.CombinedOutput()
		return err
	})
	if err != nil {
		t.Fatalf("%s: %v: %s", name, err, out)
	}
	return string(out)
}

func free(f func() error) error { return f() }

// writing confines to one file.
func writing(t *testing.T, name string) func(func() error) error {
	t.Helper()
	fd, err := unix.Open(name, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), name)
	t.Cleanup(func() { f.Close() })
	return func(start func() error) error { return Run(Limits{Write: []*os.File{f}}, start) }
}

// landlocked is under Landlock alone, as on a kernel without filters.
func landlocked(t *testing.T, name string) func(func() error) error {
	t.Helper()
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	var run func(start func() error) error
	run = func(start func() error) error {
		done := make(chan error)
		go func() {
			runtime.LockOSThread() // it ends with its limits
			if unix.Gettid() == os.Getpid() {
				// The first thread stays, and whoever has its limits may send it signals.
				done <- run(start)
				runtime.UnlockOSThread()
				return
			}
			err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
			if err == nil {
				err = restrictWrites([]*os.File{f})
			}
			if err == nil {
				err = start()
			}
			done <- err
		}()
		return <-done
	}
	return run
}

// surroundings are what a program must leave alone.
type surroundings struct {
	mine, others, socket, abstract, port, process string
}

func newSurroundings(t *testing.T) surroundings {
	t.Helper()
	dir := t.TempDir()
	s := surroundings{
		mine: filepath.Join(dir, "mine"), others: filepath.Join(dir, "others"), socket: filepath.Join(dir, "socket"),
		abstract: "confine" + strconv.Itoa(os.Getpid()), process: strconv.Itoa(os.Getpid()),
	}
	for _, name := range []string{s.mine, s.others} {
		if err := os.WriteFile(name, []byte("content"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, address := range []string{s.socket, "@" + s.abstract} {
		l, err := net.Listen("unix", address)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	s.port = strconv.Itoa(l.Addr().(*net.TCPAddr).Port)
	return s
}

// TestProgramsAreRefused: each is refused, and works for a program that is not
// confined, so that it is the limits that refuse it.
func TestProgramsAreRefused(t *testing.T) {
	s := newSurroundings(t)
	told := make(chan os.Signal, 8)
	signal.Notify(told, unix.SIGUSR1)
	defer signal.Stop(told)
	confined := writing(t, s.mine)
	for _, c := range []struct {
		name, argument string
		root           bool // only root may otherwise
	}{
		{name: "truncate", argument: s.others},
		{name: "truncate", argument: s.mine},
		{name: "open cut", argument: s.others},
		{name: "chmod", argument: s.others},
		{name: "fchmod", argument: s.others},
		{name: "chown", argument: s.others},
		{name: "fchown", argument: s.others},
		{name: "times", argument: s.others},
		{name: "symlink", argument: s.others},
		{name: "link", argument: s.others},
		{name: "mkfifo", argument: s.others},
		{name: "mkdir", argument: s.others},
		{name: "socket", argument: s.socket},
		{name: "abstract", argument: s.abstract},
		{name: "tcp", argument: s.port},
		{name: "kill", argument: s.process},
		{name: "thread kill", argument: s.process},
		{name: "pidfd kill", argument: s.process},
		{name: "limit", argument: s.process},
		{name: "priority", argument: s.process},
		{name: "namespace", root: true},
		{name: "rename", argument: s.others},
		{name: "unlink", argument: s.others + ".new"},
	} {
		t.Run(c.name+" "+filepath.Base(c.argument), func(t *testing.T) {
			if c.root {
				roottest.Require(t)
			}
			if got := try(t, confined, c.name, c.argument); got != "EPERM" {
				t.Errorf("confined: %s", got)
			}
			if len(told) > 0 {
				t.Error("a signal arrived")
			}
			if got := try(t, free, c.name, c.argument); got != "ok" {
				t.Errorf("not confined: %s", got)
			}
			if strings.Contains(c.name, "kill") {
				<-told
			}
		})
	}
}

// TestCallsOfLibraries: what a filter cannot look into is answered as by a kernel
// without it, and what not every filesystem or kernel has is refused all the same.
func TestCallsOfLibraries(t *testing.T) {
	s := newSurroundings(t)
	confined := writing(t, s.mine)
	for _, c := range []struct{ name, argument, want string }{
		{"openat2", s.others, "ENOSYS"},
		{"clone3", "", "ENOSYS"},
		{"unknown", "", "ENOSYS"},
		{"open write", s.mine, "ok"},
		{"setxattr", s.others, "EPERM"},
		{"chmod2", s.others, "EPERM"},
		{"flags", s.others, "EPERM"},
		{"io_uring", "", "EPERM"},
		{"key", "", "EPERM"},
		{"clone into namespace", "", "EPERM"},
		{"owner of signals", s.process, "EPERM"},
	} {
		if got := try(t, confined, c.name, c.argument); got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
}

// TestIoctlsOfFiles: what a filesystem does for whoever may read a file is refused, and
// what only tells of it is not.
func TestIoctlsOfFiles(t *testing.T) {
	confined := writing(t, newSurroundings(t).mine)
	for _, c := range []struct{ name, number, want string }{
		{"FS_IOC_SETVERSION", "0x40087602", "EPERM"},
		{"FS_IOC32_SETVERSION", "0x40047602", "EPERM"},
		{"EXT4_IOC_SETVERSION", "0x40086604", "EPERM"},
		{"EXT4_IOC32_SETVERSION", "0x40046604", "EPERM"},
		{"EXT4_IOC_MIGRATE", "0x6609", "EPERM"},
		{"FAT_IOCTL_SET_ATTRIBUTES", "0x40047211", "EPERM"},
		{"FS_IOC_ENABLE_VERITY", "0x40806685", "EPERM"},
		{"FS_IOC_SET_ENCRYPTION_POLICY", "0x800c6613", "EPERM"},
		{"FS_IOC_ADD_ENCRYPTION_KEY", "0xc0506617", "EPERM"},
		{"FS_IOC_REMOVE_ENCRYPTION_KEY", "0xc0406618", "EPERM"},
		{"FS_IOC_REMOVE_ENCRYPTION_KEY_ALL_USERS", "0xc0406619", "EPERM"},
		{"FS_IOC_SHUTDOWN", "0x8004587d", "EPERM"},
		{"USERFAULTFD_IOC_NEW", "0xaa00", "EPERM"},
		{"BTRFS_IOC_SNAP_CREATE", "0x50009401", "EPERM"},
		{"FS_IOC_GETVERSION", "0x80087601", "ENOTTY"},
		{"FS_IOC_GETFSMAP", "0xc0c0583b", "ENOTTY"},
		{"FS_IOC_GET_ENCRYPTION_POLICY", "0x400c6615", "ENOTTY"},
	} {
		if got := try(t, confined, "ioctl", c.number); got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
		if got := try(t, free, "ioctl", c.number); got != "ENOTTY" {
			t.Errorf("%s, not confined: %s", c.name, got)
		}
	}
}

// TestLandlockOfThisKernel: all that the kernel's version of it has is used, with no
// filter before it.
func TestLandlockOfThisKernel(t *testing.T) {
	version, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	if errno != 0 {
		t.Skip("this kernel has no Landlock")
	}
	t.Logf("version %d", version)
	s := newSurroundings(t)
	confined := landlocked(t, s.mine)
	told := make(chan os.Signal, 1)
	signal.Notify(told, unix.SIGUSR1)
	defer signal.Stop(told)
	for _, c := range []struct {
		name, argument string
		since          uintptr
		want           string
	}{
		{"open write", s.others, 1, "EACCES"},
		{"unlink", s.others, 1, "EACCES"},
		{"truncate", s.others, 3, "EACCES"},
		{"open cut", s.others, 3, "EACCES"},
		{"tcp", s.port, 4, "EACCES"},
		{"abstract", s.abstract, 6, "EPERM"},
		{"socket", s.socket, 9, "EACCES"},
	} {
		want := c.want
		if version < c.since {
			want = "ok"
		}
		if got := try(t, confined, c.name, c.argument); got != want {
			t.Errorf("%s: %s, want %s", c.name, got, want)
		}
	}
	want := "ok"
	if scopesSignalsOfProcesses() {
		want = "EPERM"
	}
	if got := try(t, confined, "kill", s.process); got != want {
		t.Errorf("kill: %s, want %s", got, want)
	}
	if got := try(t, confined, "open write", s.mine); got != "ok" {
		t.Errorf("its own file: %s", got)
	}
}

// attached is a loop device over a new file of some bytes.
func attached(t *testing.T, size int64) string {
	t.Helper()
	image := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, size); err != nil {
		t.Fatal(err)
	}
	device := roottest.Losetup(t, image)
	t.Cleanup(func() {
		// If a test has detached it, the number may be another's now.
		if len(roottest.Loops(filepath.Dir(image))) > 0 {
			_ = exec.Command("losetup", "-d", device).Run()
		}
	})
	return device
}

func TestLoopDevicesOfOthers(t *testing.T) {
	roottest.Require(t)
	mine, others := attached(t, 1<<20), attached(t, 1<<20)
	confined := writing(t, mine)
	for _, device := range []string{mine, others} {
		if got := try(t, confined, "detach", device); got != "EPERM" {
			t.Errorf("LOOP_CLR_FD on %s: %s", device, got)
		}
	}
	if got := try(t, confined, "open write", others); got == "ok" && restricts() {
		t.Error("it opens the other device for writing")
	}
	if got := try(t, confined, "size", mine); got != "ok" {
		t.Errorf("the size of its device: %s", got)
	}
	version, _, _ := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION) // -1 without
	only := landlocked(t, mine)
	if restricts() && version >= 5 {
		if got := try(t, only, "detach", others); got != "EACCES" {
			t.Errorf("LOOP_CLR_FD with Landlock alone: %s", got)
		}
	}
	if got := try(t, free, "loop status", others); got != "ok" {
		t.Errorf("it was detached: %s", got)
	}
	if got := try(t, free, "detach", others); got != "ok" {
		t.Errorf("not confined: %s", got)
	}
}

// TestE2fsckRepairs: a journal that was not replayed, and counts that are wrong.
func TestE2fsckRepairs(t *testing.T) {
	roottest.Require(t)
	device := attached(t, 64<<20)
	block := filepath.Join(t.TempDir(), "block")
	if err := os.WriteFile(block, []byte(strings.Repeat("from the journal", 64)), 0o600); err != nil {
		t.Fatal(err)
	}
	roottest.Run(t, "mkfs.ext4", "-q", "-b", "1024", device)
	script := filepath.Join(t.TempDir(), "script")
	if err := os.WriteFile(script, []byte("jo\njw -b 9000 "+block+"\njc\nset_super_value free_blocks_count 5\nset_super_value state 0\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	roottest.Run(t, "debugfs", "-w", "-f", script, device)
	var out []byte
	err := writing(t, device)(func() (err error) {
		out, err = exec.Command("e2fsck", "-f", "-p", "--", device).CombinedOutput()
		return err
	})
	const repaired = 1
	exit, ok := errors.AsType[*exec.ExitError](err)
	if !ok || exit.ExitCode() != repaired || !strings.Contains(string(out), "recovering journal") {
		t.Fatalf("%v: %s", err, out)
	}
	roottest.Run(t, "e2fsck", "-f", "-n", "--", device)
	f, err := os.Open(device)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 16)
	if _, err := f.ReadAt(b, 9000*1024); err != nil || string(b) != "from the journal" {
		t.Errorf("the block has %q, %v", b, err)
	}
}
