package integration

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

// TestShortDeadlines: clients give up on calls at random moments and repeat them, as kubelet does when a call takes
// too long. Nothing is left behind by a call that was given up.
func TestShortDeadlines(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{})
	r := random(t)
	kinds := []kind{
		{name: "ext4", fs: "ext4", size: 32 * mib, reader: true},
		{name: "xfs", fs: "xfs", size: 300 * mib, grown: 320 * mib},
		{name: "btrfs", fs: "btrfs", size: 128 * mib},
		{name: "block", size: 8 * mib, grown: 16 * mib, reader: true},
		mapped,
		{name: "ephemeral", fs: "ext4", size: 32 * mib, ephemeral: true},
	}
	var wg sync.WaitGroup
	for i, k := range kinds {
		own := rand.New(rand.NewPCG(r.Uint64(), uint64(i)))
		wg.Go(func() {
			for n := range times(2, 6, 60) {
				v := s.volume(k, fmt.Sprintf("deadline-%d-%d", i, n))
				const first = 1500.0
				most := first // microseconds
				// Gets longer by a factor, so that the end is near however slow the machine is.
				v.limit = func() time.Duration {
					most *= 1.05
					return time.Duration(own.Float64()*most) * time.Microsecond
				}
				for _, e := range k.life() {
					most = first
					ctx, cancel := context.WithTimeout(t.Context(), 10*patience)
					err := insist(ctx, func() error { return e.do(v) })
					cancel()
					if err != nil {
						t.Errorf("%q of %s: %s", e.name, v.id, explain(err))
						return
					}
				}
			}
		})
	}
	wg.Wait()
}

// TestLosetupStorm: somebody attaches and detaches other files all the time, with the numbers that are free.
func TestLosetupStorm(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{})
	file := filepath.Join(s.dir, "storm.img")
	must(t, os.WriteFile(file, make([]byte, mib), 0o600))
	storm, calm := context.WithCancel(context.Background())
	var others sync.WaitGroup
	for range 3 {
		others.Go(func() {
			for storm.Err() == nil {
				out, err := exec.Command("losetup", "--find", "--show", file).Output()
				if err != nil {
					continue // lost a race for the number, to us or to each other
				}
				node := strings.TrimSpace(string(out))
				if got, err := deviceSize(node); err != nil || got != mib {
					t.Errorf("somebody's %s has %d bytes, %v", node, got, err)
				}
				_ = exec.Command("losetup", "--detach", node).Run()
			}
		})
	}
	each(t, times(8, 24, 64), s)
	calm()
	others.Wait()
	eventually(t, func() string { return strings.Join(roottest.Loops(s.dir), "\n") })
}

// TestNosyNeighbour: somebody opens every device for a moment, as udev and blkid do. Calls may be answered ABORTED; repeated, they succeed.
func TestNosyNeighbour(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{})
	nosy, calm := context.WithCancel(context.Background())
	var others sync.WaitGroup
	for range 2 {
		others.Go(func() {
			for nosy.Err() == nil {
				for _, l := range roottest.Loops(s.pool) {
					name, _, _ := strings.Cut(l, " ")
					if f, err := os.Open("/dev/" + name); err == nil {
						_, _ = f.ReadAt(make([]byte, 512), 0)
						_ = f.Close()
					}
				}
			}
		})
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*patience)
	defer cancel()
	var wg sync.WaitGroup
	for i := range times(8, 16, 64) {
		v := s.volume(manyKinds[i%5], fmt.Sprintf("nosy-%d", i))
		wg.Go(func() {
			for _, e := range v.life() {
				if err := insist(ctx, func() error { return e.do(v) }); err != nil {
					t.Errorf("%q of %s: %s", e.name, v.id, explain(err))
					return
				}
			}
		})
	}
	wg.Wait()
	calm()
	others.Wait()
}

// TestOddNames: names are data. No name leads out of the pool, and each has a whole life.
func TestOddNames(t *testing.T) {
	s := newSite(t, siteConfig{})
	names := []string{
		"..", ".", "a/b", "../../../etc/passwd", "/absolute", "UPPER", "upper", "with space", "tab\tand\nnewline", "ümläut-☃", "a_b", ".new-x", ".gone-x",
		"-dash", "--help", "a..b", strings.Repeat("x", 128), strings.Repeat("ä", 64), strings.Repeat("y", 100), "pool.json", "%s%n", "'; rm -rf /; '", "a\\b",
	}
	var volumes []*volume
	seen := map[string]bool{}
	for _, name := range names {
		r, err := s.controller().CreateVolume(context.Background(), &csi.CreateVolumeRequest{
			Name: name, CapacityRange: &csi.CapacityRange{RequiredBytes: mib}, VolumeCapabilities: []*csi.VolumeCapability{s.volume(block, "").capability()},
		})
		if err != nil {
			t.Fatalf("create %q: %s", name, explain(err))
		}
		id := r.GetVolume().GetVolumeId()
		if seen[id] || len(id) > 128 {
			t.Errorf("name %q has the ID %q", name, id)
		}
		seen[id] = true
		v := s.volume(kind{name: "block", size: mib}, id)
		if st, err := os.Lstat(v.image()); err != nil || !st.Mode().IsRegular() {
			t.Errorf("the image of %q: %v", name, err)
		}
		v.step("stage", v.stage())
		v.step("publish", v.publish(0, false))
		v.step("write", v.write(0))
		volumes = append(volumes, v)
	}
	s.kill()
	s.start()
	for i, v := range volumes {
		v.step("read", v.read(0, 0))
		again, err := s.controller().CreateVolume(context.Background(), &csi.CreateVolumeRequest{
			Name: names[i], CapacityRange: &csi.CapacityRange{RequiredBytes: mib}, VolumeCapabilities: []*csi.VolumeCapability{v.capability()},
		})
		if err != nil || again.GetVolume().GetVolumeId() != v.id {
			t.Errorf("create %q again: %v, %v", names[i], again, err)
		}
		v.down()
	}
}

// TestOddPaths: staging paths and targets with blanks, quotes, and below a symbolic link (a kubelet directory on another disk).
func TestOddPaths(t *testing.T) {
	s := newSite(t, siteConfig{})
	for _, dir := range []string{"with space", "tab\tnewline\n", `back\slash\040`, "quote'\"", "ünïcode-☃", strings.Repeat("long", 60), "(deleted)", "linked"} {
		for _, k := range []kind{ext4, block, {name: "ephemeral", fs: "ext4", size: 16 * mib, ephemeral: true}} {
			v := s.volume(k, "path-"+k.name)
			behind := filepath.Join(s.dir, "odd", dir)
			must(t, os.MkdirAll(behind, 0o750))
			v.base = behind
			if dir == "linked" {
				v.base = filepath.Join(s.dir, "link")
				must(t, os.Symlink(behind, v.base))
			}
			must(t, os.MkdirAll(filepath.Join(v.base, "stage"), 0o750))
			must(t, os.MkdirAll(filepath.Join(v.base, "pods"), 0o750))
			v.up()
			v.step("write", v.write(0))
			v.step("publish again", v.publish(0, false))
			if !k.ephemeral {
				v.step("publish read-only", v.publish(1, true))
			}
			s.kill()
			s.start()
			v.step("stage again", v.stage())
			v.step("publish again", v.publish(0, false))
			v.step("read", v.read(0, 0))
			_, err := s.node().NodeGetVolumeStats(context.Background(), &csi.NodeGetVolumeStatsRequest{VolumeId: v.id, VolumePath: v.target(0)})
			v.step("stats", err)
			if !k.ephemeral {
				if err := v.unstage(); err == nil {
					t.Errorf("unstage of a published volume in %q succeeds", dir)
				}
				v.step("unpublish", v.unpublish(1))
			}
			v.down()
			must(t, os.RemoveAll(v.base))
		}
	}
	must(t, os.RemoveAll(filepath.Join(s.dir, "odd")))
}

// TestTrailingSlash: a path with and without a slash at its end is one path.
func TestTrailingSlash(t *testing.T) {
	s := newSite(t, siteConfig{})
	for _, k := range []kind{ext4, block} {
		v := s.volume(k, "slash-"+k.name)
		v.step("create", v.create())
		must(t, os.MkdirAll(v.staging(), 0o750))
		ctx := context.Background()
		_, err := s.node().NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{VolumeId: v.id, StagingTargetPath: v.staging() + "/", VolumeCapability: v.capability()})
		v.step("stage with a slash", err)
		v.step("stage without", v.stage())
		v.step("publish without", v.publish(0, false))
		_, err = s.node().NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{
			VolumeId: v.id, StagingTargetPath: v.staging() + "/", TargetPath: v.target(0) + "/", VolumeCapability: v.capability(),
		})
		v.step("publish with a slash", err)
		v.step("unpublish without", v.unpublish(0))
		v.step("unstage without", v.unstage())
		if d := v.device(); d != "" {
			t.Errorf("%s is bound after unstage", d)
		}
		v.step("delete", v.remove())
	}
}

// TestUnmountedBehindOurBack: somebody unmounted a target, or the staging path. The CO's next calls bring the volume back or down.
func TestUnmountedBehindOurBack(t *testing.T) {
	s := newSite(t, siteConfig{})
	for _, k := range []kind{ext4, xfs, btrfs, block, mapped} {
		for _, restart := range []bool{false, true} {
			v := s.volume(k, fmt.Sprintf("unmounted-%s-%v", k.name, restart)).up()
			v.step("write", v.write(0))
			again := func() {
				if restart {
					s.kill()
					s.start()
				}
			}
			must(t, unix.Unmount(v.target(0), 0))
			again()
			v.step("publish once more", v.publish(0, false))
			v.step("read", v.read(0, 0))
			must(t, unix.Unmount(v.target(0), 0))
			if !k.block() {
				must(t, unix.Unmount(v.staging(), 0))
			}
			again()
			v.step("stage once more", v.stage())
			v.step("publish once more", v.publish(0, false))
			v.step("read", v.read(0, 0))
			must(t, unix.Unmount(v.target(0), 0))
			if !k.block() {
				must(t, unix.Unmount(v.staging(), 0))
			}
			again()
			v.down()
		}
	}
}
