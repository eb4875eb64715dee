package image

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

// TestMkfsThatFindsNoSpace is refused as any volume that does not fit: what was promised
// to a thin volume on an overcommitted pool is not there.
func TestMkfsThatFindsNoSpace(t *testing.T) {
	const free = 64 * MiB
	for _, fs := range poolTypes {
		t.Run(fs, func(t *testing.T) {
			root := roottest.Pool(t, fs, 512*MiB)
			dir := filepath.Join(root, "pool")
			if err := os.Mkdir(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			s, err := Open(ctx, []Config{{Name: "default", Path: dir, Overcommit: 1000}}, WithRefresh(0))
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			p := s.Pools()[0]
			ballast, err := os.Create(filepath.Join(root, "ballast"))
			if err != nil {
				t.Fatal(err)
			}
			defer ballast.Close()
			for size := int64(0); p.Usage().Free > free; size += MiB {
				if err := allocate(ballast, size, MiB, false); errors.Is(err, syscall.ENOSPC) {
					break // btrfs says so before statfs does
				} else if err != nil {
					t.Fatal(err)
				}
			}
			_, err = p.Create(ctx, Spec{Name: "v", Size: 2 << 30, Filesystem: "xfs", Allocation: Thin, MkfsOptions: []string{"-l", "size=256m"}})
			wantError(t, err, ErrNoSpace)
			if !strings.Contains(err.Error(), "mkfs.xfs") && !strings.Contains(err.Error(), recordFile) { // written meanwhile
				t.Error(err)
			}
			wantClean(t, dir)
			wantAccount(t, s, p)

			// Without a reason in the pool the program is to blame.
			if err := ballast.Truncate(0); err != nil {
				t.Fatal(err)
			}
			_, err = p.Create(ctx, Spec{Name: "v", Size: 512 * MiB, Filesystem: "xfs", Allocation: Thin, MkfsOptions: []string{"-d", "agcount=100000"}})
			if err == nil || !strings.Contains(err.Error(), "agcount") || errors.Is(err, ErrNoSpace) || errors.Is(err, ErrPool) {
				t.Errorf("a program that fails for another reason: %v", err)
			}
		})
	}
}
