package image

import (
	"context"
	"maps"
	"slices"
	"strings"
	"time"
)

const (
	// fragmentsPause is between two looks at how fragmented one image is, at least.
	fragmentsPause = 10 * time.Minute
	// fragmentsShare bounds how much of the time goes into looking at one image: one
	// part of it.
	fragmentsShare = 1000
)

// Fragments is in how many extents an image is. A reflink takes longer the more there
// are, while writers wait (fact 64).
type Fragments struct {
	ID       string // of the volume or snapshot
	Snapshot bool
	Extents  int64
}

// look is the result of looking at one image.
type look struct {
	extents int64
	next    time.Time
}

// Fragments returns what was last seen of each image, those with most extents first.
// Images are looked at in the background, each at most every ten minutes; one that was
// not looked at yet is left out. The slice is the caller's.
func (p *Pool) Fragments() []Fragments {
	p.mu.Lock()
	defer p.mu.Unlock()
	all := make([]Fragments, 0, len(p.looks))
	for key, l := range p.looks {
		dir, snapshot := strings.CutPrefix(key, snapshotsDir+"/")
		all = append(all, Fragments{ID: VolumeID(p.ID(), dir), Snapshot: snapshot, Extents: l.extents})
	}
	slices.SortFunc(all, func(a, b Fragments) int {
		if a.Extents != b.Extents {
			return int(b.Extents - a.Extents)
		}
		return strings.Compare(a.ID, b.ID)
	})
	return all
}

// countFragments looks at the images that are due, and forgets those that are gone.
func (p *Pool) countFragments(ctx context.Context) {
	for _, key := range p.fragmentsDue() {
		if ctx.Err() != nil || p.store.enter() != nil {
			return
		}
		p.countOne(key)
		p.store.leave()
	}
}

// fragmentsDue returns the keys of the images to look at now.
func (p *Pool) fragmentsDue() (due []string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	there := make(map[string]bool, len(p.records)+len(p.cuts))
	for dir := range p.records {
		there[dir] = true
	}
	for dir := range p.cuts {
		there[snapshotLock(dir)] = true
	}
	maps.DeleteFunc(p.looks, func(key string, _ look) bool { return !there[key] })
	now := p.store.now()
	for key := range there {
		if l, ok := p.looks[key]; !ok || !now.Before(l.next) {
			due = append(due, key)
		}
	}
	return due
}

// countOne looks at one image. It takes no lock: a count that is wrong because the
// image grows or goes meanwhile does no harm.
func (p *Pool) countOne(key string) {
	parent := p.volumes
	dir, snapshot := strings.CutPrefix(key, snapshotsDir+"/")
	if snapshot {
		parent = p.snapshots
	}
	start := time.Now()
	d, err := openDirAt(parent, dir)
	if err != nil {
		return // others report it
	}
	defer d.Close()
	f, err := openAt(d, imageFile, false)
	if err != nil {
		return
	}
	defer f.Close()
	st, err := statFile(f)
	if err != nil || !st.Mode.IsRegular() {
		return
	}
	n, err := countExtents(f, st.Size)
	if err != nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.looks[key] = look{extents: n, next: p.store.now().Add(max(fragmentsPause, fragmentsShare*time.Since(start)))}
}
