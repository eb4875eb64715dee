package crash

import (
	"testing"

	"github.com/csi-loop/csi-loop/test/crash/gate"
)

// TestChecksSeeLies is the proof that the checks of this package can fail: a call
// that only pretends to have done its work leaves what they are there to find. The
// driver may find it first, which fails the step.
func TestChecksSeeLies(t *testing.T) {
	t.Parallel()
	only := map[string]kind{"ext4": ext4, "block": block, "copied": copied}
	for _, c := range []struct {
		kind, step, call string
		// noticed: the driver itself finds out.
		noticed bool
	}{
		{"ext4", "create", "renameat2", false},      // a volume that is acknowledged and not there
		{"ext4", "expand image", "ftruncate", true}, // a size that is acknowledged and not real
		{"ext4", "unpublish", "unlinkat", false},    // a target that stays
		{"ext4", "unstage", "unlinkat", false},      // a record that stays
		{"ext4", "delete", "renameat2", false},      // a volume that stays
		{"ext4", "delete", "unlinkat", true},        // its files
		{"ext4", "create", "fsync", false},          // what is acknowledged and not on disk
		{"ext4", "expand image", "fsync", false},
		{"ext4", "delete", "fsync", false},
		{"block", "create", "fallocate", true}, // a thick volume without blocks
		{"block", "unstage", "ioctl LOOP_CLR_FD in /dev", true},
		{"copied", "snapshot", "renameat2", false},    // a snapshot that is acknowledged and not there
		{"copied", "snapshot", "ioctl FICLONE", true}, // without the data
		{"copied", "snapshot", "fsync", false},        // not on disk
		{"copied", "group snapshot", "fsync", false},
		{"copied", "group snapshot", "renameat2", false},        // a group of which nothing is there
		{"copied", "delete group snapshot", "renameat2", false}, // one that stays
		{"copied", "delete snapshot", "renameat2", false},
	} {
		t.Run(c.step+"/"+c.call, func(t *testing.T) {
			t.Parallel()
			k := only[c.kind]
			pool := "ext4"
			if k.copied {
				pool = "xfs"
			}
			s := newSite(t, pool)
			s.bystanders()
			s.ok("before")
			v := s.volume(k, "lie")
			for _, st := range k.life() {
				if st.name != c.step {
					must(t, insist(func() error { return st.do(v) }))
					continue
				}
				s.trap.arm(func(call gate.Call, _ int) gate.Verdict { return gate.Verdict{Lie: label(call) == c.call} })
				err := st.do(v)
				hit, _ := s.trap.disarm()
				found := s.wrongBut(patience/12, s.trap.unsynced) // most of them stay wrong
				t.Logf("%v; answer: %v; found: %q", hit, err, found)
				if hit == nil || len(found) == 0 && err == nil || !c.noticed && len(found) == 0 {
					t.Errorf("%s pretends %s (%v): the answer is %v, and the checks find %q", c.step, c.call, hit, err, found)
				}
				break
			}
			s.abandon()
		})
	}
}

// abandon ends a site that is wrong on purpose.
func (s *site) abandon() {
	s.end(9)
	s.scrub()
	s.proc = nil
}
