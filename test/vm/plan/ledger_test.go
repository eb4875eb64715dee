package plan

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestFates(t *testing.T) {
	entries := []Entry{
		{Op: OpCreate, Volume: "ext4-a", N: 8},
		{Op: OpCreate, Volume: "ext4-a", N: 8, Acked: true},
		{Op: OpWrite, Volume: "ext4-a", N: 0},
		{Op: OpWrite, Volume: "ext4-a", N: 0, Acked: true}, // 4 entries
		{Op: OpExpand, Volume: "ext4-a", N: 16},
		{Op: OpDelete, Volume: "ext4-a"},
		{Op: OpDelete, Volume: "ext4-a", Acked: true}, // 7
		{Op: OpCreate, Volume: "block-b", N: 8},
	}
	// The volume's own area after so many writes at least and at most.
	own := func(least, most int64) []Area { return []Area{{Writer: "ext4-a", Min: least, Max: most}} }
	for _, c := range []struct {
		name         string
		acked, begun int
		want         map[string]*Fate
	}{
		{"nothing yet", 0, 0, map[string]*Fate{}},
		{"a creation was begun", 0, 1, map[string]*Fate{"ext4-a": {Op: OpCreate, Kind: "ext4", MaxSize: 8, Areas: own(0, 0)}}},
		{"an answer that came after the cut", 1, 2, map[string]*Fate{"ext4-a": {Op: OpCreate, Kind: "ext4", MaxSize: 8, Areas: own(0, 0)}}},
		{"a record was begun", 2, 3, map[string]*Fate{"ext4-a": {Op: OpCreate, Kind: "ext4", Created: true, MinSize: 8, MaxSize: 8, Areas: own(0, 1)}}},
		{"a record was synced", 4, 4, map[string]*Fate{"ext4-a": {Op: OpCreate, Kind: "ext4", Created: true, MinSize: 8, MaxSize: 8, Areas: own(1, 1)}}},
		{"growth was begun", 5, 5, map[string]*Fate{"ext4-a": {Op: OpCreate, Kind: "ext4", Created: true, MinSize: 8, MaxSize: 16, Areas: own(1, 1)}}},
		{"a deletion was begun", 5, 6, map[string]*Fate{"ext4-a": {Op: OpCreate, Kind: "ext4", MinSize: 8, MaxSize: 16, Areas: own(1, 1)}}},
		{"a deletion was acknowledged", 7, 8, map[string]*Fate{
			"ext4-a":  {Op: OpCreate, Kind: "ext4", Deleted: true, MinSize: 8, MaxSize: 16, Areas: own(1, 1)},
			"block-b": {Op: OpCreate, Kind: "block", MaxSize: 8, Areas: []Area{{Writer: "block-b"}}},
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if diff := cmp.Diff(c.want, Fates(entries, c.acked, c.begun)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestFatesOfCopies(t *testing.T) {
	var entries []Entry
	add := func(op, name string, n int64, acked bool, from ...string) int {
		entries = append(entries, Entry{Op: op, Volume: name, From: from, N: n, Acked: acked})
		return len(entries)
	}
	both := func(op, name string, n int64, from ...string) int {
		add(op, name, n, false, from...)
		return add(op, name, n, true, from...)
	}
	both(OpCreate, "ext4-v", 8)
	both(OpWrite, "ext4-v", 0)
	begun := add(OpSnapshot, "ext4-v-s", 8, false, "ext4-v") // one write is in it
	both(OpWrite, "ext4-v", 1)                               // may be in it
	add(OpWrite, "ext4-v", 2, false)                         // this too
	during := len(entries)
	acked := add(OpSnapshot, "ext4-v-s", 8, true, "ext4-v")
	add(OpWrite, "ext4-v", 2, true)
	both(OpWrite, "ext4-v", 3) // is not in it
	both(OpCreate, "ext4-v-r", 8, "ext4-v-s")
	both(OpWrite, "ext4-v-r", 0)
	group := both(OpGroup, "ext4-v-g", 0, "ext4-v", "ext4-v-r")
	both(OpWrite, "ext4-v", 4)
	both(OpDelete, "ext4-v-s", 0)
	both(OpCreate, "block-b", 8)
	add(OpSnapshot, "block-b-s", 8, false, "block-b")
	add(OpWrite, "block-b", 0, false)

	at := func(acked, begun int, name string) *Fate { return Fates(entries, acked, begun)[name] }
	snapshot := func(created bool, least, most, size int64) *Fate {
		return &Fate{
			Op: OpSnapshot, Kind: "ext4", From: []string{"ext4-v"}, Created: created, MinSize: size, MaxSize: 8,
			Areas: []Area{{Writer: "ext4-v", Min: least, Max: most, Whole: true}},
		}
	}
	end := len(entries)
	copied := []Area{{Writer: "ext4-v", Min: 1, Max: 3, Whole: true}}
	deleted := snapshot(false, 1, 3, 8)
	deleted.Deleted = true
	for _, c := range []struct {
		name      string
		got, want *Fate
	}{
		{"a snapshot was begun", at(begun, begun, "ext4-v-s"), snapshot(false, 1, 1, 0)},
		{"while its volume is written to", at(begun, during, "ext4-v-s"), snapshot(false, 1, 3, 0)},
		{"its answer came after the cut", at(begun, acked, "ext4-v-s"), snapshot(false, 1, 3, 0)},
		{"it was acknowledged", at(acked, acked, "ext4-v-s"), snapshot(true, 1, 3, 8)},
		{"later writes are not in it", at(group, group, "ext4-v-s"), snapshot(true, 1, 3, 8)},
		{"its deletion was acknowledged", at(end, end, "ext4-v-s"), deleted},
		{"a copy of it, which has a writer too", at(end, end, "ext4-v-r"), &Fate{
			Op: OpCreate, Kind: "ext4", From: []string{"ext4-v-s"}, Created: true, MinSize: 8, MaxSize: 8,
			Areas: append(copied[:1:1], Area{Writer: "ext4-v-r", Min: 1, Max: 1}),
		}},
		{"a group", at(end, end, "ext4-v-g"), &Fate{
			Op: OpGroup, Kind: "ext4", From: []string{"ext4-v", "ext4-v-r"}, Created: true, Members: map[string][]Area{
				"ext4-v":   {{Writer: "ext4-v", Min: 4, Max: 4, Whole: true}},
				"ext4-v-r": append(copied[:1:1], Area{Writer: "ext4-v-r", Min: 1, Max: 1, Whole: true}),
			},
		}},
		{"nothing stops a raw device", at(end, end, "block-b-s"), &Fate{
			Op: OpSnapshot, Kind: "block", From: []string{"block-b"}, MaxSize: 8, Areas: []Area{{Writer: "block-b", Min: 0, Max: 1}},
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if diff := cmp.Diff(c.want, c.got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestEntryIsRead(t *testing.T) {
	want := Entry{Op: OpProblem, Volume: "v", Acked: true, N: 3, Text: "two\nlines"}
	_, r, ok := Parse("token", want.Line("token"))
	if !ok || r.Event != Ledger {
		t.Fatalf("report %+v, %v", r, ok)
	}
	got, err := ParseEntry(r.Text)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}
