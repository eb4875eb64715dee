package router

import (
	"fmt"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/csi-loop/csi-loop/pkg/router/link"
)

// withCopy are a node with a pool, and one with a copy of it, each with a pool of its
// own too.
func withCopy(c *cluster) (a, b *fakeNode, data, clone *fakePool) {
	c.tb.Helper()
	data = newDisk(c.tb, "data", gib)
	data.volumes["x"] = 1
	clone = &fakePool{id: data.id, name: data.name, key: data.key, volumes: map[string]int64{"x": 1, "y": 1}, size: gib}
	a, b = c.node("a", newDisk(c.tb, "default", gib), data).up(), c.node("b", newDisk(c.tb, "default", gib), clone)
	c.linked(a)
	c.linked(a, b.up())
	return a, b, data, clone
}

// restart starts a node anew, with some of its pools.
func (n *fakeNode) restart(pools ...*fakePool) {
	n.stop()
	n.mu.Lock()
	n.pools = pools
	n.mu.Unlock()
	n.up()
}

func (c *cluster) remove(id string) error {
	_, err := c.csi.DeleteVolume(c.tb.Context(), &csi.DeleteVolumeRequest{VolumeId: id})
	return err
}

// servedBy waits until a pool's place is that node, with the pool.
func (c *cluster) servedBy(id, node string) {
	c.tb.Helper()
	eventually(c.tb, "served by "+node, func() bool {
		p, _ := c.router.table.pool(id)
		return p.node == node && p.session != nil
	})
	c.router.table.sound(c.tb)
}

// A node whose disk is mounted late does not lose the pool to a copy on another node.
func TestPlaceOfALatePool(t *testing.T) {
	c := newCluster(t)
	a, b, data, clone := withCopy(c)
	p, _ := c.router.table.node("a")
	a.restart(a.pools[0])
	eventually(t, "linked anew", func() bool { now, _ := c.router.table.node("a"); return now.session != nil && now != p })
	for _, volume := range []string{"x", "y"} {
		code(t, c.remove(data.id+"."+volume), codes.Unavailable, `"a"`, "without")
	}
	again := create("x", 1, nil)
	again.Parameters = map[string]string{"pool": "data"}
	_, err := c.csi.CreateVolume(t.Context(), again)
	code(t, err, codes.Unavailable, `"a"`)
	list, err := c.csi.ListVolumes(t.Context(), &csi.ListVolumesRequest{})
	if err != nil || len(list.GetEntries()) != 0 || c.router.Stats().DuplicatePools != 1 {
		t.Errorf("%v, %v, %+v", list, err, c.router.Stats())
	}
	c.router.forget() // nobody is gone
	c.router.table.sound(t)
	// Who has the copy starts anew meanwhile.
	b.restart(b.pools...)
	c.linked(a, b)
	code(t, c.remove(data.id+".y"), codes.Unavailable, `"a"`)
	a.add(data)
	c.servedBy(data.id, "a")
	must(t, c.remove(data.id+".x"))
	if data.has("x") || !clone.has("x") {
		t.Error("the copy was changed")
	}
}

// A copy that comes in late, while the pool's node is away, is none the less a copy.
func TestStandingOfALateCopy(t *testing.T) {
	c := newCluster(t)
	a, b, data, clone := withCopy(c)
	b.restart(b.pools[0])
	c.linked(a, b)
	eventually(t, "linked without the copy", func() bool { return c.router.Stats().DuplicatePools == 0 })
	a.stop()
	c.linked(b)
	b.add(clone)
	eventually(t, "the copy is refused", func() bool { return c.router.Stats().DuplicatePools == 1 })
	code(t, c.remove(data.id+".y"), codes.Unavailable, `"a"`)
	a.up()
	c.servedBy(data.id, "a")
	must(t, c.remove(data.id+".x"))
	if data.has("x") || !clone.has("x") {
		t.Error("the copy was changed")
	}
}

// A place that nobody has is not kept when no copy waits for it; and a node that was never
// seen with the pool has got the disk.
func TestPlaceThatNobodyHas(t *testing.T) {
	for _, moved := range []bool{false, true} {
		t.Run(fmt.Sprint("moved=", moved), func(t *testing.T) {
			c := newCluster(t)
			a, b, data, _ := withCopy(c)
			a.restart(a.pools[0])
			eventually(t, "linked without the pool", func() bool { p, _ := c.router.table.pool(data.id); return p.without })
			if moved {
				c.linked(a, b, c.node("c", data).up())
				c.servedBy(data.id, "c")
				return
			}
			b.stop()
			c.linked(a)
			c.roster.set("b", false)
			c.router.forget()
			if p, known := c.router.table.pool(data.id); known {
				t.Errorf("it is at %+v", p)
			}
			c.router.table.sound(t)
		})
	}
}

// A node that comes with ever other pools does not have this process remember them all.
func TestStandingsAreBounded(t *testing.T) {
	tab := newTable(time.Now)
	r := New(Config{Self: "a", Driver: driver})
	r.table = tab
	for round := range 8 {
		a, b := onChannel(r, "a"), onChannel(r, "b")
		for _, s := range []*session{a, b} {
			pools := map[string]*pool{"": newPool("", "", false)}
			for i := range link.MaxPools {
				p := newPool(fmt.Sprintf("pool-%d-%d", round, i), "p", false)
				for v := 0; v < link.MaxVolumes/link.MaxPools && round < 2; v++ {
					p.volumes[fmt.Sprint(round, i, v)] = struct{}{}
				}
				pools[p.id] = p
			}
			_, err := tab.admit(s)
			must(t, err)
			tab.join(s, pools)
		}
		for _, s := range []*session{a, b} {
			tab.leave(s)
			s.end(nil)
		}
	}
	tab.sound(t)
	for _, n := range tab.nodes {
		volumes := 0
		for _, p := range n.absent {
			volumes += len(p.volumes)
		}
		if len(n.absent) > link.MaxPools || len(n.standing) > maxStandings+link.MaxPools || volumes > link.MaxVolumes {
			t.Errorf("%s: %d pools, %d names, %d standings", n.name, len(n.absent), volumes, len(n.standing))
		}
	}
}

// A node with a refused copy of the source's pool makes no copies of what is in it: it
// would read its own. That is so too when a call before may have reached it.
func TestNoCopyOfARefusedCopy(t *testing.T) {
	c := newCluster(t)
	a, b, data, _ := withCopy(c)
	snap := data.id + ".snap"
	for name, req := range map[string]*csi.CreateVolumeRequest{"x1": restore("x1", snap, b), "x2": restore("x2", snap, b)} {
		want := codes.ResourceExhausted // the scheduler may choose another node
		if name == "x2" {
			c.router.table.sent("x2", "b")
			want = codes.Unavailable // it may have been made
		}
		_, err := c.csi.CreateVolume(t.Context(), req)
		code(t, err, want, `"a"`, `"b"`, "copy")
	}
	if b.count("CreateVolume") != 0 {
		t.Error("it was asked")
	}
	// A volume that it has made before is there, whatever it has a copy of since.
	own := b.pools[0]
	own.mu.Lock()
	own.volumes["made"] = 1
	own.mu.Unlock()
	b.restart(b.pools...)
	c.linked(a, b)
	_, err := c.csi.CreateVolume(t.Context(), restore("made", snap, b))
	must(t, err)
	// Another node that will do is asked instead.
	k := c.copier("c", newDisk(t, "default", gib))
	k.up()
	c.linked(a, b, k.fakeNode)
	two := amid("y", b, k.fakeNode)
	two.VolumeContentSource = restore("y", snap, nil).GetVolumeContentSource()
	_, err = c.csi.CreateVolume(t.Context(), two)
	code(t, err, codes.Unavailable, "does not know copies") // a, which is asked for the source
	_, err = c.csi.CreateVolume(t.Context(), restore("z", snap, a))
	must(t, err)
}
