package crash

import (
	"fmt"
	"syscall"
	"testing"

	"github.com/csi-loop/csi-loop/test/crash/gate"
)

// TestKillWhileRecovering kills the driver in the middle of an RPC, and then again at
// each call of the start that follows. What a start does depends on little more than
// whether the volume is a raw one, so that the other kinds are for the long form.
func TestKillWhileRecovering(t *testing.T) {
	t.Parallel()
	kinds(t, func(t *testing.T, s *site, k kind) {
		if !long() && k != ext4 && k != block && k != ephemeral {
			return
		}
		// Where much is half done: the last call but one of each step.
		targets := s.count(k)
		starts := 0
		for at := 1; ; at++ {
			v := s.volume(k, fmt.Sprint("again-", at))
			more := false
			for _, st := range k.life() {
				all := targets[st.name]
				if st.free || len(all) < 3 {
					must(t, insist(func() error { return st.do(v) }))
					continue
				}
				more = v.killedTwice(st, all[len(all)-2], at) || more
			}
			s.gone(v)
			if !more {
				break
			}
			starts++
		}
		t.Logf("killed at up to %d calls of a start", starts)
		if starts == 0 {
			t.Error("no start was killed")
		}
	})
}

// killedTwice kills the driver in a step, and the start after it at a call of that
// number. It says whether the start made so many.
func (v *volume) killedTwice(st step, x target, at int) bool {
	t := v.t
	t.Helper()
	v.trap.arm(func(c gate.Call, n int) gate.Verdict { return gate.Verdict{Kill: label(c) == x.name && n == x.n} })
	_ = st.do(v)
	first, _ := v.trap.disarm()
	v.end(syscall.SIGKILL)
	calls := 0
	v.trap.arm(func(c gate.Call, _ int) gate.Verdict {
		if c.Own {
			calls++
		}
		return gate.Verdict{Kill: calls == at}
	})
	err := v.start()
	second, _ := v.trap.disarm()
	when := fmt.Sprintf("%s of %s, killed at %s and at %s", st.name, v.name, first, second)
	if second == nil && err != nil {
		t.Fatalf("%s: %v", when, err)
	}
	if err := v.restart(); err != nil {
		t.Fatalf("%s: %v", when, err)
	}
	if err := insist(func() error { return st.do(v) }); err != nil {
		t.Fatalf("%s, repeated: %s", when, explain(err))
	}
	v.ok(when)
	return second != nil
}
