package integration

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

// TestThickStaysThick: nothing that a tenant or the kernel does takes blocks away
// from a thick volume.
func TestThickStaysThick(t *testing.T) {
	t.Parallel()
	roottest.Require(t)
	for _, pool := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(pool, func(t *testing.T) {
			t.Parallel()
			s := newSite(t, siteConfig{poolFS: pool, poolSize: 2 << 30})
			for _, k := range []kind{ext4, {name: "ext3", fs: "ext3", size: 32 * mib}, xfs, btrfs, {name: "ext4-128", fs: "ext4", size: 128 * mib}} {
				v := s.volume(k, "thick-"+k.name)
				v.flags = []string{"discard"}
				v.step("create", v.create())
				v.thick("create")
				v.step("stage", v.stage())
				v.step("publish", v.publish(0, false))
				v.thick("stage")
				v.punishFilesystem()
				v.step("unpublish", v.unpublish(0))
				v.step("unstage", v.unstage())
				v.thick("unstage")
				v.step("delete", v.remove())
			}
			v := s.volume(kind{name: "block", size: 32 * mib}, "thick-block").up()
			v.thick("stage")
			v.step("write", v.write(0))
			for what, err := range map[string]error{
				"BLKDISCARD": discard(v.target(0), 0, v.want), "BLKZEROOUT": zeroOut(v.target(0), 0, v.want),
				"punch":                 fallocateDevice(v.target(0), punchHole, 0, v.want),
				"zero":                  fallocateDevice(v.target(0), zeroRange, 0, v.want),
				"blkdiscard -z in part": zeroOut(v.target(0), 4096, 8192),
			} {
				t.Logf("%s on a thick device: %v", what, err)
				v.thick(what)
			}
			v.down()
		})
	}
}

// punishFilesystem writes, removes and trims, and waits for what the kernel does
// on its own.
func (v *volume) punishFilesystem() {
	t := v.t.(*testing.T)
	for i := range 8 {
		v.step("write", v.write(i))
	}
	v.thick("write")
	for i := range 8 {
		must(t, os.Remove(filepath.Join(v.target(0), fmt.Sprint("data-", i))))
	}
	syncFS(t, v.target(0))
	v.thick("remove")
	trimmed, err := trim(v.target(0))
	t.Logf("FITRIM on a thick %s: %d bytes, %v", v.name(), trimmed, err)
	v.thick("fstrim")
	// ext4's lazy init and btrfs's discard=async work in the background.
	wait := time.Duration(times(200, 700, 15000)) * time.Millisecond
	_ = waitFor(wait, func() string {
		v.thick("waiting")
		if t.Failed() {
			return ""
		}
		return "watch on"
	})
	syncFS(t, v.target(0))
	v.thick("waiting")
}

// TestThinGivesBack: the same acts free blocks of a thin volume.
func TestThinGivesBack(t *testing.T) {
	t.Parallel()
	roottest.Require(t)
	for _, pool := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(pool, func(t *testing.T) {
			t.Parallel()
			s := newSite(t, siteConfig{poolFS: pool, poolSize: 2 << 30})
			for _, fs := range []string{"ext4", "xfs", "btrfs"} {
				v := s.volume(kind{name: "thin-" + fs, fs: fs, size: 300 * mib, thin: true}, "thin-"+fs).up()
				path := filepath.Join(v.target(0), "large")
				must(t, writeFile(path, make([]byte, 64*mib), 0, os.O_CREATE))
				syncFS(t, v.target(0))
				full, err := allocated(v.image())
				must(t, err)
				if full < 64*mib || full >= v.want {
					t.Errorf("thin %s: %d bytes allocated with 64 MiB of data", fs, full)
				}
				must(t, os.Remove(path))
				syncFS(t, v.target(0))
				v.shrinksBelow(full-48*mib, func() error { // xfs frees the blocks of a removed file a moment later
					_, err := trim(v.target(0))
					return err
				})
				v.down()
				s.discardsByItself(fs)
			}
			v := s.volume(kind{name: "thin-block", size: 64 * mib, thin: true}, "thin-block").up()
			v.thinDevice()
			v.down()
		})
	}
}

// discardsByItself: with the mount option a thin volume gives back what is removed.
func (s *site) discardsByItself(fs string) {
	s.t.Helper()
	v := s.volume(kind{name: "discard-" + fs, fs: fs, size: 300 * mib, thin: true}, "discard-"+fs)
	v.flags = []string{"discard"}
	v.up()
	path := filepath.Join(v.target(0), "large")
	must(s.t, writeFile(path, make([]byte, 64*mib), 0, os.O_CREATE))
	sync := func() error {
		return withDevice(v.target(0), os.O_RDONLY, func(fd uintptr) error { return unix.Syncfs(int(fd)) })
	}
	must(s.t, sync())
	full, err := allocated(v.image())
	must(s.t, err)
	must(s.t, os.Remove(path))
	v.shrinksBelow(full-48*mib, sync)
	v.down()
}

// shrinksBelow repeats an act until the image has fewer bytes of blocks.
func (v *volume) shrinksBelow(limit int64, act func() error) {
	v.t.Helper()
	eventually(v.t, func() string {
		err := act()
		have, statErr := allocated(v.image())
		if err = errors.Join(err, statErr); err != nil || have >= limit {
			return fmt.Sprintf("%s: %d bytes are allocated, want less than %d (%v)", v.name(), have, limit, err)
		}
		return ""
	})
}

// thinDevice writes a published thin raw volume and discards it again.
func (v *volume) thinDevice() {
	v.t.Helper()
	for _, f := range []func(string, int64, int64) error{discard, zeroOut} {
		v.step("fill", writeFile(v.target(0), make([]byte, 32*mib), 0, 0))
		if have, err := allocated(v.image()); err != nil || have < 32*mib {
			v.t.Errorf("%d bytes allocated after 32 MiB were written, %v", have, err)
		}
		v.step("discard", f(v.target(0), 0, v.want))
		if got, err := deviceByte(v.target(0)); err != nil || got != 0 {
			v.t.Errorf("a discarded byte reads as %d, %v", got, err)
		}
	}
	v.shrinksBelow(mib, func() error { return discard(v.target(0), 0, v.want) })
}

func deviceByte(path string) (byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	b := make([]byte, 1)
	_, err = f.ReadAt(b, 4096)
	return b[0], err
}

// TestThinAfterThick: the mask that keeps a thick volume thick sticks to the device's
// number (fact 63) and must not stay on when a thin volume gets that number.
func TestThinAfterThick(t *testing.T) {
	s := newSite(t, siteConfig{})
	same := 0
	for i := range times(4, 8, 30) {
		thick := s.volume(block, fmt.Sprint("thick", i)).up()
		number := thick.device()
		thick.down()
		thin := s.volume(kind{name: "thin", size: 64 * mib, thin: true}, fmt.Sprint("thin", i)).up()
		if thin.device() == number {
			same++
		}
		thin.thinDevice()
		thin.down()
		again := s.volume(block, fmt.Sprint("again", i)).up()
		_ = discard(again.target(0), 0, again.want)
		again.thick("a thin volume had its number")
		again.down()
	}
	t.Logf("the thin volume got the number of the thick one %d times", same)
}
