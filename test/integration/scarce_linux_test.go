package integration

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
)

// healthOf is the node's word on a volume: "STATUS Reason: message" of each entry.
func (v *volume) healthOf() []string {
	v.t.Helper()
	r, err := v.node().NodeGetVolumeHealth(context.Background(), &csi.NodeGetVolumeHealthRequest{VolumeId: v.id})
	must(v.t, err)
	var found []string
	for _, h := range r.GetVolumeHealth().GetHealthStatuses() {
		found = append(found, fmt.Sprintf("%s %s: %s", h.GetStatus(), h.GetReason(), h.GetMessage()))
	}
	return found
}

// TestFullUnderThin: a pool fills up under a thin volume. Its health says so before and then, and what to do; no
// volume is made; the volume fails its writer loudly; and when there is space again, it is whole.
func TestFullUnderThin(t *testing.T) {
	t.Parallel()
	for _, pool := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(pool, func(t *testing.T) {
			t.Parallel()
			s := newSite(t, siteConfig{poolFS: pool, poolSize: 512 << 20})
			v := s.volume(kind{name: "thin", fs: "ext4", size: 256 * mib, thin: true}, "thin").up()
			v.step("write", v.write(0))
			v.wantHealth("")
			ballast := filepath.Join(filepath.Dir(s.pool), "ballast")
			var st unix.Statfs_t
			must(t, unix.Statfs(s.pool, &st))
			f, err := os.Create(ballast)
			must(t, err)
			must(t, unix.Fallocate(int(f.Fd()), 0, 0, int64(st.Bavail)*st.Bsize-128*mib))
			must(t, unix.Syncfs(int(f.Fd()))) // btrfs counts at a commit
			must(t, f.Close())
			v.wantHealth("DEGRADED PoolNearlyFull", "more space")
			wantCode(t, "create below the mark", s.volume(kind{name: "thin", fs: "ext4", size: 16 * mib, thin: true}, "new").create(), codes.ResourceExhausted)

			empty := fill(t, filepath.Dir(s.pool))
			v.wantHealth("INACCESSIBLE PoolFull", "give the pool space")
			failed := 0
			for n := range 64 { // more than what the filesystem's own free blocks in the image can take
				if v.write(1+n) != nil {
					failed++
				}
			}
			if failed == 0 {
				t.Error("every write succeeded and was synced on a full pool")
			}
			empty()
			must(t, os.Remove(ballast))
			v.step("unpublish", asCO(v, func() error { return v.unpublish(0) }))
			v.step("unstage", asCO(v, v.unstage))
			v.step("stage", v.stage())
			v.step("publish", v.publish(0, false))
			v.step("read what was there before", v.read(0, 0))
			v.step("write", v.write(1))
			v.step("read", v.read(1, 0))
			v.wantHealth("")
			v.down()
		})
	}
}

// wantHealth waits for the one entry of a volume's health that begins like that and has the words; none for "".
func (v *volume) wantHealth(begin string, words ...string) {
	v.t.Helper()
	eventually(v.t, func() string {
		got := v.healthOf()
		text := strings.Join(got, "\n")
		ok := begin == "" && len(got) == 0 || begin != "" && len(got) == 1 && strings.HasPrefix(text, begin)
		for _, w := range words {
			ok = ok && strings.Contains(text, w)
		}
		if ok {
			return ""
		}
		return fmt.Sprintf("health is %q, want %q with %q", got, begin, words)
	})
}

// TestReadOnlyPool: the pool's filesystem shut itself for writing, as after an I/O error. Volumes in use can be read and taken down;
// calls that need to write say what is wrong, and so does health. What is wrong is what the kernel says: on Linux 6.18
// that it is read-only, on 6.12 an I/O error.
func TestReadOnlyPool(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{poolFS: "ext4", poolSize: 512 << 20})
	root := filepath.Dir(s.pool)
	used, idle := s.volume(ext4, "used").up(), s.rest(block, "idle")
	used.step("write", used.write(0))
	must(t, unix.Mount("", root, "", unix.MS_REMOUNT, "errors=remount-ro"))
	must(t, os.WriteFile("/sys/fs/ext4/"+filepath.Base(deviceBelow(t, root))+"/trigger_fs_error", []byte("1"), 0))
	used.step("read", used.read(0, 0))
	said := os.WriteFile(filepath.Join(root, "file"), nil, 0o600)
	code, words := codes.Unavailable, unix.EROFS.Error()
	if !errors.Is(said, unix.EROFS) {
		code, words = codes.Internal, unix.EIO.Error()
	}
	if said == nil || !strings.HasSuffix(said.Error(), words) {
		t.Fatalf("writing to it: %v, want %s", said, words)
	}
	for name, err := range map[string]error{
		"create": s.volume(block, "new").create(), "delete": idle.remove(), "expand": idle.expandImage(2 * idle.size),
	} {
		wantCode(t, name, err, code, words)
	}
	if got := strings.Join(idle.healthOf(), "\n"); !strings.Contains(got, "INACCESSIBLE PoolInaccessible") || !strings.Contains(got, words) {
		t.Errorf("health on a read-only pool: %q", got)
	}
	used.step("unpublish", asCO(used, func() error { return used.unpublish(0) }))
	used.step("unstage", asCO(used, used.unstage))
	s.keep = true // the volumes cannot be deleted
}

// deviceBelow is the device of the filesystem that is mounted at a directory.
func deviceBelow(t *testing.T, dir string) string {
	t.Helper()
	b, err := os.ReadFile("/proc/self/mountinfo")
	must(t, err)
	for line := range strings.Lines(string(b)) {
		left, right, _ := strings.Cut(line, " - ")
		if f := strings.Fields(left); len(f) > 4 && f[4] == dir {
			return strings.Fields(right)[1]
		}
	}
	t.Fatalf("nothing is mounted at %s", dir)
	return ""
}
