//go:build amd64 || arm64

package confine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

func TestMain(m *testing.M) {
	if name := os.Getenv(probeVariable); name != "" {
		probe(name, os.Args[1:])
	}
	roottest.Main(m)
}

// run is a shell command under limits.
func run(t *testing.T, limits Limits, command string) (string, error) {
	t.Helper()
	var out []byte
	err := Run(limits, func() (err error) {
		out, err = exec.Command("sh", "-c", command).CombinedOutput()
		return err
	})
	return string(out), err
}

func status(t *testing.T, limits Limits) map[string]string {
	t.Helper()
	out, err := run(t, limits, "cat /proc/self/status")
	if err != nil {
		t.Fatal(err, out)
	}
	fields := map[string]string{}
	for line := range strings.Lines(out) {
		key, value, _ := strings.Cut(line, ":")
		fields[key] = strings.TrimSpace(value)
	}
	return fields
}

// restricts tells whether this kernel has Landlock.
func restricts() bool {
	const version = 1 // LANDLOCK_CREATE_RULESET_VERSION
	_, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, version)
	return errno == 0
}

func TestProgramsHaveNoCapabilities(t *testing.T) {
	roottest.Require(t)
	const none = "0000000000000000"
	for range 20 { // on whichever thread
		s := status(t, Limits{})
		for _, set := range []string{"CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"} {
			if s[set] != none {
				t.Fatalf("%s is %s", set, s[set])
			}
		}
		if s["NoNewPrivs"] != "1" {
			t.Fatal("it may gain rights")
		}
	}
	// Neither this process nor what it starts otherwise is limited.
	b, err := exec.Command("cat", "/proc/self/status").Output()
	if err != nil || strings.Contains(string(b), "CapEff:\t"+none) || !strings.Contains(string(b), "NoNewPrivs:\t0") {
		t.Errorf("%s, %v", b, err)
	}
}

// standalone makes a test run once more, in a process like that of docs/security.md
// without a container: it cannot take a capability from its bounding set.
const standalone = "CONFINE_STANDALONE"

func TestProgramsOfAStandaloneDriverHaveNoCapabilities(t *testing.T) {
	roottest.Require(t)
	if os.Getenv(standalone) == "" {
		cmd := exec.Command("setpriv", "--inh-caps=-all", "--bounding-set=-all,+sys_admin", "--no-new-privs",
			os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v", "-test.count=1")
		cmd.Env = append(os.Environ(), standalone+"=1")
		if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS: "+t.Name()) {
			t.Errorf("%v: %s", err, out)
		}
		return
	}
	const none, given = "0000000000000000", "0000000000200000" // CAP_SYS_ADMIN
	s := status(t, Limits{})
	for set, want := range map[string]string{"CapInh": none, "CapPrm": none, "CapEff": none, "CapAmb": none, "CapBnd": given} {
		if s[set] != want {
			t.Errorf("%s is %s, want %s", set, s[set], want)
		}
	}
	b, err := exec.Command("cat", "/proc/self/status").Output()
	if err != nil || !strings.Contains(string(b), "CapEff:\t"+given) {
		t.Errorf("this process is limited: %s, %v", b, err)
	}
}

// A thread without capabilities starts a program in a directory that is known by its
// descriptor only, and another thread ends it when its time is over.
func TestProgramEndsWithItsContext(t *testing.T) {
	fd, err := unix.Open(t.TempDir(), unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	dir := os.NewFile(uintptr(fd), "directory")
	defer dir.Close()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	go func() {
		_, _ = r.Read(make([]byte, 1)) // it runs
		cancel()
	}()
	err = Run(Limits{}, func() error {
		defer w.Close()
		cmd := exec.CommandContext(ctx, "sh", "-c", "echo x; exec sleep 1000")
		cmd.Dir, cmd.Stdout = fmt.Sprintf("/proc/self/fd/%d", dir.Fd()), w
		return cmd.Run()
	})
	if exit, ok := errors.AsType[*exec.ExitError](err); !ok || exit.Sys().(syscall.WaitStatus).Signal() != unix.SIGKILL {
		t.Errorf("it ended with %v", err)
	}
}

func TestProgramsWriteOnlyWhereTheyMay(t *testing.T) {
	dir := t.TempDir()
	open := func(path string) *os.File {
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	for _, d := range []string{"mine", "others"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, d, "file"), []byte("old"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if !restricts() {
		t.Log("this kernel has no Landlock: only that everything works is tested")
	}
	for name, c := range map[string]struct {
		write   string
		command string
		allowed bool
	}{
		"a file in an allowed directory": {"mine", "echo new > mine/file && echo x > mine/other && mv mine/other mine/third && rm mine/third", true},
		"an allowed file":                {"mine/file", "echo new 1<> mine/file", true},
		"reading elsewhere":              {"mine", "cat others/file", true},
		"a file elsewhere":               {"mine", "echo new > others/file", false},
		"a new file elsewhere":           {"mine", "echo new > others/new", false},
		"removing elsewhere":             {"mine", "rm -f others/file", false},
		"the directory of a file":        {"mine/file", "echo new > mine/other", false},
	} {
		t.Run(name, func(t *testing.T) {
			out, err := run(t, Limits{Write: []*os.File{open(filepath.Join(dir, c.write))}}, "cd "+dir+" && "+c.command)
			if (err == nil) != (c.allowed || !restricts()) {
				t.Errorf("%v: %s", err, out)
			}
		})
	}
	if b, err := os.ReadFile(filepath.Join(dir, "others", "file")); restricts() && (err != nil || string(b) != "old") {
		t.Errorf("%q, %v", b, err)
	}
	if err := os.WriteFile(filepath.Join(dir, "others", "file"), nil, 0o600); err != nil {
		t.Errorf("this process is limited: %v", err)
	}
}

func BenchmarkRun(b *testing.B) {
	dir, err := os.Open(b.TempDir())
	if err != nil {
		b.Fatal(err)
	}
	defer dir.Close()
	for b.Loop() {
		if err := Run(Limits{Write: []*os.File{dir}}, func() error { return nil }); err != nil {
			b.Fatal(err)
		}
	}
}
