package main

import (
	"os"
	"runtime"
	"sync"
	"time"
)

// processors sets how many processors run Go code at a time, by how many calls run.
//
// The driver waits for the kernel and for mkfs, which this does not limit, and computes
// next to nothing. While one call runs, each further processor only has to be woken, and
// makes it slower. While many do it is the other way round: a goroutine that waits in the
// kernel keeps its processor until the runtime notices, up to 10 ms later, so that with
// one of them calls wait for each other's disk (docs/performance.md).
type processors struct {
	few, many int
	set       func(n int)   // runtime.GOMAXPROCS
	rest      time.Duration // how long there were few calls before it goes back

	mu      sync.Mutex
	running int         // calls; guarded by mu
	wide    bool        // many are set; guarded by mu
	narrow  *time.Timer // will set few; nil if nothing is planned; guarded by mu
}

const (
	// processorsEach is how many of the machine's processors there are for each that
	// runs Go code while few calls run.
	processorsEach = 8
	// processorsMany is how many run Go code while many calls do, for each of the
	// machine's: most of the calls wait in the kernel and keep one.
	processorsMany = 4
)

// newProcessors leaves alone what GOMAXPROCS in the environment says. Stop it.
func newProcessors() *processors {
	p := &processors{
		few: max(1, runtime.NumCPU()/processorsEach), many: processorsMany * runtime.NumCPU(),
		set: func(n int) { runtime.GOMAXPROCS(n) }, rest: time.Second,
	}
	if os.Getenv("GOMAXPROCS") != "" {
		p.set = func(int) {}
	}
	p.set(p.few)
	return p
}

// note is told of each call that begins (1) and ends (-1).
func (p *processors) note(change int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.running += change
	switch {
	case p.running > p.few && !p.wide:
		p.wide = true
		p.set(p.many)
	case p.running <= p.few && p.wide && p.narrow == nil:
		p.narrow = time.AfterFunc(p.rest, p.settle)
	}
	if p.running > p.few && p.narrow != nil {
		p.narrow.Stop()
		p.narrow = nil
	}
}

// settle goes back to few processors, unless calls came meanwhile.
func (p *processors) settle() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.narrow == nil || p.running > p.few {
		return
	}
	p.narrow, p.wide = nil, false
	p.set(p.few)
}

// stop ends the timer.
func (p *processors) stop() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.narrow != nil {
		p.narrow.Stop()
		p.narrow = nil
	}
}
