package integration

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// descriptors lets the driver, which runs, open files only while it has fewer descriptors
// than that, and returns what undoes it.
func (s *site) descriptors(most uint64) (undo func()) {
	s.t.Helper()
	pid := s.process().cmd.Process.Pid
	var before unix.Rlimit
	must(s.t, unix.Prlimit(pid, unix.RLIMIT_NOFILE, nil, &before))
	must(s.t, unix.Prlimit(pid, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: most, Max: before.Max}, nil))
	return func() { must(s.t, unix.Prlimit(pid, unix.RLIMIT_NOFILE, &before, nil)) }
}

// lowestFree is the number that the next descriptor of the driver gets.
func (s *site) lowestFree() uint64 {
	s.t.Helper()
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", s.process().cmd.Process.Pid))
	must(s.t, err)
	used := map[string]bool{}
	for _, fd := range fds {
		used[fd.Name()] = true
	}
	free := uint64(0)
	for used[strconv.FormatUint(free, 10)] {
		free++
	}
	return free
}

// TestOutOfDescriptors: the driver runs out of descriptors after so and so many more, in the middle of each call of a volume's
// life. The call is refused with a code after which it is repeated, in words that say what is wrong; nothing is damaged, lost or left;
// health says what to do; and once there are descriptors again the same call succeeds.
func TestOutOfDescriptors(t *testing.T) {
	s := newSite(t, siteConfig{poolFS: "xfs"}) // snapshots of volumes in use
	other := s.rest(ext4, "other")
	for _, k := range []kind{ext4, block, {name: "thin", fs: "xfs", size: 300 * mib, thin: true}} {
		v := s.volume(k, "few-"+k.name)
		snapshot := ""
		for _, step := range []struct {
			name string
			call func() error
		}{
			{"create", v.create},
			{"stage", v.stage},
			{"publish", func() error { return v.publish(0, false) }},
			{"expand", func() error { return v.expandImage(2 * k.size) }},
			{"snapshot", func() error {
				made, err := v.snapshot("few-" + k.name)
				snapshot = made.GetSnapshotId()
				return err
			}},
			{"delete snapshot", func() error { return s.deleteSnapshot(snapshot) }},
			{"unpublish", func() error { return v.unpublish(0) }},
			{"unstage", v.unstage},
			{"delete", v.remove},
		} {
			s.withEverMoreDescriptors(k.name+": "+step.name, step.call)
		}
	}
	other.step("stage", other.stage())
	other.step("publish", other.publish(0, false))
	other.step("read what was there before", other.read(0, 0))
	other.down()
}

// withEverMoreDescriptors repeats a call with more descriptors each time until it succeeds.
func (s *site) withEverMoreDescriptors(what string, call func() error) {
	s.t.Helper()
	undo := s.descriptors(0)
	s.saysItIsShort(what)
	undo()
	for more := range uint64(60) {
		undo := s.descriptors(s.lowestFree() + more)
		err := call()
		undo()
		switch code := status.Code(err); {
		case err == nil:
			return
		case code == codes.Aborted: // what it began goes on
		case code != codes.Unavailable || !strings.Contains(err.Error(), "too many open files"):
			s.t.Fatalf("%s with %d more descriptors: %s", what, more, explain(err))
		}
	}
	if err := call(); err != nil {
		s.t.Fatalf("%s, with descriptors again: %s", what, explain(err))
	}
}

// saysItIsShort checks health and readiness of a driver that can open nothing.
func (s *site) saysItIsShort(what string) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	r, err := s.node().NodeGetStorageHealth(ctx, &csi.NodeGetStorageHealthRequest{})
	must(s.t, err)
	text := fmt.Sprint(r.GetBackendHealth())
	if !strings.Contains(text, "TooManyOpenFiles") || !strings.Contains(text, "raise the limit") || strings.Contains(text, "PoolFilesystem") {
		s.t.Errorf("%s: storage health is %s", what, text)
	}
	// With volumes staged it stays ready: these must be served.
	ready, err := csi.NewIdentityClient(s.client()).Probe(ctx, &csi.ProbeRequest{})
	if err != nil && (status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "too many open files")) || err == nil && !ready.GetReady().GetValue() {
		s.t.Errorf("%s: probe: %v, %v", what, ready, err)
	}
}
