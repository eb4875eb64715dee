package image

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"k8s.io/klog/v2"
)

// sourceID is a volume's ID that no pool has.
var sourceID = VolumeID(strings.Repeat("a", poolIDLength), "v")

func FuzzSnapshotRecord(f *testing.F) {
	volume := newRecord(Spec{Name: "v", Size: MiB, Allocation: Thick, BlockSize: 4096, DirectIO: "auto"}, time.Unix(1e9, 0))
	formatted := volume
	formatted.Filesystem, formatted.Size, formatted.MkfsOptions, formatted.Allocation = "ext4", 64*MiB, []string{"-m", "1"}, Thin
	encrypted := formatted
	encrypted.Encryption = Encryption{Type: LUKS2, Discard: true}
	for _, r := range []snapshotRecord{
		newSnapshotRecord(SnapshotSpec{Name: "s", Source: sourceID}, volume, "", true, time.Unix(1e9, 0)),
		newSnapshotRecord(SnapshotSpec{Name: "s", Source: sourceID, Independent: true}, formatted, sourceID, false, time.Unix(1e9, 5e6)),
		newSnapshotRecord(SnapshotSpec{Name: "s", Source: sourceID}, encrypted, "", false, time.Unix(1e9, 0)),
	} {
		b, err := r.encode()
		if err != nil {
			f.Fatal(err)
		}
		if _, err := parseSnapshot(b, "s"); err != nil {
			f.Fatalf("%s: %v", b, err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := parseSnapshot(b, "s")
		if err != nil {
			return
		}
		_, source, ok := ParseID(r.Source)
		if r.Name != "s" || !ok || source != DirName(r.Volume.Name) || r.Volume.Size <= 0 || r.Volume.Size%MiB != 0 {
			t.Fatalf("accepted %+v", r)
		}
		again, err := r.encode()
		if err != nil {
			t.Fatal(err)
		}
		if r2, err := parseSnapshot(again, "s"); err != nil || !cmp.Equal(r, r2) {
			t.Fatalf("%s does not come back: %v", again, err)
		}
	})
}

// groupOf is the record of a group snapshot.
func groupOf(name string, sources ...string) groupRecord {
	r := groupRecord{FormatVersion: groupVersion, Name: name, Created: time.Unix(1e9, 5e6).UTC()}
	for _, source := range sources {
		pool, _, _ := ParseID(source)
		r.Members = append(r.Members, groupMember{Source: source, Snapshot: VolumeID(pool, memberName(name, source))})
	}
	return r
}

func FuzzGroupRecord(f *testing.F) {
	independent := groupOf("g", sourceID)
	independent.Independent = true
	for _, r := range []groupRecord{groupOf("g", sourceID, sourceID+"w"), independent} {
		b, err := r.encode()
		if err != nil {
			f.Fatal(err)
		}
		if _, err := parseGroup(b, "g"); err != nil {
			f.Fatalf("%s: %v", b, err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := parseGroup(b, "g")
		if err != nil {
			return
		}
		if r.Name != "g" || len(r.Members) == 0 {
			t.Fatalf("accepted %+v", r)
		}
		for _, m := range r.Members {
			_, dir, ok := ParseID(m.Snapshot)
			if !ok || dir != memberName("g", m.Source) {
				t.Fatalf("the snapshot of another: %+v", m)
			}
		}
		again, err := r.encode()
		if err != nil {
			t.Fatal(err)
		}
		if r2, err := parseGroup(again, "g"); err != nil || !cmp.Equal(r, r2) {
			t.Fatalf("%s does not come back: %v", again, err)
		}
	})
}

// A group's record names its own snapshots, each once, in order.
func TestGroupRecordOfOthers(t *testing.T) {
	for name, change := range map[string]func(r *groupRecord){
		"snapshot of another group": func(r *groupRecord) { r.Members[0].Snapshot = groupOf("h", sourceID).Members[0].Snapshot },
		"a snapshot of no group":    func(r *groupRecord) { r.Members[0].Snapshot = sourceID },
		"in another pool":           func(r *groupRecord) { r.Members[0].Snapshot = strings.Replace(r.Members[0].Snapshot, "a", "b", 1) },
		"a volume twice":            func(r *groupRecord) { r.Members[1] = r.Members[0] },
		"out of order":              func(r *groupRecord) { slices.Reverse(r.Members) },
		"no volume":                 func(r *groupRecord) { r.Members[1].Source = "v" },
		"nothing":                   func(r *groupRecord) { r.Members = nil },
		"another name":              func(r *groupRecord) { *r = groupOf("h", sourceID) },
	} {
		r := groupOf("g", sourceID, sourceID+"w")
		change(&r)
		b, err := r.encode()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := parseGroup(b, "g"); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// A group whose record would be too large to be read again is refused before anything
// of it is made.
func TestGroupOfTooMany(t *testing.T) {
	s, p := openPool(t, poolDir(t))
	create(t, p, Spec{Name: "v", Size: MiB, Allocation: Thin})
	var sources []string
	for i := range 1000 {
		sources = append(sources, VolumeID(p.ID(), fmt.Sprint("v", i)))
	}
	_, err := s.SnapshotGroup(ctx, GroupSpec{Name: "g", Sources: sources}, nil)
	if e, ok := errors.AsType[*SpecError](err); !ok || e.Field != "Sources" {
		t.Error(err)
	}
	_, err = s.SnapshotGroup(ctx, GroupSpec{Name: "g", Sources: sources[:300]}, nil) // the record would do, but there are no such volumes
	wantError(t, err, ErrNotFound)
	wantNoGroup(t, s, p, "g")
}

// everyRecord is a pool with something of each kind, which lies in a directory.
type everyRecord struct {
	dir     string
	records []string // paths below dir
	group   string   // its ID
}

func newEveryRecord(tb testing.TB) everyRecord {
	tb.Helper()
	e := everyRecord{dir: poolDir(tb)}
	s, p, err := tryOpen(e.dir)
	if err != nil {
		tb.Fatal(err)
	}
	v, w := create(tb, p, Spec{Name: "v", Size: MiB, Allocation: Thin}), create(tb, p, Spec{Name: "w", Size: MiB, Allocation: Thin})
	snap(tb, p, "s", v.ID)
	snap(tb, p, "t", w.ID)
	g, err := s.SnapshotGroup(ctx, GroupSpec{Name: "g", Sources: []string{v.ID, w.ID}}, nil)
	if err != nil {
		tb.Fatal(err)
	}
	e.group = g.ID
	path := filepath.Join(tb.TempDir(), "file")
	if err := os.WriteFile(path, make([]byte, MiB), 0o600); err != nil {
		tb.Fatal(err)
	}
	file, err := os.Open(path)
	if err != nil {
		tb.Fatal(err)
	}
	defer file.Close()
	for _, name := range []string{"golden", "silver"} {
		if _, err := p.AddTemplate(ctx, TemplateSpec{Name: name, Size: MiB, BlockSize: 512}, contentOf(path, file, Copy)); err != nil {
			tb.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		tb.Fatal(err)
	}
	for _, pattern := range []string{"pool.json", "volumes/*/volume.json", "snapshots/*/snapshot.json", "groups/*/group.json", "templates/*/template.json"} {
		found, err := filepath.Glob(filepath.Join(e.dir, pattern))
		if err != nil || len(found) == 0 {
			tb.Fatal(found, err)
		}
		for _, path := range found {
			e.records = append(e.records, strings.TrimPrefix(path, e.dir+"/"))
		}
	}
	return e
}

// found is what a pool has: what each record says, by its path, or why it is refused.
// A group is refused when one of its snapshots is.
func found(t *testing.T, s *Store, p *Pool, e everyRecord) (sound map[string]any, refused map[string]error) {
	t.Helper()
	sound, refused = map[string]any{}, map[string]error{}
	for _, path := range e.records {
		name := filepath.Base(filepath.Dir(path))
		id := VolumeID(p.ID(), name)
		var v any
		var err error
		switch filepath.Base(path) {
		case recordFile:
			v, err = s.Get(id)
		case snapshotFile:
			v, err = s.GetSnapshot(id)
		case groupFile:
			v, err = s.GetGroup(id)
		case templateFile:
			v, err = p.Template(name)
		default:
			continue
		}
		if err == nil {
			sound[path] = v
		} else {
			refused[path] = err
		}
	}
	return sound, refused
}

// entries lists all files and directories below dir.
func entries(t *testing.T, dir string) []string {
	t.Helper()
	var all []string
	err := filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
		all = append(all, path)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// FuzzDamagedRecord: of a pool of which one record is spoilt all else is served as
// before. What has the record is refused as damaged, or is what its record says now;
// nothing is removed, and the account is that of what is served.
func FuzzDamagedRecord(f *testing.F) {
	klog.SetLogger(klog.Logger{})
	e := newEveryRecord(f)
	kept := f.TempDir()
	for i := range e.records {
		f.Add(uint8(i), uint16(1<<15), []byte(nil))        // empty
		f.Add(uint8(i), uint16(1<<15), []byte("{}"))       // another content
		f.Add(uint8(i), uint16(20), []byte("\x00\x00"))    // torn
		f.Add(uint8(i), uint16(1<<14), []byte("{\"a\":1")) // something behind it
	}
	f.Fuzz(func(t *testing.T, which uint8, at uint16, with []byte) {
		e := e
		path := e.records[int(which)%len(e.records)]
		whole := filepath.Join(kept, filepath.Base(t.TempDir()))
		if err := os.CopyFS(whole, os.DirFS(e.dir)); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = os.RemoveAll(whole) })
		e.dir = whole
		s, p, err := tryOpen(e.dir)
		if err != nil {
			t.Fatal(err)
		}
		before, _ := found(t, s, p, e)
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		old, err := os.ReadFile(filepath.Join(e.dir, path))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(e.dir, path), spoil(old, int(at), with), 0o600); err != nil {
			t.Fatal(err)
		}
		files := entries(t, e.dir)
		views, err := Inspect(ctx, []Config{{Name: "default", Path: e.dir}})
		if err != nil {
			t.Fatal(err)
		}
		s, p, err = tryOpen(e.dir)
		if (err == nil) != (views[0].Err == nil) || err != nil && (!errors.Is(err, ErrPool) || path != identityFile) {
			t.Fatalf("%s: %v, and a look said %v", path, err, views[0].Err)
		}
		if after := entries(t, e.dir); !slices.Equal(files, after) {
			t.Errorf("%s: %q, then %q", path, files, after)
		}
		if err != nil {
			return
		}
		t.Cleanup(func() { _ = s.Close() })
		after, refused := found(t, s, p, e)
		compareFound(t, path, before, after, refused)
		compareViews(t, path, views[0], e, refused)
		wantAccount(t, s, p)
	})
}

// spoil overwrites, or appends to, what is there; from 32 KiB on it replaces it.
func spoil(old []byte, at int, with []byte) []byte {
	if at >= 1<<15 {
		return with
	}
	b := slices.Clone(old)
	at = min(at, len(b))
	return append(b[:at], append(slices.Clone(with), b[min(len(b), at+len(with)):]...)...)
}

// compareFound wants all but what has the record at path to be as before. A group is
// what its snapshots are, and the snapshots of one whose record is damaged are not served.
func compareFound(t *testing.T, path string, before, after map[string]any, refused map[string]error) {
	t.Helper()
	for _, other := range slices.Sorted(maps.Keys(before)) {
		err := refused[other]
		switch {
		case other == path, strings.HasPrefix(path, memberPrefix) && filepath.Base(other) == groupFile:
			if err != nil && (!errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), filepath.Dir(path))) {
				t.Errorf("%s: refused by %v", path, err)
			}
		case refused[path] != nil && filepath.Base(path) == groupFile && strings.HasPrefix(other, memberPrefix):
			wantError(t, err, ErrDamaged)
		case err != nil:
			t.Errorf("%s: %s is refused: %v", path, other, err)
		case path != identityFile && !cmp.Equal(before[other], after[other]):
			t.Errorf("%s: %s", path, cmp.Diff(before[other], after[other]))
		}
	}
	if len(after)+len(refused) != len(before) {
		t.Errorf("%s: of %d are %d and %d refused", path, len(before), len(after), len(refused))
	}
}

// memberPrefix begins the paths of what a group's snapshots have.
const memberPrefix = snapshotsDir + "/group-"

// compareViews wants a look to find what the opening found; it does not look at groups.
func compareViews(t *testing.T, spoilt string, v PoolView, e everyRecord, refused map[string]error) {
	t.Helper()
	look := map[string]error{}
	name := func(kind, id, record string) string {
		_, dir, _ := ParseID(id)
		return kind + "/" + dir + "/" + record
	}
	for _, x := range v.Volumes {
		look[name(volumesDir, x.ID, recordFile)] = x.Err
	}
	for _, x := range v.Snapshots {
		look[name(snapshotsDir, x.ID, snapshotFile)] = x.Err
	}
	for _, x := range v.Templates {
		look[name(templatesDir, x.ID, templateFile)] = x.Err
	}
	for _, path := range e.records {
		if base := filepath.Base(path); base == identityFile || base == groupFile {
			continue
		}
		err, seen := look[path]
		refusal := refused[path]
		if strings.HasPrefix(path, memberPrefix) && filepath.Base(spoilt) == groupFile { // it is refused as its group is
			refusal = nil
		}
		if !seen || (err == nil) != (refusal == nil) {
			t.Errorf("%s: looked at: %v, found %v; opened: %v", path, seen, err, refused[path])
		}
	}
}

// A snapshot of a group whose record says another group, or none, is not removed as one
// that an interrupted call left. It is refused, and with it the group, which can be
// removed.
func TestSnapshotThatForgotItsGroup(t *testing.T) {
	for name, change := range map[string]func(r map[string]any){
		"none":                func(r map[string]any) { delete(r, "group") },
		"another":             func(r map[string]any) { r["group"] = fmt.Sprint(r["group"], "h") },
		"one in another pool": func(r map[string]any) { r["group"] = sourceID },
	} {
		t.Run(name, func(t *testing.T) {
			e := newEveryRecord(t)
			i := slices.IndexFunc(e.records, func(path string) bool { return strings.HasPrefix(path, memberPrefix) })
			path := filepath.Join(e.dir, e.records[i])
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			var r map[string]any
			if err := json.Unmarshal(b, &r); err != nil {
				t.Fatal(err)
			}
			change(r)
			if b, err = json.Marshal(r); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, b, 0o600); err != nil {
				t.Fatal(err)
			}
			views, err := Inspect(ctx, []Config{{Name: "default", Path: e.dir}})
			if err != nil {
				t.Fatal(err)
			}
			s, p := openPool(t, e.dir)
			_, refused := found(t, s, p, e)
			wantError(t, refused[e.records[i]], ErrDamaged, e.group)
			wantError(t, refused[groupsDir+"/g/"+groupFile], ErrDamaged)
			compareViews(t, path, views[0], e, refused)
			if len(refused) != 2 || len(p.Health()) != 1 {
				t.Errorf("refused %v, problems %v", refused, p.Health())
			}
			if _, err := os.Stat(filepath.Join(filepath.Dir(path), imageFile)); err != nil {
				t.Error(err)
			}
			if err := s.RemoveGroup(ctx, e.group); err != nil {
				t.Fatal(err)
			}
			if n := p.snapshotEntries(t); n != 2 || len(p.Health()) != 0 {
				t.Errorf("%d snapshots are left, problems %v", n, p.Health())
			}
			wantAccount(t, s, p)
		})
	}
}
