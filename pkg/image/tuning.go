package image

import (
	"context"
	"errors"
	"fmt"
	"strings"
)

// Tuning is what may change of a volume while it is in use. A field that is nil
// was never set, and what it is about is left as the kernel has it. What the fields
// point to is never written to, so that copies may share it.
type Tuning struct {
	// Limits of the volume's I/O, for each pod that uses it: operations, and bytes,
	// in a second. 0 is no limit.
	ReadIOPS       *int64 `json:"readIOPS,omitempty"`
	WriteIOPS      *int64 `json:"writeIOPS,omitempty"`
	ReadBandwidth  *int64 `json:"readBandwidth,omitempty"`
	WriteBandwidth *int64 `json:"writeBandwidth,omitempty"`
	// ReadAhead is how many bytes the kernel reads ahead: a multiple of 4096, or 0
	// for not at all.
	ReadAhead *int64 `json:"readAhead,omitempty"`
	// Trim is whether the filesystem of a thin volume is trimmed in the background,
	// which it is until this is set. True is for thin volumes only.
	Trim *bool `json:"trim,omitempty"`
}

// Bounds of a Tuning's fields. Below the least values a mount or an unmount would
// take minutes, and look like a volume that hangs.
const (
	LeastIOPS        int64 = 10
	LeastBandwidth   int64 = 64 << 10
	LargestReadAhead int64 = 64 << 20
	readAheadUnit    int64 = 4096
)

// IsZero tells whether nothing is set.
func (t Tuning) IsZero() bool { return t == Tuning{} }

// Merge is t with what is set in change.
func (t Tuning) Merge(change Tuning) Tuning {
	set := func(to **int64, from *int64) {
		if from != nil {
			*to = from
		}
	}
	set(&t.ReadIOPS, change.ReadIOPS)
	set(&t.WriteIOPS, change.WriteIOPS)
	set(&t.ReadBandwidth, change.ReadBandwidth)
	set(&t.WriteBandwidth, change.WriteBandwidth)
	set(&t.ReadAhead, change.ReadAhead)
	if change.Trim != nil {
		t.Trim = change.Trim
	}
	return t
}

// Equal tells whether both set the same.
func (t Tuning) Equal(o Tuning) bool {
	for i, a := range t.fields() {
		b := o.fields()[i]
		if (a.value == nil) != (b.value == nil) || a.value != nil && *a.value != *b.value {
			return false
		}
	}
	return (t.Trim == nil) == (o.Trim == nil) && (t.Trim == nil || *t.Trim == *o.Trim)
}

// String shows what is set, for people and logs.
func (t Tuning) String() string {
	var set []string
	for _, f := range t.fields() {
		if f.value != nil {
			set = append(set, fmt.Sprintf("%s=%d", f.name, *f.value))
		}
	}
	if t.Trim != nil {
		set = append(set, fmt.Sprintf("Trim=%t", *t.Trim))
	}
	return strings.Join(set, " ")
}

// tuningField is one field of a Tuning.
type tuningField struct {
	name        string
	value       *int64
	least, most int64 // of values other than 0; most 0 is no bound
}

func (t Tuning) fields() []tuningField {
	return []tuningField{
		{"ReadIOPS", t.ReadIOPS, LeastIOPS, 0},
		{"WriteIOPS", t.WriteIOPS, LeastIOPS, 0},
		{"ReadBandwidth", t.ReadBandwidth, LeastBandwidth, 0},
		{"WriteBandwidth", t.WriteBandwidth, LeastBandwidth, 0},
		{"ReadAhead", t.ReadAhead, readAheadUnit, LargestReadAhead},
	}
}

// check returns a *SpecError for values that no volume of that allocation has.
func (t Tuning) check(a Allocation) error {
	for _, f := range t.fields() {
		switch {
		case f.value == nil || *f.value == 0:
		case *f.value < f.least:
			return &SpecError{f.name, fmt.Sprintf("%d is less than %d", *f.value, f.least)}
		case f.most > 0 && *f.value > f.most:
			return &SpecError{f.name, fmt.Sprintf("%d is more than %d", *f.value, f.most)}
		}
	}
	if t.ReadAhead != nil && *t.ReadAhead%readAheadUnit != 0 {
		return &SpecError{"ReadAhead", fmt.Sprintf("%d is not a multiple of %d", *t.ReadAhead, readAheadUnit)}
	}
	if a == Thick && t.Trim != nil && *t.Trim {
		return &SpecError{"Trim", "a thick volume keeps its blocks, only thin ones are trimmed"}
	}
	return nil
}

// recorded is the tuning as a record has it: nothing where nothing is set.
func (t Tuning) recorded() *Tuning {
	if t.IsZero() {
		return nil
	}
	return &t
}

// Tune sets what is set in t, durably, and leaves the rest. That it is so already is
// success, and writes nothing new. Errors: ErrNotFound, *SpecError, ErrDamaged, ErrPool,
// ctx's; after them nothing has changed, but after ErrPool perhaps all of it.
func (p *Pool) Tune(ctx context.Context, id string, t Tuning) (Volume, error) {
	dir, ok := p.dirOf(id)
	if !ok {
		return Volume{}, fmt.Errorf("%w: %q", ErrNotFound, id)
	}
	leave, err := p.enter(ctx, dir)
	if err != nil {
		return Volume{}, err
	}
	defer leave()
	r, err := p.get(dir)
	if err != nil {
		return Volume{}, err
	}
	if err := t.check(r.Allocation); err != nil {
		return Volume{}, fmt.Errorf("tune %s: %w", id, err)
	}
	have := r.spec().Tuning
	tuned := have.Merge(t)
	if tuned.Equal(have) {
		// Whoever made it so may have failed, or been killed, before it was on disk.
		if err := p.syncVolume(dir); err != nil {
			return Volume{}, fmt.Errorf("tune %s: %w", id, err)
		}
		return p.volume(dir, r), nil
	}
	r.Tuning = tuned.recorded()
	if err := p.rewrite(dir, r); err != nil {
		return Volume{}, fmt.Errorf("tune %s: %w", id, err)
	}
	return p.volume(dir, r), nil
}

// syncVolume brings to disk what its directory says.
// Precondition: the lock of dir is held.
func (p *Pool) syncVolume(dir string) error {
	if err := p.present(); err != nil {
		return err
	}
	d, err := openDirAt(p.volumes, dir)
	if err != nil {
		return openError(dir, err)
	}
	if err := errors.Join(d.Sync(), d.Close()); err != nil {
		return poolError(p.config, "sync %s: %w", dir, err)
	}
	return nil
}

// rewrite replaces the record of a volume.
// Precondition: the lock of dir is held.
func (p *Pool) rewrite(dir string, r record) error {
	if err := p.present(); err != nil {
		return err
	}
	d, err := openDirAt(p.volumes, dir)
	if err != nil {
		return openError(dir, err)
	}
	defer d.Close()
	renamed, err := p.replaceRecord(d, r)
	if err != nil && !renamed {
		return opError("write", recordFile, err)
	}
	// From here on the record that a reader finds is the new one.
	p.remember(dir, r)
	if err != nil {
		return poolError(p.config, "sync %s, whose record is new: %w", dir, err)
	}
	return nil
}
