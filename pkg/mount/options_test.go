package mount

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseOptions(t *testing.T) {
	flag := func(keys ...string) (out []Param) {
		for _, k := range keys {
			key, value, has := strings.Cut(k, "=")
			out = append(out, Param{Key: key, Value: value, HasValue: has})
		}
		return out
	}
	for _, tc := range []struct {
		name, fsType string
		given        []string
		want         Options
	}{
		{"nothing gives nothing", "ext4", nil, Options{}},
		{
			"several in one element are split", "ext4",
			[]string{"noatime,nosuid", "data=ordered"},
			Options{Flags: NoAtime | NoSuid, Super: flag("data=ordered")},
		},
		{"empty pieces and spaces are ignored", "ext4", []string{" , noatime ,,", ""}, Options{Flags: NoAtime}},
		{"the last of ro and rw holds", "xfs", []string{"ro", "rw", "ro"}, Options{ReadOnly: true}},
		{"the last access time mode holds", "xfs", []string{"noatime", "strictatime"}, Options{Flags: StrictAtime}},
		{"relatime takes back noatime", "xfs", []string{"noatime,relatime"}, Options{}},
		{"suid takes back nosuid", "xfs", []string{"nosuid,suid,noexec"}, Options{Flags: NoExec}},
		{
			"userspace options are dropped", "btrfs",
			[]string{"defaults,_netdev,nofail,noauto,x-systemd.automount,x-foo=bar,comment=x"},
			Options{},
		},
		{"lazytime is the filesystem's", "xfs", []string{"lazytime"}, Options{Super: flag("lazytime")}},
		{
			"a quoted context is kept whole", "ext4",
			[]string{`noatime,context="system_u:object_r:container_file_t:s0:c12,c345",ro`},
			Options{ReadOnly: true, Flags: NoAtime, Super: flag("context=system_u:object_r:container_file_t:s0:c12,c345")},
		},
		{
			"a bare context keeps its categories", "xfs",
			[]string{"context=system_u:object_r:t:s0:c1,c2,noatime"},
			Options{Flags: NoAtime, Super: flag("context=system_u:object_r:t:s0:c1,c2")},
		},
		{
			"a range of categories stays with its context", "xfs",
			[]string{"context=u:r:t:s0-s0:c0.c5,c7.c9"},
			Options{Super: flag("context=u:r:t:s0-s0:c0.c5,c7.c9")},
		},
		{
			"ext4 as people use it", "ext4",
			[]string{"data=journal,commit=30,errors=remount-ro,barrier=0,stripe=16,nodelalloc,discard,user_xattr,acl,prjquota,inode_readahead_blks=64,max_batch_time=0,usrjquota=aquota.user,jqfmt=vfsv1"},
			Options{Super: flag("data=journal", "commit=30", "errors=remount-ro", "barrier=0", "stripe=16", "nodelalloc", "discard", "user_xattr", "acl", "prjquota",
				"inode_readahead_blks=64", "max_batch_time=0", "usrjquota=aquota.user", "jqfmt=vfsv1")},
		},
		{
			"xfs as people use it", "xfs",
			[]string{"inode64,largeio,logbsize=256k,logbufs=8,allocsize=64m,noquota,uquota,wsync,swalloc,nouuid,norecovery,attr2,discard"},
			Options{Super: flag("inode64", "largeio", "logbsize=256k", "logbufs=8", "allocsize=64m", "noquota", "uquota", "wsync", "swalloc", "nouuid", "norecovery", "attr2", "discard")},
		},
		{
			"btrfs as people use it", "btrfs",
			[]string{"compress,compress=zstd:3,compress-force=lzo,autodefrag,commit=60,space_cache=v2,ssd,thread_pool=4,max_inline=2048,nodatacow,nodatasum,discard,discard=async,nodiscard"},
			Options{Super: flag("compress", "compress=zstd:3", "compress-force=lzo", "autodefrag", "commit=60", "space_cache=v2", "ssd", "thread_pool=4", "max_inline=2048", "nodatacow", "nodatasum", "discard", "discard=async", "nodiscard")},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := ParseOptions(tc.fsType, tc.given)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(tc.want, got); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestParseOptionsRefuses(t *testing.T) {
	everywhere := []string{
		"loop", "loop=/dev/loop1", "offset=1", "sizelimit=2", "bind", "rbind", "remount", "move", "shared", "rslave", "private", "unbindable",
		"dax", "dax=always", "user", "users", "owner", "group", "X-mount.mkdir", "X-mount.idmap=x", "bogus", "=", "=x", "ro=1", "noatime=", "context=", `context="a"b"`,
		"source=/dev/sda", "lowerdir=/etc", "mand", "data=ordered\n", "noatime\x00", "uid=0", "NOATIME", "subvol=/x", "device=/dev/sda",
	}
	for fsType := range filesystemOptions {
		for _, o := range everywhere {
			t.Run(fsType+"/"+o, func(t *testing.T) { refused(t, fsType, o) })
		}
	}
	for fsType, options := range map[string][]string{
		"ext2":  {"data=journal", "commit=5", "errors=panic"},
		"ext3":  {"delalloc", "journal_path=/etc/passwd", "journal_dev=8"},
		"ext4":  {"errors=panic", "errors=", "errors", "data=bogus", "commit=-1", "commit=abc", "commit=99999999999999999999", "journal_path=/dev/sda", "usrjquota=../x", "usrjquota=/etc/x", "sb=1", "abort", "barrier=2", "acl=1", "inode64", "noacl="},
		"xfs":   {"logdev=/dev/sda", "rtdev=/dev/sda", "nobarrier", "logbsize=big", "allocsize=", "data=ordered"},
		"btrfs": {"degraded", "subvolid=5", "fatal_errors=panic", "compress=", "compress=rar", "compress=zstd:100", "discard=", "space_cache=v3", "rescue=", "fragment=all"},
	} {
		for _, o := range options {
			t.Run(fsType+"/"+o, func(t *testing.T) { refused(t, fsType, o) })
		}
	}
	t.Run("value too long", func(t *testing.T) { refused(t, "ext4", "context="+strings.Repeat("a", 256)) })
	t.Run("too long", func(t *testing.T) { refused(t, "ext4", strings.Repeat("noatime,", 600)) })
	if _, err := ParseOptions("ntfs", nil); !errors.Is(err, ErrUnknownFilesystem) {
		t.Errorf("ntfs: %v", err)
	}
}

func refused(t *testing.T, fsType, option string) {
	t.Helper()
	_, err := ParseOptions(fsType, []string{"noatime", option})
	var o *OptionError
	if !errors.As(err, &o) {
		t.Fatalf("got %v, want *OptionError", err)
	}
	if o.Option != option || o.Reason == "" || o.FSType != fsType || o.Err != nil {
		t.Errorf("%+v", o)
	}
}

func TestEveryRefusalHasItsReason(t *testing.T) {
	for fsType, table := range filesystemOptions {
		for key, r := range table {
			if _, generic := generic[key]; generic {
				t.Errorf("%s: %s is generic already", fsType, key)
			}
			if r.refused == "" && refusedEverywhere[key] != "" {
				t.Errorf("%s: %s is both allowed and refused", fsType, key)
			}
		}
	}
}

func FuzzParseOptions(f *testing.F) {
	f.Add("ext4", `noatime,context="a:b:c:s0:c1,c2",data=ordered`)
	f.Add("xfs", `context=a:b:c:s0:c1,c2,ro,,`)
	f.Add("btrfs", `compress=zstd:3,"`)
	f.Fuzz(func(t *testing.T, fsType, option string) {
		o, err := ParseOptions(fsType, []string{option})
		if err != nil {
			if len(err.Error()) > 8192 {
				t.Errorf("an error of %d bytes", len(err.Error()))
			}
			return
		}
		// What passed must be on the list, and pass again as it was understood.
		for _, p := range o.Super {
			if strings.ContainsAny(p.Key+p.Value, "\x00\n\"") {
				t.Errorf("%q", p)
			}
			again := p.String()
			if contextKeys[p.Key] {
				again = fmt.Sprintf(`%s="%s"`, p.Key, p.Value)
			}
			o2, err := ParseOptions(fsType, []string{again})
			if err != nil || len(o2.Super) != 1 || o2.Super[0] != p {
				t.Errorf("%q became %v, %v", p, o2, err)
			}
		}
	})
}
