package mount

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

func TestMain(m *testing.M) { roottest.Main(m) }

func TestCleanPath(t *testing.T) {
	for given, want := range map[string]string{
		"/a/b": "/a/b", "/a//b/": "/a/b", "/a/./b/.": "/a/b", "/a b\n": "/a b\n",
		"": "", "a": "", "./a": "", "/": "", "//": "", "/a/..": "", "/.": "", "/a\x00b": "",
	} {
		got, err := cleanPath("test", given)
		if got != want || (err != nil) != (want == "") {
			t.Errorf("%q: got %q, %v, want %q", given, got, err, want)
		}
		if err != nil && !errors.Is(err, syscall.EINVAL) {
			t.Errorf("%q: %v", given, err)
		}
	}
}

func TestErrorsStandForTheirErrno(t *testing.T) {
	all := []error{ErrBusy, ErrPermission, ErrUnsupported}
	for errno, want := range map[error]error{
		syscall.EBUSY: ErrBusy, syscall.EPERM: ErrPermission, syscall.EOPNOTSUPP: ErrUnsupported,
		syscall.ENOSYS: ErrUnsupported, ErrUnsupported: ErrUnsupported, ErrBusy: ErrBusy, syscall.EINVAL: nil,
	} {
		err := error(&OpError{Op: "do", Path: "/x", Err: errno, Words: "why"})
		for _, sentinel := range all {
			if got := errors.Is(err, sentinel); got != (want != nil && errors.Is(want, sentinel)) {
				t.Errorf("%v is %v: %t", err, sentinel, got)
			}
		}
		if !errors.Is(err, errno) {
			t.Errorf("%v lost its errno", err)
		}
	}
	if !errors.Is(ErrUnsupported, errors.ErrUnsupported) {
		t.Error("ErrUnsupported is not errors.ErrUnsupported")
	}
	long := &OpError{Op: "do", Path: "/" + strings.Repeat("x", 5000), Err: syscall.EIO}
	if n := len(long.Error()); n > 700 {
		t.Errorf("an error of %d bytes", n)
	}
}

func TestNewStats(t *testing.T) {
	for _, tc := range []struct {
		unit                                  int64
		blocks, free, avail, inodes, freeInos uint64
		want                                  Stats
	}{
		{4096, 100, 60, 50, 10, 4, Stats{Total: 409600, Available: 204800, Used: 163840, Inodes: 10, InodesFree: 4, InodesUsed: 6}},
		{4096, 100, 200, 300, 0, 9, Stats{Total: 409600, Available: 409600}},
		{1 << 40, 1 << 40, 1, 1, 1 << 63, 0, Stats{Total: 1<<63 - 1, Available: 1 << 40, Used: 1<<63 - 1, Inodes: 1<<63 - 1, InodesUsed: 1<<63 - 1}},
		{-1, 1, 1, 1, 0, 0, Stats{}},
	} {
		if d := cmp.Diff(tc.want, newStats(tc.unit, tc.blocks, tc.free, tc.avail, tc.inodes, tc.freeInos)); d != "" {
			t.Error(d)
		}
	}
}

func TestLocks(t *testing.T) {
	var l locks
	var inside, most atomic.Int32
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			unlock, err := l.lock(t.Context(), "k")
			if err != nil {
				t.Error(err)
				return
			}
			most.Store(max(most.Load(), inside.Add(1)))
			inside.Add(-1)
			unlock()
		})
	}
	wg.Wait()
	if most.Load() != 1 || len(l.held) != 0 {
		t.Errorf("%d at once, %d locks left", most.Load(), len(l.held))
	}
	unlock, _ := l.lock(t.Context(), "a")
	other, err := l.lock(t.Context(), "b")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := l.lock(ctx, "a"); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	unlock()
	other()
	if len(l.held) != 0 {
		t.Errorf("%d locks left", len(l.held))
	}
}

func TestListReadsItsProc(t *testing.T) {
	proc := t.TempDir()
	if _, err := New(WithProc(proc)).List(); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v", err)
	}
	if err := os.Mkdir(filepath.Join(proc, "self"), 0o755); err != nil {
		t.Fatal(err)
	}
	line := "36 35 98:0 / /mnt rw - ext3 /dev/root rw\n"
	if err := os.WriteFile(filepath.Join(proc, "self", "mountinfo"), []byte(line), 0o600); err != nil {
		t.Fatal(err)
	}
	m := New(WithProc(proc))
	got, err := m.List()
	if err != nil || len(got) != 1 || got[0].Path != "/mnt" {
		t.Errorf("got %v, %v", got, err)
	}
	if got, err = m.OfDevice(Device{Major: 98}); err != nil || len(got) != 1 {
		t.Errorf("got %v, %v", got, err)
	}
	if got, err = m.OfDevice(Device{Major: 98, Minor: 1}); err != nil || len(got) != 0 {
		t.Errorf("got %v, %v", got, err)
	}
}

// Nothing in this test needs root: these verbs end before the kernel is asked to
// change anything.
func TestVerbsThatNeedNothingDone(t *testing.T) {
	m, ctx := New(), t.Context()
	dir := t.TempDir()
	if err := m.Unmount(ctx, filepath.Join(dir, "missing")); err != nil && os.Geteuid() == 0 {
		t.Error(err)
	}
	if _, ok, err := m.At(filepath.Join(dir, "missing")); ok || err != nil {
		t.Errorf("got %t, %v", ok, err)
	}
	if _, ok, err := m.At(dir); ok || err != nil {
		t.Errorf("got %t, %v", ok, err)
	}
	if got, ok, err := m.At("/proc"); !ok || err != nil || got.FSType != "proc" || got.Path != "/proc" || got.Root != "/" {
		t.Errorf("got %+v, %t, %v", got, ok, err)
	}
	if _, err := m.Stats(filepath.Join(dir, "missing")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v", err)
	}
	if s, err := m.Stats(dir); err != nil || s.Total <= 0 || s.Used+s.Available > s.Total {
		t.Errorf("got %+v, %v", s, err)
	}
	long := "/" + strings.Repeat("x", 4500)
	if _, _, err := m.At(long); !errors.Is(err, syscall.ENAMETOOLONG) || len(err.Error()) > 800 {
		t.Errorf("got %v", err)
	}
	gone, cancel := context.WithCancel(ctx)
	cancel()
	for name, err := range map[string]error{
		"Mount": m.Mount(gone, Spec{Source: "/dev/null", Target: dir, FSType: "ext4"}), "Bind": m.Bind(gone, BindSpec{Source: dir, Target: dir + "/x"}),
		"Unmount": m.Unmount(gone, dir), "Remove": m.Remove(gone, dir), "Grow": m.Grow(gone, GrowSpec{FSType: "ext4"}), "Check": m.Check(gone, "ext4", "/dev/null"),
	} {
		if name == "Mount" {
			if !errors.Is(err, syscall.ENOTBLK) {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		if !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := m.Check(ctx, "ntfs", "/dev/null"); !errors.Is(err, ErrUnknownFilesystem) {
		t.Error(err)
	}
	if err := m.Grow(ctx, GrowSpec{FSType: "ntfs"}); !errors.Is(err, ErrUnknownFilesystem) {
		t.Error(err)
	}
}
