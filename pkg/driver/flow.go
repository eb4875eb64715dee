package driver

import (
	"maps"
	"slices"
	"sync"
	"sync/atomic"
)

// maxFlows is how many copies from or to other nodes there are at a time, in each
// direction: each takes some MiB of memory, and a part of the disk's time.
const maxFlows = 4

// flows counts the copies of one direction.
type flows struct {
	mu      sync.Mutex
	running map[*flow]struct{} // guarded by mu
	stats   FlowStats          // guarded by mu; without Running
}

// flow is one copy.
type flow struct {
	name        string // of a volume that is made, the ID of a source that is read
	done, total atomic.Int64
}

// FlowStats is what was copied from, or to, other nodes since the start.
type FlowStats struct {
	Bytes        int64 // of data
	Done, Failed uint64
	Running      []FlowProgress // each name once
}

// FlowProgress is how far a copy has come, in bytes of data. Total is 0 until it is
// known.
type FlowProgress struct {
	Name        string
	Done, Total int64
}

// begin counts a copy, unless there are too many.
func (f *flows) begin(name string) (*flow, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.running) >= maxFlows {
		return nil, abortedf("%d copies between this node and others are under way, try again later", len(f.running))
	}
	if f.running == nil {
		f.running = map[*flow]struct{}{}
	}
	w := &flow{name: name}
	f.running[w] = struct{}{}
	return w, nil
}

// end ends a copy that begin counted.
func (f *flows) end(w *flow, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.running, w)
	f.stats.Bytes += w.done.Load()
	if err == nil {
		f.stats.Done++
	} else {
		f.stats.Failed++
	}
}

func (f *flows) count() FlowStats {
	f.mu.Lock()
	defer f.mu.Unlock()
	s := f.stats
	byName := map[string]FlowProgress{}
	for w := range f.running {
		p, done := byName[w.name], w.done.Load()
		byName[w.name] = FlowProgress{Name: w.name, Done: p.Done + done, Total: p.Total + w.total.Load()}
		s.Bytes += done
	}
	s.Running = slices.Collect(maps.Values(byName))
	return s
}

// Flows counts the copies to and from other nodes.
func (d *Driver) Flows() (sent, received FlowStats) { return d.sending.count(), d.receiving.count() }

// ObserveCopies has f told of the volumes that are being copied, also while no call
// waits for them, by the part of their IDs behind the pool's; in order for each, until
// stop. That a copy ended is told after the volume is there.
func (d *Driver) ObserveCopies(f func(volume string, making bool)) (stop func()) {
	return d.jobs.observe(func(key, method string, running bool) {
		if method == "CreateVolume" {
			f(key, running)
		}
	})
}
