package image

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestMkfsThatDidNotFinish: a program that says that it made a filesystem, and did not
// write its superblock, as mkfs.btrfs does when that write fails, has made none.
func TestMkfsThatDidNotFinish(t *testing.T) {
	for _, c := range []struct {
		filesystem string
		at         int64 // where a byte is changed
	}{
		{"ext2", 1080}, {"ext3", 1080}, {"ext4", 1081}, {"xfs", 0}, {"xfs", 126}, {"btrfs", 64<<10 + 64},
	} {
		t.Run(fmt.Sprint(c.filesystem, " at ", c.at), func(t *testing.T) {
			tools, dir := t.TempDir(), poolDir(t)
			script := fmt.Sprintf("#!/bin/sh\n/usr/sbin/mkfs.%s \"$@\" || exit\nfor last; do :; done\n"+
				"[ ! -f \"$last\" ] || printf '\\001' | dd of=\"$last\" bs=1 seek=%d conv=notrunc 2>/dev/null\n", c.filesystem, c.at)
			if err := os.WriteFile(filepath.Join(tools, "mkfs."+c.filesystem), []byte(script), 0o700); err != nil {
				t.Fatal(err)
			}
			s, p := openPool(t, dir, WithToolDirs(tools))
			_, err := p.Create(ctx, Spec{Name: "v", Size: 320 * MiB, Filesystem: c.filesystem, Allocation: Thin})
			if err == nil || !strings.Contains(err.Error(), "no whole "+c.filesystem) {
				t.Errorf("Create = %v", err)
			}
			wantClean(t, dir)
			wantAccount(t, s, p)
		})
	}
}

// TestRenewalThatDidNotFinish: so it is with what makes the filesystem of a copy one of
// its own. tune2fs and resize2fs end with success when a write of the superblock fails.
func TestRenewalThatDidNotFinish(t *testing.T) {
	for _, program := range []string{"tune2fs", "resize2fs"} {
		t.Run(program, func(t *testing.T) {
			tools, dir := t.TempDir(), poolDir(t)
			for _, name := range []string{"mkfs.ext4", "tune2fs", "e2fsck", "resize2fs"} {
				if err := os.Symlink("/usr/sbin/"+name, filepath.Join(tools, name)); err != nil {
					t.Fatal(err)
				}
			}
			s, p := openPool(t, dir, WithToolDirs(tools))
			v := create(t, p, Spec{Name: "v", Size: 8 * MiB, Filesystem: "ext4"})
			one, err := p.Snapshot(ctx, SnapshotSpec{Name: "s", Source: v.ID}, nil)
			if err != nil {
				t.Fatal(err)
			}
			copied := Spec{Name: "copy", Size: 16 * MiB, Filesystem: "ext4", Source: &Source{Snapshot: one.ID}}
			// A byte of the filesystem's label.
			script := "#!/bin/sh\n/usr/sbin/" + program + " \"$@\" || exit\nfor last; do :; done\n" +
				"printf x | dd of=\"$last\" bs=1 seek=1150 conv=notrunc 2>/dev/null\n"
			path := filepath.Join(tools, program)
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, []byte(script), 0o700); err != nil {
				t.Fatal(err)
			}
			if _, err := p.CreateFrom(ctx, copied, nil); err == nil {
				t.Error("a copy with a damaged superblock was made")
			}
			wantClean(t, dir)
			wantAccount(t, s, p)
		})
	}
}
