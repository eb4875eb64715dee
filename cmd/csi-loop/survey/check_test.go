package survey

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/csi-loop/csi-loop/internal/roottest"
	"github.com/csi-loop/csi-loop/pkg/crypt"
	"github.com/csi-loop/csi-loop/pkg/driver"
	"github.com/csi-loop/csi-loop/pkg/image"
	"github.com/csi-loop/csi-loop/pkg/loop"
)

func TestMain(m *testing.M) { roottest.Main(m) }

// told are the findings that are worse than ok, as text.
func told(all []Finding) []string {
	var out []string
	for _, f := range all {
		if f.Level != OK {
			out = append(out, fmt.Sprintf("%s %s: %s -> %s", f.Level, f.Subject, f.Message, f.Fix))
		}
	}
	return out
}

// want checks that each finding has the text of its place, and that there are no more.
func want(t *testing.T, all []Finding, texts ...string) {
	t.Helper()
	got := told(all)
	match := len(got) == len(texts)
	for i := 0; match && i < len(got); i++ {
		match = strings.Contains(got[i], texts[i])
	}
	if !match {
		t.Errorf("found\n\t%s\nwant\n\t%s", strings.Join(got, "\n\t"), strings.Join(texts, "\n\t"))
	}
}

// goodNode is a machine without a fault.
func goodNode() Node {
	n := Node{
		Root: true, Release: "6.18", Calls: []Probe{{"openat2", "5.6", nil}}, Devtmpfs: true,
		Filesystems: []string{"ext4", "xfs", "btrfs"}, Capabilities: 1<<capSysAdmin | 1<<capSysResource | 1<<capMknod,
		KubeletDir: "/var/lib/kubelet", Propagation: "shared:1", Endpoint: "unix:///x.sock", Serving: true,
	}
	for _, t := range tools() {
		t.Path, t.Version = "/sbin/"+t.Name, "1"
		n.Tools = append(n.Tools, t)
	}
	return n
}

// lacks is a machine without a program.
func lacks(name string) func(*Node) {
	return func(n *Node) {
		n.Tools[slices.IndexFunc(n.Tools, func(t Tool) bool { return t.Name == name })].Path = ""
	}
}

func TestNode(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*Node)
		want   []string
	}{
		"sound":               {func(*Node) {}, nil},
		"not root":            {func(n *Node) { n.Root = false }, []string{"problem node: not root"}},
		"old kernel":          {func(n *Node) { n.Calls[0].Err = errors.New("function not implemented") }, []string{"problem kernel: openat2 (Linux 5.6): function not implemented"}},
		"no loop driver":      {func(n *Node) { n.Loop = loop.ErrUnsupported }, []string{"-> modprobe loop"}},
		"no dm-crypt":         {func(n *Node) { n.Encryption = crypt.ErrUnavailable }, []string{"note encryption: no encrypted volumes"}},
		"partition scanning":  {func(n *Node) { n.MaxPart = 7 }, []string{"warning loop driver: max_part is 7"}},
		"a private /dev":      {func(n *Node) { n.Devtmpfs = false }, []string{"note /dev"}},
		"no module yet":       {func(n *Node) { n.Filesystems = []string{"ext4", "xfs"} }, []string{"-> modprobe btrfs"}},
		"no CAP_SYS_ADMIN":    {func(n *Node) { n.Capabilities &^= 1 << capSysAdmin }, []string{"problem capabilities: no CAP_SYS_ADMIN"}},
		"no CAP_SYS_RESOURCE": {func(n *Node) { n.Capabilities &^= 1 << capSysResource }, []string{"warning capabilities: no CAP_SYS_RESOURCE: a mounted ext4 cannot grow"}},
		"no CAP_MKNOD":        {func(n *Node) { n.Capabilities &^= 1 << capMknod }, []string{"note capabilities: no CAP_MKNOD"}},
		"no mkfs.ext4":        {func(n *Node) { n.Tools[0].Path = "" }, []string{"problem program mkfs.ext4: it is not there: no new volumes with ext4 -> install the package e2fsprogs"}},
		"no mkfs.xfs":         {func(n *Node) { n.Tools[3].Path = "" }, []string{"warning program mkfs.xfs: it is not there: no new volumes with xfs -> install the package xfsprogs"}},
		"no tune2fs":          {lacks("tune2fs"), []string{"problem program tune2fs: it is not there: no restores and clones of ext filesystems -> install the package e2fsprogs"}},
		"no resize2fs":        {lacks("resize2fs"), []string{"problem program resize2fs"}},
		"no btrfstune":        {lacks("btrfstune"), []string{"warning program btrfstune: it is not there: no restores and clones of btrfs -> install the package btrfs-progs"}},
		"left frozen": {func(n *Node) { n.Serving, n.Freezes, n.Expedited = false, []string{"/run/x/1.freeze"}, true }, []string{
			"note csi-loop", "problem frozen filesystem: /run/x/1.freeze is left", "warning kernel: rcu_expedited is on",
		}},
		"frozen now":          {func(n *Node) { n.Freezes, n.Expedited = []string{"/run/x/1.freeze"}, true }, nil},
		"expedited by others": {func(n *Node) { n.Serving, n.Expedited = false, true }, []string{"note csi-loop"}},
		"one-way propagation": {func(n *Node) { n.Propagation = "master:1" }, []string{"problem kubelet: /var/lib/kubelet is on a mount that is not shared (master:1)"}},
		"private mount":       {func(n *Node) { n.Propagation = "" }, []string{"is not shared (private)"}},
		"no kubelet":          {func(n *Node) { n.KubeletDir, n.Propagation = "", "" }, nil},
		"driver is down":      {func(n *Node) { n.Serving = false }, []string{"note csi-loop: nobody answers on unix:///x.sock"}},
	} {
		t.Run(name, func(t *testing.T) {
			n := goodNode()
			c.change(&n)
			want(t, CheckNode(n), c.want...)
		})
	}
}

// goodSite is an installation without a fault: one volume, staged.
func goodSite() (*Site, Config) {
	const id = "aaaaaaaaaaaaaaaaaaaa.v"
	file, ref := loop.FileID{Dev: 1, Ino: 2}, loop.Ref{Number: 3, DiskSeq: 4}
	v := image.VolumeView{
		ID: id, Dev: 1, Ino: 2, Allocated: image.MiB,
		Volume: image.Volume{ID: id, Pool: "p", Spec: image.Spec{Name: "v", Size: image.MiB, Allocation: image.Thick, Filesystem: "ext4"}},
	}
	s := &Site{
		Pools:   []image.PoolView{{Name: "p", Path: "/p", ID: "aaaaaaaaaaaaaaaaaaaa", Filesystem: "xfs", Reflinks: true, DirectIO: 512, Volumes: []image.VolumeView{v}}},
		Records: []driver.Staged{{VolumeID: id, File: "/s/n/x.json", StagingPath: "/stage", Devices: []loop.Ref{ref}, Targets: []string{"/target"}}},
		Devices: []Device{{
			Path: "/dev/loop3", Number: 3, Volume: id, State: Staged, Size: image.MiB, Tag: id,
			Mounts: []string{"/stage", "/target"}, info: loop.Info{Ref: ref, Image: file},
		}},
		images: map[loop.FileID]image.VolumeView{file: v},
	}
	return s, Config{Pools: []image.Config{{Name: "p", Path: "/p"}}, MaxDevices: 256}
}

func TestSite(t *testing.T) {
	missing := filepath.Join(t.TempDir(), "missing dir")
	for name, c := range map[string]struct {
		change  func(*Site, *Config)
		serving bool
		want    []string
	}{
		"sound": {change: func(*Site, *Config) {}},
		"no pool is named": {change: func(s *Site, c *Config) {
			s.Pools, s.Devices, s.Records, c.Pools = nil, nil, nil, nil
		}, want: []string{"note pools"}},
		"the directory is missing": {change: func(s *Site, c *Config) {
			s.Pools[0].Err, c.Pools[0].Path = image.ErrPool, missing
		}, want: []string{"-> mkdir -p -m 0700 '" + missing + "'"}},
		"a new pool":        {change: func(s *Site, _ *Config) { s.Pools[0].New, s.Pools[0].DirectIO = true, 0 }, want: []string{"note pool p: /p on xfs is empty"}},
		"no direct I/O":     {change: func(s *Site, _ *Config) { s.Pools[0].DirectIO = 0 }, want: []string{"warning pool p: no direct I/O"}},
		"coarse direct I/O": {change: func(s *Site, _ *Config) { s.Pools[0].DirectIO = 65536 }, want: []string{"needs an alignment of 65536 bytes"}},
		"no reflinks":       {change: func(s *Site, _ *Config) { s.Pools[0].Reflinks = false }, want: []string{"note pool p: files cannot share"}},
		"no promises":       {change: func(s *Site, _ *Config) { s.Pools[0].NoThick = true }, want: []string{"only thin volumes"}},
		"the pool's problems": {change: func(s *Site, _ *Config) {
			s.Pools[0].Problems = []image.Problem{{Kind: image.Degraded, Reason: "ReserveUsed", Message: "m", Action: "make room"}, {Kind: image.Inaccessible, Reason: "PoolMissing", Message: "n", Action: "mount it"}}
		}, want: []string{"warning pool p: ReserveUsed: m -> make room", "problem pool p: PoolMissing: n -> mount it"}},
		"a leftover":            {change: func(s *Site, _ *Config) { s.Pools[0].Leftovers = []string{".new-x"} }, want: []string{"warning pool p: .new-x was left"}},
		"a call under way":      {change: func(s *Site, _ *Config) { s.Pools[0].Leftovers = []string{".new-x"} }, serving: true, want: []string{"note pool p: .new-x"}},
		"a file open to others": {change: func(s *Site, _ *Config) { s.Pools[0].Exposed = []string{"pool.json"} }, want: []string{"-> chmod go= /p/pool.json"}},
		"a copied pool": {change: func(s *Site, c *Config) {
			copied := s.Pools[0]
			copied.Name, copied.Volumes = "q", nil
			s.Pools, c.Pools = append(s.Pools, copied), append(c.Pools, image.Config{Name: "q", Path: "/q"})
		}, want: []string{"problem pool q: it has the ID of pool p"}},
		"a damaged record": {change: func(s *Site, _ *Config) {
			s.Pools[0].Volumes[0].Err = image.ErrDamaged
		}, want: []string{"problem volume aaaaaaaaaaaaaaaaaaaa.v: refused: damaged -> stop csi-loop on the node and restore the record"}},
		"a lost image": {change: func(s *Site, _ *Config) {
			s.Pools[0].Volumes[0].Problems = []image.Problem{{Kind: image.DataLoss, Reason: "ImageMissing", Message: "m", Action: "restore it"}}
		}, want: []string{"ImageMissing: m -> restore it (/p/volumes/v/disk.img)"}},
		"attached by hand": {change: func(s *Site, _ *Config) {
			s.Devices[0].State, s.Records = Attached, nil
		}, want: []string{"-> if nobody uses it: umount /stage /target, then losetup -d /dev/loop3"}},
		"a removed image": {change: func(s *Site, _ *Config) {
			s.Devices[0].State, s.Devices[0].Mounts, s.Records, s.images = Attached, nil, nil, nil
			s.Pools[0].Volumes = nil
		}, want: []string{"it keeps an image of volume aaaaaaaaaaaaaaaaaaaa.v that is removed, and its space () -> losetup -d /dev/loop3"}},
		"an image of a pool that cannot be looked at": {change: func(s *Site, _ *Config) {
			s.Devices[0].State, s.Devices[0].Mounts, s.Records, s.images = Attached, nil, nil, nil
			s.Pools[0].Err, s.Pools[0].Volumes = image.ErrPool, nil
		}, want: []string{"problem pool p", "warning device /dev/loop3: it shows an image of volume aaaaaaaaaaaaaaaaaaaa.v () that is not found in the pool"}},
		"an image in whose place is another": {change: func(s *Site, _ *Config) {
			s.Devices[0].State, s.Devices[0].Mounts, s.Records, s.images = Attached, nil, nil, nil
		}, want: []string{"warning device /dev/loop3: it shows an image of volume aaaaaaaaaaaaaaaaaaaa.v () that is not found in the pool"}},
		"somebody else's device": {change: func(s *Site, _ *Config) {
			s.Devices = append(s.Devices, Device{Path: "/dev/loop9", State: Foreign})
		}},
		"two writers": {change: func(s *Site, _ *Config) {
			second := s.Devices[0]
			second.Path, second.State, second.info.Ref = "/dev/loop4", Staged, loop.Ref{Number: 4, DiskSeq: 9}
			s.Devices = append(s.Devices, second)
		}, want: []string{"2 devices write to its image (/dev/loop3 /dev/loop4)"}},
		"a reader beside the writer": {change: func(s *Site, _ *Config) {
			second := s.Devices[0]
			second.Path, second.ReadOnly = "/dev/loop4", true
			s.Devices = append(s.Devices, second)
		}},
		"a thick volume that takes discards": {change: func(s *Site, _ *Config) { s.Devices[0].Discard = true }, want: []string{"-> echo 0 > /sys/block/loop3/queue/discard_max_bytes"}},
		"growth that stopped half way":       {change: func(s *Site, _ *Config) { s.Devices[0].Size = 4096 }, want: []string{"growth was not completed on the node"}},
		"a stale record": {change: func(s *Site, _ *Config) {
			s.Records = append(s.Records, driver.Staged{Stale: true, File: "/s/n/y.json"})
		}, want: []string{"note record /s/n/y.json"}},
		"a staging that came to nothing": {change: func(s *Site, _ *Config) { s.Records[0].Devices, s.Devices = nil, nil }, want: []string{"note volume aaaaaaaaaaaaaaaaaaaa.v: its staging at /stage was begun"}},
		"a device that is gone":          {change: func(s *Site, _ *Config) { s.Devices = nil }, want: []string{"its loop device is gone -> start csi-loop"}},
		"the same beside the driver":     {change: func(s *Site, _ *Config) { s.Devices = nil }, serving: true, want: []string{"-> restart csi-loop"}},
		"not mounted":                    {change: func(s *Site, _ *Config) { s.Devices[0].Mounts = nil }, want: []string{"and not mounted there"}},
		"not published":                  {change: func(s *Site, _ *Config) { s.Devices[0].Mounts = s.Devices[0].Mounts[:1] }, want: []string{"published at /target on record, and not shown there"}},
		"takes no writes":                {change: func(s *Site, _ *Config) { s.Devices[0].readOnly = []string{"/stage"} }, want: []string{"problem volume aaaaaaaaaaaaaaaaaaaa.v: its filesystem at /stage takes no more writes: the kernel found an error in it, or somebody remounted it -> dmesg, then delete the pods"}},
		"staged for reading":             {change: func(s *Site, _ *Config) { s.Devices[0].readOnly, s.Records[0].ReadOnly = []string{"/stage"}, true }},
		"published for reading":          {change: func(s *Site, _ *Config) { s.Devices[0].readOnly = []string{"/target"} }},
		"did not grow":                   {change: func(s *Site, _ *Config) { s.Devices[0].small = true }, want: []string{"warning volume aaaaaaaaaaaaaaaaaaaa.v: its filesystem at /stage is smaller than its device: it did not grow -> expand the claim again"}},
		"a mapped one that did not grow": {change: func(s *Site, _ *Config) { s.Devices[0].small, s.Records[0].Mapped = true, "/img" }},
		"as many devices as allowed":     {change: func(_ *Site, c *Config) { c.MaxDevices = 1 }, want: []string{"warning loop devices: 1 are attached, the limit is 1"}},
		"snapshots": {change: func(s *Site, _ *Config) {
			s.Snapshots = []Snapshot{{ID: "a", State: Ready}, {ID: "b", State: Refused, Problem: "p", fix: "do so"}, {ID: "c", State: Damaged, Problem: "q"}, {ID: "d", State: Unfinished, Group: "g"}}
		}, want: []string{"problem snapshot b: refused: p -> do so", "problem snapshot c: damaged: q", "warning snapshot d: it is part of a group snapshot (g)"}},
		"a group snapshot under way": {change: func(s *Site, _ *Config) {
			s.Snapshots = []Snapshot{{ID: "d", State: Unfinished, Group: "g"}}
		}, serving: true, want: []string{"note snapshot d"}},
		"templates": {change: func(s *Site, _ *Config) {
			s.Pools[0].Templates = []image.TemplateView{{ID: "a.sound"}, {ID: "a.refused", Err: image.ErrDamaged}, {ID: "a.short", ImageErr: image.ErrDamaged}, {ID: "a.deaf", ImageErr: syscall.EIO}}
		}, want: []string{
			"problem template a.refused: damaged -> stop csi-loop on the node and restore the directory from a backup", "problem template a.short: damaged",
			"problem template a.deaf: input/output error -> csi-loop stops, or the kernel could not answer just then",
		}},
		"what cannot be looked at": {change: func(s *Site, _ *Config) {
			s.Blind, s.Devices = []error{os.ErrPermission}, nil
		}, want: []string{"problem node: cannot look: permission denied"}},
	} {
		t.Run(name, func(t *testing.T) {
			s, cfg := goodSite()
			c.change(s, &cfg)
			want(t, CheckSite(s, cfg, c.serving), c.want...)
		})
	}
}

// TestDeviceOfARefusedVolume: a volume whose record is refused, as after a roll-back, may
// be in use. It is not called removed, and nobody is told to take its device away.
func TestDeviceOfARefusedVolume(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "pool")
	if err := os.Mkdir(dir, 0o700); err != nil { // whatever the umask is
		t.Fatal(err)
	}
	pool := image.Config{Name: "p", Path: dir}
	store, err := image.Open(t.Context(), []image.Config{pool})
	if err != nil {
		t.Fatal(err)
	}
	v, err := store.Pools()[0].Create(t.Context(), image.Spec{Name: "v", Size: image.MiB})
	if err := errors.Join(err, store.Close(), os.WriteFile(filepath.Join(dir, "volumes/v/volume.json"), []byte(`{"formatVersion": 99}`), 0o600)); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(filepath.Join(dir, "volumes/v/disk.img"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	id, err := loop.FileIDOf(f)
	if err != nil {
		t.Fatal(err)
	}
	s := &Site{}
	if s.Pools, err = image.Inspect(t.Context(), []image.Config{pool}); err != nil {
		t.Fatal(err)
	}
	s.see()
	s.Devices = []Device{s.device(loop.Info{Path: "/dev/none", Image: id, Tag: v.ID}, nil)}
	var got []string
	for _, f := range told(CheckSite(s, Config{Pools: []image.Config{pool}}, true)) {
		if !strings.Contains(f, " pool p: ") { // of the machine that the test runs on
			got = append(got, f)
		}
	}
	if len(got) != 2 || !strings.Contains(got[0], "refused: ") || !strings.Contains(got[1], "it shows volume "+v.ID) || !strings.Contains(got[1], "-> if nobody uses it: losetup -d") {
		t.Errorf("%q", got)
	}
}

// A template that is well has a line too: how large it is, and what was made of it.
func TestTemplateLine(t *testing.T) {
	s, cfg := goodSite()
	golden, raw := image.TemplateView{ID: "a.golden"}, image.TemplateView{ID: "a.disk"}
	golden.Size, golden.Filesystem, raw.Size = 64<<20, "ext4", 2<<30
	s.Pools[0].Templates = []image.TemplateView{golden, raw}
	made := s.Pools[0].Volumes[0]
	made.Source = &image.Source{Template: "a.golden"}
	other := made
	other.Source = &image.Source{Snapshot: "a.golden"}
	s.Pools[0].Volumes = append(s.Pools[0].Volumes, made, made, other)
	var got []string
	for _, f := range CheckSite(s, cfg, true) {
		if strings.HasPrefix(f.Subject, "template ") {
			got = append(got, fmt.Sprintf("%s %s: %s%s", f.Level, f.Subject, f.Message, f.Fix))
		}
	}
	if want := []string{
		"ok template a.golden: 64.0 MiB, ext4, in pool p: 2 volumes were made of it",
		"ok template a.disk: 2.0 GiB, raw, in pool p: 0 volumes were made of it",
	}; !slices.Equal(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
}

func TestEveryProblemSaysWhatMendsIt(t *testing.T) {
	n := goodNode()
	n.Root, n.Loop, n.MaxPart, n.Capabilities, n.Propagation = false, loop.ErrUnsupported, 1, 0, ""
	for i := range n.Tools {
		n.Tools[i].Path = ""
	}
	for _, f := range CheckNode(n) {
		if (f.Level == Problem || f.Level == Warning) && f.Fix == "" {
			t.Errorf("%+v", f)
		}
	}
}

func TestVolumeStates(t *testing.T) {
	s, _ := goodSite()
	state := func() string { return s.volume(s.Pools[0].Volumes[0]).State }
	if got := state(); got != Published {
		t.Error(got)
	}
	s.Devices[0].Mounts = []string{"/stage"}
	if got := state(); got != Staged {
		t.Error(got)
	}
	s.Devices[0].State = Attached
	if got := state(); got != Attached {
		t.Error(got)
	}
	s.Devices = nil
	if got := state(); got != Available {
		t.Error(got)
	}
	s.Pools[0].Volumes[0].Err = image.ErrDamaged
	if got := state(); got != Refused {
		t.Error(got)
	}
}

func TestQuote(t *testing.T) {
	for in, want := range map[string]string{"/a/b-c_d.e": "/a/b-c_d.e", "": "''", "a b": "'a b'", "it's": `'it'\''s'`, "$(x)": "'$(x)'"} {
		if got := Quote(in); got != want {
			t.Errorf("%q: %s, want %s", in, got, want)
		}
	}
}

func TestBytes(t *testing.T) {
	for in, want := range map[int64]string{0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 16 << 20: "16.0 MiB", 1<<63 - 1: "8.0 EiB"} {
		if got := Bytes(in); got != want {
			t.Errorf("%d: %s, want %s", in, got, want)
		}
	}
}

func TestWhatIsWellNeedsNoFix(t *testing.T) {
	s, cfg := goodSite()
	for _, f := range slices.Concat(CheckNode(goodNode()), CheckSite(s, cfg, true)) {
		if f.Level != OK || f.Fix != "" {
			t.Errorf("%+v", f)
		}
	}
}
