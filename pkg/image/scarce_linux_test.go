package image

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// withDescriptors runs f while only descriptors below limit can be had.
func withDescriptors(t *testing.T, limit uint64, f func()) {
	t.Helper()
	var before unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &before); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: limit, Max: before.Max}); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &before); err != nil {
			t.Fatal(err)
		}
	}()
	f()
}

// lowOnDescriptors runs try with ever more descriptors until it succeeds, and
// looks at every error on the way. Such a lack must not pass for damage: the
// driver lets damaged volumes be deleted.
func lowOnDescriptors(t *testing.T, try func() error) {
	t.Helper()
	for limit := range uint64(200) {
		var err error
		withDescriptors(t, limit, func() { err = try() })
		if err == nil {
			if limit == 0 {
				t.Fatal("no descriptors were needed")
			}
			return
		}
		if errors.Is(err, ErrDamaged) || errors.Is(err, ErrNotFound) || errors.Is(err, ErrNotAllowed) || !errors.Is(err, unix.EMFILE) {
			t.Fatalf("with descriptors below %d: %v", limit, err)
		}
	}
	t.Fatal("never succeeded")
}

func TestLackOfDescriptorsIsNotDamage(t *testing.T) {
	dir := poolDir(t)
	s, p := openPool(t, dir)
	v := create(t, p, Spec{Name: "v", Size: size})
	for _, readOnly := range []bool{true, false} {
		lowOnDescriptors(t, func() error {
			f, err := p.OpenImage(ctx, v.ID, readOnly)
			if err == nil {
				f.Close()
			}
			return err
		})
	}
	grown := v.Size
	lowOnDescriptors(t, func() error {
		grown += MiB
		_, err := p.Grow(ctx, v.ID, grown)
		return err
	})
	lowOnDescriptors(t, func() error { _, _, err := p.ImageInode(ctx, v.ID); return err })
	d, err := OpenDirs([]string{dir})
	if err != nil {
		t.Fatal(err)
	}
	lowOnDescriptors(t, func() error {
		f, err := d.Open(fmt.Sprintf("%s/%s/v/%s", dir, volumesDir, imageFile), true)
		if err == nil {
			f.Close()
		}
		return err
	})
	wantAccount(t, s, p)
}

func TestLackOfDescriptorsFailsThePoolNotItsVolumes(t *testing.T) {
	dir := poolDir(t)
	s, p := openPool(t, dir)
	create(t, p, Spec{Name: "v", Size: size})
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	lowOnDescriptors(t, func() error {
		s, p, err := tryOpen(dir)
		if err != nil {
			if !errors.Is(err, ErrPool) {
				t.Errorf("not the pool's: %v", err)
			}
			return err
		}
		defer s.Close()
		if len(p.Damaged()) > 0 || len(s.List()) != 1 {
			t.Errorf("damaged: %v", p.Damaged())
		}
		return nil
	})
}

func TestPoolComesInWhenThereAreDescriptorsAgain(t *testing.T) {
	a, b := madePool(t, "a"), madePool(t, "b")
	back := take(t, b)
	s := openStore(ctx, t, 0, a, b)
	back()
	for limit := uint64(0); len(s.Absent()) > 0; limit++ {
		if limit == 200 {
			t.Fatal(s.Absent())
		}
		withDescriptors(t, limit, func() { s.retry(ctx) })
		for _, absent := range s.Absent() {
			wantError(t, absent.Err, unix.EMFILE)
		}
	}
	if pb, _ := s.Pool("b"); len(pb.Damaged()) > 0 || len(s.List()) != 2 {
		t.Fatal(pb.Damaged())
	}
}

// A pool that cannot be looked at for want of descriptors is not one whose disk failed, nor
// are its volumes' images lost.
func TestHealthWithoutDescriptors(t *testing.T) {
	_, p := openPool(t, poolDir(t))
	v := create(t, p, Spec{Name: "v", Size: size})
	well := false
	for limit := uint64(0); !well && limit < 200; limit++ {
		var err error
		var pool, volume []Problem
		withDescriptors(t, limit, func() {
			err, pool, volume = p.Check(ctx), p.Health(), p.VolumeHealth(ctx, v.ID)
		})
		if well = err == nil && len(volume) == 0; well {
			if limit == 0 {
				t.Error("no descriptors were needed")
			}
			break
		}
		for _, h := range [][]Problem{pool, volume} {
			if len(h) != 1 || h[0].Kind != Degraded || h[0].Reason != "TooManyOpenFiles" || !strings.Contains(h[0].String(), "too many open files; raise the limit") {
				t.Fatalf("below %d: %v, %v, %v", limit, err, pool, volume)
			}
		}
		if !errors.Is(err, unix.EMFILE) || !errors.Is(err, ErrPool) {
			t.Errorf("below %d: %v", limit, err)
		}
	}
	if err := p.Check(ctx); err != nil || len(p.Health()) > 0 || !well {
		t.Error(err, p.Health())
	}
}
