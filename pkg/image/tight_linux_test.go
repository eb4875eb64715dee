package image

import (
	"context"
	"testing"
)

// soon is a context for calls that are refused at once, if they do not wait for themselves.
func soon(t *testing.T) context.Context {
	t.Helper()
	c, cancel := context.WithTimeout(ctx, takePatience/2)
	t.Cleanup(cancel)
	return c
}

// A call that needs space twice, and finds it once, is refused: it does not wait for what
// it has reserved itself.
func TestNoCallWaitsForItself(t *testing.T) {
	onEach(t, 768*MiB, func(t *testing.T, fsType, dir string) {
		s, p := openPool(t, dir)
		var sources []string
		for _, name := range []string{"v", "w"} {
			v := create(t, p, Spec{Name: name, Size: 96 * MiB, Allocation: Thin})
			fill(t, p, v.ID, 0, 64<<20)
			sources = append(sources, v.ID)
		}
		create(t, p, Spec{Name: "filler", Size: p.Capacity(Thick) - 120*MiB})
		for _, alloc := range []Allocation{Thin, Thick} {
			if !p.CanReflink() || fsType == "xfs" && alloc == Thick {
				continue // it needs space once
			}
			_, err := p.CreateFrom(soon(t), Spec{Name: "c", Size: 96 * MiB, Allocation: alloc, Source: &Source{Volume: sources[0]}}, held)
			wantError(t, err, ErrNoSpace)
		}
		create(t, p, Spec{Name: "filler2", Size: p.Capacity(Thick) - 80*MiB})
		_, err := s.SnapshotGroup(soon(t), GroupSpec{Name: "g", Sources: sources}, held)
		wantError(t, err, ErrNoSpace)
		if l := s.ListSnapshots(); len(l) != 0 {
			t.Errorf("left: %v", l)
		}
		wantAccount(t, s, p)
	})
}
