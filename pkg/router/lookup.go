package router

import (
	"cmp"
	"slices"
	"strings"
	"time"
)

// place is where something is: a node's link, or how long it has been away.
type place struct {
	node    string
	session *session // nil while away
	away    time.Duration
	without bool // it is linked, without the pool that is meant, since away
}

// state says, of a place without a session, why.
func (p place) state() string {
	if p.without {
		return "is linked without the pool"
	}
	return "is not linked"
}

// Precondition: t.mu is held.
func (t *table) place(n *node) place {
	if n.session != nil && n.joined {
		return place{node: n.name, session: n.session}
	}
	return place{node: n.name, away: t.now().Sub(n.away)}
}

// placeOf is where a pool is. Precondition: t.mu is held.
func (t *table) placeOf(p *pool) place {
	if p.absent.IsZero() {
		return t.place(p.node)
	}
	return place{node: p.node.name, away: t.now().Sub(p.absent), without: p.node.session != nil}
}

// pool finds the node that has the pool.
func (t *table) pool(id string) (place, bool) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	claims := t.pools[id]
	if len(claims) == 0 {
		return place{}, false
	}
	return t.placeOf(claims[0]), true
}

// owns says whether the pool's place is the node of this link.
func (t *table) owns(s *session, id string) bool {
	t.mu.RLock()
	defer t.mu.RUnlock()
	claims := t.pools[id]
	return len(claims) > 0 && claims[0].node.name == s.id.Node
}

// links says whether s is still its node's link. A link that ended does not come back:
// what the table said before was true of this one.
func (t *table) links(s *session) bool {
	t.mu.RLock()
	defer t.mu.RUnlock()
	n := t.nodes[s.id.Node]
	return n != nil && n.session == s && n.joined
}

// node finds a node.
func (t *table) node(name string) (place, bool) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	n := t.nodes[name]
	if n == nil {
		return place{}, false
	}
	return t.place(n), true
}

// all lists the nodes, by name.
func (t *table) all() []place {
	t.mu.RLock()
	defer t.mu.RUnlock()
	places := make([]place, 0, len(t.nodes))
	for _, n := range t.nodes {
		places = append(places, t.place(n))
	}
	slices.SortFunc(places, func(a, b place) int { return cmp.Compare(a.node, b.node) })
	return places
}

// has says whether a node is known to have a volume of that name, made and served.
func (t *table) has(name, dir string) bool {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return slices.ContainsFunc(t.names[dir], func(p *pool) bool { return p.node.name == name && p.id != "" && p.absent.IsZero() })
}

// volume finds the nodes that have the volume, are making it, or may have made it.
func (t *table) volume(dir string) []place {
	t.mu.RLock()
	defer t.mu.RUnlock()
	var places []place
	seen := map[*node]bool{}
	add := func(n *node, p place) {
		if !seen[n] {
			seen[n] = true
			places = append(places, p)
		}
	}
	for _, p := range t.names[dir] {
		if !p.absent.IsZero() { // first: what its node says without the pool does not count
			add(p.node, t.placeOf(p))
		}
	}
	for _, p := range t.names[dir] {
		add(p.node, t.place(p.node))
	}
	if c, ok := t.lost[dir]; ok {
		add(c.node, t.place(c.node))
	}
	return places
}

// sent notes that a CreateVolume goes to a node; answered, that its answer settled
// whether the volume exists.
func (t *table) sent(dir, name string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if n := t.nodes[name]; n != nil {
		t.lost[dir] = sentCall{n, t.now()}
	}
}

func (t *table) answered(dir string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.lost, dir)
}

// made notes a volume before its node's own word comes: a repeated call finds it.
func (t *table) made(s *session, volumeID string) {
	poolID, dir, _ := strings.Cut(volumeID, ".")
	t.mu.Lock()
	defer t.mu.Unlock()
	n := t.nodes[s.id.Node]
	if n == nil || n.session != s || n.pools[poolID] == nil {
		return
	}
	if p := n.pools[poolID]; t.shown(p) {
		p.volumes[dir] = struct{}{}
		t.indexOne(p, dir)
	}
}

// room is the free space of one node in a pool, in bytes.
type room struct {
	place

	free int64
}

// rooms lists the nodes with a pool of that name ("": their default pool), the
// roomiest first, by name where equal. Copies that were refused are left out.
func (t *table) rooms(poolName string, thin bool) []room {
	t.mu.RLock()
	defer t.mu.RUnlock()
	var rooms []room
	for _, n := range t.nodes {
		if p := t.poolOf(n, poolName); p != nil {
			rooms = append(rooms, room{t.place(n), p.room(thin)})
		}
	}
	slices.SortFunc(rooms, func(a, b room) int {
		return cmp.Or(cmp.Compare(b.free, a.free), cmp.Compare(a.node, b.node))
	})
	return rooms
}

// room is the pool's last word on free space. Precondition: table.mu is held.
func (p *pool) room(thin bool) int64 {
	if thin {
		return p.free.Thin
	}
	return p.free.Thick
}

// roomAt is the room in the pool of that name on one node. It is not known of a node that
// has yet to say for the first time what it has.
func (t *table) roomAt(name, poolName string, thin bool) (room, bool) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	n := t.nodes[name]
	if n == nil || n.pools == nil {
		return room{}, false
	}
	p := t.poolOf(n, poolName)
	if p == nil {
		return room{place: t.place(n)}, true
	}
	return room{t.place(n), p.room(thin)}, true
}

// hasPool says whether a node has a pool of that name.
func (t *table) hasPool(name, poolName string) bool {
	t.mu.RLock()
	defer t.mu.RUnlock()
	n := t.nodes[name]
	return n != nil && t.poolOf(n, poolName) != nil
}

// refused says whether a node's pool of that name is a copy, and of which node's.
func (t *table) refused(name, poolName string) (first string, is bool) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	n := t.nodes[name]
	if n == nil || t.poolOf(n, poolName) != nil {
		return "", false
	}
	for id, p := range n.pools {
		if id != "" && p.called(poolName) {
			return t.pools[id][0].node.name, true
		}
	}
	return "", false
}

// copyOn says whether a node has a copy of a pool that is another node's, and whose.
func (t *table) copyOn(name, id string) (first string, is bool) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	n := t.nodes[name]
	if n == nil || n.pools[id] == nil || t.shown(n.pools[id]) {
		return "", false
	}
	return t.pools[id][0].node.name, true
}

// called says whether a request with that name means the pool.
func (p *pool) called(name string) bool { return p.name == name || name == "" && p.isDefault }

// poolOf finds a node's pool by name. Precondition: t.mu is held.
func (t *table) poolOf(n *node, name string) *pool {
	for id, p := range n.pools {
		if id != "" && p.called(name) && t.shown(p) {
			return p
		}
	}
	return nil
}

func (t *table) stats() Stats {
	t.mu.RLock()
	defer t.mu.RUnlock()
	var s Stats
	for _, n := range t.nodes {
		if n.session != nil && n.joined {
			s.Linked++
		}
	}
	for _, claims := range t.pools {
		for _, p := range claims[1:] {
			if p.node.session != nil {
				s.DuplicatePools++
			}
		}
	}
	return s
}
