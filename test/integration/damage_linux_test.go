package integration

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

// debugfs changes an ext image that is not attached.
func (v *volume) debugfs(commands ...string) {
	v.t.Helper()
	for _, c := range commands {
		roottest.Run(v.t, "debugfs", "-w", "-R", c, v.image())
	}
}

// state is what an ext superblock says about itself.
func (v *volume) fsState() string {
	v.t.Helper()
	out := roottest.Run(v.t, "dumpe2fs", "-h", v.image())
	for line := range strings.Lines(out) {
		if s, ok := strings.CutPrefix(line, "Filesystem state:"); ok {
			return strings.TrimSpace(s)
		}
	}
	return ""
}

// rest brings a volume with data to the state between unstage and stage.
func (s *site) rest(k kind, name string) *volume {
	s.t.Helper()
	v := s.volume(k, name).up()
	v.step("write", v.write(0))
	v.step("unpublish", v.unpublish(0))
	v.step("unstage", v.unstage())
	return v
}

// TestErrorFlagIsRepaired (F12): the kernel noted an error in the superblock; the next stage checks.
func TestErrorFlagIsRepaired(t *testing.T) {
	s := newSite(t, siteConfig{})
	for _, fs := range []string{"ext4", "ext3", "ext2"} {
		v := s.rest(kind{name: fs, fs: fs, size: 32 * mib}, "flag-"+fs)
		v.debugfs("set_super_value state 3", "set_super_value free_blocks_count 17")
		if got := v.fsState(); !strings.Contains(got, "error") {
			t.Fatalf("state %q, the test is wrong", got)
		}
		v.step("stage", v.stage())
		v.step("publish", v.publish(0, false))
		v.step("read", v.read(0, 0))
		v.step("unpublish", v.unpublish(0))
		v.step("unstage", v.unstage())
		if got := v.fsState(); got != "clean" {
			t.Errorf("state after stage and unstage: %q", got)
		}
		roottest.Run(t, "e2fsck", "-fn", v.image())
		v.step("delete", v.remove())
	}
}

// refused proves that a stage was refused with one of the codes and left nothing, and that others are served.
func (v *volume) refused(want ...codes.Code) {
	t := v.t
	t.Helper()
	for range 2 {
		err := v.stage()
		if err == nil || !slices.Contains(want, status.Code(err)) {
			t.Errorf("stage of %s: %s; want one of %v", v.id, explain(err), want)
		}
	}
	if d := v.device(); d != "" {
		t.Errorf("%s is bound after a refused stage", d)
	}
	if m := mountsBelow(v.staging()); len(m) > 0 {
		t.Errorf("mounted after a refused stage: %q", m)
	}
	if left := v.strays(v.process().cmd.Process); len(left) > 0 {
		t.Errorf("processes after a refused stage: %q", left)
	}
	v.step("unstage of what was not staged", v.unstage())
	other := v.site.volume(kind{name: "ext4", fs: "ext4", size: 8 * mib}, "other").up()
	other.down()
}

// TestBeyondRepair (F12): damage that preen does not mend is a person's decision.
func TestBeyondRepair(t *testing.T) {
	s := newSite(t, siteConfig{})
	v := s.rest(ext4, "beyond")
	v.debugfs("clri <2>", "set_super_value state 3") // the root directory's inode
	v.refused(codes.FailedPrecondition)
	v.step("delete", v.remove())

	// Nothing in the superblock tells; the mount does.
	v = s.rest(ext4, "beyond-unflagged")
	v.debugfs("clri <2>")
	v.refused(codes.FailedPrecondition, codes.DataLoss)
	v.step("delete", v.remove())
}

// TestDamagedXFS: xfs and btrfs are never repaired by the driver.
func TestDamagedXFS(t *testing.T) {
	s := newSite(t, siteConfig{})
	for _, k := range []kind{xfs, btrfs} {
		v := s.rest(k, "damaged-"+k.name)
		if k.fs == "xfs" { // the headers of the first allocation group, behind the superblock
			must(t, writeFile(v.image(), []byte(strings.Repeat("damaged!", 512*3)), 4096, 0))
		} else { // the trees; the superblock is at 64 KiB
			must(t, writeFile(v.image(), make([]byte, 63*mib), mib, 0))
		}
		v.refused(codes.FailedPrecondition, codes.DataLoss)
		v.step("delete", v.remove())
	}
}

// fingerprint is the beginning of a file, where every filesystem has its superblock.
// That a thick image gets lost blocks back is no change.
func fingerprint(t testing.TB, path string) string {
	t.Helper()
	f, err := os.Open(path)
	must(t, err)
	defer f.Close()
	h := sha256.New()
	_, err = io.CopyN(h, f, 4*mib)
	must(t, err)
	return hex.EncodeToString(h.Sum(nil))
}

// TestUnreadableSuperblockIsNotFormatted (F13): no filesystem is seen, and none is made.
func TestUnreadableSuperblockIsNotFormatted(t *testing.T) {
	s := newSite(t, siteConfig{})
	for _, k := range []kind{ext4, xfs, btrfs} {
		for _, how := range []string{"zeros", "other"} {
			v := s.rest(k, how+"-"+k.name)
			if how == "zeros" {
				must(t, writeFile(v.image(), make([]byte, mib), 0, 0))
			} else { // a filesystem that the driver did not make
				other := map[string][]string{"ext4": {"mkfs.btrfs", "-q", "-f"}, "xfs": {"mkfs.ext4", "-q", "-F"}, "btrfs": {"mkfs.ext4", "-q", "-F"}}[k.fs]
				if k.fs == "ext4" {
					other = []string{"mkswap", "-q"}
				}
				if k.fs == "btrfs" || k.fs == "xfs" {
					must(t, writeFile(v.image(), make([]byte, mib), 0, 0))
				}
				if out, err := exec.Command(other[0], append(other[1:], v.image())...).CombinedOutput(); err != nil {
					t.Fatalf("%v: %v %s", other, err, out)
				}
				if k.fs == "ext4" { // mkswap leaves the superblock at 1024
					must(t, writeFile(v.image(), make([]byte, 4096-1024), 1024, 0))
				}
			}
			before := fingerprint(t, v.image())
			v.refused(codes.FailedPrecondition, codes.DataLoss)
			if after := fingerprint(t, v.image()); after != before {
				t.Errorf("%s, %s: a refused stage changed the image", k.name, how)
			}
			v.step("delete", v.remove())
		}
	}
}

// unhealthy are the IDs that the driver reports as such, with reasons.
func (s *site) unhealthy() map[string]string {
	s.t.Helper()
	r, err := s.controller().ControllerListVolumeHealth(context.Background(), &csi.ControllerListVolumeHealthRequest{})
	must(s.t, err)
	found := map[string]string{}
	for _, e := range r.GetEntries() {
		for _, h := range e.GetHealthStatuses() {
			found[e.GetVolumeId()] += h.GetReason() + " "
		}
	}
	return found
}

// TestImageReplaced: what is done to an image behind our back gives a clear error for that volume, which its health
// names and which can still be deleted; the others are served, also after a restart.
func TestImageReplaced(t *testing.T) {
	s := newSite(t, siteConfig{})
	outside := filepath.Join(s.dir, "outside")
	must(t, os.WriteFile(outside, []byte("somebody's data"), 0o600))
	for name, damage := range map[string]func(v *volume) error{
		"truncated": func(v *volume) error { return os.Truncate(v.image(), v.want/2) },
		"empty":     func(v *volume) error { return os.Truncate(v.image(), 0) },
		"longer":    func(v *volume) error { return os.Truncate(v.image(), v.want+1) },
		"missing":   func(v *volume) error { return os.Remove(v.image()) },
		"symlink": func(v *volume) error {
			return errors.Join(os.Remove(v.image()), os.Symlink(outside, v.image()))
		},
		"hard-link": func(v *volume) error { return os.Link(v.image(), v.dir+"/link-"+v.key()) },
		"fifo":      func(v *volume) error { return errors.Join(os.Remove(v.image()), syscall.Mkfifo(v.image(), 0o600)) },
		"directory": func(v *volume) error { return errors.Join(os.Remove(v.image()), os.Mkdir(v.image(), 0o700)) },
		"device": func(v *volume) error {
			return errors.Join(os.Remove(v.image()), syscall.Mknod(v.image(), syscall.S_IFBLK|0o600, 7<<8))
		},
	} {
		t.Run(name, func(t *testing.T) {
			for _, k := range []kind{ext4, block} {
				v := s.rest(k, name+"-"+k.name)
				v.t = t
				must(t, damage(v))
				for range 2 {
					v.refused(codes.DataLoss, codes.FailedPrecondition)
					if got := s.unhealthy(); got[v.id] == "" || len(got) != 1 {
						t.Errorf("unhealthy volumes: %v, want %s", got, v.id)
					}
					r, err := s.node().NodeGetVolumeHealth(context.Background(), &csi.NodeGetVolumeHealthRequest{VolumeId: v.id})
					if err != nil || len(r.GetVolumeHealth().GetHealthStatuses()) == 0 {
						t.Errorf("the node's view of its health: %v, %v", r, err)
					}
					if err := v.expand(2 * v.want); err == nil {
						t.Errorf("a damaged volume was expanded")
					} else if c := status.Code(err); c != codes.DataLoss && c != codes.FailedPrecondition {
						t.Errorf("expand: %s", explain(err))
					}
					v.want = v.size
					s.kill()
					s.start()
				}
				v.step("delete", v.remove())
				if got, err := os.ReadFile(outside); err != nil || string(got) != "somebody's data" {
					t.Errorf("a file outside the pool is %q, %v", got, err)
				}
				_ = os.Remove(v.dir + "/link-" + v.key())
			}
		})
	}
	must(t, os.Remove(outside))
}

// TestVolumeDirectoryReplaced: a volume's directory became a link to somewhere else, where nothing may be touched.
func TestVolumeDirectoryReplaced(t *testing.T) {
	s := newSite(t, siteConfig{})
	v := s.rest(ext4, "directory-replaced")
	dir, moved := filepath.Dir(v.image()), filepath.Join(s.dir, "moved")
	must(t, os.Rename(dir, moved))
	must(t, os.Symlink(moved, dir))
	v.refused(codes.DataLoss, codes.FailedPrecondition)
	if got := s.unhealthy(); got[v.id] == "" {
		t.Errorf("unhealthy volumes: %v, want %s", got, v.id)
	}
	_ = v.remove() // refused, or only the link is removed
	s.kill()
	s.start()
	_ = v.remove()
	for _, name := range []string{"disk.img", "volume.json"} {
		if _, err := os.Stat(filepath.Join(moved, name)); err != nil {
			t.Errorf("a removal went through the link: %v", err)
		}
	}
	_ = os.Remove(dir)
	must(t, os.Rename(moved, dir))
	s.kill()
	s.start()
	v.step("stage once it is mended", v.stage())
	v.step("publish", v.publish(0, false))
	v.step("read", v.read(0, 0))
	v.down()
}

// TestImageTruncatedWhileUsed: the device keeps its size and gives errors (fact 41); the volume is named, can be taken down, and deleted.
func TestImageTruncatedWhileUsed(t *testing.T) {
	s := newSite(t, siteConfig{})
	for _, k := range []kind{ext4, block} {
		v := s.volume(k, "cut-"+k.name).up()
		v.step("write", v.write(0))
		must(t, os.Truncate(v.image(), v.want/2))
		if got := s.unhealthy(); got[v.id] == "" {
			t.Errorf("unhealthy volumes: %v, want %s", got, v.id)
		}
		wantCode(t, "delete of a damaged volume that is in use", v.remove(), codes.FailedPrecondition)
		v.step("unpublish", v.unpublish(0))
		v.step("unstage", v.unstage())
		v.step("delete", v.remove())
	}
}

// TestRemovedImageIsSavedFromItsDevice: an image that was removed while its pods run is saved from the device and put back, as
// the volume's health and docs/operations.md say.
func TestRemovedImageIsSavedFromItsDevice(t *testing.T) {
	s := newSite(t, siteConfig{})
	v := s.volume(ext4, "removed").up()
	v.step("write", v.write(0))
	device := v.device()
	must(t, os.Remove(v.image()))
	v.wantHealth("DATA_LOSS ImageMissing", "hold the device open before the pods are deleted")
	held, err := os.Open(device)
	must(t, err)
	v.step("write what is saved too", v.write(1))
	v.step("unpublish", asCO(v, func() error { return v.unpublish(0) }))
	wantCode(t, "unstage what is held", v.unstage(), codes.Aborted)
	roottest.Run(t, "dd", "if="+device, "of="+v.dir+"/saved.img", "bs=1M", "iflag=direct", "conv=sparse,fsync", "status=none")
	must(t, held.Close())
	v.step("unstage", asCO(v, v.unstage))
	wantCode(t, "stage without an image", v.stage(), codes.DataLoss)
	roottest.Run(t, "cp", "--sparse=always", v.dir+"/saved.img", v.image())
	v.wantHealth("DEGRADED NotFullyAllocated")
	v.step("stage", v.stage())
	v.step("publish", v.publish(0, false))
	v.step("read", v.read(0, 0))
	v.step("read what was written last", v.read(1, 0))
	v.wantHealth("")
	must(t, os.Remove(v.dir+"/saved.img"))
	v.down()
}

// TestDamagedImageAttachedByHand: a damaged image may be attached to somebody's device all the same, who must not lose it.
func TestDamagedImageAttachedByHand(t *testing.T) {
	s := newSite(t, siteConfig{})
	for name, damage := range map[string]func(v *volume) error{
		"hard-link": func(v *volume) error { return os.Link(v.image(), v.dir+"/link") },
		"longer":    func(v *volume) error { return os.Truncate(v.image(), v.want+mib) },
	} {
		v := s.rest(ext4, "by-hand-"+name)
		node := s.losetup(v.image())
		must(t, damage(v))
		wantCode(t, "delete of a damaged image that is attached by hand ("+name+")", v.remove(), codes.FailedPrecondition, node)
		s.detach(node)
		_ = os.Remove(v.dir + "/link")
		v.step("delete", v.remove())
	}
}

// TestDamagedVolumeRecord: a record that cannot be read is one volume's trouble.
func TestDamagedVolumeRecord(t *testing.T) {
	s := newSite(t, siteConfig{})
	good := s.rest(ext4, "good")
	for i, damage := range []string{"", "{", `{"formatVersion":99}`} {
		v := s.rest(block, fmt.Sprint("bad-record-", i))
		record := filepath.Join(filepath.Dir(v.image()), "volume.json")
		whole, err := os.ReadFile(record)
		must(t, err)
		s.kill()
		must(t, os.WriteFile(record, []byte(damage), 0o600))
		s.start()
		if err := v.stage(); err == nil || status.Code(err) == codes.Internal || status.Code(err) == codes.Unknown {
			t.Errorf("stage: %s", explain(err))
		}
		// It must not be taken for a volume that does not exist, whose name is free.
		if err := v.create(); err == nil {
			t.Errorf("create over a damaged record succeeds")
		} else if c := status.Code(err); c == codes.Internal || c == codes.Unknown {
			t.Errorf("create over a damaged record: %s", explain(err))
		}
		if err := v.remove(); err == nil || status.Code(err) == codes.Internal {
			t.Errorf("delete of a volume whose record cannot be read: %s", explain(err))
		}
		if _, err := os.Stat(v.image()); err != nil {
			t.Errorf("its image is gone: %v", err)
		}
		r, err := s.node().NodeGetStorageHealth(context.Background(), &csi.NodeGetStorageHealthRequest{})
		if err != nil || !strings.Contains(fmt.Sprint(r), v.key()) {
			t.Errorf("the pool's health does not name it: %v, %v", r, err)
		}
		good.step("stage", good.stage())
		good.step("unstage", good.unstage())
		s.kill()
		must(t, os.WriteFile(record, whole, 0o600))
		s.start()
		v.step("stage once the record is mended", v.stage())
		v.step("publish", v.publish(0, false))
		v.step("read", v.read(0, 0))
		v.down()
	}
	good.step("delete", good.remove())
}
