package plan

import (
	"encoding/json"
	"fmt"
	"strings"
)

// Ledger is what a report about power cuts is called; its Text is an Entry.
const Ledger Event = "ledger"

// Entry is one line of what the guest does to volumes. It is sent before the guest
// begins, and again when the driver or the kernel acknowledged it.
type Entry struct {
	Op     string `json:"op"` // OpCreate and so on
	Volume string `json:"volume,omitempty"`
	Acked  bool   `json:"acked,omitempty"`
	// N is the number of a record for OpWrite, the size in bytes for OpCreate and
	// OpExpand.
	N int64 `json:"n,omitempty"`
	// Text says what is wrong, for OpProblem.
	Text string `json:"text,omitempty"`
}

// What an Entry is about.
const (
	OpCreate  = "create"
	OpWrite   = "write" // one record, and fsync
	OpExpand  = "expand"
	OpDelete  = "delete"
	OpChecked = "checked" // one disk was checked
	OpChurn   = "churn"   // the guest begins to change things
	OpProblem = "problem"
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

// Fate is what must be true of a volume after a cut.
type Fate struct {
	Kind string // what the volume's name begins with: see the guest
	// Created and Deleted: it must be there, it must not be there. With neither, it
	// may be there, if it is whole.
	Created, Deleted bool
	// MinSize and MaxSize, in bytes, bound its size.
	MinSize, MaxSize int64
	Records          int64 // this many must be readable
}

// Fates works out what must be true when the entries before acked were received,
// and those before begun may have been begun.
func Fates(entries []Entry, acked, begun int) map[string]*Fate {
	fates := map[string]*Fate{}
	deleting := map[string]bool{}
	for i, e := range entries[:begun] {
		if e.Volume == "" {
			continue
		}
		f := fates[e.Volume]
		if f == nil {
			kind, _, _ := strings.Cut(e.Volume, "-")
			f = &Fate{Kind: kind}
			fates[e.Volume] = f
		}
		sure := e.Acked && i < acked
		switch e.Op {
		case OpCreate:
			f.MaxSize = max(f.MaxSize, e.N)
			f.Created = f.Created || sure
			if sure {
				f.MinSize = max(f.MinSize, e.N)
			}
		case OpExpand:
			f.MaxSize = max(f.MaxSize, e.N)
			if sure {
				f.MinSize = max(f.MinSize, e.N)
			}
		case OpWrite:
			if sure {
				f.Records = max(f.Records, e.N+1)
			}
		case OpDelete:
			deleting[e.Volume] = true
			f.Deleted = f.Deleted || sure
		}
	}
	for name := range deleting {
		fates[name].Created = false // begun: it may be gone
	}
	return fates
}

// Cut is one disk to check.
type Cut struct {
	Device string `json:"device"`
	// Acked and Begun are how many entries of the ledger count for it; see Fates.
	Acked int `json:"acked"`
	Begun int `json:"begun"`
}

// CutPlan is what the guest finds on its LedgerDisk, followed by zeros.
type CutPlan struct {
	Token      string  `json:"token"`
	Filesystem string  `json:"filesystem"` // of the pools
	Boot       int     `json:"boot"`       // from 0; at 0 the pool is made
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
