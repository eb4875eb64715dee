package image

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"k8s.io/klog/v2"
)

// madePool is a pool that is closed, with one volume that has the pool's name.
func madePool(t *testing.T, name string) Config {
	t.Helper()
	c := Config{Name: name, Path: poolDir(t)}
	s, p, err := tryOpen(c.Path)
	if err != nil {
		t.Fatal(err)
	}
	create(t, p, Spec{Name: name, Size: size})
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	return c
}

// take moves a pool's directory away, until the returned function is called.
func take(t *testing.T, c Config) (back func()) {
	t.Helper()
	move := func(from, to string) {
		if err := os.Rename(from, to); err != nil {
			t.Fatal(err)
		}
	}
	move(c.Path, c.Path+"-away")
	return func() { move(c.Path+"-away", c.Path) }
}

func openStore(ctx context.Context, t *testing.T, refresh time.Duration, configs ...Config) *Store {
	t.Helper()
	s, err := Open(ctx, configs, WithRefresh(refresh))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func poolNames(s *Store) string {
	var present, absent []string
	for _, p := range s.Pools() {
		present = append(present, p.Name())
	}
	for _, a := range s.Absent() {
		absent = append(absent, a.Name)
	}
	return strings.Join(present, " ") + "/" + strings.Join(absent, " ")
}

func wantPools(t *testing.T, s *Store, want string) {
	t.Helper()
	if got := poolNames(s); got != want {
		t.Fatalf("present/absent pools are %q, want %q: %v", got, want, s.Absent())
	}
}

// lines is a log for tests.
type lines struct {
	mu  sync.Mutex
	all []string // guarded by mu
}

func (*lines) Init(klog.RuntimeInfo)                  {}
func (*lines) Enabled(level int) bool                 { return level == 0 }
func (l *lines) WithValues(...any) klog.LogSink       { return l }
func (l *lines) WithName(string) klog.LogSink         { return l }
func (l *lines) Info(_ int, message string, _ ...any) { l.add(message) }
func (l *lines) Error(err error, message string, _ ...any) {
	l.add(fmt.Sprint(message, ": ", err))
}

func (l *lines) add(line string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all = append(l.all, line)
}

// since returns what was logged since the last call.
func (l *lines) since() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	all := l.all
	l.all = nil
	return all
}

func TestAbsentPoolComesInLater(t *testing.T) {
	a, b, c := madePool(t, "a"), madePool(t, "b"), madePool(t, "c")
	back := take(t, b)
	// What an attempt that fails finds is told once, too.
	left := filepath.Join(b.Path, ".new-left")
	log := &lines{}
	ctx := klog.NewContext(ctx, klog.New(log))
	s := openStore(ctx, t, 0, a, b, c)
	wantPools(t, s, "a c/b")
	absent := s.Absent()[0]
	wantError(t, absent.Err, ErrPool, `"b"`, "create it, or mount its disk")
	if absent.Path != b.Path {
		t.Error(absent.Path)
	}
	if _, ok := s.Pool("b"); ok || !s.Configured("b") || !s.Configured("a") || s.Configured("x") {
		t.Error("an absent pool is configured, and not there")
	}
	if said := log.since(); len(said) != 1 || !strings.Contains(said[0], "A pool is absent") {
		t.Errorf("at the start: %q", said)
	}
	for range 3 {
		s.retry(ctx)
	}
	wantPools(t, s, "a c/b")
	if said := log.since(); len(said) != 0 {
		t.Errorf("nothing changed: %q", said)
	}

	back()
	if err := errors.Join(os.Mkdir(left, 0o700), os.Rename(filepath.Join(b.Path, volumesDir), filepath.Join(b.Path, "v")),
		os.WriteFile(filepath.Join(b.Path, volumesDir), nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		s.retry(ctx)
	}
	wantPools(t, s, "a c/b")
	wantError(t, s.Absent()[0].Err, ErrPool, volumesDir, "not a directory")
	if said := log.since(); len(said) != 1 || !strings.Contains(said[0], "not a directory") {
		t.Errorf("another reason: %q", said)
	}

	if err := errors.Join(os.Remove(filepath.Join(b.Path, volumesDir)), os.Rename(filepath.Join(b.Path, "v"), filepath.Join(b.Path, volumesDir))); err != nil {
		t.Fatal(err)
	}
	held := s.Pools()
	s.retry(ctx)
	wantPools(t, s, "a b c/")
	if len(held) != 2 {
		t.Error("what a reader has was changed")
	}
	if said := log.since(); len(said) != 2 || said[0] != "Removing what an interrupted call left" || said[1] != "An absent pool is there now" {
		t.Errorf("it came in: %q", said)
	}
	if l := s.List(); len(l) != 3 {
		t.Fatalf("served: %v", l)
	}
	v, ok := s.Find("b")
	p, there := s.Pool("b")
	if !ok || !there || v.Pool != "b" {
		t.Fatalf("%v %v", v, there)
	}
	fill(t, p, v.ID, 0, 10)
	if got, dir, ok := s.Lookup(v.ID); got != p || dir != "b" || !ok {
		t.Error("its volume is not found by ID")
	}
	s.retry(ctx)
	if said := log.since(); len(said) != 0 {
		t.Errorf("after all is well: %q", said)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	openPool(t, b.Path) // it was given free
}

// The volumes of an absent pool must not look like volumes that do not exist.
func TestIDsOfAnAbsentPoolAreUnknown(t *testing.T) {
	a, b := madePool(t, "a"), madePool(t, "b")
	s := openStore(ctx, t, 0, b)
	id := s.List()[0].ID
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	take(t, b)
	s = openStore(ctx, t, 0, a, b)
	if p, _, ok := s.Lookup(id); ok || p != nil {
		t.Error("a volume of a pool that is not there was looked up")
	}
	if _, err := s.Get(id); !errors.Is(err, ErrNotFound) {
		t.Error(err)
	}
	if _, ok := s.Find("b"); ok {
		t.Error("found")
	}
}

func TestRefresherBringsPoolsIn(t *testing.T) {
	a, b := madePool(t, "a"), madePool(t, "b")
	back := take(t, b)
	s := openStore(ctx, t, time.Millisecond, a, b)
	done := make(chan struct{})
	var readers sync.WaitGroup
	for range 4 {
		readers.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				_, _ = s.Pool("b")
				_, _ = s.Find("b")
				_ = s.List()
				for _, p := range s.Pools() {
					_ = p.Health()
					_ = p.Capacity(Thick)
				}
				if poolNames(s) == "" || !s.Configured("b") {
					t.Error("no pools")
				}
			}
		})
	}
	<-time.After(20 * time.Millisecond)
	wantPools(t, s, "a/b")
	back()
	for poolNames(s) != "a b/" {
		<-time.After(time.Millisecond)
	}
	close(done)
	readers.Wait()
	v, _ := s.Find("b")
	p, _ := s.Pool("b")
	if _, err := p.Grow(ctx, v.ID, 2*size); err != nil {
		t.Fatal(err)
	}
}

func TestCloseWhileAPoolComesIn(t *testing.T) {
	for range 20 {
		a, b := madePool(t, "a"), madePool(t, "b")
		back := take(t, b)
		s := openStore(ctx, t, 10*time.Microsecond, a, b)
		back()
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		o, _, err := tryOpen(b.Path)
		if err != nil {
			t.Fatal(err)
		}
		o.Close()
	}
}

func TestNoPoolUsable(t *testing.T) {
	_, err := Open(ctx, []Config{{Name: "a", Path: "/nonexistent/a"}, {Name: "b", Path: "/nonexistent/b"}})
	wantError(t, err, ErrPool, "/nonexistent/a", "/nonexistent/b")
}

// Mistakes are dangerous to the pools that are well, so nothing is served.
func TestMistakesRefuseAllPools(t *testing.T) {
	t.Parallel()
	a, b, missing := madePool(t, "a"), madePool(t, "b"), Config{Name: "m", Path: "/nonexistent/m"}
	twin := Config{Name: "twin", Path: poolDir(t)}
	copyIdentity(t, a, twin)
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(a.Path, link); err != nil {
		t.Fatal(err)
	}
	held := Config{Name: "held", Path: poolDir(t)}
	openPool(t, held.Path)
	for words, last := range map[string]Config{
		"copy of the other":                twin,
		"the same directory as pool \"a\"": {Name: "l", Path: link},
		"the same directory as pool \"m\"": {Name: "n", Path: "/nonexistent/./m/"},
		"in use by another csi-loop":       held,
		"absolute":                         {Name: "r", Path: "relative"},
	} {
		s, err := Open(ctx, []Config{missing, a, b, last}, WithRefresh(0))
		if err == nil {
			s.Close()
		}
		wantError(t, err, ErrPool, words)
	}
	openStore(ctx, t, 0, a, b) // all was given free
}

func copyIdentity(t *testing.T, from, to Config) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(from.Path, identityFile))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(to.Path, identityFile), b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// Late pools meet the same checks, and a refusal leaves the others alone.
func TestMistakesThatAppearLater(t *testing.T) {
	a, b := madePool(t, "a"), madePool(t, "b")
	for words, appear := range map[string]func(t *testing.T) (gone func()){
		"copy of the other": func(t *testing.T) func() {
			if err := os.Mkdir(b.Path, 0o700); err != nil {
				t.Fatal(err)
			}
			copyIdentity(t, a, b)
			return func() { os.RemoveAll(b.Path) }
		},
		"the same directory as pool": func(t *testing.T) func() {
			if err := os.Symlink(a.Path, b.Path); err != nil {
				t.Fatal(err)
			}
			return func() { os.Remove(b.Path) }
		},
		"it is empty, and may be where its disk is not mounted yet": func(t *testing.T) func() {
			if err := os.Mkdir(b.Path, 0o700); err != nil {
				t.Fatal(err)
			}
			return func() { os.Remove(b.Path) } // fails if anything was made there
		},
		"others may write to it": func(t *testing.T) func() {
			if err := errors.Join(os.Mkdir(b.Path, 0o700), os.Chmod(b.Path, 0o777)); err != nil {
				t.Fatal(err)
			}
			return func() { os.Remove(b.Path) }
		},
		"in use by another csi-loop": func(t *testing.T) func() {
			if err := os.Rename(b.Path+"-away", b.Path); err != nil {
				t.Fatal(err)
			}
			other, _, err := tryOpen(b.Path)
			if err != nil {
				t.Fatal(err)
			}
			return func() { other.Close(); take(t, b) }
		},
	} {
		t.Run(words, func(t *testing.T) {
			back := take(t, b)
			s := openStore(ctx, t, 0, a, b)
			gone := appear(t)
			for range 2 {
				s.retry(ctx)
				wantPools(t, s, "a/b")
				wantError(t, s.Absent()[0].Err, ErrPool, words)
			}
			pa, _ := s.Pool("a")
			if err := pa.Check(ctx); err != nil || len(pa.Health()) > 0 || len(s.List()) != 1 {
				t.Fatal("the other pool is disturbed", err, pa.Health())
			}
			gone()
			back()
			s.retry(ctx)
			wantPools(t, s, "a b/")
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

func TestStopWhileOpening(t *testing.T) {
	a, b := madePool(t, "a"), madePool(t, "b")
	stopped, stop := context.WithCancel(ctx)
	stop()
	_, err := Open(stopped, []Config{a, b})
	wantError(t, err, context.Canceled)
	back := take(t, b)
	s := openStore(ctx, t, 0, a, b)
	back()
	why := s.Absent()[0].Err
	s.retry(stopped)
	wantPools(t, s, "a/b")
	if got := s.Absent()[0].Err; !errors.Is(got, why) {
		t.Errorf("it is absent because we stop: %v", got)
	}
}

func TestDirectoriesAroundAbsentPoolsCannotBeAllowed(t *testing.T) {
	t.Parallel()
	outer := t.TempDir()
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(filepath.Join(outer, "unmounted"), link); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{filepath.Join(outer, "no", "pool"), filepath.Join(link, "pool"), link} {
		s := openStore(ctx, t, 0, madePool(t, "a"), Config{Name: "b", Path: path})
		wantPools(t, s, "a/b")
		if _, err := s.OpenDirs([]string{outer}); !errors.Is(err, ErrNotAllowed) || !strings.Contains(err.Error(), `overlaps pool "b"`) {
			t.Errorf("%s: %v", path, err)
		}
		if _, err := s.OpenDirs([]string{t.TempDir()}); err != nil {
			t.Errorf("%s: %v", path, err)
		}
	}
	circle := filepath.Join(outer, "circle")
	if err := os.Symlink(circle, circle); err != nil {
		t.Fatal(err)
	}
	if _, err := resolve(circle); err == nil {
		t.Error("a circle of links leads somewhere")
	}
}

func TestWithoutPools(t *testing.T) {
	missing := filepath.Join(t.TempDir(), "missing")
	configs := []Config{{Name: "p", Path: missing}}
	if s, err := Open(ctx, configs); err == nil {
		t.Error("opened without any pool", s.Close())
	}
	s, err := Open(ctx, configs, WithoutPools())
	if err != nil {
		t.Fatal(err)
	}
	if got := s.Absent(); len(got) != 1 || len(s.Pools()) != 0 || !s.Configured("p") {
		t.Errorf("absent %v, pools %v", got, s.Pools())
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}
