package image

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"k8s.io/klog/v2"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

func TestMain(m *testing.M) {
	klog.SetLogger(klog.Logger{}) // most of what is logged here is wanted
	if os.Getenv(crashChild) != "" {
		os.Exit(runCrashChild())
	}
	roottest.Main(m)
}

// poolDir is an empty directory that a pool accepts whatever the umask is.
func poolDir(tb testing.TB) string {
	tb.Helper()
	dir := filepath.Join(tb.TempDir(), "pool")
	if err := os.Mkdir(dir, 0o700); err != nil {
		tb.Fatal(err)
	}
	return dir
}

func tryOpen(dir string, options ...Option) (*Store, *Pool, error) {
	s, err := Open(context.Background(), []Config{{Name: "default", Path: dir}}, append([]Option{WithRefresh(0)}, options...)...)
	if err != nil {
		return nil, nil, err
	}
	return s, s.Pools()[0], nil
}

// openPool opens one pool and closes it when the test ends.
func openPool(tb testing.TB, dir string, options ...Option) (*Store, *Pool) {
	tb.Helper()
	s, p, err := tryOpen(dir, options...)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := s.Close(); err != nil {
			tb.Error(err)
		}
	})
	return s, p
}

func create(tb testing.TB, p *Pool, s Spec) Volume {
	tb.Helper()
	v, err := p.Create(context.Background(), s)
	if err != nil {
		tb.Fatal(err)
	}
	return v
}

func wantError(tb testing.TB, err, want error, words ...string) {
	tb.Helper()
	if !errors.Is(err, want) {
		tb.Fatalf("error is %v, want %v", err, want)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			tb.Fatalf("error %q does not say %q", err, w)
		}
	}
}

// leftovers lists what is in the pool's directory and should not be there.
func leftovers(tb testing.TB, dir string) []string {
	tb.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		tb.Fatal(err)
	}
	var left []string
	for _, e := range entries {
		switch e.Name() {
		case identityFile, volumesDir, snapshotsDir, groupsDir, templatesDir, "lost+found":
		default:
			left = append(left, e.Name())
		}
	}
	return left
}

// wantClean fails if something is left. A removal that takes longer than patience, as it
// may on a busy machine, goes on behind its call.
func wantClean(tb testing.TB, dir string) {
	tb.Helper()
	left := leftovers(tb, dir)
	for deadline := time.Now().Add(time.Minute); len(left) > 0 && time.Now().Before(deadline); left = leftovers(tb, dir) {
		time.Sleep(10 * time.Millisecond)
	}
	if len(left) > 0 {
		tb.Fatalf("left in the pool: %v", left)
	}
}

// wantAccount compares the account's sums with those made from what is on disk.
// XFS ends the sharing with a removed file a moment after the removal.
func wantAccount(tb testing.TB, s *Store, p *Pool) {
	tb.Helper()
	var err error
	for range 100 {
		if err = accountError(tb, s, p); err == nil {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	tb.Fatal(err)
}

func accountError(tb testing.TB, s *Store, p *Pool) error {
	tb.Helper()
	p.refresh(context.Background())
	var thick, thin, unwritten, missing int64
	for _, dir := range p.account.sharedDirs() {
		p.recountOne(dir)
	}
	for _, v := range p.list() {
		_, dir, _ := s.Lookup(v.ID)
		st, err := statAt(p.volumes, dir+"/"+imageFile)
		if err != nil {
			tb.Fatal(err)
		}
		if st.Size != v.Size {
			return fmt.Errorf("%s: image has %d bytes, record %d", v.ID, st.Size, v.Size)
		}
		more := min(v.Size, max(0, v.Size-st.Allocated)+sharedBytes(tb, p, dir, v.Size))
		if v.Allocation == Thick {
			thick += v.Size
			missing += more
		} else {
			thin += v.Size
			unwritten += more
		}
	}
	a := p.account
	a.ledger.mu.Lock()
	defer a.ledger.mu.Unlock()
	if a.thick != thick || a.thin != thin || a.thinUnwritten != unwritten || a.thickMissing != missing {
		return fmt.Errorf("account has %d thick (%d missing), %d thin (%d unwritten); disk has %d (%d), %d (%d)",
			a.thick, a.thickMissing, a.thin, a.thinUnwritten, thick, missing, thin, unwritten)
	}
	if a.ledger.pending != 0 {
		return fmt.Errorf("%d bytes are still reserved", a.ledger.pending)
	}
	var want int64
	for _, other := range s.Pools() {
		if other.account.ledger == a.ledger {
			want += other.account.promise()
		}
	}
	if a.ledger.promised != want {
		return fmt.Errorf("ledger has %d promised, its accounts %d", a.ledger.promised, want)
	}
	return nil
}

// sharedBytes counts what an image shares, where anything can.
func sharedBytes(tb testing.TB, p *Pool, dir string, size int64) int64 {
	tb.Helper()
	if !p.CanReflink() {
		return 0
	}
	f, err := os.Open(filepath.Join(p.Path(), volumesDir, dir, imageFile))
	if err != nil {
		tb.Fatal(err)
	}
	defer f.Close()
	s, err := sharingOf(f, size, p.noCow)
	if err != nil {
		tb.Fatal(err)
	}
	return s.shared
}

// fill writes n random bytes at an offset of a volume's image, synced.
func fill(tb testing.TB, p *Pool, id string, offset int64, n int) []byte {
	tb.Helper()
	f, err := p.OpenImage(context.Background(), id, false)
	if err != nil {
		tb.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, n)
	_, _ = rand.Read(b)
	if _, err := f.WriteAt(b, offset); err != nil {
		tb.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		tb.Fatal(err)
	}
	return b
}
