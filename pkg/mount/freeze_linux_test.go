package mount

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

// frozenFS mounts a new filesystem and makes sure that it is thawed at the end.
func frozenFS(t *testing.T, m *Mounter, fsType string) (dir string) {
	t.Helper()
	device, _ := loopFS(t, fsType)
	dir = t.TempDir()
	mustMount(t, m, Spec{Source: device, Target: dir, FSType: fsType})
	t.Cleanup(func() {
		if err := m.Thaw(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// freezer is a Mounter that leaves no helper.
func freezer(t *testing.T) *Mounter {
	t.Helper()
	m := New()
	t.Cleanup(func() {
		if err := m.EndHelper(); err != nil {
			t.Error(err)
		}
	})
	return m
}

// isFrozen tells whether a write waits. It writes in another process, since one that
// waits cannot be ended.
func isFrozen(t *testing.T, dir string) bool {
	t.Helper()
	// A second freeze says so, without waiting for anything.
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	err = freezeFilesystem(f)
	if errors.Is(err, unix.EBUSY) {
		return true
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := thawFilesystem(f); err != nil {
		t.Fatal(err)
	}
	return false
}

func waitThawed(t *testing.T, dir string) {
	t.Helper()
	deadline := time.Now().Add(5 * time.Second)
	for isFrozen(t, dir) {
		if time.Now().After(deadline) {
			t.Fatal("it stays frozen")
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func TestFreezeAndThaw(t *testing.T) {
	roottest.Require(t)
	m := freezer(t)
	for _, fsType := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(fsType, func(t *testing.T) {
			dir := frozenFS(t, m, fsType)
			write(t, filepath.Join(dir, "before"), "x")
			f, err := m.Freeze(context.Background(), FreezeSpec{Paths: []string{dir}, Limit: time.Minute})
			if err != nil {
				t.Fatal(err)
			}
			if !isFrozen(t, dir) {
				t.Error("it is not frozen")
			}
			_, err = m.Freeze(context.Background(), FreezeSpec{Paths: []string{dir}, Limit: time.Minute})
			if !errors.Is(err, ErrBusy) || !isFrozen(t, dir) {
				t.Errorf("frozen twice: %v", err)
			}
			for range 2 {
				if err := f.Thaw(); err != nil {
					t.Fatal(err)
				}
			}
			if isFrozen(t, dir) {
				t.Error("it is still frozen")
			}
			write(t, filepath.Join(dir, "after"), "x")
		})
	}
}

// However an expedited freeze ends, the kernel is not left in a hurry. Others on this
// machine may hurry it for a moment.
func TestExpeditedFreeze(t *testing.T) {
	roottest.Require(t)
	if _, err := os.ReadFile(expeditedFile); err != nil {
		t.Fatal(err)
	}
	m := freezer(t)
	dir := frozenFS(t, m, "ext4")
	unhurried := func() {
		t.Helper()
		for deadline := time.Now().Add(5 * time.Second); !CanExpedite(); time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal("the kernel is left in a hurry")
			}
		}
	}
	unhurried()
	spec := FreezeSpec{Paths: []string{dir}, Limit: time.Minute, Expedite: true}
	f, err := m.Freeze(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	unhurried()
	if err := f.Thaw(); err != nil {
		t.Fatal(err)
	}
	// A helper that is killed while it hurries cannot take it back.
	if f, err = m.Freeze(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	if err := expedite(true); err != nil {
		t.Fatal(err)
	}
	f.helper.kill()
	if err := f.Thaw(); !errors.Is(err, ErrThawed) {
		t.Errorf("the helper is dead: %v", err)
	}
	unhurried()
	if err := EndExpedite(); err != nil { // again
		t.Error(err)
	}
}

// What was written before a group froze is there, and none of the group stays frozen
// when one member cannot be.
func TestFreezeAllOrNone(t *testing.T) {
	roottest.Require(t)
	m := freezer(t)
	one, two := frozenFS(t, m, "ext4"), frozenFS(t, m, "ext4")
	f, err := m.Freeze(context.Background(), FreezeSpec{Paths: []string{one, two}, Limit: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	if !isFrozen(t, one) || !isFrozen(t, two) {
		t.Error("not all are frozen")
	}
	if err := f.Thaw(); err != nil {
		t.Fatal(err)
	}
	f, err = m.Freeze(context.Background(), FreezeSpec{Paths: []string{two}, Limit: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	_, err = m.Freeze(context.Background(), FreezeSpec{Paths: []string{one, two}, Limit: time.Minute})
	if !errors.Is(err, ErrBusy) || isFrozen(t, one) || !isFrozen(t, two) {
		t.Errorf("%v; one frozen: %t, two frozen: %t", err, isFrozen(t, one), isFrozen(t, two))
	}
	if err := f.Thaw(); err != nil {
		t.Fatal(err)
	}
}

func TestFreezeEndsInTime(t *testing.T) {
	roottest.Require(t)
	m := freezer(t)
	dir := frozenFS(t, m, "ext4")
	f, err := m.Freeze(context.Background(), FreezeSpec{Paths: []string{dir}, Limit: 50 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	waitThawed(t, dir)
	if err := f.Thaw(); !errors.Is(err, ErrThawed) {
		t.Errorf("thaw after the time was up: %v", err)
	}
}

func TestSomebodyElseThaws(t *testing.T) {
	roottest.Require(t)
	m := freezer(t)
	dir := frozenFS(t, m, "ext4")
	f, err := m.Freeze(context.Background(), FreezeSpec{Paths: []string{dir}, Limit: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Thaw(dir); err != nil {
		t.Fatal(err)
	}
	if err := f.Thaw(); !errors.Is(err, ErrThawed) {
		t.Errorf("thaw of what somebody else has thawed: %v", err)
	}
}

func TestHelperDies(t *testing.T) {
	roottest.Require(t)
	m := freezer(t)
	dir := frozenFS(t, m, "ext4")
	f, err := m.Freeze(context.Background(), FreezeSpec{Paths: []string{dir}, Limit: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	if err := f.helper.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := f.Thaw(); !errors.Is(err, ErrThawed) {
		t.Errorf("thaw without the helper: %v", err)
	}
	if isFrozen(t, dir) {
		t.Error("it stays frozen without the helper")
	}
}

// What cannot be thawed is told apart from what was thawed early.
func TestHelperDiesAndNobodyCanThaw(t *testing.T) {
	roottest.Require(t)
	m := freezer(t)
	dir := frozenFS(t, m, "ext4")
	f, err := m.Freeze(context.Background(), FreezeSpec{Paths: []string{dir}, Limit: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	stuck, err := os.Open(dir) // the helper freezes by a descriptor of its own
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.helper.cmd.Process.Kill(), f.dirs[0].Close()); err != nil {
		t.Fatal(err)
	}
	err = f.Thaw()
	if thawErr := thawFilesystem(stuck); thawErr != nil {
		t.Error(thawErr)
	}
	if err := stuck.Close(); err != nil {
		t.Error(err)
	}
	if !errors.Is(err, ErrNotThawed) {
		t.Errorf("thaw without the helper, which fails: %v", err)
	}
}

// A mount that is not the one that was looked up is not frozen, whether another one
// covers it or it is gone.
func TestFreezeOfAnotherMount(t *testing.T) {
	roottest.Require(t)
	m := freezer(t)
	dir := frozenFS(t, m, "ext4")
	meant, _, err := m.At(dir)
	if err != nil {
		t.Fatal(err)
	}
	freeze := func() error {
		f, err := m.Freeze(context.Background(), FreezeSpec{Paths: []string{dir}, Mounts: []int{meant.ID}, Limit: time.Minute})
		if err != nil {
			return err
		}
		return f.Thaw()
	}
	if err := freeze(); err != nil {
		t.Fatal(err)
	}
	other, _ := loopFS(t, "ext4")
	if err := unix.Mount(other, dir, "ext4", 0, ""); err != nil {
		t.Fatal(err)
	}
	if err := freeze(); !errors.Is(err, ErrBusy) || isFrozen(t, dir) {
		t.Errorf("covered: %v", err)
	}
	if err := unix.Unmount(dir, 0); err != nil {
		t.Fatal(err)
	}
	if err := freeze(); err != nil {
		t.Error(err)
	}
}

// freezeAndHang is what TestOwnerDies runs as another process.
func freezeAndHang(dir string) {
	lock, err := os.Create(filepath.Join(filepath.Dir(dir), "lock"))
	if err == nil {
		err = unix.Flock(int(lock.Fd()), unix.LOCK_EX)
	}
	if err == nil {
		_, err = New().Freeze(context.Background(), FreezeSpec{Paths: []string{dir}, Limit: time.Minute, Keep: lock})
	}
	fmt.Println("frozen", err)
	time.Sleep(time.Minute)
}

func TestOwnerDies(t *testing.T) {
	if dir := os.Getenv("CSI_LOOP_FREEZE"); dir != "" {
		freezeAndHang(dir)
		return
	}
	roottest.Require(t)
	m := freezer(t)
	dir := frozenFS(t, m, "ext4")
	cmd := exec.Command(os.Args[0], "-test.run", "TestOwnerDies")
	cmd.Env = append(os.Environ(), "CSI_LOOP_FREEZE="+dir)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line := make([]byte, 64)
	n, _ := io.ReadAtLeast(out, line, len("frozen <nil>\n"))
	if !strings.HasPrefix(string(line[:n]), "frozen <nil>") || !isFrozen(t, dir) {
		t.Errorf("%q, frozen: %t", line[:n], isFrozen(t, dir))
	}
	if err := cmd.Process.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	// The lock is free no earlier than nobody thaws any more.
	lock, err := os.Open(filepath.Join(filepath.Dir(dir), "lock"))
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	if isFrozen(t, dir) {
		t.Error("the lock is free and it is still frozen")
	}
}
