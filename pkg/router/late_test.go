package router

import (
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
)

// add gives the node a pool while it runs.
func (n *fakeNode) add(p *fakePool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.pools = append(n.pools, p)
}

// A pool that comes in later is known to all replicas, with its volumes, over the
// links that are there; and over those that are made afterwards.
func TestLatePool(t *testing.T) {
	first := newCluster(t)
	second := first.replica()
	for _, c := range []*cluster{first, second} {
		c.router.SetReplicas([]string{first.address, second.address})
	}
	a := first.node("a", newDisk(t, "default", gib)).up()
	first.linked(a)
	second.linked(a)
	before := map[*cluster]*session{}
	for _, c := range []*cluster{first, second} {
		p, _ := c.router.table.node("a")
		before[c] = p.session
	}
	late := newDisk(t, "late", 5*gib)
	late.volumes["pvc-old"], late.volumes["pvc-older"] = 1, 1
	id := late.id + ".pvc-old"
	_, err := first.csi.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: id})
	code(t, err, codes.Unavailable)
	a.add(late)
	for _, c := range []*cluster{first, second} {
		eventually(t, "the pool is known", func() bool { _, ok := c.router.table.pool(late.id); return ok })
		if p, _ := c.router.table.node("a"); p.session != before[c] {
			t.Error("the link was made anew")
		}
		if len(c.router.table.volume("pvc-older")) != 1 {
			t.Error("its volumes are not known")
		}
	}
	_, err = first.csi.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: id})
	must(t, err)
	if late.has("pvc-old") {
		t.Error("not deleted")
	}
	eventually(t, "what changes is told", func() bool { return len(second.router.table.volume("pvc-old")) == 0 })
	req := create("new", gib*4, nil)
	req.Parameters = map[string]string{"pool": "late"}
	_, err = second.csi.CreateVolume(t.Context(), req)
	must(t, err)
	if !late.has("new") {
		t.Error("not made there")
	}
	first.halt()
	first.start()
	first.linked(a)
	if _, ok := first.router.table.pool(late.id); !ok {
		t.Error("a new link does not know it")
	}
}

// A copy of a pool that comes in later is refused as one in the hello is, and the
// node's other pools are served.
func TestLateCopy(t *testing.T) {
	c := newCluster(t)
	p := newDisk(t, "default", gib)
	clone := &fakePool{id: p.id, name: "clone", key: p.key, volumes: map[string]int64{"y": 1}, size: gib}
	a, b := c.node("a", p).up(), c.node("b", newDisk(t, "default", gib)).up()
	c.linked(a, b)
	b.add(clone)
	eventually(t, "the copy is refused", func() bool { return c.router.Stats().DuplicatePools == 1 })
	if at, _ := c.router.table.pool(p.id); at.node != "a" || len(c.router.table.volume("y")) != 0 {
		t.Errorf("the copy is served: %+v", at)
	}
	_, err := c.csi.CreateVolume(t.Context(), create("z", 1, b))
	must(t, err)
	c.linked(a, b)
	a.stop()
	c.linked(b)
	c.roster.set("a", false)
	c.router.forget()
	if at, _ := c.router.table.pool(p.id); at.node != "b" || len(c.router.table.volume("y")) != 1 {
		t.Errorf("the copy does not get its turn: %+v", at)
	}
}
