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
	for _, c := range []struct {
		name         string
		acked, begun int
		want         map[string]*Fate
	}{
		{"nothing yet", 0, 0, map[string]*Fate{}},
		{"a creation was begun", 0, 1, map[string]*Fate{"ext4-a": {Kind: "ext4", MaxSize: 8}}},
		{"an answer that came after the cut", 1, 2, map[string]*Fate{"ext4-a": {Kind: "ext4", MaxSize: 8}}},
		{"a record was synced", 4, 4, map[string]*Fate{"ext4-a": {Kind: "ext4", Created: true, MinSize: 8, MaxSize: 8, Records: 1}}},
		{"growth was begun", 5, 5, map[string]*Fate{"ext4-a": {Kind: "ext4", Created: true, MinSize: 8, MaxSize: 16, Records: 1}}},
		{"a deletion was begun", 5, 6, map[string]*Fate{"ext4-a": {Kind: "ext4", MinSize: 8, MaxSize: 16, Records: 1}}},
		{"a deletion was acknowledged", 7, 8, map[string]*Fate{
			"ext4-a": {Kind: "ext4", Deleted: true, MinSize: 8, MaxSize: 16, Records: 1}, "block-b": {Kind: "block", MaxSize: 8},
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if diff := cmp.Diff(c.want, Fates(entries, c.acked, c.begun)); diff != "" {
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
