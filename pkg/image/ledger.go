package image

import (
	"math"
	"slices"
	"sync"
)

// ledger is the free space of one filesystem, shared by the accounts of all pools
// on it: what one promised, another must not give away.
type ledger struct {
	mu       sync.Mutex
	pending  int64         // guarded by mu: reservations not yet visible in statfs
	promised int64         // guarded by mu: sum of all accounts' promises
	settled  chan struct{} // guarded by mu: closed when pending shrinks

	// What a thin volume discards is free to see and still promised to that volume, but
	// the account takes it for allocated until it looks again. So of free space and the
	// blocks of thin volumes together no more counts than was there when they were looked
	// at, and at each time since, less what calls took that ended since: a discard of as
	// much would hide that.
	blocks   int64      // guarded by mu: what thin volumes have, as last seen
	together int64      // guarded by mu
	used     int64      // guarded by mu: what calls took that have ended, of all times
	accounts []*account // guarded by mu
	looking  sync.Mutex // held for a whole look, and taken before mu
}

func newLedger() *ledger { return &ledger{settled: make(chan struct{}), together: math.MaxInt64} }

// look brings what thin volumes have up to date, of all accounts. It ends early once stop,
// which may be nil, is closed.
//
// Volumes are written to and discard meanwhile, so each is looked at before the free space
// and after it, and the smaller counts: else what one wrote, which is not free any more,
// would be hidden by what another one discards after it was looked at.
func (l *ledger) look(stop <-chan struct{}, statfs func() (space, error)) {
	l.looking.Lock()
	defer l.looking.Unlock()
	l.mu.Lock()
	accounts := slices.Clone(l.accounts)
	l.mu.Unlock()
	if !lookAll(stop, accounts, false) {
		return
	}
	l.mu.Lock()
	between, err := statfs()
	used := l.used
	l.mu.Unlock()
	if err != nil || !lookAll(stop, accounts, true) {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if after, err := statfs(); err == nil {
		l.together = min(between.Free-(l.used-used), after.Free) + l.blocks
	}
}

// lookAll looks at each thin volume; again is that the smaller of what it had then and has
// now counts. It tells whether it came to the end.
func lookAll(stop <-chan struct{}, accounts []*account, again bool) bool {
	for _, a := range accounts {
		for _, dir := range a.thinDirs() {
			select {
			case <-stop:
				return false
			default:
			}
			if a.look == nil {
				continue
			}
			had := a.allocatedOf(dir)
			a.look(dir)
			if again {
				a.atMost(dir, had)
			}
		}
	}
	return true
}
