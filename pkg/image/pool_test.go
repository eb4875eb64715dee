package image

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

var ctx = context.Background()

const size = 4 * MiB

func TestVolumeLivesThroughReopen(t *testing.T) {
	dir := poolDir(t)
	s, p := openPool(t, dir)
	want := create(t, p, Spec{Name: "pvc-1", Size: size, Ephemeral: &Ephemeral{Target: "/t"}, BlockSize: 512})
	if want.ID != p.ID()+".pvc-1" || want.Allocation != Thick || want.DirectIO != "auto" || want.Pool != "default" {
		t.Fatalf("made %+v", want)
	}
	data := fill(t, p, want.ID, 4096, 1000)
	id, key := p.ID(), p.PublicKey()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	wantClean(t, dir)

	s, p = openPool(t, dir)
	if p.ID() != id || !ed25519.Verify(key, []byte("nonce"), p.Sign([]byte("nonce"))) {
		t.Fatal("another identity after reopening")
	}
	got, err := s.Get(want.ID)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Fatal(d)
	}
	if found, ok := s.Find("pvc-1"); !ok || found.ID != want.ID {
		t.Fatal("not found by name")
	}
	if d := cmp.Diff([]Volume{want}, s.List()); d != "" {
		t.Fatal(d)
	}
	f, err := p.OpenImage(ctx, want.ID, true)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 1000)
	if _, err := f.ReadAt(b, 4096); err != nil || !bytes.Equal(b, data) {
		t.Fatalf("data differs: %v", err)
	}
	if _, err := f.Write(b); err == nil {
		t.Fatal("an image opened read-only was written")
	}
	wantAccount(t, s, p)
}

func TestModes(t *testing.T) {
	dir := poolDir(t)
	_, p := openPool(t, dir)
	create(t, p, Spec{Name: "v", Size: size})
	for path, want := range map[string]fs.FileMode{
		"pool.json": 0o600, "volumes": 0o700 | fs.ModeDir, "volumes/v": 0o700 | fs.ModeDir,
		"volumes/v/volume.json": 0o600, "volumes/v/disk.img": 0o600,
	} {
		st, err := os.Lstat(filepath.Join(dir, path))
		if err != nil {
			t.Fatal(err)
		}
		if st.Mode() != want {
			t.Errorf("%s has mode %v, want %v", path, st.Mode(), want)
		}
	}
}

func TestCreateIsIdempotentAndComparesOnce(t *testing.T) {
	_, p := openPool(t, poolDir(t))
	base := Spec{Name: "v", Size: size}
	first := create(t, p, base)
	if again := create(t, p, Spec{Name: "v", Size: size, Allocation: Thick, BlockSize: 4096, DirectIO: "auto"}); again.ID != first.ID {
		t.Fatal("a second volume")
	}
	for field, change := range map[string]func(*Spec){
		"size":             func(s *Spec) { s.Size = 2 * size },
		"allocation":       func(s *Spec) { s.Allocation = Thin },
		"filesystem":       func(s *Spec) { s.Filesystem, s.Size = "ext2", size },
		"block size":       func(s *Spec) { s.BlockSize = 512 },
		"direct I/O":       func(s *Spec) { s.DirectIO = "off" },
		"ephemeral target": func(s *Spec) { s.Ephemeral = &Ephemeral{Target: "/x"} },
	} {
		s := base
		change(&s)
		_, err := p.Create(ctx, s)
		wantError(t, err, ErrIncompatible, "its "+field+" is")
	}
}

func TestSpecsThatNoPoolMakes(t *testing.T) {
	_, p := openPool(t, poolDir(t))
	for name, c := range map[string]struct {
		field string
		spec  Spec
	}{
		"empty name":         {"Name", Spec{Size: size}},
		"long name":          {"Name", Spec{Name: strings.Repeat("x", 129), Size: size}},
		"name with NUL":      {"Name", Spec{Name: "a\x00b", Size: size}},
		"name not UTF-8":     {"Name", Spec{Name: "a\xffb", Size: size}},
		"no size":            {"Size", Spec{Name: "v"}},
		"negative size":      {"Size", Spec{Name: "v", Size: -MiB}},
		"size between MiB":   {"Size", Spec{Name: "v", Size: MiB + 512}},
		"allocation":         {"Allocation", Spec{Name: "v", Size: size, Allocation: "fat"}},
		"block size":         {"BlockSize", Spec{Name: "v", Size: size, BlockSize: 8192}},
		"direct I/O":         {"DirectIO", Spec{Name: "v", Size: size, DirectIO: "maybe"}},
		"filesystem":         {"Filesystem", Spec{Name: "v", Size: size, Filesystem: "vfat"}},
		"ephemeral target":   {"Ephemeral", Spec{Name: "v", Size: size, Ephemeral: &Ephemeral{}}},
		"options for raw":    {"MkfsOptions", Spec{Name: "v", Size: size, MkfsOptions: []string{"-L", "x"}}},
		"options too long":   {"MkfsOptions", Spec{Name: "v", Size: 64 * size, Filesystem: "ext4", MkfsOptions: slices.Repeat([]string{"-O", "project"}, 500)}},
		"options not listed": {"MkfsOptions", Spec{Name: "v", Size: size, Filesystem: "ext4", MkfsOptions: []string{"-d", "/etc"}}},
	} {
		_, err := p.Create(ctx, c.spec)
		var se *SpecError
		if !errors.As(err, &se) || se.Field != c.field {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, f := range []string{"ext3", "ext4", "xfs", "btrfs"} {
		_, err := p.Create(ctx, Spec{Name: "v", Size: MinimumSize(f) - MiB, Filesystem: f})
		wantError(t, err, ErrSize, f)
	}
	_, err := p.Create(ctx, Spec{Name: "v", Size: 1 << 61, Allocation: Thin})
	wantError(t, err, ErrNoSpace)
	wantClean(t, p.Path())
}

func TestHostileNamesStayInTheirDirectory(t *testing.T) {
	dir := poolDir(t)
	s, p := openPool(t, dir)
	names := []string{
		"..", ".", "/", "../../etc/passwd", "a/b", "-rf", "pvc-", "ä ö ü", "日本語", "A", "a", ".new-x", ".gone-x",
		"volume.json", strings.Repeat("n", 128), strings.Repeat("n", 101), strings.Repeat("n", 100), "a_b", "a.b", "\n", "a\tb",
	}
	ids := map[string]bool{}
	for _, n := range names {
		v := create(t, p, Spec{Name: n, Size: MiB, Allocation: Thin})
		if len(v.ID) > 128 || ids[v.ID] {
			t.Fatalf("ID of %q is %q", n, v.ID)
		}
		ids[v.ID] = true
		if found, ok := s.Find(n); !ok || found.ID != v.ID {
			t.Fatalf("%q not found", n)
		}
	}
	wantClean(t, dir)
	entries, err := os.ReadDir(filepath.Join(dir, volumesDir))
	if err != nil || len(entries) != len(names) {
		t.Fatalf("%d directories for %d names: %v", len(entries), len(names), err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s, p = openPool(t, dir)
	if len(s.List()) != len(names) || len(p.Damaged()) > 0 {
		t.Fatalf("%d of %d back, %v", len(s.List()), len(names), p.Damaged())
	}
	for _, v := range s.List() {
		if err := p.Remove(ctx, v.ID); err != nil {
			t.Fatal(err)
		}
	}
	wantAccount(t, s, p)
}

func TestUnknownIDs(t *testing.T) {
	s, p := openPool(t, poolDir(t))
	for _, id := range []string{
		"", ".", "x", p.ID(), p.ID() + ".", p.ID() + ".nope", p.ID() + "...", p.ID() + "./etc", p.ID() + ".a/b",
		"aaaaaaaaaaaaaaaaaaaa.v", strings.Repeat("x", 200),
	} {
		if _, err := s.Get(id); !errors.Is(err, ErrNotFound) {
			t.Errorf("Get(%q): %v", id, err)
		}
		if err := p.Remove(ctx, id); err != nil {
			t.Errorf("Remove(%q): %v", id, err)
		}
		if _, err := p.Grow(ctx, id, size); !errors.Is(err, ErrNotFound) {
			t.Errorf("Grow(%q): %v", id, err)
		}
		if _, err := p.OpenImage(ctx, id, true); !errors.Is(err, ErrNotFound) {
			t.Errorf("OpenImage(%q): %v", id, err)
		}
		if h := p.VolumeHealth(ctx, id); len(h) != 1 || h[0].Reason != "NotFound" {
			t.Errorf("VolumeHealth(%q): %v", id, h)
		}
	}
}

func TestGrow(t *testing.T) {
	for _, alloc := range []Allocation{Thick, Thin} {
		dir := poolDir(t)
		s, p := openPool(t, dir)
		v := create(t, p, Spec{Name: "v", Size: size, Allocation: alloc})
		data := fill(t, p, v.ID, size-512, 512)
		for _, want := range []int64{size, size - MiB, 3 * size, 3 * size} {
			got, err := p.Grow(ctx, v.ID, want)
			if err != nil || got.Size < want || got.Size != max(got.Size, size) {
				t.Fatalf("grow to %d: %d, %v", want, got.Size, err)
			}
		}
		if _, err := p.Grow(ctx, v.ID, 5*size+1); err == nil {
			t.Fatal("a size between MiB was accepted")
		}
		_, err := p.Grow(ctx, v.ID, 1<<60)
		wantError(t, err, ErrNoSpace)
		wantAccount(t, s, p)
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		s, p = openPool(t, dir)
		got, err := s.Get(v.ID)
		if err != nil || got.Size != 3*size {
			t.Fatalf("after reopening: %d, %v", got.Size, err)
		}
		f, err := p.OpenImage(ctx, v.ID, true)
		if err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 512)
		if _, err := f.ReadAt(b, size-512); err != nil || !bytes.Equal(b, data) {
			t.Fatal("data changed by growing")
		}
		f.Close()
		wantAccount(t, s, p)
	}
}

func TestSameVolumeFromManySides(t *testing.T) {
	dir := poolDir(t)
	s, p := openPool(t, dir)
	var wg sync.WaitGroup
	for i := range 32 {
		wg.Go(func() {
			v, err := p.Create(ctx, Spec{Name: "same", Size: size})
			if err == nil && i%4 == 0 {
				_, err = p.Grow(ctx, v.ID, size+int64(i)*MiB)
				if errors.Is(err, ErrNotFound) {
					err = nil
				}
			}
			if i%8 == 1 {
				err = errors.Join(err, p.Remove(ctx, p.ID()+".same"))
			}
			if err != nil && !errors.Is(err, ErrIncompatible) {
				t.Error(err)
			}
		})
		wg.Go(func() {
			v, err := p.Create(ctx, Spec{Name: fmt.Sprintf("other-%d", i), Size: size, Allocation: []Allocation{Thick, Thin}[i%2]})
			if err != nil {
				t.Error(err)
				return
			}
			_ = s.List()
			_ = p.Capacity(Thin)
			if f, err := p.OpenImage(ctx, v.ID, false); err != nil {
				t.Error(err)
			} else {
				f.Close()
			}
		})
	}
	wg.Wait()
	wantClean(t, dir)
	wantAccount(t, s, p)
	if n := len(p.locks.held); n != 0 {
		t.Errorf("%d locks are kept for nobody", n)
	}
}

func TestWaitingForAVolumeHeedsContext(t *testing.T) {
	_, p := openPool(t, poolDir(t))
	unlock, err := p.locks.lock(ctx, "v")
	if err != nil {
		t.Fatal(err)
	}
	short, cancel := context.WithTimeout(ctx, 10*time.Millisecond)
	defer cancel()
	_, err = p.Create(short, Spec{Name: "v", Size: size})
	wantError(t, err, context.DeadlineExceeded)
	unlock()
	create(t, p, Spec{Name: "v", Size: size})
}

func TestPoolsThatAreRefused(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	foreign := poolDir(t)
	if err := os.WriteFile(filepath.Join(foreign, "photos"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	writable := poolDir(t)
	if err := os.Chmod(writable, 0o777); err != nil {
		t.Fatal(err)
	}
	lost := poolDir(t)
	s, p := openPool(t, lost)
	create(t, p, Spec{Name: "v", Size: MiB})
	if err := errors.Join(s.Close(), os.Remove(filepath.Join(lost, identityFile))); err != nil {
		t.Fatal(err)
	}
	sp, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer sp.Close()
	for name, c := range map[string]struct {
		config Config
		words  string
	}{
		"missing":         {Config{Path: "/nonexistent/pool"}, "create it, or mount its disk"},
		"relative":        {Config{Path: "pool"}, "absolute"},
		"root":            {Config{Path: "/"}, "not /"},
		"a file":          {Config{Path: file}, "not a directory"},
		"foreign content": {Config{Path: foreign}, "photos"},
		"lost identity":   {Config{Path: lost}, "restore the file"},
		"world-writable":  {Config{Path: writable}, "chmod"},
		"other type":      {Config{Path: poolDir(t), Expect: Expect{Filesystem: "f2fs"}}, "expected f2fs"},
		"other UUID":      {Config{Path: poolDir(t), Expect: Expect{UUID: "00000000-0000-0000-0000-000000000001"}}, "expected"},
		"no mount point":  {Config{Path: poolDir(t), Expect: Expect{MountPoint: true}}, "not a mount point"},
		"not existing":    {Config{Path: poolDir(t), Expect: Expect{Existing: true}}, "existing pool is expected"},
		"other pool ID":   {Config{Path: poolDir(t), Expect: Expect{PoolID: "aaaaaaaaaaaaaaaaaaaa"}}, "existing pool is expected"},
		"overcommit":      {Config{Path: poolDir(t), Overcommit: 0.5}, "overcommit"},
		"reserve":         {Config{Path: poolDir(t), Reserve: Reserve{Percent: 101}}, "reserve"},
		"name":            {Config{Name: "A/b", Path: poolDir(t)}, "a-z"},
	} {
		if c.config.Name == "" {
			c.config.Name = "p"
		}
		s, err := Open(ctx, []Config{c.config})
		if err == nil {
			s.Close()
		}
		if !errors.Is(err, ErrPool) || !strings.Contains(err.Error(), c.words) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestIdentityThatIsRefused(t *testing.T) {
	for name, change := range map[string]func([]byte) []byte{
		"empty":     func([]byte) []byte { return nil },
		"truncated": func(b []byte) []byte { return b[:len(b)/2] },
		"other ID":  func(b []byte) []byte { return bytes.Replace(b, []byte(`"id": "`), []byte(`"id": "a`), 1) },
		"newer": func(b []byte) []byte {
			return bytes.Replace(b, []byte(`"formatVersion": 1`), []byte(`"formatVersion": 2`), 1)
		},
		"unknown": func(b []byte) []byte { return bytes.Replace(b, []byte("{"), []byte(`{"x": 1,`), 1) },
		"large":   func([]byte) []byte { return make([]byte, 1<<20) },
	} {
		dir := poolDir(t)
		s, _ := openPool(t, dir)
		s.Close()
		path := filepath.Join(dir, identityFile)
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, change(b), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, _, err := tryOpen(dir); !errors.Is(err, ErrPool) || !strings.Contains(err.Error(), identityFile) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestLinksInPlaceOfThePoolsOwnFilesAreRefused(t *testing.T) {
	for _, name := range []string{identityFile, volumesDir, snapshotsDir} {
		dir := poolDir(t)
		s, _ := openPool(t, dir)
		s.Close()
		away := filepath.Join(t.TempDir(), "away")
		path := filepath.Join(dir, name)
		if err := errors.Join(os.Rename(path, away), os.Symlink(away, path)); err != nil {
			t.Fatal(err)
		}
		_, _, err := tryOpen(dir)
		wantError(t, err, ErrPool, name)
	}
}

func TestPrivateAgainAfterARestore(t *testing.T) {
	dir := poolDir(t)
	s, _ := openPool(t, dir)
	s.Close()
	for name, mode := range map[string]fs.FileMode{identityFile: 0o600, volumesDir: 0o700} {
		path := filepath.Join(dir, name)
		if err := os.Chmod(path, 0o755); err != nil {
			t.Fatal(err)
		}
		s, _ := openPool(t, dir)
		s.Close()
		if st, err := os.Stat(path); err != nil || st.Mode().Perm() != mode {
			t.Errorf("%s has mode %v: %v", name, st.Mode(), err)
		}
	}
}

func TestOneProcessPerPoolOneDirectoryPerID(t *testing.T) {
	t.Parallel()
	dir := poolDir(t)
	_, p := openPool(t, dir)
	_, _, err := tryOpen(dir)
	wantError(t, err, ErrPool, "in use by another csi-loop process")

	one := poolDir(t)
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(one, link); err != nil {
		t.Fatal(err)
	}
	_, err = Open(ctx, []Config{{Name: "a", Path: one}, {Name: "b", Path: link}})
	wantError(t, err, ErrPool, "same directory")
	_, err = Open(ctx, []Config{{Name: "a", Path: one}, {Name: "a", Path: poolDir(t)}})
	wantError(t, err, ErrPool, "two pools of this name")

	twin := poolDir(t)
	b, err := os.ReadFile(filepath.Join(dir, identityFile))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(twin, identityFile), b, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := p.store.Close(); err != nil {
		t.Fatal(err)
	}
	_, err = Open(ctx, []Config{{Name: "a", Path: dir}, {Name: "b", Path: twin}})
	wantError(t, err, ErrPool, "copy of the other", dir)
	openPool(t, dir) // all was given free again
}

func TestClosedStoreRefuses(t *testing.T) {
	s, p := openPool(t, poolDir(t))
	v := create(t, p, Spec{Name: "v", Size: MiB})
	if err := errors.Join(s.Close(), s.Close()); err != nil {
		t.Fatal(err)
	}
	_, err := p.Create(ctx, Spec{Name: "w", Size: MiB})
	wantError(t, err, ErrPool, "closed")
	wantError(t, p.Remove(ctx, v.ID), ErrPool)
	wantError(t, p.Check(ctx), ErrPool)
	if p.Capacity(Thick) != 0 || p.Usage() != (Usage{}) {
		t.Error("a closed pool has capacity")
	}
}

func TestRemoveByHandIsSuccess(t *testing.T) {
	dir := poolDir(t)
	s, p := openPool(t, dir)
	v := create(t, p, Spec{Name: "v", Size: MiB})
	if err := os.RemoveAll(filepath.Join(dir, volumesDir, "v")); err != nil {
		t.Fatal(err)
	}
	if err := p.Remove(ctx, v.ID); err != nil {
		t.Fatal(err)
	}
	create(t, p, Spec{Name: "v", Size: MiB})
	wantAccount(t, s, p)
}

func TestPoolThatGoesAway(t *testing.T) {
	dir := poolDir(t)
	s, p := openPool(t, dir)
	v := create(t, p, Spec{Name: "v", Size: MiB})
	if err := p.Check(ctx); err != nil || len(p.Health()) > 0 {
		t.Fatal(err, p.Health())
	}
	if err := os.Rename(dir, dir+"-away"); err != nil {
		t.Fatal(err)
	}
	for _, again := range []bool{false, true} {
		if again { // another directory in its place
			if err := os.Mkdir(dir, 0o700); err != nil {
				t.Fatal(err)
			}
		}
		_, err := p.Create(ctx, Spec{Name: "w", Size: MiB})
		wantError(t, err, ErrPool)
		_, err = p.Grow(ctx, v.ID, 2*MiB)
		wantError(t, err, ErrPool)
		wantError(t, p.Check(ctx), ErrPool)
		if h := p.Health(); len(h) != 1 || h[0].Reason != "PoolMissing" || h[0].Kind != Inaccessible {
			t.Fatal(h)
		}
	}
	if err := errors.Join(os.Remove(dir), os.Rename(dir+"-away", dir), p.Check(ctx)); err != nil {
		t.Fatal(err)
	}
	if len(p.Health()) > 0 {
		t.Fatal(p.Health())
	}
	wantAccount(t, s, p)
}

func TestRefresherStopsAndSees(t *testing.T) {
	dir := poolDir(t)
	s, p := openPool(t, dir, WithRefresh(time.Millisecond))
	v := create(t, p, Spec{Name: "v", Size: size, Allocation: Thin})
	fill(t, p, v.ID, 0, int(MiB))
	for p.Usage().ThinAllocated < MiB {
		<-time.After(time.Millisecond)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

// What somebody else put beside the volumes is refused, and is no volume: the controller
// takes no node for honest that speaks of such names.
func TestDirsAreVolumes(t *testing.T) {
	dir := poolDir(t)
	s, p := openPool(t, dir)
	create(t, p, Spec{Name: "v", Size: size})
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"my copy", "nötes", strings.Repeat("x", 200), "pvc-1"} {
		if err := os.Mkdir(filepath.Join(dir, volumesDir, name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	_, p = openPool(t, dir)
	dirs := p.Dirs()
	slices.Sort(dirs)
	if d := cmp.Diff([]string{"pvc-1", "v"}, dirs); d != "" {
		t.Error(d)
	}
	if n := len(p.damaged); n != 4 {
		t.Errorf("%d are refused", n)
	}
}

// Observers hear of each volume that comes and goes, once, and Dirs lists them.
func TestObserve(t *testing.T) {
	s, p := openPool(t, poolDir(t))
	var heard []Change
	stop := s.Observe(func(c Change) { heard = append(heard, c) })
	v := create(t, p, Spec{Name: "v", Size: size})
	create(t, p, Spec{Name: "v", Size: size}) // as before
	if _, err := p.Grow(ctx, v.ID, 2*size); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]string{"v"}, p.Dirs()); d != "" {
		t.Error(d)
	}
	for range 2 {
		if err := p.Remove(ctx, v.ID); err != nil {
			t.Fatal(err)
		}
	}
	stop()
	create(t, p, Spec{Name: "w", Size: size})
	if d := cmp.Diff([]Change{{p.ID(), "v", true}, {p.ID(), "v", false}}, heard); d != "" {
		t.Error(d)
	}
}
