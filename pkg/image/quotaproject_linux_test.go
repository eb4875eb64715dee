package image

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

// bounded tells the test that it has no CAP_SYS_RESOURCE, which ext4 lets pass its quotas.
const bounded = "CSI_LOOP_TEST_BOUNDED"

const quotaLimit = 96 * MiB

// project makes a filesystem with project quotas, and on it a directory for a pool that
// may hold quotaLimit.
func project(t *testing.T, fsType string) (dir, device string) {
	t.Helper()
	top, device := withQuotas(t, fsType, "quota,project", "prjquota")
	dir = filepath.Join(top, "pool")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	roottest.Run(t, "xfs_io", "-c", "chproj 7", "-c", "chattr +P", dir)
	limitQuota(t, device, projectQuota, 7, quotaLimit)
	return dir, device
}

// withQuotas mounts a filesystem of 512 MiB with quotas. The features are those that
// mkfs.ext4 wants for it, the options those of the mount. The test is skipped where the
// kernel has no such quotas, and fails where the virtual machine should have them.
func withQuotas(t *testing.T, fsType, features, options string) (top, device string) {
	t.Helper()
	top = t.TempDir()
	image := filepath.Join(t.TempDir(), "pool.img")
	if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, 512*MiB)); err != nil {
		t.Fatal(err)
	}
	mkfs := map[string][]string{
		"ext4": {"mkfs.ext4", "-q", "-F", "-m", "0", "-I", "256", "-O", features, "-E", "quotatype=" + strings.ReplaceAll(options, ",", ":")},
		"xfs":  {"mkfs.xfs", "-q", "-f"},
	}[fsType]
	roottest.Run(t, append(mkfs, image)...)
	device = roottest.Losetup(t, image)
	t.Cleanup(func() { roottest.Run(t, "losetup", "-d", device) })
	if err := unix.Mount(device, top, fsType, 0, options); err != nil {
		if os.Getenv("CSI_LOOP_VM") != "" {
			t.Fatalf("the virtual machine has no quotas (%s): %v", options, err)
		}
		t.Skipf("this kernel has no such quotas for %s (%s: %v): make test-vm runs it in a virtual machine", fsType, options, err)
	}
	t.Cleanup(func() { roottest.Run(t, "umount", top) })
	return top, device
}

// Kinds of quotas, as quotactl numbers them.
const (
	userQuota    = 0
	groupQuota   = 1
	projectQuota = 2
)

// limitQuota is quotactl's Q_SETQUOTA: what a user, group or project may have, in bytes.
func limitQuota(t *testing.T, device string, kind, id uintptr, limit int64) {
	t.Helper()
	const setQuota, blockLimits = 0x800008, 1
	arg := struct { // if_dqblk, limits in KiB
		hard, soft, space, inodesHard, inodesSoft, inodes, blockTime, inodeTime uint64
		valid                                                                   uint32
	}{hard: uint64(limit) >> 10, valid: blockLimits}
	name, err := unix.BytePtrFromString(device)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, errno := unix.Syscall6(unix.SYS_QUOTACTL, setQuota<<8|kind, uintptr(unsafe.Pointer(name)), id, uintptr(unsafe.Pointer(&arg)), 0, 0); errno != 0 {
		t.Fatal("quotactl: ", errno)
	}
}

// withoutResource runs the test that calls it once more, in a process that lacks
// CAP_SYS_RESOURCE, and reports what that said.
func withoutResource(t *testing.T) {
	t.Helper()
	name, _, _ := strings.Cut(t.Name(), "/")
	cmd := exec.Command("setpriv", "--inh-caps=-sys_resource", "--bounding-set=-sys_resource", os.Args[0], "-test.run=^"+name+"$", "-test.v")
	cmd.Env = append(os.Environ(), bounded+"=1")
	out, err := cmd.CombinedOutput()
	t.Logf("%s", out)
	switch {
	case err != nil:
		t.Error(err)
	case bytes.Contains(out, []byte("--- SKIP")):
		t.Skip("see above")
	}
}

// A quota of the project that the pool's directory is in: statfs tells of it, so it is
// the pool's size. Nothing is promised beyond it, writers of thin volumes are told, and
// a thick volume can be written to the last byte when it is used up.
func TestProjectQuota(t *testing.T) {
	roottest.Require(t)
	if os.Getenv(bounded) == "" {
		withoutResource(t)
		return
	}
	for _, fsType := range []string{"ext4", "xfs"} {
		t.Run(fsType, func(t *testing.T) {
			dir, device := project(t, fsType)
			s, p := openPool(t, dir)
			if got := p.Capacity(Thick); got <= 0 || got > quotaLimit {
				t.Fatalf("capacity is %d under a quota of %d", got, quotaLimit)
			}
			thick := create(t, p, Spec{Name: "thick", Size: 16 * MiB})
			_, err := p.Create(ctx, Spec{Name: "larger", Size: quotaLimit})
			wantError(t, err, ErrNoSpace)
			_, err = p.Grow(ctx, thick.ID, quotaLimit)
			wantError(t, err, ErrNoSpace)
			if _, err := p.Grow(ctx, thick.ID, 32*MiB); err != nil {
				t.Error(err)
			}
			thin := create(t, p, Spec{Name: "thin", Size: 32 * MiB, Allocation: Thin})
			limitQuota(t, device, projectQuota, 7, 48*MiB) // somebody takes from it what was promised
			if failed := writeAll(p, thin.ID, 32*MiB); !errors.Is(failed, unix.EDQUOT) && !errors.Is(failed, unix.ENOSPC) {
				t.Errorf("more was written than the quota is: %v", failed)
			}
			_, err = p.Create(ctx, Spec{Name: "another", Size: 16 * MiB})
			wantError(t, err, ErrNoSpace)
			if err := writeAll(p, thick.ID, 32*MiB); err != nil {
				t.Errorf("a thick volume, when the quota is used up: %v", err)
			}
			if err := p.Remove(ctx, thin.ID); err != nil {
				t.Fatal(err)
			}
			limitQuota(t, device, projectQuota, 7, quotaLimit)
			eventually(t, func() error {
				_, err := p.Create(ctx, Spec{Name: "another", Size: 32 * MiB})
				return err
			})
			wantWhole(t, p, thick.ID)
			if got := leftovers(t, dir); len(got) > 0 {
				t.Errorf("left: %v", got)
			}
			wantAccount(t, s, p)
			if err := s.Close(); err != nil { // before the filesystem goes
				t.Fatal(err)
			}
		})
	}
}

// writeAll writes so many bytes of a volume and has them synced.
func writeAll(p *Pool, id string, size int64) error {
	f, err := p.OpenImage(ctx, id, false)
	if err != nil {
		return err
	}
	for at := int64(0); at < size && err == nil; at += MiB {
		_, err = f.WriteAt(bytes.Repeat([]byte{9}, int(MiB)), at)
	}
	return errors.Join(err, f.Sync(), f.Close())
}
