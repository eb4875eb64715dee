package router

import (
	"sync/atomic"
	"testing"
	"time"

	"github.com/csi-loop/csi-loop/pkg/router/link"
)

// A disk that hangs ends no link: the token is renewed meanwhile, other pools tell their
// free space, pools come in late, and the node can stop.
func TestPoolThatHangs(t *testing.T) {
	c := newCluster(t)
	hung, good := newDisk(t, "data", gib), newDisk(t, "default", 10*gib)
	a := c.node("a", hung, good)
	open, opened := holdBack(t)
	defer open()
	var hangs atomic.Bool
	waits := make(chan struct{}, 1000)
	a.proofs = func(p *link.Pool) {
		if free := p.Free; p.ID == hung.id {
			p.Free = func() link.Free {
				if hangs.Load() {
					waits <- struct{}{}
					<-opened
				}
				return free()
			}
		}
	}
	c.linked(a.up())
	asked := c.auth.asked()
	hangs.Store(true)
	<-waits
	a.setToken(c.auth.issue("a", "pod-a", time.Hour))
	eventually(t, "the token is renewed", func() bool { return c.auth.asked() > asked })
	good.mu.Lock()
	good.volumes["x"] = 4 * gib
	good.mu.Unlock()
	eventually(t, "the other pool's space is told", func() bool {
		r, _ := c.router.table.roomAt("a", "default", false)
		return r.free == 6*gib
	})
	late := newDisk(t, "late", gib)
	a.add(late)
	eventually(t, "a pool comes in late", func() bool { _, known := c.router.table.pool(late.id); return known })
	a.stop()
	if len(waits) != 0 {
		t.Errorf("the pool was asked %d times more", len(waits))
	}
}
