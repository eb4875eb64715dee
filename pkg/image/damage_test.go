package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestDamagedRecordIsRefusedOthersServed(t *testing.T) {
	damages := map[string]func(dir string) error{
		"empty":   func(d string) error { return os.Truncate(filepath.Join(d, recordFile), 0) },
		"half":    func(d string) error { return os.Truncate(filepath.Join(d, recordFile), 50) },
		"garbage": func(d string) error { return os.WriteFile(filepath.Join(d, recordFile), []byte("\x00\x01{"), 0o600) },
		"missing": func(d string) error { return os.Remove(filepath.Join(d, recordFile)) },
		"newer": func(d string) error {
			return replaceIn(filepath.Join(d, recordFile), `"formatVersion": 1`, `"formatVersion": 9`)
		},
		"unknown":   func(d string) error { return replaceIn(filepath.Join(d, recordFile), `"name"`, `"x": 1, "name"`) },
		"size":      func(d string) error { return replaceIn(filepath.Join(d, recordFile), `"size": `, `"size": 1`) },
		"othername": func(d string) error { return replaceIn(filepath.Join(d, recordFile), `"name": "`, `"name": "x`) },
		"no-fields": func(d string) error { return replaceIn(filepath.Join(d, recordFile), `"directIO": "auto",`, ``) },
		"symlink":   func(d string) error { return moveAndLink(d, recordFile, os.Symlink) },
		"hardlink":  func(d string) error { return moveAndLink(d, recordFile, os.Link) },
		"fifo": func(d string) error {
			return errors.Join(os.Remove(filepath.Join(d, recordFile)), syscall.Mkfifo(filepath.Join(d, recordFile), 0o600))
		},
		"dir": func(d string) error {
			return errors.Join(os.Remove(filepath.Join(d, recordFile)), os.Mkdir(filepath.Join(d, recordFile), 0o700))
		},
		"dirlink": func(d string) error {
			return errors.Join(os.Rename(d, d+"-moved"), os.Symlink(d+"-moved", d))
		},
	}
	dir := poolDir(t)
	s, p := openPool(t, dir)
	create(t, p, Spec{Name: "good", Size: MiB})
	for name := range damages {
		create(t, p, Spec{Name: name, Size: MiB})
	}
	s.Close()
	for name, damage := range damages {
		if err := damage(filepath.Join(dir, volumesDir, name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, volumesDir, "Stray File"), nil, 0o600); err != nil {
		t.Fatal(err)
	}

	s, p = openPool(t, dir)
	if l := s.List(); len(l) != 1 || l[0].Name != "good" {
		t.Fatalf("served: %v", l)
	}
	for name := range damages {
		id := VolumeID(p.ID(), name)
		_, err := s.Get(id)
		wantError(t, err, ErrDamaged, name)
		_, err = p.Create(ctx, Spec{Name: name, Size: MiB})
		wantError(t, err, ErrDamaged, name)
		wantError(t, p.Remove(ctx, id), ErrDamaged, name)
		_, err = p.OpenImage(ctx, id, true)
		wantError(t, err, ErrDamaged)
		if h := p.VolumeHealth(ctx, id); len(h) != 1 || h[0].Reason != "RecordUnreadable" || h[0].Kind != Inaccessible {
			t.Errorf("%s: %v", name, h)
		}
	}
	wantError(t, p.Damaged()["newer"], errNewer)
	if p.Damaged()["Stray File"] == nil {
		t.Error("a stray file in volumes/ is not told of")
	}
	if len(p.Health()) < len(damages) {
		t.Errorf("health: %v", p.Health())
	}
	fill(t, p, VolumeID(p.ID(), "good"), 0, 10)
}

func replaceIn(path, old, with string) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	changed := strings.Replace(string(b), old, with, 1)
	if changed == string(b) {
		return fmt.Errorf("%s has no %q", path, old)
	}
	return os.WriteFile(path, []byte(changed), 0o600)
}

func moveAndLink(dir, name string, link func(string, string) error) error {
	away := filepath.Join(filepath.Dir(filepath.Dir(dir)), "elsewhere-"+filepath.Base(dir)+name)
	return errors.Join(os.Rename(filepath.Join(dir, name), away), link(away, filepath.Join(dir, name)))
}

func TestDamagedImageIsNotOpened(t *testing.T) {
	for name, c := range map[string]struct {
		damage func(dir string) error
		reason string
		kind   ProblemKind
	}{
		"missing":   {func(d string) error { return os.Remove(filepath.Join(d, imageFile)) }, "ImageMissing", DataLoss},
		"truncated": {func(d string) error { return os.Truncate(filepath.Join(d, imageFile), MiB) }, "ImageTruncated", DataLoss},
		"longer":    {func(d string) error { return os.Truncate(filepath.Join(d, imageFile), size+5) }, "ImageForeign", Inaccessible},
		"symlink":   {func(d string) error { return moveAndLink(d, imageFile, os.Symlink) }, "ImageForeign", Inaccessible},
		"hard link": {func(d string) error { return moveAndLink(d, imageFile, os.Link) }, "ImageForeign", Inaccessible},
		"directory": {func(d string) error {
			return errors.Join(os.Remove(filepath.Join(d, imageFile)), os.Mkdir(filepath.Join(d, imageFile), 0o700))
		}, "ImageForeign", Inaccessible},
		"FIFO": {func(d string) error {
			return errors.Join(os.Remove(filepath.Join(d, imageFile)), syscall.Mkfifo(filepath.Join(d, imageFile), 0o600))
		}, "ImageForeign", Inaccessible},
	} {
		t.Run(name, func(t *testing.T) {
			dir := poolDir(t)
			s, p := openPool(t, dir)
			v := create(t, p, Spec{Name: "v", Size: size})
			if h := p.VolumeHealth(ctx, v.ID); len(h) > 0 {
				t.Fatalf("health before: %v", h)
			}
			if err := c.damage(filepath.Join(dir, volumesDir, "v")); err != nil {
				t.Fatal(err)
			}
			for range 2 { // before and after reopening
				for _, readOnly := range []bool{true, false} {
					_, err := p.OpenImage(ctx, v.ID, readOnly)
					wantError(t, err, ErrDamaged, imageFile)
				}
				_, err := p.Grow(ctx, v.ID, 2*size)
				wantError(t, err, ErrDamaged)
				if h := p.VolumeHealth(ctx, v.ID); len(h) != 1 || h[0].Reason != c.reason || h[0].Kind != c.kind {
					t.Fatalf("health: %v", h)
				}
				s.Close()
				s, p = openPool(t, dir)
			}
			if err := p.Remove(ctx, v.ID); err != nil {
				t.Fatal(err)
			}
		})
	}
}

func TestLeftoversAreSwept(t *testing.T) {
	dir := poolDir(t)
	outside := filepath.Join(t.TempDir(), "outside")
	if err := os.WriteFile(outside, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	s, p := openPool(t, dir)
	create(t, p, Spec{Name: "v", Size: MiB})
	s.Close()
	deep := filepath.Join(dir, ".new-a", "b", "c")
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.MkdirAll(deep, 0o700))
	must(os.WriteFile(filepath.Join(deep, "f"), nil, 0o600))
	must(os.Symlink(filepath.Dir(outside), filepath.Join(deep, "link")))
	must(os.Symlink(filepath.Dir(outside), filepath.Join(dir, ".gone-link")))
	must(os.WriteFile(filepath.Join(dir, ".gone-file"), nil, 0o400))
	must(syscall.Mkfifo(filepath.Join(dir, ".new-fifo"), 0o600))
	must(os.Mkdir(filepath.Join(dir, volumesDir, "v", recordNew), 0o700))
	s, p = openPool(t, dir)
	wantClean(t, dir)
	if _, err := os.Stat(outside); err != nil {
		t.Fatal("followed a link out of the pool")
	}
	if _, err := os.Stat(filepath.Join(dir, volumesDir, "v", recordNew)); !errors.Is(err, fs.ErrNotExist) {
		t.Fatal("an unfinished record is left")
	}
	if len(s.List()) != 1 || len(p.Health()) != 0 {
		t.Fatal(p.Health())
	}
}

func TestDamageIsWhatIsProved(t *testing.T) {
	proofs := []error{errNotRegular, syscall.ENOENT, syscall.ENOTDIR, syscall.ELOOP, syscall.EXDEV}
	others := []error{
		errNoProc, syscall.EMFILE, syscall.ENFILE, syscall.ENOMEM, syscall.EINTR, syscall.EAGAIN, syscall.EIO, syscall.EACCES, syscall.EPERM, syscall.ESTALE, syscall.EBUSY, syscall.EROFS,
	}
	for _, err := range slices.Concat(proofs, others) {
		got := openError("x", &os.PathError{Op: "open", Path: "x", Err: err})
		if errors.Is(got, ErrDamaged) != slices.Contains(proofs, err) || !errors.Is(got, err) {
			t.Errorf("%v: %v", err, got)
		}
	}
}

// TestHealthOfABusyVolume: while a call works on a volume its image is not judged, and
// whoever cannot wait is told of the rest; an idle one is judged all the same.
func TestHealthOfABusyVolume(t *testing.T) {
	dir := poolDir(t)
	_, p := openPool(t, dir)
	v := create(t, p, Spec{Name: "v", Size: MiB})
	if err := os.Remove(filepath.Join(dir, "volumes/v/disk.img")); err != nil {
		t.Fatal(err)
	}
	over, cancel := context.WithCancel(ctx)
	cancel()
	health := func(want ...string) {
		t.Helper()
		var got []string
		// A busy machine may take longer for its look at the pool than healthPatience.
		for try := 0; try == 0 || slices.Contains(got, "NotChecked") && try < 60; try++ {
			got = nil
			for _, h := range p.VolumeHealth(over, v.ID) {
				got = append(got, h.Reason)
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("%v, want %v", got, want)
		}
	}
	health("ImageMissing")
	unlock, ok := p.locks.tryLock("v")
	if !ok {
		t.Fatal("busy")
	}
	health()
	if err := os.Rename(dir, dir+"-away"); err != nil {
		t.Fatal(err)
	}
	health("PoolInaccessible")
	unlock()
	health("ImageMissing", "PoolInaccessible")
	if err := os.Rename(dir+"-away", dir); err != nil {
		t.Fatal(err)
	}
}

// TestHealthOnAPoolThatHangs: whoever asks for the health of a volume waits no longer than
// there is time for a look at the pool, and keeps nobody from the volume meanwhile.
func TestHealthOnAPoolThatHangs(t *testing.T) {
	dir := poolDir(t)
	_, p := openPool(t, dir)
	v := create(t, p, Spec{Name: "v", Size: MiB})
	if err := os.Remove(filepath.Join(dir, "volumes/v/disk.img")); err != nil { // not to be looked at
		t.Fatal(err)
	}
	hang := func(since time.Duration) {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.checking = &checking{began: time.Now().Add(-since), done: make(chan struct{})}
	}
	for _, c := range []struct {
		since time.Duration
		want  string
	}{{0, "NotChecked"}, {2 * checkPatience, "PoolInaccessible"}} {
		hang(c.since)
		over, cancel := context.WithCancel(ctx)
		cancel()
		found := make(chan []Problem)
		go func() { found <- p.VolumeHealth(over, v.ID) }()
		for deadline := time.Now().Add(healthPatience / 2); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
			unlock, free := p.locks.tryLock("v")
			if !free {
				t.Error("it keeps the volume's lock")
				break
			}
			unlock()
		}
		select {
		case got := <-found:
			if len(got) != 1 || got[0].Reason != c.want {
				t.Errorf("%+v, want %s", got, c.want)
			}
		case <-time.After(checkPatience):
			t.Fatal("it waits for the pool")
		}
	}
	p.mu.Lock()
	p.checking = nil
	p.mu.Unlock()
	if got := p.VolumeHealth(ctx, v.ID); len(got) != 1 || got[0].Reason != "ImageMissing" {
		t.Errorf("%+v", got)
	}
}

// TestRefusedVolumeIsCharged: what was promised to a volume is not given away while its
// record is refused, since its pod goes on.
func TestRefusedVolumeIsCharged(t *testing.T) {
	dir := poolDir(t)
	open := func() (*Store, *Pool) {
		s, p := openPool(t, dir)
		d := &fakeDisk{size: 100 * MiB, free: 20*MiB + overhead}
		p.account.statfs = d.statfs
		return s, p
	}
	s, p := open()
	create(t, p, Spec{Name: "thick", Size: 4 * MiB})
	thin := create(t, p, Spec{Name: "thin", Size: 8 * MiB, Allocation: Thin})
	fill(t, p, thin.ID, 0, 1<<20)
	p.refreshOne("thin")
	want := func(capacity int64, volumes int) {
		t.Helper()
		if got := p.Capacity(Thick); got != capacity*MiB {
			t.Errorf("capacity is %d MiB, want %d", got/MiB, capacity)
		}
		if got := p.Usage().Volumes; got != volumes {
			t.Errorf("%d volumes are counted, want %d", got, volumes)
		}
	}
	damage := func(old, with string) {
		t.Helper()
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"thick", "thin"} {
			if err := replaceIn(filepath.Join(dir, volumesDir, name, recordFile), old, with); err != nil {
				t.Fatal(err)
			}
		}
		s, p = open()
	}
	want(13, 2)
	damage(`"formatVersion": 1`, `"formatVersion": 9`)
	want(13, 0)
	if v := inspect(t, Config{Name: "default", Path: dir})[0]; v.Usage.Volumes != 0 || v.Usage.Shared != p.Usage().Shared {
		t.Errorf("seen as %+v, is %+v", v.Usage, p.Usage())
	}
	f, err := os.OpenFile(filepath.Join(dir, volumesDir, "thin", imageFile), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteAt(make([]byte, 2*MiB), 4*MiB)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		t.Fatal(err)
	}
	want(13, 0)
	p.refreshRefused(ctx)
	want(15, 0)
	damage(`"formatVersion": 9`, `"formatVersion": 1`) // and so mends
	want(15, 2)
	wantAccount(t, s, p)
	damage(`"formatVersion": 1`, `"formatVersion": 9`)
	want(15, 0)
	if err := os.RemoveAll(filepath.Join(dir, volumesDir, "thin")); err != nil {
		t.Fatal(err)
	}
	p.refreshRefused(ctx)
	want(20, 0)
}

// TestSharingThatCannotBeCounted: a volume whose image cannot be looked at is looked at
// once before a refusal, and not for ever.
func TestSharingThatCannotBeCounted(t *testing.T) {
	dir := poolDir(t)
	_, p := openPool(t, dir)
	create(t, p, Spec{Name: "v", Size: MiB})
	p.account.share("v", MiB)
	if err := os.Remove(filepath.Join(dir, volumesDir, "v", imageFile)); err != nil {
		t.Fatal(err)
	}
	if !p.recount(ctx) || p.recount(ctx) {
		t.Error("it is not looked at once")
	}
	if p.account.sharedOf("v") != MiB {
		t.Error("its claim is gone")
	}
}
