package integration

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

// losetup attaches a file by hand; the test's clean-up detaches it.
func (s *site) losetup(args ...string) (node string) {
	s.t.Helper()
	// Others take devices at the same time, which losetup reports as busy or gone.
	eventually(s.t, func() string {
		out, err := exec.Command("losetup", append([]string{"--find", "--show"}, args...)...).CombinedOutput()
		if err != nil {
			return string(out)
		}
		node = strings.TrimSpace(string(out))
		return ""
	})
	s.foreign = append(s.foreign, node)
	return node
}

// detach is losetup -d, and proves that the device is free.
func (s *site) detach(node string) {
	s.t.Helper()
	roottest.Run(s.t, "losetup", "-d", node)
	s.foreign = slices.DeleteFunc(s.foreign, func(n string) bool { return n == node })
	eventually(s.t, func() string {
		if all := append(roottest.Loops(s.dir), roottest.Loops(s.pool)...); slices.ContainsFunc(all, func(l string) bool { return strings.HasPrefix(l, filepath.Base(node)+" ") }) {
			return node + " is still bound"
		}
		return ""
	})
}

// picture is what losetup shows of a device.
func picture(t testing.TB, node string) string {
	t.Helper()
	var out strings.Builder
	out.WriteString(roottest.Run(t, "losetup", "--list", "--json", "--output", "NAME,BACK-INO,BACK-FILE,OFFSET,SIZELIMIT,RO,AUTOCLEAR,DIO,LOG-SEC", node))
	name := filepath.Base(node)
	for _, f := range []string{"diskseq", "queue/discard_max_bytes"} {
		b, err := os.ReadFile("/sys/block/" + name + "/" + f)
		must(t, err)
		fmt.Fprintf(&out, "%s %s", f, b)
	}
	return out.String()
}

// TestForeignDeviceIsLeftAlone: a device that losetup bound is untouched by whatever the driver does.
func TestForeignDeviceIsLeftAlone(t *testing.T) {
	s := newSite(t, siteConfig{})
	file := filepath.Join(s.dir, "foreign.img")
	must(t, os.WriteFile(file, []byte(strings.Repeat("foreign ", 1<<19)), 0o600))
	node := s.losetup("--offset", "4096", file)
	before := picture(t, node)
	each(t, 8, s)
	v := s.volume(block, "foreign").up()
	s.kill()
	s.start()
	v.down()
	s.stop()
	s.start()
	if after := picture(t, node); after != before {
		t.Errorf("the foreign device was\n%s\nand is\n%s", before, after)
	}
	s.detach(node)
	must(t, os.Remove(file))
}

// TestImageAttachedByHand: staging and deleting refuse an image that somebody attached, and name the device.
func TestImageAttachedByHand(t *testing.T) {
	s := newSite(t, siteConfig{})
	for _, k := range []kind{ext4, btrfs, block} {
		for _, args := range [][]string{nil, {"--sector-size", "4096"}, {"--sector-size", "4096", "--direct-io=on"}} {
			v := s.volume(k, fmt.Sprintf("by-hand-%s-%d", k.name, len(args)))
			v.step("create", v.create())
			node := s.losetup(append(slices.Clone(args), v.image())...)
			before := picture(t, node)
			wantCode(t, "stage", v.stage(), codes.FailedPrecondition, node)
			wantCode(t, "delete", v.remove(), codes.FailedPrecondition, node)
			s.kill()
			s.start()
			wantCode(t, "stage after a restart", v.stage(), codes.FailedPrecondition, node)
			wantCode(t, "delete after a restart", v.remove(), codes.FailedPrecondition, node)
			v.step("unstage of what is not staged", v.unstage())
			if after := picture(t, node); after != before {
				t.Errorf("the device was\n%s\nand is\n%s", before, after)
			}
			if got, err := os.Stat(v.image()); err != nil || got.Size() != v.want {
				t.Errorf("the image: %v, %v", got, err)
			}
			s.detach(node)
			v.step("stage", v.stage())
			v.step("publish", v.publish(0, false))
			v.step("write", v.write(0))
			v.down()
		}
	}
}

// TestReadOnlyDeviceByHand: somebody who looks at an image through a read-only device is not in the way of a
// staging, and is in the way of a removal.
func TestReadOnlyDeviceByHand(t *testing.T) {
	s := newSite(t, siteConfig{})
	v := s.volume(ext4, "looked-at")
	v.step("create", v.create())
	node := s.losetup("--read-only", v.image())
	before := picture(t, node)
	v.step("stage", v.stage())
	v.step("publish", v.publish(0, false))
	v.step("write", v.write(0))
	v.step("unpublish", v.unpublish(0))
	v.step("unstage", v.unstage())
	wantCode(t, "delete", v.remove(), codes.FailedPrecondition, node)
	if after := picture(t, node); after != before {
		t.Errorf("the device was\n%s\nand is\n%s", before, after)
	}
	s.detach(node)
	v.step("delete", v.remove())
}

// TestDetachedBehindOurBack: losetup -d of a staged volume's device. What is in use stays in use; a device that is gone is told,
// and the volume can be brought back by unpublish, unstage and stage.
func TestDetachedBehindOurBack(t *testing.T) {
	s := newSite(t, siteConfig{})
	for _, k := range []kind{block, ext4, mapped} {
		for _, restart := range []bool{false, true} {
			v := s.volume(k, fmt.Sprintf("detached-%s-%v", k.name, restart)).up()
			v.step("write", v.write(0))
			node := v.device()
			// The driver (raw) or the mount holds it, so the kernel only marks it.
			roottest.Run(t, "losetup", "-d", node)
			v.step("read after losetup -d", v.read(0, 0))
			if restart {
				s.kill() // of a raw volume that was the last user
				s.start()
				if k.block() {
					eventually(t, func() string {
						if n := v.device(); n != "" {
							return n + " is still bound"
						}
						return ""
					})
					wantCode(t, "publish of a volume that lost its device", v.publish(1, false), codes.FailedPrecondition)
				}
			}
			v.step("unpublish", v.unpublish(0))
			v.step("unstage", v.unstage())
			v.step("stage", v.stage())
			v.step("publish", v.publish(0, false))
			v.step("read", v.read(0, 0))
			v.down()
		}
	}
}

// TestReusedNumber: the number of a device that was detached behind our back is bound to something else. Neither
// the driver nor the unpublishing may touch that, and no new publication may show it.
func TestReusedNumber(t *testing.T) {
	s := newSite(t, siteConfig{})
	v := s.volume(block, "victim").up()
	v.step("write", v.write(0))
	node := v.device()
	roottest.Run(t, "losetup", "-d", node)
	s.kill()
	file := filepath.Join(s.dir, "foreign.img")
	must(t, os.WriteFile(file, make([]byte, 2*mib), 0o600))
	if out, err := exec.Command("losetup", node, file).CombinedOutput(); err != nil {
		t.Logf("the number could not be bound anew, nothing is tested: %v %s", err, out)
	} else {
		s.foreign = append(s.foreign, node)
	}
	s.start()
	if err := v.publish(1, false); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("publish when the device shows another file: %s", explain(err))
	}
	r, err := s.node().NodeGetVolumeHealth(context.Background(), &csi.NodeGetVolumeHealthRequest{VolumeId: v.id})
	t.Logf("health: %v %v", r, err)
	if slices.Contains(s.foreign, node) {
		before := picture(t, node)
		v.step("unpublish", v.unpublish(0))
		v.step("unstage", v.unstage())
		if after := picture(t, node); after != before {
			t.Errorf("the foreign device was\n%s\nand is\n%s", before, after)
		}
		s.detach(node)
	} else {
		v.step("unpublish", v.unpublish(0))
		v.step("unstage", v.unstage())
	}
	v.step("stage", v.stage())
	v.step("publish", v.publish(0, false))
	v.step("read", v.read(0, 0))
	v.down()
	must(t, os.Remove(file))
}

// TestLoopOnTop: kubelet puts a loop device of its own on a published raw volume (fact 30).
func TestLoopOnTop(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{})
	v := s.volume(block, "below").up()
	v.step("write", v.write(0))
	node := s.losetup(v.device())
	before := picture(t, node)
	s.kill()
	s.start()
	if after := picture(t, node); after != before {
		t.Errorf("kubelet's device was\n%s\nand is\n%s", before, after)
	}
	v.step("unpublish", v.unpublish(0))
	wantCode(t, "unstage with kubelet's device on top", v.unstage(), codes.Aborted)
	must(t, compareFile(node, v.pattern(0), 0)) // and works
	s.detach(node)
	v.step("unstage", v.unstage())
	v.step("stage", v.stage())
	v.step("publish", v.publish(0, false))
	v.step("read", v.read(0, 0))
	v.down()
}

// TestLosetupShowsUs: what losetup -l prints of our devices leads a person to the volume.
func TestLosetupShowsUs(t *testing.T) {
	s := newSite(t, siteConfig{})
	v := s.volume(block, "shown").up()
	out := roottest.Run(t, "losetup", "--list", "--noheadings", "--output", "BACK-FILE", v.device())
	if got := strings.TrimSpace(out); got != v.image() {
		t.Errorf("losetup shows the file %q, want %q", got, v.image())
	}
	tag, err := deviceTag(v.device())
	if err != nil || tag != v.id {
		t.Errorf("the device's tag is %q, %v, want %q", tag, err, v.id)
	}
	v.down()
}
