package crash

import (
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/csi-loop/csi-loop/test/crash/gate"
)

// TestLedger shows what is owed after calls as the driver makes them, each made after it
// was noted.
func TestLedger(t *testing.T) {
	t.Parallel()
	const own, child = true, false
	call := func(own bool, words ...string) gate.Call {
		c := gate.Call{Own: own, Name: words[0], Path: words[1]}
		if len(words) > 2 {
			c.To = words[2]
		}
		return c
	}
	truncate := func(length int64) gate.Call {
		return gate.Call{Own: own, Name: "ftruncate", Path: "/volumes/v/image", Length: length}
	}
	failed := gate.Verdict{Errno: unix.EIO}
	type entry struct {
		call    gate.Call
		verdict gate.Verdict
	}
	run := func(c gate.Call) entry { return entry{call: c} }
	created := []entry{
		run(call(own, "mkdirat", "/.new-v")), run(call(own, "openat", "/.new-v/image")), run(call(own, "fallocate", "/.new-v/image")),
		run(call(own, "fsync", "/.new-v/image")), run(call(own, "renameat2", "/.new-v", "/volumes/v")), run(call(own, "fsync", "/volumes")),
	}
	grown := []entry{
		run(truncate(1)), run(call(own, "fsync", "/volumes/v/image")),
		run(call(own, "openat", "/volumes/v/.new-record")), run(call(own, "write", "/volumes/v/.new-record")), run(call(own, "fsync", "/volumes/v/.new-record")),
		run(call(own, "renameat2", "/volumes/v/.new-record", "/volumes/v/record")), run(call(own, "fsync", "/volumes/v")),
	}
	without := func(all []entry, n int) []entry { return slices.Delete(slices.Clone(all), n, n+1) }
	but := func(all []entry, n int, v gate.Verdict) []entry {
		all = slices.Clone(all)
		all[n].verdict = v
		return all
	}
	for _, c := range []struct {
		name  string
		calls []entry
		owed  []string
	}{
		{"created", created, nil},
		{"half-way", created[:4], nil},
		{"created without a sync of the image", without(created, 3), []string{"/volumes/v/image"}},
		{"whose sync was pretended", but(created, 3, gate.Verdict{Lie: true}), []string{"/volumes/v/image"}},
		{"whose sync failed", but(created, 3, failed), []string{"/volumes/v/image"}},
		{"created without a sync of the directory", created[:5], []string{"/volumes", "/volumes/v"}},
		{"killed before that", but(created, 5, gate.Verdict{Kill: true}), []string{"/volumes", "/volumes/v"}},
		{"grown", slices.Concat(created, grown), nil},
		{"grown, the new record not synced", slices.Concat(created, without(grown, 4)), []string{"/volumes/v/record"}},
		{"grown, its directory not synced", slices.Concat(created, grown[:6]), []string{"/volumes/v"}},
		{"nor by one above it that did not change", slices.Concat(created, grown[:6], created[5:]), []string{"/volumes/v"}},
		{"a directory's sync that is repeated", slices.Concat(created, but(grown, 6, failed), grown[6:]), nil},
		{"a file's sync that is repeated", slices.Concat(created, but(grown, 1, failed), grown[1:]), []string{"/volumes/v/image"}},
		{"written and synced again", slices.Concat(created, but(grown, 1, failed), []entry{run(call(own, "pwrite", "/volumes/v/image"))}, grown), nil},
		{"a child's sync that failed, and the driver's", slices.Concat(created, grown[:1], []entry{{call(child, "fsync", "/volumes/v/image"), failed}}, grown[1:]), nil},
		{"blocks past the end given back", append(slices.Clone(created), run(truncate(0))), nil},
		{"shorter", slices.Concat(created, grown, []entry{run(truncate(0))}), []string{"/volumes/v/image"}},
		{"removed", slices.Concat(created, grown[:1], []entry{run(call(own, "renameat2", "/volumes/v", "/.gone-v")), run(call(own, "fsync", "/volumes"))}), nil},
		{"removed, not synced", slices.Concat(created, []entry{run(call(own, "renameat2", "/volumes/v", "/.gone-v"))}), []string{"/volumes"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			root := t.TempDir()
			l := ledger{root: root, debts: map[string]debt{}}
			must(t, os.Mkdir(root+"/volumes", 0o700))
			for _, e := range c.calls {
				e.call.Path = root + e.call.Path
				if e.call.To != "" {
					e.call.To = root + e.call.To
				}
				l.note(e.call, e.verdict)
				if e.verdict == (gate.Verdict{}) {
					must(t, perform(e.call))
				}
			}
			var owed []string
			for _, line := range l.unsynced() {
				owed = append(owed, line[strings.Index(line, root)+len(root):])
			}
			if !slices.Equal(owed, c.owed) {
				t.Errorf("owed %q, want %q", owed, c.owed)
			}
		})
	}
}

// perform does what of a call can be seen by name.
func perform(c gate.Call) error {
	switch c.Name {
	case "mkdirat":
		return os.Mkdir(c.Path, 0o700)
	case "openat":
		return os.WriteFile(c.Path, nil, 0o600)
	case "renameat2":
		return os.Rename(c.Path, c.To)
	case "ftruncate":
		return os.Truncate(c.Path, c.Length)
	}
	return nil
}

// TestMayBeMissed shows which moments a life may lack that an earlier one had.
func TestMayBeMissed(t *testing.T) {
	t.Parallel()
	calls := func(name string, n int) []gate.Call {
		return slices.Repeat([]gate.Call{{Own: true, Name: name, Path: "/pool/image"}}, n)
	}
	for _, c := range []struct {
		x     target
		calls []gate.Call
		want  bool
	}{
		{target{"copy_file_range", 3}, calls("copy_file_range", 2), true},
		{target{"copy_file_range", 3}, calls("copy_file_range", 1), true},
		{target{"copy_file_range", 1}, calls("fsync", 1), false},
		{target{"fsync", 2}, calls("fsync", 1), false},
		{target{"ioctl BTRFS_IOC_START_SYNC", 2}, nil, true},
		{target{ofChild, 4}, slices.Repeat([]gate.Call{{Name: "write", Path: "/pool/image"}}, 3), true},
		{target{ofChild, 5}, slices.Repeat([]gate.Call{{Name: "write", Path: "/pool/image"}}, 3), false},
	} {
		if got := c.x.mayBeMissed(c.calls); got != c.want {
			t.Errorf("%s after %d calls: %v", c.x, len(c.calls), got)
		}
	}
}
