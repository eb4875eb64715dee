package crash

import (
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/csi-loop/csi-loop/internal/roottest"
	"github.com/csi-loop/csi-loop/test/crash/gate"
)

// errnos are what calls are made to fail with.
var errnos = []syscall.Errno{unix.EIO, unix.ENOSPC, unix.EINTR, unix.EBUSY, unix.EAGAIN, unix.ENOMEM}

// fits says whether a code is right for a call of the kernel that failed. What may
// go by itself gets a code after which a CO repeats the call as it is; of a program
// that failed the driver does not know why.
func fits(code codes.Code, errno syscall.Errno, own bool) bool {
	if slices.Contains(uncertain, code) {
		return true
	}
	return (errno == unix.EIO || !own) && (code == codes.Internal || code == codes.FailedPrecondition)
}

// TestErrors makes every call of every RPC fail once. The RPC succeeds, or fails
// with a code that fits. After a code that is final nothing is left of what should
// have been made; a CO goes on to ask for an end in any case. The next try succeeds.
func TestErrors(t *testing.T) {
	t.Parallel()
	kinds(t, failEverywhere)
}

// TestErrorsWhileCopying does so in snapshots, restores, clones and group snapshots.
func TestErrorsWhileCopying(t *testing.T) {
	t.Parallel()
	copies(t, failEverywhere)
}

func failEverywhere(t *testing.T, s *site, k kind) {
	t.Helper()
	targets := s.count(k)
	var y tally
	rounds := 1
	if long() {
		rounds = len(errnos)
	}
	for life, failed := 0, true; failed; life++ {
		failed = false
		v := s.volume(k, fmt.Sprint("error-", life))
		for i, st := range k.life() {
			at, errno := life/rounds, errnos[(life+i)%len(errnos)]
			switch {
			case at >= len(targets[st.name]):
				must(t, insist(func() error { return st.do(v) }))
			default:
				failed = true
				v.failing(st, targets[st.name][at], errno, &y)
			}
		}
		s.gone(v)
	}
	y.check(t)
}

// failing does a step in which a call fails, and repeats it.
func (v *volume) failing(st step, x target, errno syscall.Errno, y *tally) {
	t := v.t
	t.Helper()
	v.trap.arm(func(c gate.Call, n int) gate.Verdict {
		if label(c) == x.name && n == x.n {
			return gate.Verdict{Errno: errno}
		}
		return gate.Verdict{}
	})
	err := v.untilHit(st)
	hit, calls := v.trap.disarm()
	when := fmt.Sprintf("%s of %s, %s at %s, %s", st.name, v.name, unix.ErrnoName(errno), x, hit)
	y.add(st.name, x, hit, calls)
	if v.proc.State() != nil {
		t.Fatalf("%s: the driver ended\n%s", when, v.tail(30))
	}
	code := status.Code(err)
	if err != nil && !fits(code, errno, hit != nil && hit.Own) {
		t.Errorf("%s: %s", when, explain(err))
	}
	if err != nil && !slices.Contains(uncertain, code) && !st.ends {
		v.okButRemains(when+", after "+explain(err), hit, v.wrongAfterFailure)
	}
	if err := insist(func() error { return st.do(v) }); err != nil {
		t.Fatalf("%s, repeated: %s", when, explain(err))
	}
	v.okButRemains(when, hit, v.wrong)
}

// okButRemains is ok. What could not be unlinked may stay until the next start, and what
// is shared no more may stay claimed until the next look when btrfs could not commit.
func (s *site) okButRemains(when string, hit *gate.Call, wrong func() []string) {
	s.t.Helper()
	if hit != nil && isCommit(hit.Name) {
		must(s.t, s.restart())
	}
	if hit != nil && strings.HasPrefix(hit.Name, "unlinkat") {
		if remains := glob(s.pool+"/.*", s.state+"/*/*.freeze"); len(remains) > 0 {
			must(s.t, s.restart())
		}
	}
	s.none(when, wrong())
}

// TestErrorsFoundBefore repeats what the long form of TestErrors found.
func TestErrorsFoundBefore(t *testing.T) {
	t.Parallel()
	roottest.Require(t)
	for _, c := range []struct {
		pool  string
		k     kind
		step  string
		at    target
		errno syscall.Errno
	}{
		{"ext4", block, "expand image", target{"fsync", 3}, unix.EIO},              // was final, and the new size stayed
		{"btrfs", block, "create", target{"ioctl FS_IOC_SETFLAGS", 1}, unix.EBUSY}, // was called an invalid request
		{"btrfs", copied, "delete snapshot", target{"ioctl BTRFS_IOC_START_SYNC", 1}, unix.EIO},
		{"xfs", copied, "group snapshot", target{"openat2", 1}, unix.ENOSPC},          // left a directory
		{"xfs", copied, "delete group snapshot", target{"renameat2", 2}, unix.ENOMEM}, // left a snapshot until the next start
	} {
		t.Run(c.pool+"/"+c.step, func(t *testing.T) {
			t.Parallel()
			s := newSite(t, c.pool)
			v := s.volume(c.k, "found")
			var y tally
			for _, st := range c.k.life() {
				if st.name == c.step {
					v.failing(st, c.at, c.errno, &y)
					continue
				}
				must(t, insist(func() error { return st.do(v) }))
			}
			s.gone(v)
			y.check(t)
		})
	}
}

// TestNoNumberLeft: the kernel has no loop device number left. Whoever stages a volume
// then hears so, with what to do, and not of a full disk; nothing stays behind, and
// the next try finds one.
func TestNoNumberLeft(t *testing.T) {
	t.Parallel()
	roottest.Require(t)
	s := newSite(t, "ext4")
	v := s.volume(block, "numberless")
	must(t, v.create())
	s.trap.arm(func(c gate.Call, _ int) gate.Verdict {
		if c.Own && c.Name == "ioctl LOOP_CTL_GET_FREE" {
			return gate.Verdict{Errno: unix.ENOSPC}
		}
		return gate.Verdict{}
	})
	err := v.stage()
	hit, _ := s.trap.disarm()
	if hit == nil || status.Code(err) != codes.ResourceExhausted || !strings.Contains(err.Error(), "no loop device number left") || !strings.Contains(err.Error(), "losetup") {
		t.Errorf("%v: %v", hit, err)
	}
	s.ok("without a number")
	s.prove(v)
}
