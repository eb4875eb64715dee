package gate

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

func TestMain(m *testing.M) {
	Launch()
	roottest.Main(m)
}

// sh runs a shell script under a gate and returns its calls, as name and base
// name, and its exit code, -1 if it was killed.
func sh(t *testing.T, dir, script string, judge func(n int, c Call) Verdict) ([]string, int) {
	t.Helper()
	roottest.Require(t)
	var mu sync.Mutex
	var seen []string
	cmd := exec.Command("/bin/sh", "-c", script)
	cmd.Dir = dir
	p, err := Start(cmd, func(c Call) Verdict {
		if !strings.HasPrefix(c.Path, dir) {
			return Verdict{}
		}
		mu.Lock()
		defer mu.Unlock()
		seen = append(seen, c.Name+" "+filepath.Base(c.Path))
		return judge(len(seen), c)
	})
	if err != nil {
		t.Fatal(err)
	}
	p.Wait()
	return seen, p.State().ExitCode()
}

func run1(int, Call) Verdict { return Verdict{} }

const script = "echo x >a; ln -s a b; echo y >c; mv c d; rm a"

// The calls of the script: those of ln, mv and rm are children's, and what is
// written to the standard output does not count.
var want = []string{"openat a", "symlinkat b", "openat c", "renameat2 c", "unlinkat a"}

func TestCallsAreSeen(t *testing.T) {
	dir := t.TempDir()
	var own []bool
	seen, code := sh(t, dir, script, func(_ int, c Call) Verdict {
		own = append(own, c.Own)
		return Verdict{}
	})
	if code != 0 || len(seen) != len(want) {
		t.Fatalf("exit code %d, calls %q, want %q", code, seen, want)
	}
	if !slices.Equal(seen, want) {
		t.Errorf("calls %q, want %q", seen, want)
	}
	if !slices.Equal(own, []bool{true, false, true, false, false}) {
		t.Errorf("own = %v: the shell opens files itself, the rest is children's", own)
	}
}

func TestReadingIsNotSeen(t *testing.T) {
	if seen, _ := sh(t, t.TempDir(), "ls -l . >/dev/null; cat /dev/null; test -e x", run1); len(seen) > 0 {
		t.Errorf("calls %q change nothing", seen)
	}
}

func TestKillComesBeforeTheCall(t *testing.T) {
	for k := range want {
		dir := t.TempDir()
		seen, code := sh(t, dir, script, func(n int, _ Call) Verdict { return Verdict{Kill: n == k+1} })
		if code != -1 {
			t.Errorf("kill at call %d: exit code %d", k+1, code)
		}
		// What a child was about to do it still does.
		_, err := os.Lstat(filepath.Join(dir, "b"))
		if wantLink := k >= 1; errors.Is(err, fs.ErrNotExist) == wantLink {
			t.Errorf("kill at call %d (%q): the link is there: %v", k+1, seen, err == nil)
		}
		if _, err := os.Lstat(filepath.Join(dir, "a")); k == 0 && err == nil {
			t.Error("the call at which the shell was killed was run")
		}
	}
}

func TestErrnoAndLie(t *testing.T) {
	dir := t.TempDir()
	_, code := sh(t, dir, "echo x >a", func(int, Call) Verdict { return Verdict{Errno: syscall.ENOSPC} })
	if _, err := os.Stat(dir + "/a"); code == 0 || err == nil {
		t.Errorf("an open that fails: exit code %d, %v", code, err)
	}
	_, code = sh(t, dir, "echo x >a && mv a b", func(_ int, c Call) Verdict { return Verdict{Lie: c.Name == "renameat2"} })
	if _, err := os.Stat(dir + "/a"); code != 0 || err != nil {
		t.Errorf("a rename that is pretended: exit code %d, %v", code, err)
	}
}

func TestLengthIsRead(t *testing.T) {
	dir := t.TempDir()
	var lengths []int64
	_, code := sh(t, dir, "truncate -s 5000000000 a", func(_ int, c Call) Verdict {
		if c.Name == "ftruncate" {
			lengths = append(lengths, c.Length)
		}
		return Verdict{}
	})
	if code != 0 || !slices.Equal(lengths, []int64{5000000000}) {
		t.Errorf("exit code %d, lengths %d, want 5000000000 once", code, lengths)
	}
}

func TestProgramThatCannotStart(t *testing.T) {
	roottest.Require(t)
	p, err := Start(exec.Command("/does/not/exist"), func(Call) Verdict { return Verdict{} })
	if err != nil {
		t.Fatal(err)
	}
	p.Wait()
	if code := p.State().ExitCode(); code != 127 {
		t.Errorf("exit code %d", code)
	}
}
