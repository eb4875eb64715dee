package main

import (
	"fmt"
	mathrand "math/rand/v2"
	"strings"

	"github.com/csi-loop/csi-loop/test/vm/plan"
)

// How recoveries are cut. Of some of the disks that a boot checks a copy is made of what
// a cut would leave while the guest mounts it and the driver starts on it. Nothing was
// asked of the driver then, so that it must have what the disk had before: the next boot
// checks it as that one. The recovery of such a copy may be cut as well.

// again is of how many disks in each boot the recovery is cut, at most.
const again = 3

// sample chooses one of a disk's writes and flushes, any of them alike, without knowing
// how many there will be: the n-th takes the place of the one before with a chance of 1/n.
type sample struct {
	loss   loss
	random *mathrand.Rand
	seen   int   // writes and flushes
	after  *disk // what a cut leaves that comes before the one that was chosen
	// late: chosen since restart.
	late, restarted bool
}

// sampleLocked is called with mu held, before something is written or flushed.
func (d *disk) sampleLocked() {
	s := d.sampled
	if s == nil {
		return
	}
	s.seen++
	if s.random.IntN(s.seen) == 0 {
		s.after, s.late = d.cutLocked(s.loss, s.random), s.restarted
	}
}

// restart forgets what was seen: the next write, if there is one, is preferred to all
// before.
func (d *disk) restart() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.sampled != nil {
		d.sampled.seen, d.sampled.restarted = 0, true
	}
}

// endSample returns what was sampled.
func (d *disk) endSample() *sample {
	d.mu.Lock()
	defer d.mu.Unlock()
	s := d.sampled
	d.sampled = nil
	return s
}

// recoveries are those of one boot, and how many there were of all.
type recoveries struct {
	disks map[string]recovery // by the guest's name
	left  []plan.Cut          // what the cuts leave
	after []*disk             // the same
	cuts  int
	late  int // of them after the mount
}

// recovery is that of one disk.
type recovery struct {
	disk *disk
	cut  plan.Cut
	// driver: what the driver does is preferred to what mount does, which is more.
	driver bool
}

func (r *recoveries) String() string {
	return fmt.Sprintf("%d in recoveries, %d of them while the driver started", r.cuts, r.late)
}

// cutRecoveries chooses disks of the next boot and lets them be sampled.
func (t *cutTest) cutRecoveries() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.recovery.disks = map[string]recovery{}
	if t.plan.CheckOnly {
		return // nobody would check what is left
	}
	for _, i := range t.random.Perm(len(t.plan.Check))[:min(again, len(t.plan.Check))] {
		c, d := &t.plan.Check[i], t.pool
		if i < len(t.check) {
			d = t.check[i]
		}
		c.Again = true
		d.sampled = &sample{loss: loss(t.random.IntN(3)), random: mathrand.New(mathrand.NewPCG(t.random.Uint64(), 0))}
		t.recovery.disks[c.Device] = recovery{disk: d, cut: *c, driver: t.random.IntN(2) == 0}
	}
}

// mounted is called when a disk is mounted and the driver starts.
func (r *recoveries) mounted(device string) {
	if d, ok := r.disks[device]; ok && d.driver {
		d.disk.restart()
	}
}

// recovered is called when the driver serves a disk, which the guest leaves alone.
func (r *recoveries) recovered(device string) {
	d, ok := r.disks[device]
	if !ok {
		return
	}
	s := d.disk.endSample()
	if s == nil || s.after == nil {
		return // nothing was written
	}
	r.left = append(r.left, plan.Cut{Acked: d.cut.Acked, Begun: d.cut.Begun})
	r.after = append(r.after, s.after)
	r.cuts++
	if s.late {
		r.late++
	}
}

// take gives away what the cuts of this boot left.
func (r *recoveries) take() (cuts []plan.Cut, after []*disk) {
	cuts, after = r.left, r.after
	r.left, r.after = nil, nil
	return cuts, after
}

// ofTheLiar tells what was found on the pool's disk, which lied, from what was found on
// others, which did not.
func ofTheLiar(problems []string) (found string, others []string) {
	for _, p := range problems {
		switch {
		case !strings.HasPrefix(p, plan.PoolDisk+": "):
			others = append(others, p)
		case found == "":
			found = p
		}
	}
	return found, others
}
