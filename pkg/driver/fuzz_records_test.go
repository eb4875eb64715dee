package driver

import (
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"

	"github.com/csi-loop/csi-loop/pkg/loop"
	"github.com/csi-loop/csi-loop/pkg/mount"
)

// spoil overwrites, or appends to, what is there; from 32 KiB on it replaces it.
func spoil(old []byte, at int, with []byte) []byte {
	if at >= 1<<15 {
		return with
	}
	b := slices.Clone(old)
	at = min(at, len(b))
	return append(b[:at], append(slices.Clone(with), b[min(len(b), at+len(with)):]...)...)
}

// leftFrozen is a node with a volume whose thawing failed, its record, and the path
// where it is frozen; and a filesystem of somebody else, which is frozen too.
func leftFrozen(t *testing.T) (n *node, v volume, record string) {
	t.Helper()
	n = newFake(t)
	v = n.create("v", 8*mib, mountCap("ext4", oneWriter), nil).up("pod")
	n.fake.failOnce("thaw", mount.ErrNotThawed)
	_, err := v.snapshot("s", "copyInUse", "true")
	code(t, err, codes.Aborted)
	records := n.freezeRecords()
	if len(records) != 1 {
		t.Fatalf("records %v", records)
	}
	foreign := filepath.Join(n.dir, "foreign")
	n.must(os.Mkdir(foreign, 0o700))
	n.fake.devices[1] = &fakeDevice{info: loop.Info{Ref: loop.Ref{Number: 1, DiskSeq: 1 << 40}, Path: "/dev/loop1", Major: fakeMajor, Minor: 1}, openers: 1}
	n.fake.mounts = append(n.fake.mounts, mount.Mount{Path: foreign, Root: "/", FSType: "ext4", Source: "/dev/loop1", Major: fakeMajor, Minor: 1})
	n.fake.frozen[foreign] = true
	t.Cleanup(func() {
		if !n.fake.frozen[foreign] {
			t.Error("what somebody else froze is thawed")
		}
		delete(n.fake.frozen, foreign)
		delete(n.fake.devices, 1)
		n.must(n.fake.Unmount(t.Context(), foreign))
	})
	return n, v, records[0]
}

// FuzzFreezeRecord: beside a freeze record that is sound lies one that was spoilt. The
// sound one's filesystem is thawed, nobody else's is, nothing stays mounted, and the
// spoilt one is refused by name, or stands for what it says.
func FuzzFreezeRecord(f *testing.F) {
	f.Add(uint16(1<<15), []byte(nil))
	f.Add(uint16(1<<15), []byte("null"))
	f.Add(uint16(1<<15), []byte(`{"version":1,"volumes":[{"device":{"number":1}}]}`))
	f.Add(uint16(1<<15), []byte(`{"version":2,"expedited":true}`))
	f.Add(uint16(30), []byte("\x00\x00"))
	f.Add(uint16(1<<14), []byte("{}"))
	for _, at := range []uint16{11, 140, 160, 180, 200, 220, 240, 260} {
		f.Add(at, []byte("9"))
	}
	f.Fuzz(func(t *testing.T, at uint16, with []byte) {
		n, v, record := leftFrozen(t)
		sound, err := os.ReadFile(record)
		n.must(err)
		bad := filepath.Join(filepath.Dir(record), "bad"+freezeSuffix)
		text := spoil(sound, int(at), with)
		n.must(os.WriteFile(bad, text, 0o600))
		var r freezeRecord
		valid := json.Unmarshal(text, &r) == nil && r.Version == recordVersion //nolint:musttag // as in freezestate.go
		counts := valid && r.BootID == n.d.state.bootID
		if got := FreezeRecords(filepath.Dir(record)); slices.Contains(got, bad) != counts || !slices.Contains(got, record) {
			t.Errorf("%s: counted are %q", text, got)
		}
		before := slices.Clone(n.fake.mounts)
		err = n.d.thawLeft(t.Context())
		if !valid && (err == nil || !strings.Contains(err.Error(), bad)) {
			t.Errorf("%s: %v", text, err)
		}
		if len(n.fake.frozen) != 1 || !cmp.Equal(before, n.fake.mounts) {
			t.Errorf("%s: frozen %v, mounts %v", text, slices.Collect(maps.Keys(n.fake.frozen)), n.fake.mounts)
		}
		if left := n.freezeRecords(); slices.Contains(left, record) || slices.Contains(left, bad) && (!counts || err == nil) {
			t.Errorf("%s: records %q are left: %v", text, left, err)
		}
		v.down("pod")
	})
}

// A freeze record whose device has other numbers by now stands for no filesystem: that
// of these numbers may be one that somebody else froze.
func TestFreezeRecordOfOtherNumbers(t *testing.T) {
	n, v, record := leftFrozen(t)
	text, err := os.ReadFile(record)
	n.must(err)
	changed := strings.Replace(string(text), `"Minor":0`, `"Minor":1`, 1)
	if changed == string(text) {
		t.Fatalf("no number in %s", text)
	}
	n.must(os.WriteFile(record, []byte(changed), 0o600))
	if err := n.d.thawLeft(t.Context()); err == nil || !strings.Contains(err.Error(), "freeze record says") {
		t.Error(err)
	}
	n.must(os.WriteFile(record, text, 0o600))
	n.must(n.d.thawLeft(t.Context()))
	v.down("pod")
}

// What lies in the state directory under the name of a record and is no file, or is
// huge, keeps neither the driver from starting nor others' records from being read.
func TestStateThatIsNoRecord(t *testing.T) {
	n := newFake(t)
	v := n.create("v", mib, blockCap(oneWriter), nil).up("pod")
	n.halt()
	dir := filepath.Join(n.cfg.StateDir, n.cfg.NodeID)
	n.must(os.MkdirAll(filepath.Join(dir, "directory.json", "x"), 0o700))
	n.must(os.Symlink("/dev/zero", filepath.Join(dir, "endless.json")))
	n.must(os.Symlink("/dev/zero", filepath.Join(dir, "endless"+freezeSuffix)))
	for _, name := range []string{"huge.json", "huge" + freezeSuffix} {
		n.must(os.WriteFile(filepath.Join(dir, name), nil, 0o600))
		n.must(os.Truncate(filepath.Join(dir, name), 1<<40))
	}
	staged, err := StagedVolumes(n.cfg.StateDir, n.cfg.NodeID)
	n.must(err)
	stale := 0
	for _, s := range staged {
		if s.Stale {
			stale++
		}
	}
	if len(staged) != 4 || stale != 3 {
		t.Errorf("%+v", staged)
	}
	if got := FreezeRecords(dir); len(got) != 0 {
		t.Errorf("%q count", got)
	}
	n.start()
	if all := n.d.state.list(); len(all) != 1 || all[0].VolumeID != v.id {
		t.Errorf("%+v", all)
	}
	left, err := os.ReadDir(dir)
	n.must(err)
	for _, e := range left {
		if e.Name() != "directory.json" && filepath.Join(dir, e.Name()) != n.d.state.path(v.id) && !strings.HasPrefix(e.Name(), ".") {
			t.Errorf("%s is left", e.Name())
		}
	}
	v.down("pod")
}
