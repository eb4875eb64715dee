package image

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

// usersLimit is below what the pools of TestUserQuota are asked for.
const usersLimit = 48 * MiB

// poolGroup owns the pool's directory where a quota is a group's: with the set-group-ID
// bit all below belongs to it.
const poolGroup = 4000

// Quotas of the user or group that images belong to: root, or the group of a directory
// with the set-group-ID bit. statfs tells of neither. XFS limits no root at all. ext4
// lets pass who has CAP_SYS_RESOURCE, and so does a loop device, which writes with the
// kernel's rights. Where a quota binds, what does not fit is refused, nothing of it is
// left, and thick volumes can be written to the last byte all the same.
func TestUserQuota(t *testing.T) {
	roottest.Require(t)
	passes := hasResource(t)
	if passes && os.Getenv(bounded) == "" {
		t.Run("without CAP_SYS_RESOURCE", withoutResource)
	}
	for _, c := range []struct {
		name, fsType string
		kind, id     uintptr
		binds        bool
		// deviceToo: a loop device is refused the blocks as well.
		deviceToo bool
	}{
		{"ext4, root", "ext4", userQuota, 0, !passes, false},
		{"ext4, group", "ext4", groupQuota, poolGroup, !passes, false},
		{"xfs, root", "xfs", userQuota, 0, false, false},
		{"xfs, group", "xfs", groupQuota, poolGroup, true, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			top, device := withQuotas(t, c.fsType, "quota", "usrquota,grpquota")
			dir := filepath.Join(top, "pool")
			if err := errors.Join(os.Mkdir(dir, 0o700), os.Chown(dir, 0, poolGroup), os.Chmod(dir, 0o700|os.ModeSetgid)); err != nil {
				t.Fatal(err)
			}
			s, p := openPool(t, dir)
			thick := create(t, p, Spec{Name: "thick", Size: 32 * MiB})
			thin := create(t, p, Spec{Name: "thin", Size: 64 * MiB, Allocation: Thin})
			limitQuota(t, device, c.kind, c.id, usersLimit)
			if got := p.Capacity(Thick); got <= 2*usersLimit {
				t.Errorf("capacity is %d: statfs tells of the quota", got)
			}
			if c.binds {
				wantQuotaBinds(t, p, thick.ID, thin.ID)
			} else {
				wantQuotaPasses(t, p, thin.ID)
			}
			limitQuota(t, device, c.kind, c.id, 16*MiB) // less than there is
			if err := writeAll(p, thick.ID, 32*MiB); err != nil {
				t.Errorf("a thick volume, when the quota is used up: %v", err)
			}
			if err := writeThroughDevice(t, p, thin.ID); (err != nil) != c.deviceToo {
				t.Errorf("a write of a loop device over the quota: %v, want an error: %v", err, c.deviceToo)
			}
			if err := p.Remove(ctx, thin.ID); err != nil {
				t.Fatal(err)
			}
			limitQuota(t, device, c.kind, c.id, 400*MiB)
			eventually(t, func() error {
				_, err := p.Create(ctx, Spec{Name: "another", Size: 64 * MiB})
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

// wantQuotaBinds checks that nothing is promised beyond the quota, and that who writes to
// a file is told.
func wantQuotaBinds(t *testing.T, p *Pool, thick, thin string) {
	t.Helper()
	_, err := p.Create(ctx, Spec{Name: "larger", Size: 2 * usersLimit})
	wantError(t, err, ErrNoSpace)
	_, err = p.Grow(ctx, thick, 2*usersLimit)
	wantError(t, err, ErrNoSpace)
	if err := writeAll(p, thin, 64*MiB); !errors.Is(err, unix.EDQUOT) && !errors.Is(err, unix.ENOSPC) {
		t.Errorf("more was written than the quota is: %v", err)
	}
	_, err = p.Create(ctx, Spec{Name: "another", Size: 32 * MiB})
	wantError(t, err, ErrNoSpace)
}

// wantQuotaPasses checks that the quota is nothing to those who make and write volumes.
func wantQuotaPasses(t *testing.T, p *Pool, thin string) {
	t.Helper()
	larger := create(t, p, Spec{Name: "larger", Size: 2 * usersLimit})
	wantWhole(t, p, larger.ID)
	if err := writeAll(p, thin, 32*MiB); err != nil {
		t.Error(err)
	}
}

// writeThroughDevice writes the last 8 MiB of a volume of 64 MiB through a loop device,
// and has them synced.
func writeThroughDevice(t *testing.T, p *Pool, id string) error {
	t.Helper()
	image, err := p.OpenImage(ctx, id, false)
	if err != nil {
		t.Fatal(err)
	}
	path, err := os.Readlink(procPath(image))
	if err := errors.Join(err, image.Close()); err != nil {
		t.Fatal(err)
	}
	node := bind(t, path, 4096)
	defer roottest.Run(t, "losetup", "-d", node)
	f, err := os.OpenFile(node, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteAt(bytes.Repeat([]byte{5}, int(8*MiB)), 56*MiB)
	return errors.Join(err, f.Sync(), f.Close())
}

// hasResource says whether the test has CAP_SYS_RESOURCE.
func hasResource(t *testing.T) bool {
	t.Helper()
	var data [2]unix.CapUserData
	if err := unix.Capget(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &data[0]); err != nil {
		t.Fatal(err)
	}
	return data[0].Effective&(1<<unix.CAP_SYS_RESOURCE) != 0
}
