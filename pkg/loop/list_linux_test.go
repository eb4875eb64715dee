package loop

import (
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestListShowsWhatFindShows(t *testing.T) {
	onEveryMachine(t, func(t *testing.T, m *machine) {
		manager := m.manager(t)
		d := m.attach(t, manager, "a", whole)
		opts := []Option{withKernel(m.kernel)}
		if m.fake == nil {
			opts = nil // by itself
		}
		all, err := List(t.Context(), opts...)
		check(t, err)
		i := slices.IndexFunc(all, func(i Info) bool { return i.Ref == d.Ref() })
		if i < 0 {
			t.Fatalf("%v is not listed: %v", d.Ref(), all)
		}
		found, err := manager.Find(t.Context(), m.image(t, "a"))
		check(t, err)
		got := all[i]
		got.Path = found[0].Path // the test's nodes may be elsewhere
		if diff := cmp.Diff(found[0], got); diff != "" {
			t.Error(diff)
		}
		m.detach(t, manager, d)
		all, err = List(t.Context(), opts...)
		check(t, err)
		if slices.ContainsFunc(all, func(i Info) bool { return i.Ref == d.Ref() }) {
			t.Error("it is listed after it was detached")
		}
	})
}
