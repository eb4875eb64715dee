package router

import (
	"cmp"
	"slices"
	"time"
)

// Node is what the controller knows of a node.
type Node struct {
	Name string `json:"name"`
	// State is linked, away, or missing: the driver is registered there, and the node
	// has not linked since this controller started.
	State string `json:"state"`
	// Since is when it was linked, or went away.
	Since   time.Time `json:"since,omitzero"`
	Version string    `json:"version,omitempty"`
	Pod     string    `json:"pod,omitempty"`
	// Pools are those it had when it was last linked.
	Pools []NodePool `json:"pools,omitempty"`
}

// NodePool is a pool of a node.
type NodePool struct {
	ID   string `json:"id"`
	Name string `json:"name"`
	// Volumes are counted, inline ephemeral ones included.
	Volumes int `json:"volumes"`
	// Free is how large one more thick volume may be, in bytes.
	Free int64 `json:"free"`
	// ServedBy is the node that has the pool, where this one is refused as a copy.
	ServedBy string `json:"servedBy,omitempty"`
}

// The states of a node.
const (
	NodeLinked  = "linked"
	NodeAway    = "away"
	NodeMissing = "missing"
)

// Nodes lists the nodes that have, had, or should have a link, by name.
func (r *Router) Nodes() []Node {
	nodes := r.table.list()
	for _, name := range r.missing() {
		if !slices.ContainsFunc(nodes, func(n Node) bool { return n.Name == name }) {
			nodes = append(nodes, Node{Name: name, State: NodeMissing})
		}
	}
	slices.SortFunc(nodes, func(a, b Node) int { return cmp.Compare(a.Name, b.Name) })
	return nodes
}

func (t *table) list() []Node {
	t.mu.RLock()
	defer t.mu.RUnlock()
	nodes := make([]Node, 0, len(t.nodes))
	for _, n := range t.nodes {
		v := Node{Name: n.name, State: NodeAway, Since: n.away}
		if n.session != nil && n.joined {
			v.State, v.Since, v.Version, v.Pod = NodeLinked, n.since, n.session.hello.Version, n.session.id.Pod
		}
		for id, p := range n.pools {
			if id == "" {
				continue
			}
			np := NodePool{ID: id, Name: p.name, Volumes: len(p.volumes), Free: p.free.Thick}
			if !t.shown(p) {
				np.ServedBy = t.pools[id][0].node.name
			}
			v.Pools = append(v.Pools, np)
		}
		slices.SortFunc(v.Pools, func(a, b NodePool) int { return cmp.Compare(a.Name, b.Name) })
		nodes = append(nodes, v)
	}
	return nodes
}
