package image

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func volumeContent(tb testing.TB, p *Pool, id string, offset int64, n int) []byte {
	tb.Helper()
	f, err := p.OpenImage(ctx, id, true)
	return content(tb, f, err, offset, n)
}

// Copies of snapshots and of volumes, thick and thin, larger and in another pool.
func TestCopies(t *testing.T) {
	dirs := []string{poolDir(t), poolDir(t)}
	s := poolPair(t, dirs)
	a, b := s.Pools()[0], s.Pools()[1]
	v := create(t, a, Spec{Name: "v", Size: 4 * MiB})
	data := fill(t, a, v.ID, MiB, 100_000)
	one := snap(t, a, "one", v.ID)
	for _, c := range []struct {
		name   string
		p      *Pool
		spec   Spec
		source Source
	}{
		{"restored", a, Spec{}, Source{Snapshot: one.ID}},
		{"restored-thin", a, Spec{Allocation: Thin}, Source{Snapshot: one.ID}},
		{"restored-larger", a, Spec{Size: 9 * MiB}, Source{Snapshot: one.ID}},
		{"restored-elsewhere", b, Spec{}, Source{Snapshot: one.ID}},
		{"cloned", a, Spec{}, Source{Volume: v.ID}},
		{"cloned-elsewhere", b, Spec{Allocation: Thin, Size: 5 * MiB}, Source{Volume: v.ID}},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.spec.Name, c.spec.Source = c.name, &c.source
			if c.spec.Size == 0 {
				c.spec.Size = 4 * MiB
			}
			made, err := c.p.CreateFrom(ctx, c.spec, held)
			if err != nil {
				t.Fatal(err)
			}
			if got := volumeContent(t, c.p, made.ID, MiB, 100_000); !bytes.Equal(got, data) {
				t.Error("the content differs")
			}
			again, err := c.p.Create(ctx, c.spec)
			if err != nil || !cmp.Equal(made, again) {
				t.Error(err, cmp.Diff(made, again))
			}
			c.spec.Source = nil
			_, err = c.p.Create(ctx, c.spec)
			wantError(t, err, ErrIncompatible, "source")
			fill(t, c.p, made.ID, MiB, 1000)
			if got := volumeContent(t, a, v.ID, MiB, 100_000); !bytes.Equal(got, data) {
				t.Error("writing to the copy changed the source")
			}
			if got := snapshotContent(t, a, one.ID, MiB, 100_000); !bytes.Equal(got, data) {
				t.Error("writing to the copy changed the snapshot")
			}
		})
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = poolPair(t, dirs)
	got, err := s.Get(VolumeID(s.Pools()[0].ID(), "restored"))
	if err != nil || got.Source == nil || got.Source.Snapshot != one.ID {
		t.Errorf("%+v, %v", got, err)
	}
	for i, p := range s.Pools() {
		wantAccount(t, s, p)
		wantClean(t, dirs[i])
	}
}

func TestCopyRefusals(t *testing.T) {
	dir := poolDir(t)
	s, p := openPool(t, dir)
	v := create(t, p, Spec{Name: "v", Size: 4 * MiB})
	one := snap(t, p, "one", v.ID)
	for _, c := range []struct {
		spec Spec
		want error
	}{
		{Spec{Size: 3 * MiB, Source: &Source{Snapshot: one.ID}}, ErrSize},
		{Spec{Size: 4 * MiB, BlockSize: 512, Source: &Source{Snapshot: one.ID}}, ErrSource},
		{Spec{Size: 8 * MiB, Filesystem: "ext4", Source: &Source{Volume: v.ID}}, ErrSource},
		{Spec{Size: 4 * MiB, Source: &Source{Snapshot: VolumeID(p.ID(), "none")}}, ErrNotFound},
		{Spec{Size: 4 * MiB, Source: &Source{Volume: VolumeID(p.ID(), "itself")}}, ErrNotFound},
		{Spec{Size: 4 * MiB, Source: &Source{Volume: VolumeID(strings.Repeat("a", 20), "v")}}, ErrNotFound},
	} {
		c.spec.Name = "itself"
		_, err := p.Create(ctx, c.spec)
		wantError(t, err, c.want)
	}
	for _, bad := range []Source{{}, {Volume: "x"}, {Volume: v.ID, Snapshot: one.ID}} {
		_, err := p.Create(ctx, Spec{Name: "x", Size: MiB, Source: &bad})
		if _, ok := errors.AsType[*SpecError](err); !ok {
			t.Errorf("%v: %v", bad, err)
		}
	}
	wantClean(t, dir)
	wantAccount(t, s, p)
}

// Two volumes that are each to be a copy of the other do not wait for each other.
func TestCopiesOfEachOther(t *testing.T) {
	_, p := openPool(t, poolDir(t))
	done := make(chan error)
	for _, names := range [][2]string{{"a", "b"}, {"b", "a"}} {
		go func() {
			_, err := p.Create(ctx, Spec{Name: names[0], Size: MiB, Source: &Source{Volume: VolumeID(p.ID(), names[1])}})
			done <- err
		}()
	}
	for range 2 {
		wantError(t, <-done, ErrNotFound)
	}
}
