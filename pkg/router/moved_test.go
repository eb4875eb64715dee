package router

import "testing"

// A disk moved from a node that is away to another one, which lost it again: nobody has
// it now, and whoever lists the nodes hears just that.
func TestMovedDiskIsGone(t *testing.T) {
	c := newCluster(t)
	p := newDisk(t, "default", gib)
	p.volumes["x"] = 1
	a := c.node("a", p).up()
	c.linked(a)
	a.stop()
	c.linked()
	b := c.node("b", p).up()
	c.linked(b)
	b.stop()
	c.linked()
	empty := c.node("b").up()
	c.linked(empty)
	for _, n := range c.router.Nodes() {
		if len(n.Pools) != 0 {
			t.Errorf("node %q has %+v", n.Name, n.Pools)
		}
	}
	if places := c.router.table.volume("x"); len(places) != 0 {
		t.Errorf("the volume is at %+v", places)
	}
}
