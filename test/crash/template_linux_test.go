package crash

import (
	"fmt"
	"slices"
	"testing"

	"github.com/csi-loop/csi-loop/internal/roottest"
	"github.com/csi-loop/csi-loop/test/crash/gate"
)

// TestKillWithTemplate ends the driver at every call of a creation that copies a
// template, and makes each fail. Each process is first given what it takes to have one.
func TestKillWithTemplate(t *testing.T) {
	t.Parallel()
	roottest.Require(t)
	shortenLeases(t)
	all := []kind{ext4, xfs, btrfs, thinExt4}
	if testing.Short() {
		all = all[:1]
	}
	for _, k := range all {
		t.Run(k.name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t, "ext4")
			s.args = slices.DeleteFunc(s.args, func(a string) bool { return a == mkfsAlways })
			must(t, s.restart())
			s.prime(k)
			s.trap.arm(nil)
			v := s.volume(k, "count")
			must(t, v.create())
			_, calls := s.trap.disarm()
			targets := targetsOf(calls)
			if slices.ContainsFunc(targets, func(x target) bool { return x.name == ofChild }) {
				t.Fatal("a program ran: there is no template")
			}
			must(t, insist(v.remove))
			s.gone(v)
			var y tally
			create := k.life()[0]
			for i, x := range targets {
				v := s.volume(k, fmt.Sprint("killed-", i))
				v.killed(create, x, &y)
				s.prove(v)
				s.prime(k)
				v = s.volume(k, fmt.Sprint("failed-", i))
				v.failing(create, x, errnos[i%len(errnos)], &y)
				s.prove(v)
				if s.proc.State() != nil {
					must(t, s.restart())
				}
			}
			y.check(t)
		})
	}
}

// prime makes and removes volumes until the process has a template of their kind.
func (s *site) prime(k kind) {
	s.t.Helper()
	s.trap.arm(func(gate.Call, int) gate.Verdict { return gate.Verdict{} })
	defer s.trap.disarm()
	for range 2 {
		v := s.volume(k, "prime")
		must(s.t, insist(v.create))
		must(s.t, insist(v.remove))
		s.gone(v)
	}
}

// prove lives the rest of a volume's life.
func (s *site) prove(v *volume) {
	s.t.Helper()
	must(s.t, insist(v.stage))
	must(s.t, insist(func() error { return v.publish(0) }))
	must(s.t, v.write())
	must(s.t, insist(func() error { return v.unpublish(0) }))
	must(s.t, insist(v.unstage))
	must(s.t, insist(v.remove))
	s.gone(v)
}
