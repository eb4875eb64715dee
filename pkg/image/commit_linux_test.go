package image

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

// goingDown shuts a filesystem, and flushLog is how: nothing of its log goes to disk
// any more, as in a power cut (linux/xfs_fs.h, and the same for ext4).
const (
	goingDown  = 0x8004587d
	noLogFlush = 2
)

// cutPower loses what the filesystem at dir has not brought to disk, and mounts it again.
// A btrfs cannot be shut: what is in the file below it before it is unmounted is what the
// disk would have.
func cutPower(t *testing.T, fsType, dir string) {
	t.Helper()
	device := strings.TrimSpace(roottest.Run(t, "findmnt", "--noheadings", "--output=SOURCE", "--mountpoint", dir))
	held, err := os.Open(device) // else the loop device goes with its mount
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	if fsType == "btrfs" {
		disk := filepath.Join(filepath.Dir(dir), "pool.img")
		roottest.Run(t, "cp", "--sparse=never", disk, disk+".cut")
		defer os.Remove(disk + ".cut")
		if err := unix.Unmount(dir, 0); err != nil {
			t.Fatal(err)
		}
		roottest.Run(t, "dd", "if="+disk+".cut", "of="+disk, "bs=1M", "conv=notrunc", "status=none")
		roottest.Run(t, "blockdev", "--flushbufs", device)
		if err := unix.Mount(device, dir, fsType, 0, ""); err != nil {
			t.Fatal(err)
		}
		return
	}
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	err = unix.IoctlSetPointerInt(int(f.Fd()), goingDown, noLogFlush)
	if err := errors.Join(err, f.Close(), unix.Unmount(dir, 0), unix.Mount(device, dir, fsType, 0, "")); err != nil {
		t.Fatal(err)
	}
}

// failSyncs makes every sync fail of what is open at path: renames work beneath a
// descriptor with O_PATH, and syncs do not.
func failSyncs(t *testing.T, path string) {
	t.Helper()
	pathOnly, err := unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Error(err)
		return
	}
	defer unix.Close(pathOnly)
	open, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Error(err)
	}
	for _, e := range open {
		n, err := strconv.Atoi(e.Name())
		if is, readErr := os.Readlink("/proc/self/fd/" + e.Name()); err != nil || readErr != nil || is != path || n == pathOnly {
			continue
		}
		if err := unix.Dup3(pathOnly, n, unix.O_CLOEXEC); err != nil {
			t.Error(err)
		}
	}
}

// A record that was renamed and could not be synced is what the next call finds done.
// That is acknowledged only once it is on disk.
func TestRepeatedTuneIsOnDisk(t *testing.T) {
	roottest.Require(t)
	for _, fsType := range []string{"ext4", "xfs"} { // a btrfs cannot be shut
		t.Run(fsType, func(t *testing.T) {
			dir := scratch(t, fsType, 512*MiB)
			fail := false
			s, p, err := tryOpen(dir, withKill(func(point string) {
				if fail && point == "record renamed" {
					failSyncs(t, filepath.Join(dir, "volumes", "a"))
				}
			}))
			if err != nil {
				t.Fatal(err)
			}
			v, err := p.Create(ctx, Spec{Name: "a", Size: 4 * MiB, Allocation: Thin})
			if err != nil {
				t.Fatal(err)
			}
			unix.Sync()
			want := Tuning{ReadIOPS: new(int64(1000))}
			fail = true
			if _, err := p.Tune(ctx, v.ID, want); !errors.Is(err, ErrPool) {
				t.Errorf("%v, want ErrPool", err)
			}
			fail = false
			if _, err := p.Tune(ctx, v.ID, want); err != nil {
				t.Fatal(err)
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			cutPower(t, fsType, filepath.Dir(dir))

			s, p, err = tryOpen(dir)
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			if got, err := p.store.Get(v.ID); err != nil || !got.Tuning.Equal(want) {
				t.Errorf("%+v, %v after the cut; %+v was acknowledged", got.Tuning, err, want)
			}
		})
	}
}

// A start that finds an image larger than its record completes the growth. Its size may
// not be on disk then, and is, before the record or a call tells of it.
func TestCompletedGrowIsOnDisk(t *testing.T) {
	onEach(t, 512*MiB, func(t *testing.T, fsType, dir string) {
		s, p, err := tryOpen(dir)
		if err != nil {
			t.Fatal(err)
		}
		v, err := p.Create(ctx, Spec{Name: "a", Size: 4 * MiB, Allocation: Thin})
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		unix.Sync()
		if err := os.Truncate(filepath.Join(dir, "volumes", "a", imageFile), 8*MiB); err != nil { // and was killed
			t.Fatal(err)
		}
		if s, p, err = tryOpen(dir); err != nil {
			t.Fatal(err)
		}
		if got, err := p.Grow(ctx, v.ID, 8*MiB); err != nil || got.Size != 8*MiB {
			t.Fatalf("%d bytes, %v", got.Size, err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		cutPower(t, fsType, filepath.Dir(dir))

		if s, p, err = tryOpen(dir); err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		f, err := p.OpenImage(ctx, v.ID, false)
		if err != nil {
			t.Fatalf("%v after the cut; %d bytes were acknowledged", err, 8*MiB)
		}
		defer f.Close()
		if st, err := f.Stat(); err != nil || st.Size() != 8*MiB {
			t.Errorf("%v, %v after the cut; %d bytes were acknowledged", st, err, 8*MiB)
		}
	})
}

// A removal that cannot be committed, nor taken back, is not forgotten: the next call
// would be answered with success, and a power cut bring back what it was about.
func TestRemovalIsNotForgottenBeforeItsCommit(t *testing.T) {
	dir := poolDir(t)
	var obstacle string
	s, p, err := tryOpen(dir, withKill(func(point string) {
		if obstacle != "" && strings.HasSuffix(point, ": renamed") {
			if err := os.Mkdir(obstacle, 0o700); err != nil {
				t.Error(err)
			}
		}
	}))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	v, err := p.Create(ctx, Spec{Name: "a", Size: 4 * MiB, Allocation: Thin})
	if err != nil {
		t.Fatal(err)
	}
	// Renames work beneath an O_PATH descriptor, and syncs do not.
	fd, err := unix.Open(filepath.Join(dir, "volumes"), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	whole, pathOnly := p.volumes, os.NewFile(uintptr(fd), "volumes")
	obstacle = filepath.Join(dir, "volumes", "a")
	p.volumes = pathOnly
	err = p.Remove(ctx, v.ID)
	p.volumes = whole
	if err == nil || !errors.Is(err, unix.EBADF) {
		t.Fatalf("%v, want that of the sync", err)
	}
	if _, err := s.Get(v.ID); err != nil {
		t.Errorf("it is forgotten: %v", err)
	}
	if err := errors.Join(os.Remove(obstacle), pathOnly.Close()); err != nil {
		t.Fatal(err)
	}
	obstacle = ""
	if err := p.Remove(ctx, v.ID); err != nil {
		t.Error(err)
	}
	if _, err := s.Get(v.ID); !errors.Is(err, ErrNotFound) {
		t.Errorf("it is still there: %v", err)
	}
}
