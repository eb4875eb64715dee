package driver

import (
	"context"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/csi-loop/csi-loop/internal/roottest"
	"github.com/csi-loop/csi-loop/pkg/image"
	"github.com/csi-loop/csi-loop/pkg/loop"
	"github.com/csi-loop/csi-loop/pkg/mount"
)

// TestTrimsOnTheRealThing: the image of a mounted thin volume shrinks after files were
// removed in it, and the volume can be unstaged at any moment of that.
func TestTrimsOnTheRealThing(t *testing.T) {
	roottest.Require(t)
	for _, fs := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(fs, func(t *testing.T) {
			ctx := t.Context()
			must := func(err error) {
				t.Helper()
				if err != nil {
					t.Fatal(err)
				}
			}
			n := &node{t: t, dir: t.TempDir()}
			n.defaults(filepath.Join(n.dir, "pool"))
			store, err := image.Open(ctx, n.pool)
			must(err)
			defer func() { must(store.Close()) }()
			loops, err := loop.New(ctx, loop.WithWarm(0))
			must(err)
			defer func() { must(loops.Close()) }()
			n.cfg.TrimInterval = time.Hour
			d, err := New(n.cfg, store, nil, loops, mount.New())
			must(err)
			defer func() { must(d.Close()) }()
			must(d.Reconcile(ctx))
			d.load = func(context.Context, int) string { return "" }

			c, staging := mountCap(fs, oneWriter), filepath.Join(n.dir, "staging")
			must(os.Mkdir(staging, 0o750))
			made, err := (&controllerServer{d: d}).CreateVolume(ctx, &csi.CreateVolumeRequest{
				Name: "v", CapacityRange: &csi.CapacityRange{RequiredBytes: 512 * mib},
				VolumeCapabilities: []*csi.VolumeCapability{c}, Parameters: map[string]string{"allocation": "thin"},
			})
			must(err)
			id := made.GetVolume().GetVolumeId()
			stage := func() error {
				_, err := (&nodeServer{d: d}).NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{VolumeId: id, StagingTargetPath: staging, VolumeCapability: c})
				return err
			}
			unstage := func() error {
				_, err := (&nodeServer{d: d}).NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: id, StagingTargetPath: staging})
				return err
			}
			blocks := func() int64 {
				syscall.Sync() // ext4 trims what is free on disk
				var st syscall.Stat_t
				must(syscall.Stat(filepath.Join(n.pool[0].Path, "volumes", "v", "disk.img"), &st))
				return st.Blocks * 512
			}
			must(stage())
			file := filepath.Join(staging, "file")
			must(os.WriteFile(file, make([]byte, 96*mib), 0o600))
			full := blocks()
			must(os.Remove(file))
			trim := func(value string) {
				_, err := (&controllerServer{d: d}).ControllerModifyVolume(ctx, &csi.ControllerModifyVolumeRequest{VolumeId: id, MutableParameters: map[string]string{"trim": value}})
				must(err)
			}
			trim("false")
			now := time.Now()
			d.trimDue(ctx, now)
			now = now.Add(2 * time.Hour)
			d.trimDue(ctx, now)
			if s := d.TrimStats(); s != (TrimStats{}) {
				t.Errorf("trimmed though it is off: %+v", s)
			}
			trim("true")
			d.trimDue(ctx, now)
			for attempt := 1; blocks() > full-80*mib; attempt++ { // XFS frees a removed file a moment later
				if attempt > 200 {
					t.Fatalf("%d bytes of blocks with a file, %d after trims: %+v", full, blocks(), d.TrimStats())
				}
				now = now.Add(2 * time.Hour)
				d.trimDue(ctx, now)
			}
			if s := d.TrimStats(); s.Failed > 0 || s.Done == 0 || s.Bytes < 80*mib {
				t.Errorf("stats: %+v", s)
			}
			t.Logf("%d bytes of blocks with a file, %d after trims", full, blocks())
			// At any moment.
			trimsOn, end := context.WithCancel(ctx)
			var wg sync.WaitGroup
			wg.Go(func() {
				for at := now; trimsOn.Err() == nil; at = at.Add(2 * time.Hour) {
					d.trimDue(trimsOn, at)
				}
			})
			for range 20 {
				must(unstage())
				must(stage())
			}
			end()
			wg.Wait()
			must(unstage())
			_, err = (&controllerServer{d: d}).DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: id})
			must(err)
		})
	}
}
