package integration

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
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
			t.Error(err)
			break
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
		// The sweep at the start leaves no work in progress.
		if left, _ := filepath.Glob(s.pool + "/.new-*"); len(left) > 0 {
			t.Errorf("left after the start: %q", left)
		}
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
