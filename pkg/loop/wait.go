package loop

import (
	"context"
	"math/rand/v2"
	"sync"
	"time"
)

func (r Retry) withDefaults() Retry {
	set := func(d *time.Duration, v time.Duration) {
		if *d <= 0 {
			*d = v
		}
	}
	set(&r.Delay, time.Millisecond)
	set(&r.MaxDelay, 100*time.Millisecond)
	set(&r.Settle, 5*time.Second)
	if r.Attempts <= 0 {
		r.Attempts = 64
	}
	return r
}

// pause waits before try number try+1, at most until ctx ends. Several managers
// contend for the lowest number, so equal pauses would make them meet again. Before
// the first try, number 0, there is none.
func (r Retry) pause(ctx context.Context, try int) error {
	if try < 0 {
		return ctx.Err()
	}
	d := r.MaxDelay
	if try < 20 && r.Delay<<try < d {
		d = r.Delay << try
	}
	d = d/2 + rand.N(d/2+1) //nolint:gosec // jitter
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// semaphore is a mutex whose wait ends with a context.
type semaphore chan struct{}

func newSemaphore() semaphore { return make(semaphore, 1) }

func (s semaphore) lock(ctx context.Context) error {
	select {
	case s <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (s semaphore) unlock() { <-s }

// keyedLock is one semaphore per image, kept only while somebody wants it.
type keyedLock struct {
	mu    sync.Mutex
	locks map[FileID]*keyedEntry // guarded by mu
}

type keyedEntry struct {
	semaphore
	users int // guarded by keyedLock.mu
}

// lock returns the function that unlocks.
func (k *keyedLock) lock(ctx context.Context, id FileID) (func(), error) {
	k.mu.Lock()
	if k.locks == nil {
		k.locks = map[FileID]*keyedEntry{}
	}
	e := k.locks[id]
	if e == nil {
		e = &keyedEntry{semaphore: newSemaphore()}
		k.locks[id] = e
	}
	e.users++
	k.mu.Unlock()

	leave := func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		if e.users--; e.users == 0 {
			delete(k.locks, id)
		}
	}
	if err := e.lock(ctx); err != nil {
		leave()
		return nil, err
	}
	return func() { e.unlock(); leave() }, nil
}
