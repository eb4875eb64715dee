package driver

import (
	"fmt"
	"sync"
)

// volumeLocks hands out one lock per key, without waiting: a CO repeats a call
// that was answered ABORTED, and a queue would only hide that it does.
type volumeLocks struct {
	mu   sync.Mutex
	held map[string]string // key -> method that holds it; guarded by mu
}

// busyError says that another call works on the volume.
type busyError struct {
	key    string
	method string
}

func (e *busyError) Error() string {
	return fmt.Sprintf("%s of volume %q is still running, try again later", e.method, e.key)
}

// lock takes the lock of key for method, or returns a *busyError at once. The
// returned function gives it back.
func (l *volumeLocks) lock(key, method string) (unlock func(), err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if by, ok := l.held[key]; ok {
		return nil, &busyError{key: key, method: by}
	}
	if l.held == nil {
		l.held = make(map[string]string)
	}
	l.held[key] = method
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		delete(l.held, key)
	}, nil
}

// busy says whether a call holds the lock of key. It takes nothing.
func (l *volumeLocks) busy(key string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	_, held := l.held[key]
	return held
}
