package router

import (
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/csi-loop/csi-loop/pkg/router/link"
)

// table is what the controller knows of nodes and their pools: those with a link,
// and those that had one.
type table struct {
	now func() time.Time

	mu    sync.RWMutex
	nodes map[string]*node // guarded by mu; by name
	// pools holds each pool's claims, in the order they were made: the first one
	// is the pool's place, further ones are refused copies. A node that goes away
	// keeps its place among them until it is forgotten (standing.go). Guarded by mu.
	pools map[string][]*pool
	names map[string][]*pool  // guarded by mu; by volume: where it is
	lost  map[string]sentCall //  guarded by mu; by volume: a CreateVolume whose answer was lost
}

// sentCall is a CreateVolume that was sent and not answered, or not clearly.
type sentCall struct {
	node *node
	at   time.Time
}

// lostAge is how long a call without an answer is remembered once its node is linked:
// the node has told since what it has and makes.
const lostAge = 10 * time.Minute

// node is a node that has or had a link. All fields but name are guarded by
// table.mu.
type node struct {
	name     string
	session  *session  // nil while away
	joined   bool      // the session has told everything
	since    time.Time // it has
	away     time.Time
	pools    map[string]*pool    // by ID; "" is for volumes being made, the others are in table.pools too
	absent   map[string]*pool    // by ID; places that it did not bring along when it linked; in table.pools too
	standing map[string]standing // by pool ID; also of copies that are not there now
	replaced map[string]struct{} // pods whose link another pod's replaced
}

// pool is one node's claim to a pool. Guarded by table.mu.
type pool struct {
	id, name  string
	isDefault bool // of its node
	node      *node
	volumes   map[string]struct{}
	free      link.Free
	absent    time.Time // since when its node is linked without it; zero while it has it
}

func newPool(id, name string, isDefault bool) *pool {
	return &pool{id: id, name: name, isDefault: isDefault, volumes: map[string]struct{}{}}
}

// maxFree is more than a node has; the sum for 8000 nodes does not overflow.
const maxFree = int64(1) << 50

// change takes a node's word, and tells which names are new or gone.
func (p *pool) change(u link.PoolUpdate, added, removed func(volume string)) {
	for _, v := range u.Added {
		p.volumes[v] = struct{}{}
		added(v)
	}
	for _, v := range u.Removed {
		delete(p.volumes, v)
		removed(v)
	}
	if u.Free != nil {
		p.free = link.Free{Thick: min(max(0, u.Free.Thick), maxFree), Thin: min(max(0, u.Free.Thin), maxFree)}
	}
}

// bounded refuses a node that says more than one can have.
func bounded(pools map[string]*pool) error {
	volumes := 0
	for _, p := range pools {
		volumes += len(p.volumes)
	}
	if len(pools)-1 > link.MaxPools || volumes > link.MaxVolumes {
		return fmt.Errorf("%d pools with %d volumes; a node can have %d and %d", len(pools)-1, volumes, link.MaxPools, link.MaxVolumes)
	}
	return nil
}

func newTable(now func() time.Time) *table {
	return &table{now: now, nodes: map[string]*node{}, pools: map[string][]*pool{}, names: map[string][]*pool{}, lost: map[string]sentCall{}}
}

// secondError: the node has a link already.
type secondError struct {
	old *session // nil when asking it is of no use
	msg string
}

func (e *secondError) Error() string { return e.msg }

// admit makes s the link of its node, and returns the one that it replaces. A
// second link replaces the first only if it is another pod's, and not one that was
// replaced itself: pods that replace each other for ever help nobody.
func (t *table) admit(s *session) (replaced *session, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := t.nodes[s.id.Node]
	if n == nil {
		n = &node{name: s.id.Node, away: t.now(), replaced: map[string]struct{}{}}
		t.nodes[s.id.Node] = n
	}
	if old := n.session; old != nil {
		if _, was := n.replaced[s.id.PodUID]; was {
			return nil, &secondError{nil, fmt.Sprintf("node %q is linked by pod %q, which came after this one", n.name, old.id.Pod)}
		}
		if old.id.PodUID == s.id.PodUID {
			return nil, &secondError{old, fmt.Sprintf("node %q is linked by this very pod already", n.name)}
		}
		n.replaced[old.id.PodUID] = struct{}{}
		replaced = old
		if n.joined {
			n.away = t.now()
		}
	}
	// What was known of the node counts until the new link has told everything.
	n.session, n.joined = s, false
	return replaced, nil
}

// join makes the node of s take part in routing, with what it has told. It returns
// the claims that are refused because another node has the pool.
func (t *table) join(s *session, pools map[string]*pool) (duplicates []duplicate) {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := t.nodes[s.id.Node]
	if n == nil || n.session != s {
		return nil // replaced meanwhile
	}
	before := maps.Clone(n.standing)
	t.renew(n, pools)
	n.joined, n.since, n.pools = true, t.now(), pools
	for id, p := range pools {
		if d, is := t.claim(n, p, before[id]); is {
			duplicates = append(duplicates, d)
		}
	}
	return duplicates
}

// claim adds a pool to those known, and says whether another node has it. A claim
// that the node had before keeps its place among the others: who was away for a
// moment does not lose its pool to a copy, nor does a copy become the pool because
// both were.
// Precondition: t.mu is held, and p is one of the pools of n.
func (t *table) claim(n *node, p *pool, before standing) (_ duplicate, is bool) {
	p.node = n
	if p.id == "" {
		t.index(p)
		return duplicate{}, false
	}
	// What is known of a pool on a node that is away ends when the pool is found
	// elsewhere: the disk was moved. If the two were there together, it was not.
	if claims := t.pools[p.id]; before == noClaim && len(claims) > 0 && !claims[0].linked() {
		// The first one last: copies do not get their turn by this.
		for _, other := range slices.Backward(slices.Clone(claims)) {
			if !other.linked() {
				t.drop(other)
				delete(other.node.pools, p.id)
				delete(other.node.absent, p.id)
			}
		}
		before = placeOfPool
	}
	claims := t.pools[p.id]
	switch {
	case len(claims) == 0:
		t.pools[p.id] = []*pool{p}
		t.stand(p, placeOfPool)
		t.index(p)
		return duplicate{}, false
	case before == placeOfPool:
		t.unindex(claims[0])
		t.stand(claims[0], copyOfPool)
		t.pools[p.id] = slices.Insert(slices.Clone(claims), 0, p)
		t.stand(p, placeOfPool)
		t.index(p)
		linked := slices.IndexFunc(claims, (*pool).linked)
		if linked < 0 {
			return duplicate{}, false
		}
		return duplicateOf(p, n, claims[linked].node), true
	default:
		t.pools[p.id] = append(claims, p)
		t.stand(p, copyOfPool)
		return duplicateOf(p, claims[0].node, n), true
	}
}

// duplicate is a pool that two nodes have.
type duplicate struct {
	id, name, first, second string
	sessions                []*session // theirs, of those that are linked
}

// Precondition: table.mu is held.
func duplicateOf(p *pool, first, second *node) duplicate {
	d := duplicate{id: p.id, name: p.name, first: first.name, second: second.name}
	for _, n := range []*node{first, second} {
		if n.session != nil {
			d.sessions = append(d.sessions, n.session)
		}
	}
	return d
}

// leave makes the node of s away, if s is still its link.
func (t *table) leave(s *session) {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := t.nodes[s.id.Node]
	if n == nil || n.session != s {
		return
	}
	n.session = nil
	clear(n.replaced)
	if !n.joined {
		return // what was known from an earlier link stays
	}
	n.joined, n.away = false, t.now()
}

// forget removes nodes that are away and that gone says are no more. A copy of their
// pools that was refused gets its turn.
func (t *table) forget(gone func(name string, away time.Duration) bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for name, n := range t.nodes {
		if n.session == nil && gone(name, t.now().Sub(n.away)) {
			t.clear(n)
			delete(t.nodes, name)
		}
	}
	t.settle()
	for volume, c := range t.lost {
		n := c.node
		settled := n.session != nil && n.joined && t.now().Sub(c.at) > lostAge && t.now().Sub(n.since) > lostAge
		if settled || t.nodes[n.name] != n {
			delete(t.lost, volume)
		}
	}
}

// shown says whether a claim is its pool's place. Precondition: t.mu is held.
func (t *table) shown(p *pool) bool {
	claims := t.pools[p.id]
	return p.id == "" || len(claims) > 0 && claims[0] == p
}

// clear drops all claims of a node. Precondition: t.mu is held.
func (t *table) clear(n *node) {
	for _, pools := range []map[string]*pool{n.pools, n.absent} {
		for _, p := range pools {
			t.drop(p)
		}
	}
	n.pools, n.absent = nil, nil
}

// drop ends a claim; the next one, if there is one, takes its place.
// Precondition: t.mu is held.
func (t *table) drop(p *pool) {
	claims := t.pools[p.id]
	i := slices.Index(claims, p)
	if i <= 0 {
		t.unindex(p)
	}
	if i < 0 {
		return // the pool of volumes being made
	}
	claims = slices.Delete(claims, i, i+1)
	if i == 0 {
		delete(p.node.standing, p.id)
	}
	if len(claims) == 0 {
		delete(t.pools, p.id)
		return
	}
	t.pools[p.id] = claims
	if i == 0 {
		t.stand(claims[0], placeOfPool)
		t.index(claims[0])
	}
}

// index and unindex keep names. Precondition: t.mu is held.
func (t *table) index(p *pool) {
	for v := range p.volumes {
		t.indexOne(p, v)
	}
}

func (t *table) indexOne(p *pool, volume string) {
	if !slices.Contains(t.names[volume], p) {
		t.names[volume] = append(t.names[volume], p)
	}
}

func (t *table) unindex(p *pool) {
	for v := range p.volumes {
		t.unindexOne(p, v)
	}
}

func (t *table) unindexOne(p *pool, volume string) {
	left := slices.DeleteFunc(t.names[volume], func(o *pool) bool { return o == p })
	if len(left) == 0 {
		delete(t.names, volume)
		return
	}
	t.names[volume] = left
}

// update takes what a joined node says: pools that came in late, and what changed. It
// returns the late pools that are refused because another node has them, and an error
// when it is more than a node can have.
func (t *table) update(s *session, late []*pool, u link.Update) (duplicates []duplicate, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := t.nodes[s.id.Node]
	if n == nil || n.session != s {
		return nil, nil // replaced meanwhile
	}
	for _, p := range late {
		if n.pools[p.id] != nil {
			continue
		}
		before := n.standing[p.id]
		if a := n.absent[p.id]; a != nil {
			t.drop(a)
			delete(n.absent, p.id)
		}
		n.pools[p.id] = p
		if d, is := t.claim(n, p, before); is {
			duplicates = append(duplicates, d)
		}
	}
	for _, change := range u.Pools {
		p := n.pools[change.ID]
		if p == nil {
			return nil, fmt.Errorf("the node speaks of pool %q, which it did not prove to have", change.ID)
		}
		shown := t.shown(p)
		p.change(change, func(v string) {
			if shown {
				t.indexOne(p, v)
			}
		}, func(v string) {
			if shown {
				t.unindexOne(p, v)
			}
		})
	}
	return duplicates, bounded(n.pools)
}
