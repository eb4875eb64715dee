package integration

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// uncertain are the codes after which a CO repeats a call as it is (fact 57).
var uncertain = []codes.Code{codes.Unavailable, codes.Aborted, codes.Canceled, codes.DeadlineExceeded}

// insist repeats a step like a CO does, until it succeeds; codes that are final
// are returned.
func insist(ctx context.Context, do func() error) error {
	tick := time.NewTicker(3 * time.Millisecond)
	defer tick.Stop()
	for {
		err := do()
		if err == nil || !slices.Contains(uncertain, status.Code(err)) {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("no end in sight: %w", err)
		case <-tick.C:
		}
	}
}

// repeated repeats a step while its answer is ABORTED, as a CO does: another call or a passer-by
// was in its way.
func repeated(do func() error) error {
	var err error
	_ = waitFor(10*patience, func() string {
		if err = do(); status.Code(err) == codes.Aborted {
			return "aborted"
		}
		return ""
	})
	return err
}

// TestKillDuringRPCs kills the driver at random moments while several clients take
// volumes through their lives and repeat what fails.
func TestKillDuringRPCs(t *testing.T) {
	s := newSite(t, siteConfig{poolFS: "xfs", poolSize: 6 << 30})
	seeds := random(t)
	ctx, cancel := context.WithTimeout(context.Background(), 10*patience)
	defer cancel()
	kinds := []kind{
		{name: "ext4", fs: "ext4", size: 32 * mib, reader: true},
		{name: "xfs", fs: "xfs", size: 300 * mib, grown: 320 * mib},
		{name: "btrfs", fs: "btrfs", size: 128 * mib, reader: true},
		{name: "block", size: 8 * mib, grown: 16 * mib, reader: true},
		{name: "mapped", fs: "ext4", size: 16 * mib, mapped: true},
		{name: "ephemeral", fs: "ext4", size: 32 * mib, ephemeral: true},
		{name: "thin", fs: "ext4", size: 64 * mib, thin: true},
	}
	var stopped atomic.Bool
	var lives atomic.Int64
	var workers sync.WaitGroup
	failed := make(chan error, len(kinds))
	for i, k := range kinds {
		workers.Go(func() {
			for n := 0; !stopped.Load(); n++ {
				v := s.volume(k, fmt.Sprintf("%s-%d-%d", k.name, i, n))
				for _, e := range k.life() {
					if err := insist(ctx, func() error { return e.do(v) }); err != nil {
						failed <- fmt.Errorf("%q of %s: %s", e.name, v.id, explain(err))
						return
					}
				}
				lives.Add(1)
			}
		})
	}
	// Volumes that were acknowledged and that nobody touches.
	var kept []*volume
	kills := times(8, 30, 300)
	for i := range kills {
		v := s.volume(kind{name: "block", size: int64(1+i%3) * mib}, fmt.Sprint("kept-", i))
		after := time.Duration(1+seeds.IntN(120)) * time.Millisecond
		s.killAfter(after, func() {
			if err := v.create(); err == nil {
				kept = append(kept, v)
			}
		})
		if err := s.tryStart(); err != nil {
			cancel() // the clients would wait in vain
			workers.Wait()
			t.Fatal(err)
		}
		if len(failed) > 0 {
			break
		}
	}
	stopped.Store(true)
	workers.Wait()
	close(failed)
	for err := range failed {
		t.Error(err)
	}
	t.Logf("%d kills, %d whole lives, %d volumes kept", kills, lives.Load(), len(kept))
	s.converged(kept)
}

// killAfter kills the driver while or after work runs.
func (s *site) killAfter(d time.Duration, work func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		work()
	}()
	<-time.After(d)
	s.kill()
	<-done
}

// converged checks the volumes that must be there, removes them, and whatever a
// call that was not answered has made.
func (s *site) converged(kept []*volume) {
	t := s.t
	t.Helper()
	have := s.volumes()
	for _, v := range kept {
		if !slices.Contains(have, v.id) {
			t.Errorf("volume %q was acknowledged and is lost", v.id)
			continue
		}
		v.step("stage", v.stage())
		v.step("publish", v.publish(0, false))
		v.step("size", v.checkSize())
		v.step("unpublish", v.unpublish(0))
		v.step("unstage", v.unstage())
	}
	for _, id := range have {
		if name := id[strings.IndexByte(id, '.')+1:]; !strings.HasPrefix(name, "kept-") && !t.Failed() {
			t.Errorf("volume %q is left", id)
		}
		_, err := s.controller().DeleteVolume(context.Background(), &csi.DeleteVolumeRequest{VolumeId: id})
		if err != nil && !t.Failed() {
			t.Errorf("delete %q: %s", id, explain(err))
		}
	}
}

// TestKillWhileCreating (F7): a create that is cut at any moment leaves nothing in
// the way of its retry, and the retry gives the whole volume.
func TestKillWhileCreating(t *testing.T) {
	s := newSite(t, siteConfig{poolFS: "ext4", poolSize: 2 << 30})
	r := random(t)
	for i := range times(6, 20, 200) {
		k := []kind{ext4, xfs, btrfs, block}[i%4]
		v := s.volume(k, fmt.Sprintf("create-%d", i))
		s.killAfter(time.Duration(r.IntN(60))*time.Millisecond, func() { _ = v.create() })
		s.start()
		// The sweep at the start leaves no work in progress. It goes on when the driver serves.
		eventually(t, func() string {
			left, _ := filepath.Glob(s.pool + "/.new-*")
			return strings.Join(left, " ")
		})
		v.up()
		v.step("size", v.checkSize())
		v.thick("a killed create")
		v.step("write", v.write(0))
		// The same for a removal.
		v.step("unpublish", v.unpublish(0))
		v.step("unstage", v.unstage())
		s.killAfter(time.Duration(r.IntN(5))*time.Millisecond, func() { _ = v.remove() })
		s.start()
		v.step("delete", v.remove())
		s.checkClean()
	}
}

// TestKillInsideRPC sweeps the moment of the kill through each call of a volume's life. Half of the time the CO
// repeats the call; the other half it has lost interest, because the pod is gone, and takes the opposite call.
func TestKillInsideRPC(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{})
	publish := func(v *volume) error { return v.publish(0, false) }
	unpublish := func(v *volume) error { return v.unpublish(0) }
	reader := func(v *volume) error { return v.publish(1, true) }
	endReader := func(v *volume) error { return v.unpublish(1) }
	grow := func(v *volume) error { return v.expand(v.size + 4*mib) }
	type victim struct {
		name             string
		before           []func(*volume) error
		do               func(*volume) error
		opposite, ending []func(*volume) error
	}
	create, stage, unstage := (*volume).create, (*volume).stage, (*volume).unstage
	steps := func(f ...func(*volume) error) []func(*volume) error { return f }
	victims := []victim{
		{"stage", steps(create), stage, steps(unstage), steps(unstage)},
		{"publish", steps(create, stage), publish, steps(unpublish), steps(unpublish, unstage)},
		{"publish read-only", steps(create, stage, publish), reader, steps(endReader), steps(endReader, unpublish, unstage)},
		{"unpublish read-only", steps(create, stage, publish, reader), endReader, steps(reader, endReader), steps(unpublish, unstage)},
		{"expand", steps(create, stage, publish), grow, steps(unpublish), steps(unpublish, unstage)},
		{"unpublish", steps(create, stage, publish), unpublish, steps(publish, unpublish), steps(unpublish, unstage)},
		{"unstage", steps(create, stage), unstage, steps(stage, unstage), steps(unstage)},
	}
	for _, k := range []kind{{name: "ext4", fs: "ext4", size: 8 * mib}, {name: "block", size: 2 * mib}, mapped, {name: "ephemeral", fs: "ext4", size: 8 * mib, ephemeral: true}} {
		for _, c := range victims {
			if k.ephemeral && c.name != "publish" && c.name != "unpublish" || c.name == "expand" && k.name != "block" {
				continue
			}
			took := s.timing(k, c.before, c.do, c.ending)
			rounds := times(4, 10, 60)
			for i := range rounds {
				v := s.volume(k, fmt.Sprintf("inside-%s-%d", strings.ReplaceAll(c.name, " ", "-"), i))
				for _, f := range c.before {
					v.step("prepare", f(v))
				}
				s.killAfter(took*time.Duration(i)/time.Duration(rounds-1), func() { _ = c.do(v) })
				s.start()
				next, how := steps(c.do), "again"
				if i%2 == 0 {
					next, how = c.opposite, "then the opposite"
				}
				for _, f := range next {
					v.step(fmt.Sprintf("%s of %s, killed %d/%d through, %s:", c.name, k.name, i, rounds-1, how), f(v))
				}
				for _, f := range c.ending {
					v.step("end", f(v))
				}
				v.want = v.size
				v.step("delete", v.remove())
				s.checkClean()
				if t.Failed() {
					return
				}
			}
		}
	}
}

// timing measures a call, to know when to kill it.
func (s *site) timing(k kind, before []func(*volume) error, do func(*volume) error, ending []func(*volume) error) time.Duration {
	s.t.Helper()
	v := s.volume(k, "timing")
	for _, f := range before {
		v.step("prepare", f(v))
	}
	start := time.Now()
	v.step("measured call", do(v))
	took := time.Since(start)
	for _, f := range ending {
		v.step("end", f(v))
	}
	v.step("delete", v.remove())
	return took + took/5
}

// TestStartWhileLockLingers: a child that a killed driver was about to start shares its locks until it execs. The next
// start waits for that, and does not take it for another driver.
func TestStartWhileLockLingers(t *testing.T) {
	s := newSite(t, siteConfig{})
	s.kill()
	for _, dir := range []string{s.pool, filepath.Join(s.state, s.name)} {
		f, err := os.Open(dir)
		must(t, err)
		must(t, unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB))
		timer := time.AfterFunc(300*time.Millisecond, func() { _ = f.Close() })
		if err := s.tryStart(); err != nil {
			t.Errorf("%s is locked for a moment: %v", dir, err)
		}
		timer.Stop()
		_ = f.Close()
		s.kill()
	}
}
