package image

import (
	"bytes"
	"context"
	"io"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

// large is the size of an image that is not unlinked in one call.
const large = 5 * firstPiece

// goneImages are the images of removed volumes that are still there.
func goneImages(t *testing.T, pool string) []string {
	t.Helper()
	found, err := filepath.Glob(pool + "/" + gonePrefix + "*/" + imageFile)
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// TestRemovalOutlivesItsCallAndItsProcess stops in the middle of freeing a large image,
// as long as it likes.
func TestRemovalOutlivesItsCallAndItsProcess(t *testing.T) {
	for _, fs := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(fs, func(t *testing.T) {
			dir := filepath.Join(roottest.Pool(t, fs, 1<<30), "pool")
			if err := os.Mkdir(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			cut, goOn := make(chan struct{}), make(chan struct{})
			s, p, err := tryOpen(dir, withKill(func(point string) {
				if point == "remove: cut" {
					cut <- struct{}{}
					<-goOn
				}
			}))
			if err != nil {
				t.Fatal(err)
			}
			v := create(t, p, Spec{Name: "v", Size: large})
			before := p.Capacity(Thick)

			call, cancel := context.WithCancel(ctx)
			answer := make(chan error)
			go func() { answer <- p.Remove(call, v.ID) }()
			<-cut // the first piece is free, and the second will not be soon
			cancel()
			if err := <-answer; err != nil {
				t.Fatal(err)
			}
			left := goneImages(t, dir)
			if len(left) != 1 || len(s.List()) != 0 {
				t.Fatalf("images that are being freed: %q; volumes: %v", left, s.List())
			}
			// Capacity follows what is free, not what was removed. btrfs shows it late.
			if now := p.Capacity(Thick); now < before || now > before+large-2*firstPiece {
				t.Errorf("capacity %d before, %d while the image is being freed", before, now)
			}
			again := create(t, p, Spec{Name: "v", Size: MiB})

			closed := make(chan error)
			go func() { closed <- s.Close() }()
			<-p.erasers.end.Done()
			close(goOn)
			if err := <-closed; err != nil {
				t.Fatal(err)
			}
			st, err := os.Stat(left[0])
			if err != nil || st.Size() != large-firstPiece {
				t.Fatalf("after the end of the process: %v, %v", st, err)
			}

			s, p = openPool(t, dir)
			wantClean(t, dir)
			wantAccount(t, s, p)
			if _, err := s.Get(again.ID); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestOpenDoesNotWaitForWhatWasRemoved: a start after a crash frees images that may be of
// any size. Not parallel: what another test forks has the image open for a moment, and such
// a one is not cut.
func TestOpenDoesNotWaitForWhatWasRemoved(t *testing.T) {
	dir := poolDir(t)
	s, _ := openPool(t, dir)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	gone := filepath.Join(dir, gonePrefix+"v-x")
	if err := os.Mkdir(gone, 0o700); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(filepath.Join(gone, imageFile))
	if err == nil {
		err = allocate(f, 0, large, false)
	}
	if err != nil || f.Close() != nil {
		t.Fatal(err)
	}
	goOn := make(chan struct{})
	s, p := openPool(t, dir, withKill(func(point string) {
		if point == "remove: cut" {
			<-goOn
		}
	}))
	if len(goneImages(t, dir)) != 1 {
		t.Fatal("nothing is being freed")
	}
	v := create(t, p, Spec{Name: "v", Size: MiB})
	if err := p.Remove(ctx, v.ID); err != nil { // does not queue behind the large one
		t.Fatal(err)
	}
	close(goOn)
	for deadline := time.Now().Add(10 * time.Second); len(leftovers(t, dir)) > 0 && time.Now().Before(deadline); {
		time.Sleep(10 * time.Millisecond)
	}
	wantClean(t, dir)
	wantAccount(t, s, p)
}

// TestRemovalCutsNothingThatSomebodyHas: an unlink leaves a file to who has it open, or
// has a link to it, and so must a removal by pieces.
func TestRemovalCutsNothingThatSomebodyHas(t *testing.T) {
	setUp := func(t *testing.T) (p *Pool, v Volume, content []byte, cuts *atomic.Int32) {
		t.Helper()
		cuts = &atomic.Int32{}
		_, p = openPool(t, poolDir(t), withKill(func(point string) {
			if point == "remove: cut" {
				cuts.Add(1)
			}
		}))
		v = create(t, p, Spec{Name: "v", Size: large})
		return p, v, fill(t, p, v.ID, large-MiB, 4096), cuts
	}
	intact := func(t *testing.T, f *os.File, content []byte) {
		t.Helper()
		got := make([]byte, len(content))
		if _, err := f.ReadAt(got, large-MiB); err != nil || !bytes.Equal(got, content) {
			t.Errorf("the content is gone: %v", err)
		}
		if end, err := f.Seek(0, io.SeekEnd); err != nil || end != large {
			t.Errorf("the file has %d bytes, %v", end, err)
		}
	}

	t.Run("nobody", func(t *testing.T) {
		p, v, _, cuts := setUp(t)
		if err := p.Remove(ctx, v.ID); err != nil {
			t.Fatal(err)
		}
		if cuts.Load() == 0 {
			t.Error("it was not freed by pieces")
		}
	})
	t.Run("a reader", func(t *testing.T) {
		p, v, content, cuts := setUp(t)
		f, err := p.OpenImage(ctx, v.ID, true)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := p.Remove(ctx, v.ID); err != nil {
			t.Fatal(err)
		}
		intact(t, f, content)
		wantClean(t, p.Path())
		if cuts.Load() != 0 {
			t.Errorf("it was cut %d times", cuts.Load())
		}
	})
	t.Run("a loop device", func(t *testing.T) {
		roottest.Require(t)
		p, v, content, _ := setUp(t)
		image := filepath.Join(p.Path(), volumesDir, "v", imageFile)
		node := roottest.Losetup(t, "--read-only", image)
		defer roottest.Run(t, "losetup", "--detach", node)
		if err := p.Remove(ctx, v.ID); err != nil {
			t.Fatal(err)
		}
		f, err := os.Open(node)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		intact(t, f, content)
	})
	t.Run("a hard link", func(t *testing.T) {
		p, v, content, _ := setUp(t)
		link := filepath.Join(filepath.Dir(p.Path()), "link")
		if err := os.Link(filepath.Join(p.Path(), volumesDir, "v", imageFile), link); err != nil {
			t.Fatal(err)
		}
		if err := p.Remove(ctx, v.ID); err != nil {
			t.Fatal(err)
		}
		f, err := os.Open(link)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		intact(t, f, content)
	})
}

func TestPiecesFollowTheTimeTheyTake(t *testing.T) {
	for _, c := range []struct {
		name        string
		piece, want int64
		took        time.Duration
	}{
		{"quick: twice as much", 64 * MiB, 128 * MiB, time.Millisecond},
		{"about right: the same", 64 * MiB, 64 * MiB, pieceTime / 2},
		{"slow: half", 64 * MiB, 32 * MiB, time.Second},
		{"slow at the least: no less", MiB, MiB, time.Second},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := nextPiece(c.piece, c.took); got != c.want {
				t.Errorf("nextPiece = %d, want %d", got, c.want)
			}
		})
	}
}
