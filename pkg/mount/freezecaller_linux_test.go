package mount

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
	"time"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

// The helper stays for the next time, and then holds on to nothing. One that died
// meanwhile is replaced.
func TestHelperIsKept(t *testing.T) {
	roottest.Require(t)
	m := freezer(t)
	one, two := frozenFS(t, m, "ext4"), frozenFS(t, m, "ext4")
	cycle := func(dirs ...string) (pid int) {
		t.Helper()
		f, err := m.Freeze(context.Background(), FreezeSpec{Paths: dirs, Limit: time.Minute})
		if err != nil {
			t.Fatal(err)
		}
		pid = f.helper.cmd.Process.Pid
		for _, dir := range dirs {
			if !isFrozen(t, dir) {
				t.Errorf("%s is not frozen", dir)
			}
		}
		if err := f.Thaw(); err != nil {
			t.Fatal(err)
		}
		for _, dir := range dirs {
			if isFrozen(t, dir) {
				t.Errorf("%s is frozen", dir)
			}
		}
		return pid
	}
	first := cycle(one)
	if second := cycle(two, one); second != first {
		t.Errorf("process %d froze first, %d then", first, second)
	}
	for _, fd := range openFiles(t, first) {
		if strings.HasPrefix(fd, one) || strings.HasPrefix(fd, two) {
			t.Errorf("the idle helper has %s open", fd)
		}
	}
	if err := syscall.Kill(first, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	third := cycle(two)
	if third == first {
		t.Error("a dead process froze")
	}
	if err := m.EndHelper(); err != nil {
		t.Error(err)
	}
	if err := syscall.Kill(third, 0); !errors.Is(err, syscall.ESRCH) {
		t.Errorf("the helper after its end: %v", err)
	}
}

// Two freezes at once have a helper each, of which one is kept.
func TestHelpersAtOnce(t *testing.T) {
	roottest.Require(t)
	m := freezer(t)
	spec := func(dir string) FreezeSpec { return FreezeSpec{Paths: []string{dir}, Limit: time.Minute} }
	one, err := m.Freeze(context.Background(), spec(frozenFS(t, m, "ext4")))
	if err != nil {
		t.Fatal(err)
	}
	two, err := m.Freeze(context.Background(), spec(frozenFS(t, m, "ext4")))
	if err != nil {
		t.Fatal(errors.Join(err, one.Thaw()))
	}
	pids := []int{one.helper.cmd.Process.Pid, two.helper.cmd.Process.Pid}
	if err := errors.Join(one.Thaw(), two.Thaw()); err != nil {
		t.Error(err)
	}
	alive := 0
	for _, pid := range pids {
		if syscall.Kill(pid, 0) == nil {
			alive++
		}
	}
	if alive != 1 {
		t.Errorf("of %v there are %d", pids, alive)
	}
}

// More directories than go with one message.
func TestFreezeMany(t *testing.T) {
	roottest.Require(t)
	m := freezer(t)
	dir := frozenFS(t, m, "ext4")
	f := &Frozen{helpers: &m.helpers}
	for range 2*filesPerMessage + 3 {
		d, err := os.Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		f.dirs = append(f.dirs, d)
	}
	if _, err := f.take(); err != nil {
		t.Fatal(err)
	}
	if err := f.handOver(FreezeSpec{Limit: time.Minute}, false); err != nil {
		t.Error(err)
	}
	if got := len(openFiles(t, f.helper.cmd.Process.Pid)); got < len(f.dirs) {
		t.Errorf("of %d files the helper has %d", len(f.dirs), got)
	}
	if err := f.close(); err != nil {
		t.Error(err)
	}
}

// openFiles lists what a process has open.
func openFiles(t *testing.T, pid int) (paths []string) {
	t.Helper()
	links, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil || len(links) == 0 {
		t.Fatalf("%v: no files of process %d", err, pid)
	}
	for _, link := range links {
		if path, err := os.Readlink(link); err == nil {
			paths = append(paths, path)
		}
	}
	return paths
}

// An idle helper does not outlive its parent.
func TestOwnerOfIdleHelperDies(t *testing.T) {
	if dir := os.Getenv("CSI_LOOP_FREEZE"); dir != "" {
		f, err := New().Freeze(context.Background(), FreezeSpec{Paths: []string{dir}, Limit: time.Minute})
		if err != nil {
			t.Fatal(err)
		}
		pid := f.helper.cmd.Process.Pid
		fmt.Println(pid, f.Thaw())
		time.Sleep(time.Minute)
		return
	}
	roottest.Require(t)
	dir := frozenFS(t, New(), "ext4")
	cmd := exec.Command(os.Args[0], "-test.run", t.Name())
	cmd.Env = append(os.Environ(), "CSI_LOOP_FREEZE="+dir)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var pid int
	var thawed string
	if _, err := fmt.Fscan(out, &pid, &thawed); err != nil || thawed != "<nil>" {
		t.Errorf("%v: %s", err, thawed)
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	for deadline := time.Now().Add(5 * time.Second); syscall.Kill(pid, 0) == nil; time.Sleep(5 * time.Millisecond) {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err == nil && strings.Contains(string(stat), ") Z ") {
			break // nobody has waited for it yet
		}
		if time.Now().After(deadline) {
			t.Fatalf("process %d lives", pid)
		}
	}
}
