package image

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestTune(t *testing.T) {
	dir := t.TempDir()
	s, p := openPool(t, dir)
	v, err := p.Create(ctx, Spec{Name: "a", Size: 4 * MiB, Allocation: Thin, Tuning: Tuning{WriteIOPS: new(int64(100)), Trim: new(true)}})
	if err != nil {
		t.Fatal(err)
	}
	change := Tuning{ReadIOPS: new(int64(0)), ReadAhead: new(int64(1 << 20)), ReadBandwidth: new(int64(1 << 20)), Trim: new(false)}
	if v, err = p.Tune(ctx, v.ID, change); err != nil {
		t.Fatal(err)
	}
	want := Tuning{ReadIOPS: new(int64(0)), WriteIOPS: new(int64(100)), ReadAhead: new(int64(1 << 20)), ReadBandwidth: new(int64(1 << 20)), Trim: new(false)}
	if diff := cmp.Diff(want, v.Tuning); diff != "" {
		t.Error(diff)
	}

	// The same again writes nothing.
	record := filepath.Join(dir, "volumes", "a", recordFile)
	before, err := os.Stat(record)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Tune(ctx, v.ID, change); err != nil {
		t.Fatal(err)
	}
	if after, err := os.Stat(record); err != nil || !os.SameFile(before, after) {
		t.Errorf("written again: %v", err)
	}

	// A value that no volume has changes nothing.
	for _, bad := range []Tuning{
		{ReadIOPS: new(int64(5)), WriteIOPS: new(int64(500))}, {ReadBandwidth: new(int64(-1))}, {ReadAhead: new(int64(4097))}, {ReadAhead: new(int64(1 << 40))},
	} {
		if _, err := p.Tune(ctx, v.ID, bad); !errors.As(err, new(*SpecError)) {
			t.Errorf("%v: %v", bad, err)
		}
		if _, err := p.Create(ctx, Spec{Name: "bad", Size: 4 * MiB, Tuning: bad}); !errors.As(err, new(*SpecError)) {
			t.Errorf("create with %v: %v", bad, err)
		}
	}
	if _, err := p.Tune(ctx, VolumeID(p.ID(), "other"), change); !errors.Is(err, ErrNotFound) {
		t.Errorf("unknown volume: %v", err)
	}

	// Growth keeps it, a second creation finds the volume, and so does the next start.
	if _, err := p.Grow(ctx, v.ID, 8*MiB); err != nil {
		t.Fatal(err)
	}
	if again, err := p.Create(ctx, Spec{Name: "a", Size: 8 * MiB, Allocation: Thin}); err != nil || !again.Tuning.Equal(want) {
		t.Errorf("%v, %v", again.Tuning, err)
	}
	thick, err := p.Create(ctx, Spec{Name: "thick", Size: 4 * MiB, Tuning: Tuning{Trim: new(false)}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Tune(ctx, thick.ID, Tuning{Trim: new(true)}); !errors.As(err, new(*SpecError)) {
		t.Errorf("a thick volume that is trimmed: %v", err)
	}
	if _, err := p.Create(ctx, Spec{Name: "bad", Size: 4 * MiB, Tuning: Tuning{Trim: new(true)}}); !errors.As(err, new(*SpecError)) {
		t.Errorf("a thick volume made to be trimmed: %v", err)
	}
	if err := p.Remove(ctx, thick.ID); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	_, p = openPool(t, dir)
	if got := p.list(); len(got) != 1 || !got[0].Tuning.Equal(want) || got[0].Size != 8*MiB {
		t.Errorf("after a start: %+v", got)
	}
}
