package image

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

// bounded tells the test that it has no CAP_SYS_RESOURCE, which ext4 lets pass its quotas.
const bounded = "CSI_LOOP_TEST_BOUNDED"

const quotaLimit = 96 * MiB

// project makes a filesystem with project quotas, and on it a directory for a pool that
// may hold quotaLimit. The test is skipped where the kernel has none, and fails where
// the virtual machine should have them.
func project(t *testing.T, fsType string) (dir, device string) {
	t.Helper()
	image, top := filepath.Join(t.TempDir(), "pool.img"), t.TempDir()
	if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, 512*MiB)); err != nil {
		t.Fatal(err)
	}
	mkfs := map[string][]string{
		"ext4": {"mkfs.ext4", "-q", "-F", "-m", "0", "-I", "256", "-O", "quota,project", "-E", "quotatype=prjquota"},
		"xfs":  {"mkfs.xfs", "-q", "-f"},
	}[fsType]
	roottest.Run(t, append(mkfs, image)...)
	out, err := exec.Command("losetup", "-f", "--show", image).Output()
	if err != nil {
		t.Fatal(err)
	}
	device = string(bytes.TrimSpace(out))
	t.Cleanup(func() { roottest.Run(t, "losetup", "-d", device) })
	if err := unix.Mount(device, top, fsType, 0, "prjquota"); err != nil {
		if os.Getenv("CSI_LOOP_VM") != "" {
			t.Fatal("the virtual machine has no project quotas: ", err)
		}
		t.Skipf("this kernel has no project quotas for %s (%v): make test-vm runs it in a virtual machine", fsType, err)
	}
	t.Cleanup(func() { roottest.Run(t, "umount", top) })
	dir = filepath.Join(top, "pool")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	roottest.Run(t, "xfs_io", "-c", "chproj 7", "-c", "chattr +P", dir)
	limitProject(t, device, quotaLimit)
	return dir, device
}

// limitProject is quotactl's Q_SETQUOTA of project 7.
func limitProject(t *testing.T, device string, limit int64) {
	t.Helper()
	const setQuota, projects, blockLimits = 0x800008, 2, 1
	arg := struct { // if_dqblk, limits in KiB
		hard, soft, space, inodesHard, inodesSoft, inodes, blockTime, inodeTime uint64
		valid                                                                   uint32
	}{hard: uint64(limit) >> 10, valid: blockLimits}
	name, err := unix.BytePtrFromString(device)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, errno := unix.Syscall6(unix.SYS_QUOTACTL, setQuota<<8|projects, uintptr(unsafe.Pointer(name)), 7, uintptr(unsafe.Pointer(&arg)), 0, 0); errno != 0 {
		t.Fatal("quotactl: ", errno)
	}
}

// A quota of the project that the pool's directory is in: statfs tells of it, so it is
// the pool's size. Nothing is promised beyond it, writers of thin volumes are told, and
// a thick volume can be written to the last byte when it is used up.
func TestProjectQuota(t *testing.T) {
	roottest.Require(t)
	if os.Getenv(bounded) == "" {
		cmd := exec.Command("setpriv", "--inh-caps=-sys_resource", "--bounding-set=-sys_resource", os.Args[0], "-test.run=^TestProjectQuota$", "-test.v")
		cmd.Env = append(os.Environ(), bounded+"=1")
		out, err := cmd.CombinedOutput()
		t.Logf("%s", out)
		switch {
		case err != nil:
			t.Error(err)
		case bytes.Contains(out, []byte("--- SKIP")):
			t.Skip("see above")
		}
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
			limitProject(t, device, 48*MiB) // somebody takes from it what was promised
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
			limitProject(t, device, quotaLimit)
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
