package main

import (
	"math/rand/v2"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/csi-loop/csi-loop/test/vm/plan"
)

// sampledWrites writes 1 to 8 to the first sector, one after the other, restarts the sample
// before one of them, and returns what is on the disk that was sampled.
func sampledWrites(t *testing.T, seed uint64, l loss, restart byte) (first byte, late bool) {
	t.Helper()
	d := newDisk(mib)
	d.sampled = &sample{loss: l, random: rand.New(rand.NewPCG(seed, 0))}
	for b := byte(1); b <= 9; b++ {
		if b == restart {
			d.restart()
		}
		if b < 9 {
			d.write(filled(b, 1), 0, false)
		}
	}
	s := d.endSample()
	d.write(filled(9, 1), 0, false)
	if s == nil || s.after == nil {
		t.Fatal("nothing was sampled")
	}
	return s.after.first(), s.late
}

func TestAnyWriteMayBeSampled(t *testing.T) {
	for _, c := range []struct {
		name    string
		loss    loss
		restart byte
		want    map[byte]bool // what was written before the one that was chosen
	}{
		{"any", loseNone, 0, map[byte]bool{0: true, 1: true, 2: true, 3: true, 4: true, 5: true, 6: true, 7: true}},
		{"nothing was flushed", loseAll, 0, map[byte]bool{0: true}},
		{"the later ones", loseNone, 6, map[byte]bool{5: true, 6: true, 7: true}},
		{"none came later", loseNone, 9, map[byte]bool{0: true, 1: true, 2: true, 3: true, 4: true, 5: true, 6: true, 7: true}},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := map[byte]bool{}
			for seed := range uint64(256) {
				first, late := sampledWrites(t, seed, c.loss, c.restart)
				got[first] = true
				if want := c.restart == 6; late != want {
					t.Fatalf("late: %v, want %v", late, want)
				}
			}
			if diff := cmp.Diff(c.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// A recovery that was cut is checked in the next boot as the disk that was recovered.
func TestRecoveriesAreCheckedNext(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	copied := newDisk(mib)
	c := cutTest{pool: newDisk(mib), check: []*disk{copied}, random: random}
	c.plan.Check = []plan.Cut{{Device: checkDevice(0), Acked: 3, Begun: 5}, {Device: plan.PoolDisk, Acked: 7, Begun: 7}}
	c.cutRecoveries()
	if !c.plan.Check[0].Again || !c.plan.Check[1].Again {
		t.Errorf("not all recoveries are cut: %+v", c.plan.Check)
	}
	copied.write(filled(1, 1), 0, true)
	c.recovery.mounted(checkDevice(0))
	copied.write(filled(2, 1), 0, true)
	c.recovery.recovered(checkDevice(0))
	c.recovery.recovered(plan.PoolDisk) // nothing was written to it
	c.recovery.recovered("/dev/none")
	copied.write(filled(3, 1), 0, true)
	c.next([]plan.Cut{{Acked: 8, Begun: 9}}, []*disk{newDisk(mib)}, false)
	want := []plan.Cut{
		{Device: "/dev/vdd", Acked: 8, Begun: 9},
		{Device: "/dev/vde", Acked: 3, Begun: 5},
		{Device: plan.PoolDisk},
	}
	if diff := cmp.Diff(want, c.plan.Check); diff != "" {
		t.Error(diff)
	}
	if len(c.check) != 2 || c.check[1].first() > 1 || c.cuts != 2 || c.recovery.cuts != 1 {
		t.Errorf("%d disks, %d cuts, %s", len(c.check), c.cuts, &c.recovery)
	}
}

func TestOfTheLiar(t *testing.T) {
	found, others := ofTheLiar([]string{plan.PoolDisk + ": a is lost", "/dev/vdd: b is lost", plan.PoolDisk + ": c", "churn: no"})
	if found != plan.PoolDisk+": a is lost" {
		t.Errorf("found %q", found)
	}
	if diff := cmp.Diff([]string{"/dev/vdd: b is lost", "churn: no"}, others); diff != "" {
		t.Error(diff)
	}
}
