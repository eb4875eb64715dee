package report

import (
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func machine(volumes, snapshots int) Machine {
	m := Machine{Time: time.Unix(1, 0).UTC(), Pools: []Pool{{Name: "default", ID: "a"}}}
	for i := range volumes {
		m.Volumes = append(m.Volumes, Volume{ID: fmt.Sprintf("a.%05d", i)})
	}
	for i := range snapshots {
		m.Snapshots = append(m.Snapshots, Snapshot{ID: fmt.Sprintf("a.s%05d", i)})
	}
	m.Templates = []Template{{ID: "a.golden", Name: "golden", Volumes: 2}}
	m.Problems = []Problem{{Kind: Degraded, Reason: "LoopDeviceLimit", Message: "m"}}
	m.Copies = []Copy{{Name: "pvc-1", Kind: Copying, Done: 1, Total: 2}}
	return m
}

// Pages put together are the whole, whatever there is.
func TestPagesAreTheWhole(t *testing.T) {
	for _, c := range []struct{ volumes, snapshots, pages int }{
		{0, 0, 1}, {1, 0, 1}, {0, 1, 1}, {1, 1, 2}, {PageSize, 0, 1}, {PageSize + 1, 0, 2}, {0, PageSize + 1, 2}, {2*PageSize + 1, PageSize + 1, 5},
	} {
		t.Run(fmt.Sprintf("%d volumes and %d snapshots", c.volumes, c.snapshots), func(t *testing.T) {
			want := machine(c.volumes, c.snapshots)
			var got Machine
			next, pages := "", 0
			for {
				p, ok := want.Page(next)
				if !ok || len(p.Volumes) > PageSize || len(p.Snapshots) > PageSize {
					t.Fatalf("page %q: %v", next, ok)
				}
				got.Add(p)
				pages++
				if next = p.Next; next == "" {
					break
				}
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Error(diff)
			}
			if pages != c.pages {
				t.Errorf("%d pages, want %d", pages, c.pages)
			}
		})
	}
}

// A volume that goes between two pages hides no other.
func TestPagesSurviveAChange(t *testing.T) {
	m := machine(PageSize+2, 0)
	first, _ := m.Page("")
	m.Volumes = append(m.Volumes[:PageSize-1:PageSize-1], m.Volumes[PageSize:]...)
	second, ok := m.Page(first.Next)
	if !ok || len(second.Volumes) != 2 || second.Volumes[0].ID != "a.01000" {
		t.Errorf("%+v", second.Volumes)
	}
	if _, ok := m.Page("what"); ok {
		t.Error("any text is a page")
	}
}
