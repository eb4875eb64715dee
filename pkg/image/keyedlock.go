package image

import (
	"context"
	"sync"
)

// keyedLock is one lock per volume directory, for as long as somebody uses it.
type keyedLock struct {
	mu   sync.Mutex
	held map[string]*waiters // guarded by mu
}

type waiters struct {
	token chan struct{} // full while the lock is free
	users int           // guarded by keyedLock.mu
}

// lock waits for the key, or for ctx. The key is free again after unlock.
func (k *keyedLock) lock(ctx context.Context, key string) (unlock func(), err error) {
	k.mu.Lock()
	if k.held == nil {
		k.held = map[string]*waiters{}
	}
	w, ok := k.held[key]
	if !ok {
		w = &waiters{token: make(chan struct{}, 1)}
		w.token <- struct{}{}
		k.held[key] = w
	}
	w.users++
	k.mu.Unlock()
	leave := func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		if w.users--; w.users == 0 {
			delete(k.held, key)
		}
	}
	select {
	case <-w.token:
		return func() { w.token <- struct{}{}; leave() }, nil
	case <-ctx.Done():
		leave()
		return nil, ctx.Err()
	}
}
