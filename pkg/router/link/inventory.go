package link

import (
	"crypto/ed25519"
	"slices"
	"sync"
	"time"
)

// Pool is a pool as the link needs it.
type Pool struct {
	ID, Name string
	Key      ed25519.PublicKey
	Sign     func(message []byte) []byte
	// Volumes lists the volumes, by the part of their IDs behind the pool's.
	// Damaged ones are among them: their names are taken.
	Volumes func() []string
	// Free may hang, as on a disk that does: it is asked for nothing else meanwhile.
	Free func() Free
}

// Observe tells of every volume that comes into being or is gone, after the
// fact, in order for each volume, until stop.
type Observe func(f func(poolID, volume string, exists bool)) (stop func())

// chunk is how many names one message carries at most.
const chunk = 10_000

// inventory is what a node tells its controllers: kept up to date, and given to
// each stream as a whole first and as changes then.
type inventory struct {
	find func() []Pool

	mu     sync.Mutex
	pools  []Pool                     // guarded by mu; those that have been read
	names  map[string]map[string]bool // guarded by mu; pool ID, volume; false: known to be gone
	making map[string]int             // guarded by mu; volume, calls that make it
	free   map[string]Free            // guarded by mu; by pool ID; only of pools that have been read
	asking map[string]bool            // guarded by mu; by pool ID: asked for something, and no answer yet
	idle   chan struct{}              // guarded by mu; nil, or closed when nothing is asked any more
	token  string                     // guarded by mu
	subs   map[*subscriber]struct{}   // guarded by mu
}

// subscriber collects changes for one stream. Its maps are guarded by the
// inventory's mu.
type subscriber struct {
	volumes map[[2]string]bool
	free    map[string]Free
	token   string
	wake    chan struct{} // capacity 1
}

func (s *subscriber) ring() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

const (
	// firstAnswers is how long the links wait for what the first pools hold. One that has
	// not answered by then comes in late.
	firstAnswers = 10 * time.Second
	// lastAnswers is how long a stop waits for what was asked.
	lastAnswers = time.Second
)

// openInventory reads the pools that find lists. No change between the reading and
// the observing is lost, because observing begins first and its word counts.
func openInventory(find func() []Pool, observe Observe) (_ *inventory, stop func()) {
	i := &inventory{
		find: find, names: map[string]map[string]bool{"": {}}, making: map[string]int{},
		free: map[string]Free{}, asking: map[string]bool{}, subs: map[*subscriber]struct{}{},
	}
	stop = func() {}
	if observe != nil {
		stop = observe(i.set)
	}
	i.discover(firstAnswers)
	return i, stop
}

// discover reads the pools that were not there before, and tells of each when all
// its volumes are known. It waits for that no longer than patience: a pool that hangs
// keeps no other. One goroutine at a time may.
func (i *inventory) discover(patience time.Duration) {
	timer := time.NewTimer(patience)
	defer timer.Stop()
	var answers []<-chan struct{}
	for _, p := range i.find() {
		i.mu.Lock()
		_, known := i.names[p.ID]
		if !known {
			i.names[p.ID] = map[string]bool{} // changes count from here on
		}
		i.mu.Unlock()
		if !known {
			answers = append(answers, i.ask(p, i.read))
		}
	}
	for _, answered := range answers {
		select {
		case <-answered:
		case <-timer.C:
			return
		}
	}
}

// ask has a pool answer, in a goroutine of its own. There is one for each pool at most:
// while there is, ask does nothing.
func (i *inventory) ask(p Pool, question func(Pool)) (answered <-chan struct{}) {
	done := make(chan struct{})
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.asking[p.ID] {
		close(done)
		return done
	}
	i.asking[p.ID] = true
	go func() {
		defer close(done)
		question(p)
		i.mu.Lock()
		defer i.mu.Unlock()
		if delete(i.asking, p.ID); len(i.asking) == 0 && i.idle != nil {
			close(i.idle)
			i.idle = nil
		}
	}()
	return done
}

// settle waits for what was asked, but not for a pool that hangs: its question, one for
// each such pool, is left behind.
func (i *inventory) settle(patience time.Duration) {
	i.mu.Lock()
	if len(i.asking) == 0 {
		i.mu.Unlock()
		return
	}
	idle := make(chan struct{})
	i.idle = idle
	i.mu.Unlock()
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case <-idle:
	case <-timer.C:
	}
}

func (i *inventory) read(p Pool) {
	volumes, free := p.Volumes(), p.Free()
	i.mu.Lock()
	defer i.mu.Unlock()
	names := i.names[p.ID]
	for _, v := range volumes {
		if _, ok := names[v]; !ok {
			names[v] = true
		}
	}
	for v, exists := range names {
		if !exists {
			delete(names, v)
		}
	}
	i.pools, i.free[p.ID] = append(i.pools, p), free
	for s := range i.subs {
		for v := range names {
			s.volumes[[2]string{p.ID, v}] = true
		}
		s.free[p.ID] = free
		s.ring()
	}
}

// known lists the pools that have been read.
func (i *inventory) known() []Pool {
	i.mu.Lock()
	defer i.mu.Unlock()
	return slices.Clone(i.pools)
}

// set notes that a volume exists, or does not any more.
func (i *inventory) set(poolID, volume string, exists bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.setLocked(poolID, volume, exists)
}

// Precondition: i.mu is held.
func (i *inventory) setLocked(poolID, volume string, exists bool) {
	names, ok := i.names[poolID]
	if !ok {
		return
	}
	_, read := i.free[poolID]
	switch {
	case !read && poolID != "":
		names[volume] = exists // one that goes during the reading must be known as gone
		return
	case exists:
		names[volume] = true
	default:
		delete(names, volume)
	}
	for s := range i.subs {
		s.volumes[[2]string{poolID, volume}] = exists
		s.ring()
	}
}

// begin notes that a volume is being made, until done.
func (i *inventory) begin(volume string) (done func()) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.making[volume]++; i.making[volume] == 1 {
		i.setLocked("", volume, true)
	}
	return func() {
		i.mu.Lock()
		defer i.mu.Unlock()
		if i.making[volume]--; i.making[volume] == 0 {
			delete(i.making, volume)
			i.setLocked("", volume, false)
		}
	}
}

// note is begin for who tells when it is over, and does so in order for each volume.
func (i *inventory) note() func(volume string, making bool) {
	var mu sync.Mutex
	ends := map[string]func(){}
	return func(volume string, making bool) {
		mu.Lock()
		defer mu.Unlock()
		if end, ok := ends[volume]; ok {
			delete(ends, volume)
			end()
		}
		if making {
			ends[volume] = i.begin(volume)
		}
	}
}

// refresh asks the pools for their free space and sends what changed, when they answer.
func (i *inventory) refresh() {
	for _, p := range i.known() {
		i.ask(p, i.look)
	}
}

func (i *inventory) look(p Pool) {
	free := p.Free()
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.free[p.ID] == free {
		return
	}
	i.free[p.ID] = free
	for s := range i.subs {
		s.free[p.ID] = free
		s.ring()
	}
}

// setToken sends a fresh token.
func (i *inventory) setToken(token string) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if token == i.token {
		return
	}
	i.token = token
	for s := range i.subs {
		s.token = token
		s.ring()
	}
}

// subscribe returns everything there is, in messages of bounded size of which the
// last is Complete, and collects what changes from then on. sent is the token that
// the controller has.
func (i *inventory) subscribe(sent string) (*subscriber, []Update) {
	i.mu.Lock()
	defer i.mu.Unlock()
	s := &subscriber{volumes: map[[2]string]bool{}, free: map[string]Free{}, wake: make(chan struct{}, 1)}
	i.subs[s] = struct{}{}
	if i.token != "" && i.token != sent {
		s.token = i.token
		s.ring()
	}
	var updates []Update
	for id, known := range i.names {
		u := PoolUpdate{ID: id}
		if free, ok := i.free[id]; ok {
			u.Free = &free
		} else if id != "" {
			continue // it is being read
		}
		volumes := make([]string, 0, len(known))
		for v, exists := range known {
			if exists {
				volumes = append(volumes, v)
			}
		}
		for part := range slices.Chunk(volumes, chunk) {
			u.Added = part
			updates = append(updates, Update{Pools: []PoolUpdate{u}})
			u.Free = nil
		}
		if len(volumes) == 0 {
			updates = append(updates, Update{Pools: []PoolUpdate{u}})
		}
	}
	return s, append(updates, Update{Complete: true})
}

func (i *inventory) unsubscribe(s *subscriber) {
	i.mu.Lock()
	defer i.mu.Unlock()
	delete(i.subs, s)
}

// take returns what changed since the last time.
func (i *inventory) take(s *subscriber) Update {
	i.mu.Lock()
	defer i.mu.Unlock()
	pools := map[string]*PoolUpdate{}
	of := func(id string) *PoolUpdate {
		if pools[id] == nil {
			pools[id] = &PoolUpdate{ID: id}
		}
		return pools[id]
	}
	for key, exists := range s.volumes {
		p := of(key[0])
		if exists {
			p.Added = append(p.Added, key[1])
		} else {
			p.Removed = append(p.Removed, key[1])
		}
	}
	for id, free := range s.free {
		of(id).Free = &free
	}
	u := Update{Token: s.token}
	for _, p := range pools {
		u.Pools = append(u.Pools, *p)
	}
	clear(s.volumes)
	clear(s.free)
	s.token = ""
	return u
}
