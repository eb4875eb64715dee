package image

import (
	"context"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// copies is the copying of data that is under way in a pool.
type copies struct {
	copied atomic.Int64 // bytes, since the pool was opened

	mu      sync.Mutex
	running map[*copying]struct{} // guarded by mu
}

// copying is one copy.
type copying struct {
	of    *copies
	name  string
	total int64
	done  atomic.Int64
	said  time.Time // when the log was last told; of the goroutine that copies
	say   func(done, total int64)
	told  func(error)
}

// Copies is the copying of data in a pool: of snapshots and volumes where blocks
// cannot be shared, and of what gives a copy blocks of its own. Sizes are bytes.
type Copies struct {
	Running   int   // how many there are now
	Remaining int64 // what they have still to do, all together
	Copied    int64 // what was copied since the pool was opened
}

// Copies returns how far the copying in this pool is.
func (p *Pool) Copies() Copies {
	p.copies.mu.Lock()
	defer p.copies.mu.Unlock()
	c := Copies{Running: len(p.copies.running), Copied: p.copies.copied.Load()}
	for r := range p.copies.running {
		c.Remaining += max(0, r.total-r.done.Load())
	}
	return c
}

// CopyProgress is how far one copy is, in bytes of data.
type CopyProgress struct {
	Name        string // of the volume, snapshot or template that is made
	Done, Total int64
}

// CopiesNow lists the copies that are under way in this pool, by name.
func (p *Pool) CopiesNow() []CopyProgress {
	p.copies.mu.Lock()
	defer p.copies.mu.Unlock()
	var all []CopyProgress
	for r := range p.copies.running {
		all = append(all, CopyProgress{Name: r.name, Done: r.done.Load(), Total: r.total})
	}
	slices.SortFunc(all, func(a, b CopyProgress) int { return strings.Compare(a.Name, b.Name) })
	return all
}

// sayEvery is how often the log is told of a copy that goes on.
const sayEvery = 10 * time.Second

// copyOf begins to count a copy of so many bytes, which the log is told of by the
// name. Call end when it is over.
func (p *Pool) copyOf(ctx context.Context, name string, total int64) *copying {
	ctx, told := p.store.step(ctx, "copy data")
	c := &copying{of: &p.copies, name: name, total: total, said: time.Now(), told: told, say: func(done, total int64) {
		p.log(ctx).Info("Copying", "name", name, "bytes", done, "of", total)
	}}
	p.copies.mu.Lock()
	defer p.copies.mu.Unlock()
	if p.copies.running == nil {
		p.copies.running = map[*copying]struct{}{}
	}
	p.copies.running[c] = struct{}{}
	return c
}

// add counts bytes that were copied.
func (c *copying) add(n int64) {
	done := c.done.Add(n)
	c.of.copied.Add(n)
	if time.Since(c.said) >= sayEvery {
		c.said = time.Now()
		c.say(done, c.total)
	}
}

func (c *copying) end() {
	c.told(nil)
	c.of.mu.Lock()
	defer c.of.mu.Unlock()
	delete(c.of.running, c)
}

// copyCounted is copySparse of the first size bytes, counted and told of; data is what
// dataBytes says of them.
func (p *Pool) copyCounted(ctx context.Context, name string, dst, src *os.File, size, data int64) error {
	c := p.copyOf(ctx, name, data)
	defer c.end()
	return copySparse(ctx, dst, src, size, p.mayReflink(), c.add)
}
