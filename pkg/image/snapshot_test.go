package image

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func snap(tb testing.TB, p *Pool, name, source string) Snapshot {
	tb.Helper()
	s, err := p.Snapshot(ctx, SnapshotSpec{Name: name, Source: source}, nil)
	if err != nil {
		tb.Fatal(err)
	}
	return s
}

// content is an image's bytes at the offset.
func content(tb testing.TB, f *os.File, err error, offset int64, n int) []byte {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, n)
	if _, err := f.ReadAt(b, offset); err != nil {
		tb.Fatal(err)
	}
	return b
}

func snapshotContent(tb testing.TB, p *Pool, id string, offset int64, n int) []byte {
	tb.Helper()
	f, err := p.OpenSnapshot(ctx, id)
	return content(tb, f, err, offset, n)
}

func TestSnapshotKeepsTheMoment(t *testing.T) {
	dir := poolDir(t)
	s, p := openPool(t, dir)
	v := create(t, p, Spec{Name: "v", Size: 4 * MiB})
	before := fill(t, p, v.ID, MiB, 1000)
	one := snap(t, p, "one", v.ID)
	fill(t, p, v.ID, MiB, 1000)
	if got := snapshotContent(t, p, one.ID, MiB, 1000); !bytes.Equal(got, before) {
		t.Error("the snapshot follows its volume")
	}
	if _, err := p.Grow(ctx, v.ID, 6*MiB); err != nil {
		t.Fatal(err)
	}
	if again := snap(t, p, "one", v.ID); !cmp.Equal(again, one) {
		t.Error(cmp.Diff(one, again))
	}
	if err := p.Remove(ctx, v.ID); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s, p = openPool(t, dir)
	got, err := s.GetSnapshot(one.ID)
	if err != nil || !cmp.Equal(got, one) {
		t.Fatal(err, cmp.Diff(one, got))
	}
	if found, ok := s.FindSnapshot("one"); !ok || found.Volume.Size != 4*MiB || found.Source != v.ID {
		t.Error(found, ok)
	}
	if got := snapshotContent(t, p, one.ID, MiB, 1000); !bytes.Equal(got, before) {
		t.Error("the snapshot did not outlive its volume")
	}
	for range 2 {
		if err := p.RemoveSnapshot(ctx, one.ID); err != nil {
			t.Fatal(err)
		}
	}
	_, err = s.GetSnapshot(one.ID)
	wantError(t, err, ErrNotFound)
	wantClean(t, dir)
	wantAccount(t, s, p)
}

func TestSnapshotRefusals(t *testing.T) {
	s, p := openPool(t, poolDir(t))
	v, w := create(t, p, Spec{Name: "v", Size: MiB}), create(t, p, Spec{Name: "w", Size: MiB})
	snap(t, p, "one", v.ID)
	for _, c := range []struct {
		spec SnapshotSpec
		want error
	}{
		{SnapshotSpec{Name: "one", Source: w.ID}, ErrIncompatible},
		{SnapshotSpec{Name: "one", Source: v.ID, Independent: true}, ErrIncompatible},
		{SnapshotSpec{Name: "two", Source: VolumeID(p.ID(), "none")}, ErrNotFound},
		{SnapshotSpec{Name: "two", Source: VolumeID(strings.Repeat("a", 20), "v")}, ErrNotFound},
	} {
		_, err := p.Snapshot(ctx, c.spec, nil)
		wantError(t, err, c.want)
	}
	for _, bad := range []SnapshotSpec{{Source: v.ID}, {Name: "x", Source: "nonsense"}} {
		_, err := p.Snapshot(ctx, bad, nil)
		if _, ok := errors.AsType[*SpecError](err); !ok {
			t.Errorf("%+v: %v", bad, err)
		}
	}
	if n := len(s.ListSnapshots()); n != 1 {
		t.Errorf("%d snapshots", n)
	}
}

// Nothing is left of a snapshot whose writers did not hold still.
func TestSnapshotThatWasNotQuiet(t *testing.T) {
	dir := poolDir(t)
	s, p := openPool(t, dir)
	v := create(t, p, Spec{Name: "v", Size: 4 * MiB, Allocation: Thin})
	fill(t, p, v.ID, 0, 1000)
	loud := errors.New("loud")
	for name, quiesce := range map[string]Quiesce{
		"before": func(context.Context) (func() error, error) { return nil, loud },
		"after":  func(context.Context) (func() error, error) { return func() error { return loud }, nil },
	} {
		_, err := p.Snapshot(ctx, SnapshotSpec{Name: name, Source: v.ID}, quiesce)
		wantError(t, err, loud)
	}
	canceled, cancel := context.WithCancel(ctx)
	_, err := p.Snapshot(canceled, SnapshotSpec{Name: "canceled", Source: v.ID}, func(context.Context) (func() error, error) {
		cancel()
		return func() error { return nil }, nil
	})
	wantError(t, err, context.Canceled)
	if n := len(s.ListSnapshots()); n != 0 || p.snapshotEntries(t) != 0 {
		t.Errorf("%d snapshots, %d entries", n, p.snapshotEntries(t))
	}
	wantClean(t, dir)
	wantAccount(t, s, p)
}

func TestDamagedSnapshotIsRefusedAlone(t *testing.T) {
	dir := poolDir(t)
	s, p := openPool(t, dir)
	v := create(t, p, Spec{Name: "v", Size: MiB})
	bad, good := snap(t, p, "bad", v.ID), snap(t, p, "good", v.ID)
	short := snap(t, p, "short", v.ID)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	for _, mend := range []error{
		os.WriteFile(filepath.Join(dir, snapshotsDir, "bad", snapshotFile), []byte(`{"formatVersion": 1}`), 0o600),
		os.Truncate(filepath.Join(dir, snapshotsDir, "short", imageFile), 10),
	} {
		if mend != nil {
			t.Fatal(mend)
		}
	}
	s, p = openPool(t, dir)
	_, err := s.GetSnapshot(bad.ID)
	wantError(t, err, ErrDamaged)
	wantError(t, p.RemoveSnapshot(ctx, bad.ID), ErrDamaged)
	_, err = p.OpenSnapshot(ctx, short.ID)
	wantError(t, err, ErrDamaged)
	if _, err := s.GetSnapshot(good.ID); err != nil {
		t.Error(err)
	}
	if h := p.Health(); len(h) != 1 || h[0].Reason != "SnapshotRefused" {
		t.Error(h)
	}
}

// poolPair is two pools of one store.
func poolPair(t *testing.T, dirs []string, options ...Option) *Store {
	t.Helper()
	s, err := Open(ctx, []Config{{Name: "a", Path: dirs[0]}, {Name: "b", Path: dirs[1]}}, append([]Option{WithRefresh(0)}, options...)...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func TestGroupAcrossPools(t *testing.T) {
	dirs := []string{poolDir(t), poolDir(t)}
	s := poolPair(t, dirs)
	pools := s.Pools()
	v, w := create(t, pools[0], Spec{Name: "v", Size: MiB}), create(t, pools[1], Spec{Name: "w", Size: 2 * MiB})
	spec := GroupSpec{Name: "a group", Sources: []string{w.ID, v.ID}}
	calls := 0
	quiesce := func(context.Context) (func() error, error) { calls++; return func() error { return nil }, nil }
	g, err := s.SnapshotGroup(ctx, spec, quiesce)
	if err != nil {
		t.Fatal(err)
	}
	again, err := s.SnapshotGroup(ctx, spec, quiesce)
	if err != nil || !cmp.Equal(g, again) || calls != 1 {
		t.Fatal(err, calls, cmp.Diff(g, again))
	}
	for _, other := range [][]string{{v.ID}, {v.ID, VolumeID(pools[0].ID(), "x")}} {
		_, err := s.SnapshotGroup(ctx, GroupSpec{Name: spec.Name, Sources: other}, nil)
		wantError(t, err, ErrIncompatible)
	}
	for _, member := range g.Snapshots {
		p, _, _ := s.Lookup(member.ID)
		if member.Group != g.ID {
			t.Errorf("%+v is not in %s", member, g.ID)
		}
		wantError(t, p.RemoveSnapshot(ctx, member.ID), ErrInGroup)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}

	// One pool alone: its member may exist or not, so it is neither shown nor removed.
	record := slices.Index([]string{pools[0].ID(), pools[1].ID()}, strings.Split(g.ID, ".")[0])
	_, other := openPool(t, dirs[1-record])
	if got := other.store.ListSnapshots(); len(got) != 0 || other.snapshotEntries(t) != 1 {
		t.Error(got)
	}
	if err := other.store.Close(); err != nil {
		t.Fatal(err)
	}
	s = poolPair(t, dirs)
	got, err := s.GetGroup(g.ID)
	if err != nil || !cmp.Equal(g, got) {
		t.Fatal(err, cmp.Diff(g, got))
	}
	for range 2 {
		if err := s.RemoveGroup(ctx, g.ID); err != nil {
			t.Fatal(err)
		}
	}
	if left := s.ListSnapshots(); len(left) != 0 {
		t.Error(left)
	}
	_, err = s.GetGroup(g.ID)
	wantError(t, err, ErrNotFound)
}

func TestGroupRefusals(t *testing.T) {
	s, p := openPool(t, poolDir(t))
	v := create(t, p, Spec{Name: "v", Size: MiB})
	for _, bad := range []GroupSpec{{Name: "g"}, {Sources: []string{v.ID}}, {Name: "g", Sources: []string{v.ID, v.ID}}} {
		_, err := s.SnapshotGroup(ctx, bad, nil)
		if _, ok := errors.AsType[*SpecError](err); !ok {
			t.Errorf("%+v: %v", bad, err)
		}
	}
	_, err := s.SnapshotGroup(ctx, GroupSpec{Name: "g", Sources: []string{v.ID, VolumeID(p.ID(), "none")}}, nil)
	wantError(t, err, ErrNotFound)
	if n := p.snapshotEntries(t); n != 0 {
		t.Errorf("%d snapshots are left of a group that failed", n)
	}
}

// Only what a kernel says that has no reflinks on a filesystem is taken for that, for as
// long as the pool is open: an error of the moment would end what volumes claim.
func TestReflinkThatFailsOnce(t *testing.T) {
	yes, no := true, false
	for err, want := range map[error]*bool{
		nil: &yes, syscall.EOPNOTSUPP: &no, syscall.EINVAL: &no, syscall.ENOTTY: &no, syscall.EXDEV: &no,
		syscall.EIO: nil, syscall.ENOSPC: nil, syscall.EDQUOT: nil, syscall.ENOMEM: nil, syscall.EINTR: nil, syscall.EROFS: nil, syscall.EPERM: nil,
	} {
		if got := canReflink(err); !cmp.Equal(got, want) {
			t.Errorf("%v: %v", err, got)
		}
	}
}

// TestProbeThatHangs: while a disk hangs that is tried whether it can reflink, the records
// of its pool are there for those who need no disk, as the calls for other pools.
func TestProbeThatHangs(t *testing.T) {
	hung, hold := make(chan struct{}), make(chan struct{})
	s, p := openPool(t, poolDir(t), withKill(func(point string) {
		if point == "reflink: made" {
			close(hung)
			<-hold
		}
	}))
	v := create(t, p, Spec{Name: "v", Size: MiB})
	probed := make(chan bool)
	go func() { probed <- p.CanReflink() }()
	<-hung
	found := make(chan bool)
	go func() {
		_, ok := s.Find("v")
		_, other := s.Find("other")
		_, err := s.Get(v.ID)
		found <- ok && !other && err == nil && len(p.Health()) == 0
	}()
	select {
	case ok := <-found:
		if !ok {
			t.Error("not what there is")
		}
	case <-time.After(10 * time.Second):
		t.Error("they wait for the disk")
	}
	close(hold)
	if can := <-probed; can != p.CanReflink() {
		t.Errorf("%v, and then not", can)
	}
}
