package router

import "github.com/csi-loop/csi-loop/pkg/router/link"

// standing is what a node's claim to a pool was when it was seen last. It is known until
// the node is forgotten, also while the node is linked without the pool: a disk that is
// mounted late neither loses its place to a copy, nor makes a copy the place.
type standing int

const (
	noClaim standing = iota
	placeOfPool
	copyOfPool
)

// maxStandings bounds what is kept for one node, by the number of pools.
const maxStandings = 4 * link.MaxPools

// linked says whether the pool is on a node with a link.
func (p *pool) linked() bool { return p.node.session != nil && p.absent.IsZero() }

// stand notes what a claim is. Precondition: t.mu is held.
func (t *table) stand(p *pool, s standing) {
	n := p.node
	if n.standing == nil {
		n.standing = map[string]standing{}
	}
	n.standing[p.id] = s
	for id, other := range n.standing {
		if len(n.standing) > maxStandings && other == copyOfPool && n.pools[id] == nil {
			delete(n.standing, id)
		}
	}
}

// copied says whether another node was seen with a copy of n's pool.
// Precondition: t.mu is held.
func (t *table) copied(n *node, id string) bool {
	for _, other := range t.nodes {
		if other != n && other.standing[id] == copyOfPool {
			return true
		}
	}
	return false
}

// renew ends the claims of a node that is about to join with these pools. A place that
// it does not bring along stays its own if there are copies, one of which would get it:
// the disk may come in late. Precondition: t.mu is held.
func (t *table) renew(n *node, pools map[string]*pool) {
	absent, volumes := map[string]*pool{}, 0
	for _, p := range pools {
		volumes += len(p.volumes)
	}
	for _, had := range []map[string]*pool{n.absent, n.pools} {
		for id, p := range had {
			if pools[id] != nil || !t.shown(p) || len(absent) == link.MaxPools || !t.copied(n, id) {
				t.drop(p)
				continue
			}
			if p.absent.IsZero() {
				p.absent = t.now()
			}
			if volumes += len(p.volumes); volumes > link.MaxVolumes {
				t.unindex(p) // nobody has that many: the names are not worth keeping
				clear(p.volumes)
			}
			absent[id] = p
		}
	}
	n.pools, n.absent = nil, absent
}

// settle drops the places that nobody has and that no copy waits for.
// Precondition: t.mu is held.
func (t *table) settle() {
	for _, n := range t.nodes {
		for id, p := range n.absent {
			if !t.copied(n, id) {
				t.drop(p)
				delete(n.absent, id)
			}
		}
	}
}
