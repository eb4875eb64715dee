package plan

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Ledger is what a report about power cuts is called; its Text is an Entry.
const Ledger Event = "ledger"

// Entry is one line of what the guest does to volumes. It is sent before the guest
// begins, and again when the driver or the kernel acknowledged it.
type Entry struct {
	Op string `json:"op"` // OpCreate and so on
	// Volume is what it is done to: a volume, a snapshot or a group snapshot. Each
	// has a name of its own.
	Volume string `json:"volume,omitempty"`
	// From is what a copy is made of: the volume or snapshot of OpCreate, the volume
	// of OpSnapshot, the volumes of OpGroup.
	From  []string `json:"from,omitempty"`
	Acked bool     `json:"acked,omitempty"`
	// N is the number of a write for OpWrite, the size in bytes for OpCreate,
	// OpExpand and OpSnapshot.
	N int64 `json:"n,omitempty"`
	// Text says what is wrong, for OpProblem.
	Text string `json:"text,omitempty"`
}

// What an Entry is about.
const (
	OpCreate    = "create"
	OpWrite     = "write" // one record, and fsync; each volume has one writer
	OpExpand    = "expand"
	OpSnapshot  = "snapshot"
	OpGroup     = "group"
	OpDelete    = "delete"
	OpMounted   = "mounted"   // one disk, whose recovery is cut, is mounted
	OpRecovered = "recovered" // and the driver serves it; the guest waits for InFlight
	OpChecked   = "checked"   // one disk was checked
	OpChurn     = "churn"     // the guest begins to change things
	OpProblem   = "problem"
)

// Line spells an entry as a report.
func (e Entry) Line(token string) string {
	b, err := json.Marshal(e)
	if err != nil { // a struct of strings and numbers
		panic(err)
	}
	return Report{Event: Ledger, Text: string(b)}.Line(token)
}

// ParseEntry reads the text of a Ledger report.
func ParseEntry(text string) (Entry, error) {
	var e Entry
	if err := json.Unmarshal([]byte(text), &e); err != nil {
		return e, fmt.Errorf("ledger: %q: %w", text, err)
	}
	return e, nil
}

// Fate is what must be true of a volume, a snapshot or a group snapshot after a cut.
type Fate struct {
	Op   string // what made it: OpCreate, OpSnapshot or OpGroup
	Kind string // what its name begins with: see the guest
	From []string
	// Created and Deleted: it must be there, it must not be there. With neither, it
	// may be there, if it is whole.
	Created, Deleted bool
	// MinSize and MaxSize, in bytes, bound its size.
	MinSize, MaxSize int64
	// Areas are what was written to it. The last one of a volume is its own; those
	// before, and all of a snapshot, are copied from where it was made.
	Areas []Area
	// Members are the areas of a group's snapshots, by the name of their volume.
	Members map[string][]Area
}

// Fates works out what must be true when the entries before acked were received,
// and those before begun may have been begun.
func Fates(entries []Entry, acked, begun int) map[string]*Fate {
	l := ledger{fates: map[string]*Fate{}, written: map[string]*written{}}
	for i, e := range entries[:begun] {
		if e.Volume != "" {
			l.take(e, i < acked)
		}
	}
	for name, f := range l.fates {
		if !l.copied[name] {
			l.bound(f) // the copy may be of any moment until now
		}
	}
	for name := range l.deleting {
		l.fates[name].Created = false // begun: it may be gone
	}
	return l.fates
}

// written counts what the writer of a volume did, whatever of it survived.
type written struct{ begun, acked int64 }

// ledger is what was read of the entries.
type ledger struct {
	fates    map[string]*Fate
	written  map[string]*written
	copied   map[string]bool // its content is fixed
	deleting map[string]bool
}

// take reads an entry. One that was received before the cut is sure if it tells of an
// acknowledgement.
func (l *ledger) take(e Entry, received bool) {
	f := l.fates[e.Volume]
	if f == nil {
		f = l.begin(e)
	}
	sure := e.Acked && received
	switch e.Op {
	case OpCreate, OpExpand, OpSnapshot, OpGroup:
		f.MaxSize = max(f.MaxSize, e.N)
		if sure {
			f.MinSize = max(f.MinSize, e.N)
		}
		if e.Op == OpExpand {
			return
		}
		f.Created = f.Created || sure
		if e.Acked {
			l.bound(f)
			mark(&l.copied, e.Volume)
		}
	case OpWrite:
		w, own := l.written[e.Volume], &f.Areas[len(f.Areas)-1]
		if !e.Acked {
			w.begun = e.N + 1
			own.Max = w.begun
			return
		}
		w.acked = e.N + 1
		if sure {
			own.Min = w.acked
		}
	case OpDelete:
		mark(&l.deleting, e.Volume)
		f.Deleted = f.Deleted || sure
	}
}

func mark(set *map[string]bool, name string) {
	if *set == nil {
		*set = map[string]bool{}
	}
	(*set)[name] = true
}

// begin notes that something is being made. What was acknowledged by then is in a copy.
func (l *ledger) begin(e Entry) *Fate {
	kind, _, _ := strings.Cut(e.Volume, "-")
	f := &Fate{Op: e.Op, Kind: kind, From: e.From}
	l.fates[e.Volume] = f
	for _, source := range e.From {
		areas := l.copy(source)
		if e.Op != OpGroup {
			f.Areas = areas
			continue
		}
		if f.Members == nil {
			f.Members = map[string][]Area{}
		}
		f.Members[source] = areas
	}
	if e.Op == OpCreate {
		l.written[e.Volume] = &written{}
		f.Areas = append(f.Areas, Area{Writer: e.Volume})
	}
	return f
}

// copy gives the areas of a copy that is begun now.
func (l *ledger) copy(source string) []Area {
	from := l.fates[source]
	areas := slices.Clone(from.Areas)
	if w := l.written[source]; w != nil {
		// A filesystem holds still in the middle of no write; nothing stops the writers
		// of a raw device.
		areas[len(areas)-1] = Area{Writer: source, Min: w.acked, Max: w.begun, Whole: from.Kind != "block"}
	}
	return areas
}

// bound says that a copy has nothing that was not begun by now.
func (l *ledger) bound(f *Fate) {
	if f.Op == OpGroup {
		for source, areas := range f.Members {
			l.boundLast(areas, source)
		}
		return
	}
	for _, source := range f.From {
		last := len(f.Areas) - 1
		if f.Op == OpCreate {
			last-- // its own
		}
		l.boundLast(f.Areas[:last+1], source)
	}
}

func (l *ledger) boundLast(areas []Area, source string) {
	if w := l.written[source]; w != nil {
		areas[len(areas)-1].Max = w.begun
	}
}

// Cut is one disk to check.
type Cut struct {
	Device string `json:"device"`
	// Acked and Begun are how many entries of the ledger count for it; see Fates.
	Acked int `json:"acked"`
	Begun int `json:"begun"`
	// Again: its recovery is cut too. The guest says how far it is.
	Again bool `json:"again,omitempty"`
}

// InFlight is more than a line takes from the guest to the host.
const InFlight = time.Second

// CutPlan is what the guest finds on its LedgerDisk, followed by zeros.
type CutPlan struct {
	Token      string  `json:"token"`
	Filesystem string  `json:"filesystem"` // of the pools
	Boot       int     `json:"boot"`       // from 0; at 0 the pool is made
	Seed       uint64  `json:"seed"`       // of what the guest does in this boot
	Check      []Cut   `json:"check"`      // the last one is the disk that lives on
	Entries    []Entry `json:"entries"`
	// CheckOnly: no changes after the checks.
	CheckOnly bool `json:"checkOnly"`
}

// The guest's disks in a test of power cuts, beside the scratch disk: the pool that
// lives on, the plan, and from the third on copies to check.
const (
	PoolDisk   = "/dev/vdb"
	LedgerDisk = "/dev/vdc"
)
