package image

import (
	"encoding/json"
	"errors"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestRecordRoundTrip(t *testing.T) {
	for _, s := range []Spec{
		{Name: "v", Size: MiB},
		{Name: "日本 <&>\u2028", Size: 1 << 60, Allocation: Thin, BlockSize: 512, DirectIO: "on"},
		{Name: "v", Size: 300 * MiB, Filesystem: "xfs", MkfsOptions: []string{"-L", "x", "-isize=1024"}, Ephemeral: &Ephemeral{Target: "/t"}},
		{Name: "v", Size: MiB, Source: &Source{File: "/a", Taken: Taken{Offset: 512, Length: 5, Inode: 1 << 63, Modified: "2026-01-02T03:04:05Z", Changed: "12026-01-02T03:04:05Z"}}},
	} {
		n, err := s.normalise()
		if err != nil {
			t.Fatal(err)
		}
		want := newRecord(n, time.Unix(1e9, 5))
		b, err := want.encode()
		if err != nil {
			t.Fatal(err)
		}
		got, err := parseRecord(b, DirName(s.Name))
		if err != nil {
			t.Fatalf("%s: %v", b, err)
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Error(d)
		}
	}
}

func FuzzRecord(f *testing.F) {
	b, _ := newRecord(Spec{Name: "v", Size: MiB, Allocation: Thick, BlockSize: 4096, DirectIO: "auto"}, time.Unix(1e9, 0)).encode()
	f.Add(b)
	taken := Taken{Length: 5, Inode: 7, Modified: "2026-01-02T03:04:05Z", Changed: "2026-01-02T03:04:06.7Z"}
	b, _ = newRecord(Spec{Name: "v", Size: MiB, Allocation: Thin, BlockSize: 512, DirectIO: "on", Source: &Source{File: "/a", Taken: taken}}, time.Unix(1e9, 0)).encode()
	f.Add(b)
	f.Add([]byte(`{"formatVersion":2}`))
	f.Add([]byte(`{"formatVersion":1,"name":"v","size":1048576,"allocation":"thick"}{}`))
	f.Add([]byte("\x00\xff"))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := parseRecord(b, "v")
		if err != nil {
			return
		}
		if r.Name != "v" || r.Size <= 0 || r.Size%MiB != 0 {
			t.Fatalf("accepted %+v", r)
		}
		again, err := r.encode()
		if err != nil {
			t.Fatal(err)
		}
		if r2, err := parseRecord(again, "v"); err != nil || !cmp.Equal(r, r2) {
			t.Fatalf("%s does not come back: %v", again, err)
		}
	})
}

func FuzzTemplateRecord(f *testing.F) {
	f.Add([]byte(`{"formatVersion":1,"name":"v","size":1048576,"filesystem":"","blockSize":512,"source":"/a","created":"2026-01-02T03:04:05Z"}`))
	f.Add([]byte(`{"formatVersion":1,"name":"v","size":1048576,"filesystem":"ext4","blockSize":512,"source":"/a",
"taken":{"offset":0,"length":5,"inode":7,"modified":"2026-01-02T03:04:05Z","changed":"2026-01-02T03:04:05Z"},"created":"2026-01-02T03:04:05Z"}`))
	f.Add([]byte(`{"formatVersion":1,"name":"v","taken":{"length":-1}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := parseTemplate(b, "v")
		if err != nil {
			return
		}
		again, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		if r2, err := parseTemplate(again, "v"); err != nil || !cmp.Equal(r, r2) {
			t.Fatalf("%s does not come back: %v", again, err)
		}
	})
}

func FuzzIdentity(f *testing.F) {
	i, err := newIdentity(time.Unix(1e9, 0))
	if err != nil {
		f.Fatal(err)
	}
	b, _ := i.encode()
	f.Add(b)
	f.Add([]byte(`{"formatVersion":1,"id":"x","ed25519Seed":""}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if i, err := parseIdentity(b); err == nil && !poolIDs.MatchString(i.ID) {
			t.Fatalf("accepted ID %q", i.ID)
		}
	})
}

func TestParseMkfsOptions(t *testing.T) {
	for _, c := range []struct {
		filesystem string
		in, want   []string
	}{
		{"ext4", nil, nil},
		{"ext4", []string{"-i8192", "-L", "data"}, []string{"-i", "8192", "-L", "data"}},
		{"ext4", []string{"-O", "^has_journal,quota", "-O", "project"}, []string{"-O", "^has_journal,quota", "-O", "project"}},
		{"ext4", []string{"-E", "stride=4,stripe_width=16", "-m", "1"}, []string{"-E", "stride=4,stripe_width=16", "-m", "1"}},
		{"xfs", []string{"-m", "reflink=0,rmapbt=0", "-isize=512"}, []string{"-m", "reflink=0,rmapbt=0", "-i", "size=512"}},
		{"btrfs", []string{"--csum=sha256", "-M", "-n4096"}, []string{"--csum", "sha256", "-M", "-n", "4096"}},
	} {
		got, err := ParseMkfsOptions(c.filesystem, c.in)
		if err != nil {
			t.Errorf("%v: %v", c.in, err)
		}
		if d := cmp.Diff(c.want, got); d != "" {
			t.Error(d)
		}
		if again, err := ParseMkfsOptions(c.filesystem, got); err != nil || !cmp.Equal(again, got) {
			t.Errorf("%v is not canonical: %v, %v", got, again, err)
		}
	}
	for _, c := range []struct {
		filesystem string
		in         []string
	}{
		{"", []string{"-L", "x"}},
		{"ext4", []string{"-b", "1024"}},
		{"ext4", []string{"-b1024"}},
		{"ext4", []string{"-F"}},
		{"ext4", []string{"-d", "/etc"}},
		{"ext4", []string{"-E", "discard"}},
		{"ext4", []string{"-E", "stride=1,discard"}},
		{"ext4", []string{"-E", "lazy_itable_init=1"}},
		{"ext4", []string{"-O", "orphan_file"}},
		{"ext4", []string{"-O", "none"}},
		{"ext4", []string{"-O", "journal_dev"}},
		{"ext4", []string{"-U", "random"}},
		{"ext4", []string{"-J", "device=/dev/sda"}},
		{"ext4", []string{"-e", "panic"}},
		{"ext4", []string{"-L"}},
		{"ext4", []string{"-L", "-x"}},
		{"ext4", []string{"-L", "a", "-L", "b"}},
		{"ext4", []string{"/dev/sda"}},
		{"ext4", []string{""}},
		{"ext4", []string{"-"}},
		{"ext4", []string{"--"}},
		{"ext4", []string{"-m", "5; rm -rf /"}},
		{"xfs", []string{"-s", "size=512"}},
		{"xfs", []string{"-p", "/etc/passwd"}},
		{"xfs", []string{"-d", "name=/dev/sda"}},
		{"xfs", []string{"-d", "file"}},
		{"xfs", []string{"-c", "options=/x"}},
		{"xfs", []string{"-m", "uuid=1"}},
		{"xfs", []string{"-K"}},
		{"xfs", []string{"-m", "crc=0"}},
		{"xfs", []string{"-l", "logdev=/dev/sda"}},
		{"xfs", []string{"-i", "nrext64=1"}},
		{"btrfs", []string{"--rootdir=/etc"}},
		{"btrfs", []string{"-r", "/etc"}},
		{"btrfs", []string{"-O", "block-group-tree"}},
		{"btrfs", []string{"-M=1"}},
		{"btrfs", []string{"-d", "raid0"}},
		{"btrfs", []string{"-O", "list-all"}},
	} {
		_, err := ParseMkfsOptions(c.filesystem, c.in)
		if _, ok := errors.AsType[*SpecError](err); !ok {
			t.Errorf("%s %q: %v", c.filesystem, c.in, err)
		}
	}
}

func FuzzMkfsOptions(f *testing.F) {
	f.Add("ext4", "-i8192", "-O", "^has_journal")
	f.Add("xfs", "-m", "reflink=0", "-K")
	f.Add("btrfs", "--csum=sha256", "-n", "4k")
	f.Fuzz(func(t *testing.T, filesystem, a, b, c string) {
		got, err := ParseMkfsOptions(filesystem, []string{a, b, c})
		if err != nil {
			if _, ok := errors.AsType[*SpecError](err); !ok {
				t.Fatal(err)
			}
			return
		}
		again, err := ParseMkfsOptions(filesystem, got)
		if err != nil || !cmp.Equal(got, again) {
			t.Fatalf("%q is not canonical: %q, %v", got, again, err)
		}
		mkfsArguments(Spec{Filesystem: filesystem, BlockSize: 4096, MkfsOptions: got}, "nrext64= block-group-tree")
	})
}

func TestNewerFeaturesAreSwitchedOffOnlyWhereKnown(t *testing.T) {
	args := func(fs, help string, o ...string) []string {
		return mkfsArguments(Spec{Filesystem: fs, BlockSize: 512, MkfsOptions: o}, help)
	}
	for _, c := range []struct{ got, want []string }{
		{args("xfs", "-i nrext64=0|1,exchange=0|1 -n parent=0|1"), []string{
			"-q", "-K", "-b", "size=4096", "-s", "size=512", "-i", "nrext64=0", "-i", "exchange=0", "-n", "parent=0",
		}},
		{args("xfs", "", "-i", "size=1024"), []string{"-q", "-K", "-b", "size=4096", "-s", "size=512", "-i", "size=1024"}},
		{args("btrfs", "block-group-tree - x\n", "-O", "no-holes", "-M"), []string{
			"-q", "-K", "-s", "4096", "-O", "^block-group-tree,no-holes", "-M",
		}},
		{args("btrfs", ""), []string{"-q", "-K", "-s", "4096"}},
		{args("ext2", "", "-O", "quota", "-E", "stride=2", "-m", "1"), []string{
			"-q", "-F", "-b", "4096", "-m", "0", "-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=0,stride=2",
			"-O", extFeatures["ext2"] + ",quota", "-m", "1",
		}},
	} {
		if d := cmp.Diff(c.want, c.got); d != "" {
			t.Error(d)
		}
	}
}
