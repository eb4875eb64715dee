package integration

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

// lifetime takes a volume through its whole life and returns the first error.
func (v *volume) lifetime() error {
	for _, e := range v.life() {
		if err := repeated(func() error { return e.do(v) }); err != nil {
			return fmt.Errorf("%q of %s: %s", e.name, v.id, explain(err))
		}
	}
	return nil
}

var manyKinds = []kind{
	{name: "ext4", fs: "ext4", size: 16 * mib, reader: true},
	{name: "block", size: 4 * mib, reader: true},
	{name: "ext2", fs: "ext2", size: 16 * mib},
	{name: "thin", fs: "ext4", size: 64 * mib, thin: true},
	{name: "ext4", fs: "ext4", size: 32 * mib},
	{name: "ephemeral", fs: "ext4", size: 16 * mib, ephemeral: true},
	{name: "btrfs", fs: "btrfs", size: 128 * mib},
	{name: "xfs", fs: "xfs", size: 300 * mib},
}

// each runs n volumes of all kinds on the sites at the same time.
func each(t *testing.T, n int, sites ...*site) {
	t.Helper()
	var wg sync.WaitGroup
	for _, s := range sites {
		for i := range n {
			v := s.volume(manyKinds[i%len(manyKinds)], fmt.Sprintf("v%02d", i))
			wg.Go(func() {
				if err := v.lifetime(); err != nil {
					t.Error(err)
				}
			})
		}
	}
	wg.Wait()
}

// TestManyVolumes takes 64 volumes through their lives concurrently.
func TestManyVolumes(t *testing.T) {
	each(t, 64, newSite(t, siteConfig{}))
}

// TestManyPublished keeps 64 volumes published at the same time, each with its own
// data, and kills the driver meanwhile.
func TestManyPublished(t *testing.T) {
	s := newSite(t, siteConfig{})
	kinds := slices.DeleteFunc(slices.Clone(manyKinds), func(k kind) bool { return k.size > 128*mib })
	volumes := make([]*volume, 64)
	parallel := func(what string, do func(v *volume) error) {
		t.Helper()
		var wg sync.WaitGroup
		for _, v := range volumes {
			wg.Go(func() {
				if err := do(v); err != nil {
					t.Errorf("%s of %s: %s", what, v.id, explain(err))
				}
			})
		}
		wg.Wait()
		if t.Failed() {
			t.FailNow()
		}
	}
	for i := range volumes {
		volumes[i] = s.volume(kinds[i%len(kinds)], fmt.Sprintf("p%02d", i))
	}
	parallel("create", (*volume).create)
	parallel("stage", (*volume).stage)
	parallel("publish", func(v *volume) error { return v.publish(0, false) })
	parallel("write", func(v *volume) error { return v.write(0) })
	devices := map[string]string{}
	for _, v := range volumes {
		d := v.device()
		if other, taken := devices[d]; taken || d == "" {
			t.Errorf("%s and %s have the device %q", v.id, other, d)
		}
		devices[d] = v.id
	}
	s.kill()
	parallel("read without a driver", func(v *volume) error { return v.read(0, 0) })
	s.start()
	parallel("read", func(v *volume) error { return v.read(0, 0) })
	parallel("unpublish", func(v *volume) error { return v.unpublish(0) })
	parallel("unstage", (*volume).unstage)
	parallel("delete", (*volume).remove)
}

// documented are the codes that a call on a volume in any state may get.
var documented = []codes.Code{
	codes.OK, codes.Aborted, codes.FailedPrecondition, codes.NotFound, codes.AlreadyExists, codes.InvalidArgument, codes.OutOfRange,
}

// TestOneVolumeManyCalls throws random calls at one volume from 16 clients (F8, F19).
func TestOneVolumeManyCalls(t *testing.T) {
	s := newSite(t, siteConfig{})
	r := random(t)
	for _, k := range []kind{{name: "ext4", fs: "ext4", size: 16 * mib}, block, {name: "xfs", fs: "xfs", size: 300 * mib}} {
		v := s.volume(k, "one-"+k.name)
		v.step("create", v.create())
		calls := v.randomCalls()
		count := map[string]map[codes.Code]int{}
		var mu sync.Mutex
		var wg sync.WaitGroup
		for i := range 16 {
			own := rand.New(rand.NewPCG(r.Uint64(), 0))
			wg.Go(func() {
				for range times(20, 50, 1000) {
					c := calls[own.IntN(len(calls))]
					err := c.do()
					for range 50 { // some clients insist, so that the others meet more states
						if i%2 == 0 || status.Code(err) != codes.Aborted {
							break
						}
						err = c.do()
					}
					code := status.Code(err)
					mu.Lock()
					if count[c.name] == nil {
						count[c.name] = map[codes.Code]int{}
					}
					count[c.name][code]++
					if !slices.Contains(documented, code) && count[c.name][code] == 1 {
						t.Errorf("%s of %s: %s", c.name, k.name, explain(err))
					}
					mu.Unlock()
				}
			})
		}
		wg.Wait()
		t.Log(k.name, count)
		for n := range 3 {
			v.step("unpublish at last", repeated(func() error { return v.unpublish(n) }))
		}
		v.step("unstage at last", repeated(v.unstage))
		v.step("delete at last", repeated(v.remove))
		s.checkClean()
	}
}

type call struct {
	name string
	do   func() error
}

// randomCalls are calls on one volume; some are deliberately odd.
func (v *volume) randomCalls() []call {
	ctx := context.Background()
	id := v.id
	return []call{
		{"create", func() error {
			_, err := v.controller().CreateVolume(ctx, &csi.CreateVolumeRequest{
				Name: v.key(), CapacityRange: &csi.CapacityRange{RequiredBytes: v.size}, VolumeCapabilities: []*csi.VolumeCapability{v.capability()},
			})
			return err
		}},
		{"stage", func() error {
			_, err := v.node().NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{VolumeId: id, StagingTargetPath: v.staging(), VolumeCapability: v.capability()})
			return err
		}},
		{"stage elsewhere", func() error {
			_, err := v.node().NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{VolumeId: id, StagingTargetPath: v.staging(), VolumeCapability: (&volume{kind: v.kind, mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER}).capability()})
			return err
		}},
		{"publish 0", func() error { return v.publish(0, false) }},
		{"publish 1", func() error { return v.publish(1, true) }},
		{"publish 2", func() error { return v.publish(2, false) }},
		{"publish 0 read-only", func() error { return v.publish(0, true) }},
		{"unpublish 0", func() error { return v.bareUnpublish(0) }},
		{"unpublish 1", func() error { return v.bareUnpublish(1) }},
		{"unpublish 2", func() error { return v.bareUnpublish(2) }},
		{"unstage", func() error {
			_, err := v.node().NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: id, StagingTargetPath: v.staging()})
			return err
		}},
		{"delete", func() error {
			_, err := v.controller().DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: id})
			return err
		}},
		{"expand", func() error {
			_, err := v.controller().ControllerExpandVolume(ctx, &csi.ControllerExpandVolumeRequest{VolumeId: id, CapacityRange: &csi.CapacityRange{RequiredBytes: v.size}})
			return err
		}},
		{"node expand", func() error {
			_, err := v.node().NodeExpandVolume(ctx, &csi.NodeExpandVolumeRequest{VolumeId: id, VolumePath: v.target(0)})
			return err
		}},
		{"stats", func() error {
			_, err := v.node().NodeGetVolumeStats(ctx, &csi.NodeGetVolumeStatsRequest{VolumeId: id, VolumePath: v.target(0)})
			return err
		}},
		{"node health", func() error {
			_, err := v.node().NodeGetVolumeHealth(ctx, &csi.NodeGetVolumeHealthRequest{VolumeId: id})
			return err
		}},
		{"health", func() error {
			_, err := v.controller().ControllerGetVolumeHealth(ctx, &csi.ControllerGetVolumeHealthRequest{VolumeId: id})
			return err
		}},
		{"list health", func() error {
			_, err := v.controller().ControllerListVolumeHealth(ctx, &csi.ControllerListVolumeHealthRequest{})
			return err
		}},
		{"get", func() error {
			_, err := v.controller().ControllerGetVolume(ctx, &csi.ControllerGetVolumeRequest{VolumeId: id})
			return err
		}},
		{"validate", func() error {
			_, err := v.controller().ValidateVolumeCapabilities(ctx, &csi.ValidateVolumeCapabilitiesRequest{VolumeId: id, VolumeCapabilities: []*csi.VolumeCapability{v.capability()}})
			return err
		}},
		{"list", func() error {
			_, err := v.controller().ListVolumes(ctx, &csi.ListVolumesRequest{})
			return err
		}},
	}
}

// bareUnpublish does not look at the target: somebody else may publish there again.
func (v *volume) bareUnpublish(n int) error {
	_, err := v.node().NodeUnpublishVolume(context.Background(), &csi.NodeUnpublishVolumeRequest{VolumeId: v.id, TargetPath: v.target(n)})
	return err
}

// TestTwoDrivers runs two drivers with a pool each on one kernel, and starts others
// on what is theirs.
func TestTwoDrivers(t *testing.T) {
	a, b := newSite(t, siteConfig{}), newSite(t, siteConfig{})
	each(t, 32, a, b)
	v := a.volume(ext4, "stays").up()
	for _, c := range []struct {
		name string
		args []string
		word string
	}{
		{"the pool of another", []string{"--endpoint=unix://" + a.dir + "/other.sock", "--node-id=other", "--pool=default=" + a.pool, "--state-dir=" + a.dir + "/other-state"}, a.pool},
		{"the state directory of another", []string{"--endpoint=unix://" + a.dir + "/other.sock", "--node-id=" + a.name, "--pool=default=" + a.dir + "/other-pool", "--state-dir=" + a.state}, a.state},
		{"the socket of another", []string{"--endpoint=unix://" + a.socket, "--node-id=third", "--pool=default=" + a.dir + "/third-pool", "--state-dir=" + a.dir + "/third-state"}, a.socket},
		{"a copy of the pool", []string{"--endpoint=unix://" + a.dir + "/other.sock", "--node-id=fourth", "--default-pool=a", "--pool=a=" + a.pool + "-copy", "--pool=b=" + a.pool + "-copy2", "--state-dir=" + a.dir + "/fourth-state"}, "ID"},
	} {
		for _, dir := range []string{"other-pool", "third-pool"} {
			must(t, os.MkdirAll(filepath.Join(a.dir, dir), 0o700))
		}
		if c.name == "a copy of the pool" {
			roottest.Run(t, "cp", "-r", a.pool, a.pool+"-copy")
			roottest.Run(t, "cp", "-r", a.pool, a.pool+"-copy2")
		}
		p, err := a.spawn(append([]string{"serve"}, c.args...)...)
		must(t, err)
		if code := p.ended(t); code != 1 {
			t.Errorf("serve on %s ends with %d, want 1:\n%s", c.name, code, p.tail(10))
		}
		lines := strings.Split(strings.TrimSpace(p.tail(1)), "\n")
		if last := lines[len(lines)-1]; !strings.HasPrefix(last, "csi-loop: ") || !strings.Contains(last, c.word) {
			t.Errorf("serve on %s says %q, want one line that names %q", c.name, last, c.word)
		}
	}
	v.step("write after others tried", v.write(0))
	v.step("read", v.read(0, 0))
	v.down()
}
