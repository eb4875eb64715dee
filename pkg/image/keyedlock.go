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
	select {
	case <-w.token:
		return func() { k.unlock(w, key) }, nil
	case <-ctx.Done():
		k.leave(w, key)
		return nil, ctx.Err()
	}
}

// tryLock is lock for who does not want to wait.
func (k *keyedLock) tryLock(key string) (unlock func(), ok bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if _, taken := k.held[key]; taken {
		return nil, false
	}
	if k.held == nil {
		k.held = map[string]*waiters{}
	}
	w := &waiters{token: make(chan struct{}, 1), users: 1}
	k.held[key] = w
	return func() { k.unlock(w, key) }, true
}

func (k *keyedLock) unlock(w *waiters, key string) {
	w.token <- struct{}{}
	k.leave(w, key)
}

func (k *keyedLock) leave(w *waiters, key string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if w.users--; w.users == 0 {
		delete(k.held, key)
	}
}
