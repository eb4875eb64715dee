package image

import (
	"bytes"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

// limited makes a directory that may hold 48 MiB, by a quota of btrfs: root is not exempt
// from it, and statfs does not tell of it.
func limited(t *testing.T) string {
	t.Helper()
	top := scratch(t, "btrfs", 400*MiB)
	dir := filepath.Join(top, "limited")
	roottest.Run(t, "btrfs", "quota", "enable", top)
	roottest.Run(t, "btrfs", "subvolume", "create", dir)
	roottest.Run(t, "btrfs", "qgroup", "limit", "48m", dir)
	return dir
}

// A quota on the pool's directory that is used up: what does not fit is refused and
// nothing of it is left, and writers are told. That goes for thick volumes too, whose
// blocks are there: btrfs wants room in the quota for every write. They go on when
// there is some again.
func TestQuota(t *testing.T) {
	roottest.Require(t)
	dir := limited(t)
	s, p := openPool(t, dir)
	thick := create(t, p, Spec{Name: "thick", Size: 16 * MiB})
	_, err := p.Create(ctx, Spec{Name: "larger", Size: 64 * MiB})
	wantError(t, err, ErrNoSpace)
	thin := create(t, p, Spec{Name: "thin", Size: 128 * MiB, Allocation: Thin})
	f, err := p.OpenImage(ctx, thin.ID, false)
	if err != nil {
		t.Fatal(err)
	}
	var failed error
	for n := range int64(64) {
		if _, failed = f.WriteAt(bytes.Repeat([]byte{1}, int(MiB)), n*MiB); failed != nil {
			break
		}
	}
	failed = errors.Join(failed, f.Sync(), f.Close())
	if !errors.Is(failed, unix.EDQUOT) && !errors.Is(failed, unix.ENOSPC) {
		t.Errorf("64 MiB were written under a quota of 48: %v", failed)
	}
	_, err = p.Create(ctx, Spec{Name: "another", Size: 16 * MiB})
	wantError(t, err, ErrNoSpace)
	quota := func(said bool) error {
		err := p.Check(ctx)
		for _, h := range [][]Problem{p.Health(), p.VolumeHealth(ctx, thick.ID)} {
			if is := len(h) == 1 && h[0].Reason == "QuotaUsedUp" && h[0].Kind == Degraded && strings.Contains(h[0].String(), "raise the quota"); err != nil || is != said || !said && len(h) > 0 {
				return fmt.Errorf("health of a quota that is used up (%v): %v, %w", said, h, err)
			}
		}
		return nil
	}
	if err := quota(true); err != nil {
		t.Error(err)
	}
	if err := writeOnce(p, thick.ID); err != nil && !errors.Is(err, unix.EDQUOT) {
		t.Errorf("a write to the thick volume: %v", err)
	}
	// It may want room for a removal too.
	if err := p.Remove(ctx, thin.ID); err != nil {
		wantError(t, err, ErrNoSpace)
		roottest.Run(t, "btrfs", "qgroup", "limit", "none", dir)
		if err := p.Remove(ctx, thin.ID); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, func() error { return writeOnce(p, thick.ID) })
	eventually(t, func() error { return quota(false) })
	wantWhole(t, p, thick.ID)
	if got := leftovers(t, dir); len(got) > 0 {
		t.Errorf("left: %s", strings.Join(got, " "))
	}
	wantAccount(t, s, p)
}

func writeOnce(p *Pool, id string) error {
	f, err := p.OpenImage(ctx, id, false)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(bytes.Repeat([]byte{7}, 4096), MiB)
	return errors.Join(err, f.Sync(), f.Close())
}
