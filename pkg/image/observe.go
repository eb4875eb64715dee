package image

import (
	"maps"
	"slices"
	"sync"
)

// observers are told which volumes come and go.
type observers struct {
	mu   sync.Mutex
	next int                    // guarded by mu
	all  map[int]func(_ Change) // guarded by mu
}

// Change is a volume that came into being or is gone.
type Change struct {
	PoolID, Dir string
	Exists      bool // its name is taken: the volume may be damaged
}

// Observe calls f after each Create and Remove that had an effect, until stop. For
// one volume the calls come in order, and before Create or Remove returns. f must be
// quick, and must not call the store.
func (s *Store) Observe(f func(Change)) (stop func()) {
	o := &s.observers
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.all == nil {
		o.all = map[int]func(Change){}
	}
	id := o.next
	o.next++
	o.all[id] = f
	return func() {
		o.mu.Lock()
		defer o.mu.Unlock()
		delete(o.all, id)
	}
}

func (o *observers) tell(c Change) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, f := range o.all {
		f(c)
	}
}

// Dirs lists the directories of all volumes, damaged ones included, in no order. What
// else somebody put beside them is left out: no call can mean it.
func (p *Pool) Dirs() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	dirs := slices.Collect(maps.Keys(p.records))
	for dir := range p.damaged {
		if validDir(dir) {
			dirs = append(dirs, dir)
		}
	}
	return dirs
}
