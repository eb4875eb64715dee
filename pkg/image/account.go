package image

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"time"
)

// overhead is kept back for what a volume takes beside its image (directory,
// record, extent tree), so that a volume as large as Capacity says does fit.
const overhead = MiB

// extentsOf is kept back of a filesystem of that size, unless the reserve is larger, for what
// it records of its files' extents. A thick image begins as few of them, which are not
// written; each write away from the others makes two more. Measured on XFS, 4 KiB written
// in every second place: 33 bytes a write, 0.41% of the image, and ENOSPC once the 32 MiB
// that XFS keeps for that itself were used up (fact 106); with blocks of 1 KiB it keeps 8.
func extentsOf(size int64) int64 { return max(0, size/200-8*MiB) }

// Usage is the state of a pool. All values are bytes but Volumes.
type Usage struct {
	Size     int64 // of the filesystem, others' files included
	Free     int64 // of the filesystem, before any promise is kept back
	Reserved int64 // kept free for others, by configuration
	Pending  int64 // promised to calls under way, on this filesystem

	Volumes         int   // without those that are refused, as in the sums
	Thick           int64 // sum of the sizes of thick volumes
	ThinProvisioned int64 // sum of the sizes of thin volumes
	ThinAllocated   int64 // what they have got, as last seen

	Snapshots int
	Shared    int64 // what volumes may still take for blocks they share, as last seen
}

// charge is what the account knows of one volume.
type charge struct {
	size      int64
	allocated int64 // at most size
	thick     bool
	shared    int64 // of allocated, what a write would take anew (fact 69)
	refused   bool  // only its image is known
	// cow is that each write takes other blocks, so that it shares as much as it has: an
	// image on btrfs that should be NOCOW and is not.
	cow bool
}

// unwritten is what the volume may still take from the pool. A thick volume that
// lost blocks (fact 48) keeps its claim to them.
func (c charge) unwritten() int64 { return min(c.size, max(0, c.size-c.allocated)+c.shared) }

// lookAgain is look, if there is more free than the account lets count. It tells whether
// there was.
func (a *account) lookAgain() bool {
	l := a.ledger
	l.mu.Lock()
	s, err := a.statfs()
	more := err == nil && l.blocks > 0 && s.Free > l.together-l.blocks
	l.mu.Unlock()
	if more {
		l.look(nil, a.statfs)
	}
	return more
}

// account is the share of one pool. Every change is O(1).
type account struct {
	ledger     *ledger
	statfs     func() (space, error)
	reserve    Reserve
	overcommit float64 // >= 1
	// lag is asked before a refusal whether statfs may say more soon; it waits
	// for that.
	lag func(ctx context.Context, attempt int) bool
	// look brings up to date what a thin volume has.
	look func(dir string)
	// patience bounds how long take waits for other calls.
	patience time.Duration

	// All below is guarded by ledger.mu.
	charges       map[string]charge // by directory
	thick         int64             // sum of sizes
	thin          int64
	thinAllocated int64
	thinUnwritten int64
	thickMissing  int64 // blocks that thick volumes should have to themselves and do not
	shared        int64
	refused       int // how many
}

// takePatience is how long a call waits for space that others may give up. They may
// take hours, and whoever waits keeps others from its volume.
const takePatience = 30 * time.Second

func newAccount(l *ledger, statfs func() (space, error), r Reserve, overcommit float64) *account {
	a := &account{ledger: l, statfs: statfs, reserve: r, overcommit: overcommit, patience: takePatience, charges: map[string]charge{}}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.accounts = append(l.accounts, a)
	return a
}

// promise is what must stay free for the pool's own volumes.
// Precondition: ledger.mu is held.
func (a *account) promise() int64 {
	return a.thickMissing + divide(a.thinUnwritten, a.overcommit)
}

// divide rounds up.
func divide(n int64, ratio float64) int64 {
	if ratio == 1 {
		return n // exact, also above 2^53
	}
	return int64(math.Ceil(float64(n) / ratio))
}

// free is what a new volume may take now; it may be negative.
// Precondition: ledger.mu is held.
func (a *account) free() (int64, error) {
	free, _, err := a.room()
	return free, err
}

// room is free, and what is kept back beside the reserve for extents: what takes no more
// space than there was before may have that, as on a pool that was full without it.
// Precondition: ledger.mu is held.
func (a *account) room() (free, forExtents int64, err error) {
	s, err := a.statfs()
	if err != nil {
		return 0, 0, err
	}
	l := a.ledger
	if l.blocks == 0 { // nobody has anything to give back
		l.together = s.Free
	}
	l.together = min(l.together, s.Free+l.blocks)
	free = min(s.Free, l.together-l.blocks)
	reserve := a.reserve.of(s.Size)
	forExtents = max(0, extentsOf(s.Size)-reserve)
	return free - reserve - forExtents - l.promised - l.pending - overhead, forExtents, nil
}

// reservation is space that is spoken for and not yet to be seen in statfs.
type reservation struct {
	account *account
	bytes   int64 // guarded by ledger.mu; 0 when released
}

// need is the free space that a volume of that size takes.
func (a *account) need(alloc Allocation, size int64) int64 {
	if alloc == Thin {
		return divide(size, a.overcommit)
	}
	return size
}

// take reserves space for size more bytes, or returns ErrNoSpace. While other
// calls allocate, their space counts twice (as reserved, and as used); a refusal
// that might be due to this waits for them, so that it is not wrong, but no longer
// than for patience. held is what the same call has reserved before, if anything:
// that is not waited for.
func (a *account) take(ctx context.Context, alloc Allocation, size int64, held ...*reservation) (*reservation, error) {
	need := a.need(alloc, size)
	patience := time.NewTimer(a.patience)
	defer patience.Stop()
	for attempt, looks := 0, 0; ; {
		r, wait, err := a.tryTake(need, held)
		if r == nil && (err == nil || errors.Is(err, ErrNoSpace)) && looks < mostLooks && a.lookAgain() {
			looks++
			continue
		}
		if errors.Is(err, ErrNoSpace) && a.lag != nil && a.lag(ctx, attempt) {
			attempt++
			continue
		}
		if r != nil || err != nil {
			return r, err
		}
		select {
		case <-wait:
		case <-patience.C:
			return nil, fmt.Errorf("%w: %d bytes needed, which other calls have reserved", ErrNoSpace, need)
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// mostLooks bounds how often one call looks at all thin volumes, should one of them give
// blocks back all the time.
const mostLooks = 3

// takeNow is take for those who need less if there is not so much: nil then.
func (a *account) takeNow(alloc Allocation, size int64) *reservation {
	a.lookAgain()
	r, _, err := a.tryTake(a.need(alloc, size), nil)
	if err != nil {
		return nil
	}
	return r
}

// tryTake takes the space if it is there. If it may be there when others settle, it
// returns what to wait for.
func (a *account) tryTake(need int64, held []*reservation) (*reservation, <-chan struct{}, error) {
	l := a.ledger
	l.mu.Lock()
	defer l.mu.Unlock()
	others := l.pending
	for _, r := range held {
		if r != nil && r.account.ledger == l {
			others -= r.bytes
		}
	}
	free, forExtents, err := a.room()
	switch {
	case err != nil:
		return nil, nil, opError("look at the free space of", "the pool", err)
	case need <= free, need == 0 && free+forExtents >= 0:
		l.pending += need
		return &reservation{account: a, bytes: need}, nil, nil
	case others > 0 && need <= free+others:
		return nil, l.settled, nil
	}
	return nil, nil, fmt.Errorf("%w: %d bytes needed, %d free", ErrNoSpace, need, max(0, free))
}

// enlarge makes a reservation one of at least so many bytes, or returns ErrNoSpace and
// leaves it as it is. It does not wait, as take does.
func (r *reservation) enlarge(bytes int64) error {
	r.account.lookAgain()
	l := r.account.ledger
	l.mu.Lock()
	defer l.mu.Unlock()
	more := bytes - r.bytes
	if more <= 0 {
		return nil
	}
	free, err := r.account.free()
	switch {
	case err != nil:
		return opError("look at the free space of", "the pool", err)
	case more > free:
		return fmt.Errorf("%w: %d bytes more needed, %d free", ErrNoSpace, more, max(0, free))
	}
	l.pending += more
	r.bytes += more
	return nil
}

// release gives the reservation up; again is harmless. To be called as soon as
// the space is used, or will not be.
func (r *reservation) release() {
	if r == nil {
		return
	}
	l := r.account.ledger
	l.mu.Lock()
	defer l.mu.Unlock()
	r.spend()
}

// spend is settle for space that was used. What was not used after all counts again when
// thin volumes are looked at, which a refusal does.
// Precondition: ledger.mu is held.
func (r *reservation) spend() {
	if r == nil {
		return
	}
	l := r.account.ledger
	l.together -= r.bytes
	l.used += r.bytes
	r.settle()
}

// settle ends the reservation: a promise has taken its place.
// Precondition: ledger.mu is held.
func (r *reservation) settle() {
	if r == nil || r.bytes == 0 {
		return
	}
	l := r.account.ledger
	l.pending -= r.bytes
	r.bytes = 0
	close(l.settled)
	l.settled = make(chan struct{})
}

// put records a volume's charge in place of its old one, and releases r (which
// may be nil) in the same moment, so that its space is never free in between.
func (a *account) put(dir string, c charge, r *reservation) {
	a.ledger.mu.Lock()
	defer a.ledger.mu.Unlock()
	a.set(dir, &c)
	if c.thick {
		r.spend()
	} else {
		r.settle()
	}
	if a.ledger.blocks > 0 {
		_, _ = a.free() // what was used has to be known before somebody gives back as much
	}
}

// swap is put for a charge that may turn out larger than r, which is not nil, holds;
// ErrNoSpace, and nothing is changed, when there is not enough for it.
func (a *account) swap(dir string, c charge, r *reservation) error {
	a.lookAgain()
	a.ledger.mu.Lock()
	defer a.ledger.mu.Unlock()
	old := a.charges[dir]
	a.set(dir, &c)
	free, forExtents, err := a.room()
	if lacking := -(free + forExtents + overhead + r.bytes); err == nil && lacking > 0 {
		err = fmt.Errorf("%w: %d bytes more are needed for what is shared", ErrNoSpace, lacking)
	}
	if err != nil {
		a.set(dir, &old)
		return err
	}
	r.settle()
	return nil
}

// keep is put for a volume that is refused: its pod goes on, so what was promised to it is
// kept, as if it were thick. What it was found to share stays.
func (a *account) keep(dir string, size, allocated int64) {
	a.ledger.mu.Lock()
	defer a.ledger.mu.Unlock()
	c := a.charges[dir]
	a.set(dir, &charge{size: size, allocated: allocated, thick: true, shared: c.shared, refused: true})
}

// anyRefused tells whether there are volumes of which only the image is known.
func (a *account) anyRefused() bool {
	a.ledger.mu.Lock()
	defer a.ledger.mu.Unlock()
	return a.refused > 0
}

// sizes are those of all volumes.
func (a *account) sizes() map[string]int64 {
	a.ledger.mu.Lock()
	defer a.ledger.mu.Unlock()
	all := make(map[string]int64, len(a.charges))
	for dir, c := range a.charges {
		all[dir] = c.size
	}
	return all
}

// share records how many bytes a volume shares with other files.
func (a *account) share(dir string, shared int64) {
	a.ledger.mu.Lock()
	defer a.ledger.mu.Unlock()
	if c, ok := a.charges[dir]; ok {
		c.shared = shared
		a.set(dir, &c)
	}
}

// shareMore is share for who does not hold the volume's lock: the account may know of more
// by now, of a volume that was grown or a snapshot that was made of it.
func (a *account) shareMore(dir string, shared int64) {
	a.ledger.mu.Lock()
	defer a.ledger.mu.Unlock()
	if c, ok := a.charges[dir]; ok && c.shared < shared {
		c.shared = shared
		a.set(dir, &c)
	}
}

// sharedOf returns what share recorded.
func (a *account) sharedOf(dir string) int64 {
	a.ledger.mu.Lock()
	defer a.ledger.mu.Unlock()
	return a.charges[dir].shared
}

// sharedDirs lists the volumes that share blocks, and will not for ever.
func (a *account) sharedDirs() []string {
	a.ledger.mu.Lock()
	defer a.ledger.mu.Unlock()
	var dirs []string
	for dir, c := range a.charges {
		if c.shared > 0 && !c.cow {
			dirs = append(dirs, dir)
		}
	}
	return dirs
}

// drop forgets a volume. Its blocks are free when statfs says so, and count when thin
// volumes are looked at again: till then they would stand for what others discarded.
func (a *account) drop(dir string) {
	a.ledger.mu.Lock()
	defer a.ledger.mu.Unlock()
	if c := a.charges[dir]; !c.thick {
		a.ledger.together -= c.allocated
	}
	a.set(dir, nil)
}

// of is what the account knows of a volume: nothing, if there is none.
func (a *account) of(dir string) charge {
	a.ledger.mu.Lock()
	defer a.ledger.mu.Unlock()
	return a.charges[dir]
}

// seen records how many bytes of blocks a volume was found to have, unless the account
// knows something else of it by now than it did before somebody looked: it may be another
// volume of that name.
func (a *account) seen(dir string, before charge, allocated int64) {
	a.ledger.mu.Lock()
	defer a.ledger.mu.Unlock()
	if c, ok := a.charges[dir]; ok && c == before {
		c.allocated = allocated
		a.set(dir, &c)
	}
}

// atMost lets a thin volume have no more blocks than that. One that came to be just now
// has more again at the next look.
func (a *account) atMost(dir string, allocated int64) {
	a.ledger.mu.Lock()
	defer a.ledger.mu.Unlock()
	if c, ok := a.charges[dir]; ok && !c.thick && c.allocated > allocated {
		c.allocated = allocated
		a.set(dir, &c)
	}
}

// set is the only place that changes the sums.
// Precondition: ledger.mu is held.
func (a *account) set(dir string, c *charge) {
	before := a.promise()
	old, ok := a.charges[dir]
	if ok {
		a.add(old, -1)
		delete(a.charges, dir)
	}
	if c != nil {
		if c.cow = c.cow || old.cow; c.cow { // the image stays as it was made
			c.shared = c.size
		}
		c.allocated = min(c.allocated, c.size)
		c.shared = min(c.shared, c.size)
		a.charges[dir] = *c
		a.add(*c, 1)
	}
	a.ledger.promised += a.promise() - before
}

// Precondition: ledger.mu is held.
func (a *account) add(c charge, sign int64) {
	a.shared += sign * c.shared
	if c.refused {
		a.refused += int(sign)
		a.thickMissing += sign * c.unwritten()
		return
	}
	if c.thick {
		a.thick += sign * c.size
		a.thickMissing += sign * c.unwritten()
		return
	}
	a.thin += sign * c.size
	a.thinAllocated += sign * c.allocated
	a.ledger.blocks += sign * c.allocated
	a.thinUnwritten += sign * c.unwritten()
}

// capacity is the largest volume that take would accept now, whole MiB, never
// negative; 0 when the filesystem does not answer.
func (a *account) capacity(alloc Allocation) int64 {
	a.lookAgain()
	a.ledger.mu.Lock()
	defer a.ledger.mu.Unlock()
	free, err := a.free()
	if err != nil || free <= 0 {
		return 0
	}
	size := free
	if alloc == Thin {
		size = int64(min(float64(free)*a.overcommit, math.MaxInt64/2))
	}
	size -= size % MiB
	for size > 0 && a.need(alloc, size) > free { // rounding, and above 2^53
		size -= MiB
	}
	return size
}

func (a *account) usage() (Usage, error) {
	a.ledger.mu.Lock()
	defer a.ledger.mu.Unlock()
	s, err := a.statfs()
	return Usage{
		Size:            s.Size,
		Free:            s.Free,
		Reserved:        a.reserve.of(s.Size),
		Pending:         a.ledger.pending,
		Volumes:         len(a.charges) - a.refused,
		Thick:           a.thick,
		ThinProvisioned: a.thin,
		ThinAllocated:   a.thinAllocated,
		Shared:          a.shared,
	}, err
}

// leave takes the account's promises out of the ledger.
func (a *account) leave() {
	a.ledger.mu.Lock()
	defer a.ledger.mu.Unlock()
	a.ledger.promised -= a.promise()
	a.ledger.blocks -= a.thinAllocated
	a.ledger.accounts = slices.DeleteFunc(a.ledger.accounts, func(o *account) bool { return o == a })
	a.charges, a.refused = map[string]charge{}, 0
	a.thick, a.thin, a.thinAllocated, a.thinUnwritten, a.thickMissing, a.shared = 0, 0, 0, 0, 0, 0
}

// thinDirs lists the volumes whose allocation changes by being written to.
func (a *account) thinDirs() []string {
	a.ledger.mu.Lock()
	defer a.ledger.mu.Unlock()
	var dirs []string
	for dir, c := range a.charges {
		if !c.thick {
			dirs = append(dirs, dir)
		}
	}
	return dirs
}
