package mount

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	mountutils "k8s.io/mount-utils"
)

func TestParseMountinfo(t *testing.T) {
	text := strings.Join([]string{
		`36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue`,
		`37 35 0:44 / /a\040b\011c\012d\134e ro,nosuid,relatime shared:7 master:2 - btrfs /dev/loop3 rw,ssd,subvolid=5,subvol=/`,
		"38 35 7:4 / /no\u00a0break\u2003\u0085 rw,relatime - xfs /dev/loop4 ro,attr2",
		`39 35 0:50 / /empty rw - tmpfs  rw,size=4k`,
		`40 35 0:51 /x//deleted /gone//deleted rw - overlay over rw,lowerdir=/l1:/l2,upperdir=/u p`,
		`41 35 0:52 / /se rw - ext4 /dev/sda rw,context="system_u:object_r:t:s0:c1,c2",noatime`,
		`42 35 0:53 / /fuse rw - fuse.sshfs me\040and\040you:/ rw`,
		`47 35 7:5 / /stopped rw,relatime - ext4 /dev/loop5 rw,errors=remount-ro,emergency_ro`,
		`this line is not one`, `43 35 0:54`, `44 x 0:55 / /p rw - a b rw`, `45 1 1 / /p rw - a b rw`, `46 1 0:1 / /p rw a b rw c d`, ``,
	}, "\n")
	want := []Mount{
		{ID: 36, ParentID: 35, Major: 98, Root: "/mnt1", Path: "/mnt2", FSType: "ext3", Source: "/dev/root", Options: []string{"rw", "noatime"}, SuperOptions: []string{"rw", "errors=continue"}},
		{ID: 37, ParentID: 35, Minor: 44, Root: "/", Path: "/a b\tc\nd\\e", FSType: "btrfs", Source: "/dev/loop3", ReadOnly: true, Options: []string{"ro", "nosuid", "relatime"}, SuperOptions: []string{"rw", "ssd", "subvolid=5", "subvol=/"}},
		{ID: 38, ParentID: 35, Major: 7, Minor: 4, Root: "/", Path: "/no\u00a0break\u2003\u0085", FSType: "xfs", Source: "/dev/loop4", ReadOnly: true, Options: []string{"rw", "relatime"}, SuperOptions: []string{"ro", "attr2"}},
		{ID: 39, ParentID: 35, Minor: 50, Root: "/", Path: "/empty", FSType: "tmpfs", Options: []string{"rw"}, SuperOptions: []string{"rw", "size=4k"}},
		{ID: 40, ParentID: 35, Minor: 51, Root: "/x//deleted", Path: "/gone//deleted", FSType: "overlay", Source: "over", Options: []string{"rw"}, SuperOptions: []string{"rw", "lowerdir=/l1:/l2", "upperdir=/u p"}},
		{ID: 41, ParentID: 35, Minor: 52, Root: "/", Path: "/se", FSType: "ext4", Source: "/dev/sda", Options: []string{"rw"}, SuperOptions: []string{"rw", `context="system_u:object_r:t:s0:c1,c2"`, "noatime"}},
		{ID: 42, ParentID: 35, Minor: 53, Root: "/", Path: "/fuse", FSType: "fuse.sshfs", Source: "me and you:/", Options: []string{"rw"}, SuperOptions: []string{"rw"}},
		{ID: 47, ParentID: 35, Major: 7, Minor: 5, Root: "/", Path: "/stopped", FSType: "ext4", Source: "/dev/loop5", ReadOnly: true, Options: []string{"rw", "relatime"}, SuperOptions: []string{"rw", "errors=remount-ro", "emergency_ro"}},
	}
	if d := cmp.Diff(want, parseMountinfo([]byte(text))); d != "" {
		t.Error(d)
	}
}

func TestTopAt(t *testing.T) {
	mounts := []Mount{
		{ID: 1, ParentID: 1, Path: "/"}, {ID: 12, ParentID: 11, Path: "/t"}, // printed before its parent
		{ID: 10, ParentID: 1, Path: "/t"}, {ID: 11, ParentID: 10, Path: "/t"}, {ID: 13, ParentID: 12, Path: "/t/below"},
	}
	if got, ok := topAt(mounts, "/t"); !ok || got.ID != 12 {
		t.Errorf("got %v %v, want 12", got.ID, ok)
	}
	if got, ok := topAt(mounts, "/"); !ok || got.ID != 1 {
		t.Errorf("got %v %v, want 1", got.ID, ok)
	}
	if _, ok := topAt(mounts, "/x"); ok {
		t.Error("found a mount that is not there")
	}
}

func FuzzParseMountinfo(f *testing.F) {
	f.Add([]byte("36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue\n"))
	f.Add([]byte("36 35 98:0 / /a\\040b\\ rw - tmpfs  \"rw,\n\n36"))
	f.Fuzz(func(t *testing.T, text []byte) {
		mounts := parseMountinfo(text)
		if lines := strings.Count(string(text), "\n") + 1; len(mounts) > lines {
			t.Errorf("%d mounts from %d lines", len(mounts), lines)
		}
		for _, m := range mounts {
			topAt(mounts, m.Path)
		}
	})
}

// TestAgreesWithMountUtils: on what the machine shows, where nobody uses strange
// names, our parser and that of mount-utils see the same.
func TestAgreesWithMountUtils(t *testing.T) {
	const file = "/proc/self/mountinfo"
	text, err := os.ReadFile(file)
	if err != nil {
		t.Skip("no mountinfo on this system: ", err)
	}
	path := filepath.Join(t.TempDir(), "mountinfo") // the real one may change meanwhile
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
	if bytes.ContainsAny(text, "\\") {
		t.Skip("a path on this machine is escaped; mount-utils leaves it so")
	}
	theirs, err := mountutils.ParseMountInfo(path)
	if err != nil {
		t.Fatal(err)
	}
	ours := parseMountinfo(text)
	if len(ours) != len(theirs) {
		t.Fatalf("%d mounts, mount-utils sees %d", len(ours), len(theirs))
	}
	for i, m := range ours {
		w := theirs[i]
		if m.ID != w.ID || m.Path != w.MountPoint || m.Root != w.Root || m.FSType != w.FsType || m.Source != w.Source ||
			int(m.Major) != w.Major || int(m.Minor) != w.Minor {
			t.Errorf("%+v, mount-utils has %+v", m, w)
		}
	}
}
