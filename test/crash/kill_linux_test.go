package crash

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/csi-loop/csi-loop/internal/roottest"
	"github.com/csi-loop/csi-loop/test/crash/gate"
)

// kinds are the volumes that are tested, and on which pool.
func kinds(t *testing.T, test func(t *testing.T, s *site, k kind)) {
	t.Helper()
	roottest.Require(t)
	shortenLeases(t)
	pools := []string{"ext4"}
	all := []kind{ext4, xfs, btrfs, block, thinExt4, mapped, mappedRaw, partition, ephemeral}
	switch {
	case testing.Short():
		all = []kind{ext4, block}
	case long():
		pools = []string{"ext4", "xfs", "btrfs"}
		all = append(all, thinXFS, thinBtrfs, thinBlock)
	}
	for _, fs := range pools {
		for _, k := range all {
			onSite(t, fs, k, test)
		}
	}
}

// copies is kinds for the copies of a volume in use.
func copies(t *testing.T, test func(t *testing.T, s *site, k kind)) {
	t.Helper()
	roottest.Require(t)
	shortenLeases(t)
	pools := []string{"xfs"}
	if long() {
		pools = []string{"ext4", "xfs", "btrfs"}
	}
	for _, fs := range pools {
		onSite(t, fs, copied, test)
		if !testing.Short() {
			onSite(t, fs, copiedXFS, test)
		}
	}
}

// onSite runs a test on a site of its own, beside volumes that are in use.
func onSite(t *testing.T, fs string, k kind, test func(t *testing.T, s *site, k kind)) {
	t.Helper()
	t.Run(fs+"/"+k.name, func(t *testing.T) {
		t.Parallel()
		s := newSite(t, fs)
		s.bystanders()
		test(t, s, k)
		s.noBystanders()
	})
}

// bystanders are volumes in use that nobody touches: they must come to no harm.
func (s *site) bystanders() {
	for _, k := range []kind{ext4, thinBlock} {
		v := s.volume(k, "bystander-"+k.name)
		for _, do := range []func(v *volume) error{(*volume).create, (*volume).stage, func(v *volume) error { return v.publish(0) }, (*volume).write} {
			must(s.t, do(v))
		}
	}
}

func (s *site) noBystanders() {
	s.t.Helper()
	for _, v := range s.volumes {
		if !v.exists || !strings.HasPrefix(v.name, "bystander-") {
			continue
		}
		for _, do := range []func(v *volume) error{func(v *volume) error { return v.unpublish(0) }, (*volume).unstage, (*volume).remove} {
			must(s.t, insist(func() error { return do(v) }))
		}
	}
}

// target is a moment in a step of a volume's life: before the n-th call of that
// name that the driver makes, before the n-th call of any of its children (mkfs), or
// after the last call.
type target struct {
	name string
	n    int // from 1; 0 is after the last call
}

const (
	ofChild = "call of a child"
	after   = "after the last call"
)

func (x target) String() string { return fmt.Sprintf("%s (%d)", x.name, x.n) }

// label names a call as targets do. What is done to /sys and /dev is apart: it
// depends on which numbers were used before, by anybody on this machine. The test's own
// files are not apart, though they may be in /dev/shm.
func label(c gate.Call) string {
	ours := strings.HasPrefix(c.Path, os.TempDir()+"/")
	switch {
	case !c.Own && strings.HasPrefix(c.Path, "/sys/"):
		return ofChild + " in /sys"
	case !c.Own:
		return ofChild
	case strings.HasPrefix(c.Path, "/sys/"):
		return c.Name + " in /sys"
	case strings.HasPrefix(c.Path, "/dev/") && !ours:
		return c.Name + " in /dev"
	}
	return c.Name
}

// mayBeMissed says whether a life that made these calls may have lacked this one: it
// depends on what others on this machine do, is a commit of btrfs, of which there is one
// for each volume whose extents it is time to look at, is one of the last calls of a
// child, of which programs make a few more or fewer from one run to the next, or is not
// the first of those that copy data: there is one for each range that the filesystem says
// has data, which depends on what it has written back by then. What is busy for a moment is
// unmounted once more.
func (x target) mayBeMissed(calls []gate.Call) bool {
	made := 0
	for _, c := range calls {
		if label(c) == x.name {
			made++
		}
	}
	return strings.HasSuffix(x.name, " in /sys") || strings.HasSuffix(x.name, " in /dev") || isCommit(x.name) ||
		x.name == ofChild && 4*made >= 3*x.n || x.name == "copy_file_range" && made > 0 ||
		x.name == "umount2" && made > 0 && made == x.n-1
}

// isCommit says whether a call is part of a commit of btrfs.
func isCommit(name string) bool {
	return strings.HasPrefix(name, "ioctl BTRFS_IOC_START_SYNC") || strings.HasPrefix(name, "ioctl BTRFS_IOC_WAIT_SYNC")
}

// count lives a life and returns the moments of its steps. The first life of a kind
// makes calls that later ones do not (programs are looked for), so it counts in the
// second.
func (s *site) count(k kind) map[string][]target {
	s.t.Helper()
	var targets map[string][]target
	for i := range 2 {
		targets = map[string][]target{}
		v := s.volume(k, fmt.Sprint("count-", i))
		for _, st := range k.life() {
			s.trap.arm(nil)
			err := insist(func() error { return st.do(v) })
			_, calls := s.trap.disarm()
			if err != nil {
				s.t.Fatalf("%s: %s", st.name, explain(err))
			}
			s.ok(st.name)
			if !st.free {
				targets[st.name] = targetsOf(calls)
			}
		}
		s.gone(v)
	}
	return targets
}

// targetsOf lists the moments of a step that made these calls. Of those of children
// it takes the first, one in the middle and the last, and all in the long form.
func targetsOf(calls []gate.Call) []target {
	all := []target{{after, 0}}
	seen := map[string]int{}
	for _, c := range calls {
		seen[label(c)]++
		all = append(all, target{label(c), seen[label(c)]})
	}
	children := seen[ofChild]
	if long() {
		return all
	}
	return slices.DeleteFunc(all, func(x target) bool {
		return x.name == ofChild && x.n != 1 && x.n != (children+1)/2 && x.n != children
	})
}

// ok fails the test if anything is wrong.
func (s *site) ok(when string) {
	s.t.Helper()
	s.none(when, s.wrong())
}

// none fails the test if something was found.
func (s *site) none(when string, found []string) {
	s.t.Helper()
	if len(found) > 0 {
		s.t.Fatalf("%s:\n%s", when, strings.Join(found, "\n"))
	}
}

// gone forgets a volume whose life is over.
func (s *site) gone(v *volume) {
	s.volumes = slices.DeleteFunc(s.volumes, func(o *volume) bool { return o == v })
}

// tally is what came of the targets of a test.
type tally struct {
	hit    int
	missed []string
}

// add counts a target, and what came of it in a step that made these calls.
func (y *tally) add(step string, x target, hit *gate.Call, calls []gate.Call) {
	switch {
	case hit != nil || x.name == after:
		y.hit++
	case !x.mayBeMissed(calls):
		y.missed = append(y.missed, fmt.Sprintf("%s: %s", step, x))
	}
}

// check fails the test if a target was not reached.
func (y *tally) check(t *testing.T) {
	t.Helper()
	t.Logf("%d points", y.hit)
	if y.hit == 0 || len(y.missed) > 0 {
		t.Errorf("%d points were reached, and these were not: %q", y.hit, y.missed)
	}
}

// TestKill ends the driver at every call of every RPC, and after the last one.
func TestKill(t *testing.T) {
	t.Parallel()
	kinds(t, killEverywhere)
}

// TestKillWhileCopying does so in snapshots, restores, clones and group snapshots.
func TestKillWhileCopying(t *testing.T) {
	t.Parallel()
	copies(t, killEverywhere)
}

func killEverywhere(t *testing.T, s *site, k kind) {
	t.Helper()
	targets := s.count(k)
	var y tally
	for life := 0; ; life++ {
		v := s.volume(k, fmt.Sprint("kill-", life))
		killed := false
		for _, st := range k.life() {
			if life >= len(targets[st.name]) {
				must(t, insist(func() error { return st.do(v) }))
				continue
			}
			killed = true
			v.killed(st, targets[st.name][life], &y)
		}
		s.gone(v)
		if !killed {
			break
		}
	}
	y.check(t)
}

// killed does a step, in which the driver is killed; starts it again, and repeats
// the step.
func (v *volume) killed(st step, x target, y *tally) {
	t := v.t
	t.Helper()
	v.trap.arm(func(c gate.Call, n int) gate.Verdict { return gate.Verdict{Kill: label(c) == x.name && n == x.n} })
	err := v.untilHit(st)
	hit, calls := v.trap.disarm()
	when := fmt.Sprintf("%s of %s, killed at %s, %s", st.name, v.name, x, hit)
	if hit == nil && err != nil {
		t.Fatalf("%s: %s", when, explain(err))
	}
	y.add(st.name, x, hit, calls)
	if err := v.restart(); err != nil {
		t.Fatalf("%s: %v", when, err)
	}
	if err := insist(func() error { return st.do(v) }); err != nil {
		t.Fatalf("%s, repeated: %s", when, explain(err))
	}
	v.ok(when)
}
