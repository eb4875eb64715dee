package image

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

var poolTypes = []string{"ext4", "xfs", "btrfs"}

// onEach runs a test with a pool directory on a real filesystem of each type.
func onEach(t *testing.T, bytes int64, f func(t *testing.T, fsType, dir string)) {
	t.Helper()
	roottest.Require(t)
	for _, fsType := range poolTypes {
		t.Run(fsType, func(t *testing.T) { f(t, fsType, scratch(t, fsType, bytes)) })
	}
}

func scratch(tb testing.TB, fsType string, bytes int64) string {
	tb.Helper()
	dir := filepath.Join(roottest.Pool(tb, fsType, bytes), "pool")
	if err := os.Mkdir(dir, 0o700); err != nil {
		tb.Fatal(err)
	}
	return dir
}

func wantWhole(t *testing.T, p *Pool, id string) {
	t.Helper()
	v, err := p.store.Get(id)
	if err != nil {
		t.Fatal(err)
	}
	f, err := p.OpenImage(ctx, id, true) // read-only, so that nothing is repaired
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	st, err := statFile(f)
	if err != nil {
		t.Fatal(err)
	}
	hole, _, err := nextHole(f, 0, v.Size)
	if err != nil {
		t.Fatal(err)
	}
	if st.Allocated < v.Size || hole != v.Size {
		t.Fatalf("%s: %d of %d bytes have blocks, first hole at %d", v.Name, st.Allocated, v.Size, hole)
	}
	if p.fsType == "btrfs" {
		if on, err := isNoCow(f); err != nil || !on {
			t.Fatalf("image is not NOCOW: %v", err)
		}
	}
}

// mounted runs f with the image mounted through a loop device of its block size.
func mounted(t *testing.T, p *Pool, v Volume, f func(mountPoint string)) {
	t.Helper()
	_, dir, _ := p.store.Lookup(v.ID)
	at := t.TempDir()
	device := bind(t, filepath.Join(p.Path(), volumesDir, dir, imageFile), v.BlockSize)
	defer roottest.Run(t, "losetup", "-d", device)
	if attribute := filepath.Join("/sys/block", filepath.Base(device), "queue/discard_max_bytes"); v.Allocation == Thick {
		if err := os.WriteFile(attribute, []byte("0"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	roottest.Run(t, append([]string{"mount", "-t", v.Filesystem}, append(mountOptions(v), device, at)...)...)
	defer roottest.Run(t, "umount", at)
	f(at)
}

// bind tries again: losetup loses races against others on the same kernel.
func bind(t *testing.T, path string, blockSize int) string {
	t.Helper()
	for range 100 {
		out, err := command(ctx, nil, "/usr/sbin/losetup", []string{"--find", "--show", "--sector-size", strconv.Itoa(blockSize), path})
		if err == nil {
			return strings.TrimSpace(out)
		}
		t.Log(out)
		<-time.After(20 * time.Millisecond)
	}
	t.Fatal("no loop device")
	return ""
}

func TestThickIsWholeAndMounts(t *testing.T) {
	onEach(t, 1500<<20, func(t *testing.T, _, dir string) {
		_, p := openPool(t, dir)
		for _, fsType := range []string{"", "ext2", "ext3", "ext4", "xfs", "btrfs"} {
			for _, blockSize := range []int{4096, 512} {
				t.Run(fmt.Sprintf("%s-%d", fsType, blockSize), func(t *testing.T) {
					v := create(t, p, Spec{Name: "v", Size: 320 * MiB, Filesystem: fsType, BlockSize: blockSize})
					wantWhole(t, p, v.ID)
					if fsType != "" {
						mounted(t, p, v, func(at string) {
							if err := os.WriteFile(filepath.Join(at, "f"), make([]byte, MiB), 0o600); err != nil {
								t.Error(err)
							}
						})
						wantWhole(t, p, v.ID)
					}
					if err := p.Remove(ctx, v.ID); err != nil {
						t.Fatal(err)
					}
				})
			}
		}
	})
}

func TestSmallestFilesystemsMount(t *testing.T) {
	_, p := openPool(t, scratch(t, "ext4", 1<<30))
	for i, fsType := range []string{"ext2", "ext3", "ext4", "btrfs", "xfs", "xfs"} {
		blockSize := 4096
		if fsType == "xfs" {
			blockSize = 512 << (i - 3) // 1024, 2048; the others are tested elsewhere
		}
		v := create(t, p, Spec{Name: fmt.Sprint(fsType, i), Size: MinimumSize(fsType), Filesystem: fsType, BlockSize: blockSize})
		wantWhole(t, p, v.ID)
		mounted(t, p, v, func(at string) {
			if err := os.WriteFile(filepath.Join(at, "f"), []byte("x"), 0o600); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestFeaturesAreThoseOfTheOldestKernel(t *testing.T) {
	_, p := openPool(t, scratch(t, "ext4", 2<<30))
	image := func(s Spec) string {
		v := create(t, p, s)
		_, dir, _ := p.store.Lookup(v.ID)
		return filepath.Join(p.Path(), volumesDir, dir, imageFile)
	}
	want := func(out string, words ...string) {
		t.Helper()
		for _, w := range words {
			if n, absent := strings.CutPrefix(w, "!"); strings.Contains(out, n) == absent {
				t.Errorf("want %q in:\n%s", w, out)
			}
		}
	}
	want(roottest.Run(t, "dumpe2fs", "-h", image(Spec{Name: "e4", Size: 320 * MiB, Filesystem: "ext4"})),
		"has_journal", "extent", "64bit", "metadata_csum_seed", "!orphan_file", "Block size:               4096", "Reserved block count:     0\n",
		"!INODE_UNINIT")
	want(roottest.Run(t, "dumpe2fs", "-h", image(Spec{
		Name: "opts", Size: 64 * MiB, Filesystem: "ext4",
		MkfsOptions: []string{"-O", "^has_journal,project,quota", "-L", "label", "-i", "8192", "-m", "1", "-E", "stride=4"},
	})), "!has_journal", "project", "quota", "label", "RAID stride:              4")
	want(roottest.Run(t, "dumpe2fs", "-h", image(Spec{Name: "e2", Size: 16 * MiB, Filesystem: "ext2"})), "!has_journal", "!extent")
	want(roottest.Run(t, "dumpe2fs", "-h", image(Spec{Name: "e3", Size: 16 * MiB, Filesystem: "ext3"})), "has_journal", "!extent")
	want(roottest.Run(t, "xfs_db", "-r", "-c", "version", "-c", "sb 0", "-c", "p sectsize blocksize", image(Spec{Name: "x", Size: 300 * MiB, Filesystem: "xfs"})),
		"V5", "!NREXT64", "!PARENT", "!EXCHANGE", "sectsize = 4096", "blocksize = 4096")
	want(roottest.Run(t, "xfs_db", "-r", "-c", "sb 0", "-c", "p sectsize inodesize", image(Spec{
		Name: "x5", Size: 300 * MiB, Filesystem: "xfs", BlockSize: 512, MkfsOptions: []string{"-i", "size=1024", "-m", "reflink=0"},
	})), "sectsize = 512", "inodesize = 1024")
	want(roottest.Run(t, "btrfs", "inspect-internal", "dump-super", image(Spec{Name: "b", Size: 128 * MiB, Filesystem: "btrfs"})),
		"sectorsize\t\t4096", "!BLOCK_GROUP_TREE")
}

func TestMkfsThatIsMissingOrFails(t *testing.T) {
	dir := poolDir(t)
	tools := t.TempDir()
	s, p := openPool(t, dir, WithToolDirs(tools))
	for fsType, pkg := range map[string]string{"ext4": "e2fsprogs", "xfs": "xfsprogs", "btrfs": "btrfs-progs"} {
		_, err := p.Create(ctx, Spec{Name: "v", Size: 300 * MiB, Filesystem: fsType, Allocation: Thin})
		wantError(t, err, ErrUnsupported, "mkfs."+fsType, pkg)
	}
	script := func(name, text string) {
		if err := os.WriteFile(filepath.Join(tools, name), []byte("#!/bin/sh\n"+text+"\n"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	script("mkfs.ext4", "echo cannot do it: $* >&2; exit 3")
	_, err := p.Create(ctx, Spec{Name: "v", Size: 8 * MiB, Filesystem: "ext4"})
	if err == nil || !strings.Contains(err.Error(), "cannot do it: -q") || !strings.Contains(err.Error(), "exit status 3") {
		t.Fatal(err)
	}
	script("mkfs.ext3", `/usr/sbin/mkfs.ext3 "$@"; printf x >> disk.img`)
	_, err = p.Create(ctx, Spec{Name: "v", Size: 8 * MiB, Filesystem: "ext3"})
	if err == nil || !strings.Contains(err.Error(), "changed the image's size") {
		t.Fatal(err)
	}
	// A loop device of somebody else went while mkfs looked at all of them.
	count := filepath.Join(tools, "count")
	script("mkfs.btrfs", `[ "$1" = --help ] && exit; echo x >> `+count+`; [ $(wc -l < `+count+`) -ge 3 ] ||
		{ echo "ERROR: cannot check mount status of disk.img: No such device or address" >&2; exit 1; }
		exec /usr/sbin/mkfs.btrfs "$@"`)
	if _, err := p.Create(ctx, Spec{Name: "retried", Size: 128 * MiB, Filesystem: "btrfs", Allocation: Thin}); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(count); err != nil || strings.Count(string(b), "x") < 3 {
		t.Fatalf("mkfs was not tried again: %q %v", b, err)
	}
	if err := p.Remove(ctx, VolumeID(p.ID(), "retried")); err != nil {
		t.Fatal(err)
	}
	script("mkfs.ext2", "exec sleep 60")
	short, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(short, func() {})
	defer stop()
	go cancel()
	_, err = p.Create(short, Spec{Name: "v", Size: 8 * MiB, Filesystem: "ext2"})
	wantError(t, err, context.Canceled)
	wantClean(t, dir)
	wantAccount(t, s, p)
	if len(s.List()) != 0 {
		t.Fatal(s.List())
	}
}

// blind makes the account believe in endless space, so that the filesystem itself
// says no, at the first place that writes.
func blind(p *Pool) {
	p.account.statfs = func() (space, error) { return space{Size: 1 << 50, Free: 1 << 50}, nil }
}

func TestFullPoolUndoesExactly(t *testing.T) {
	onEach(t, 512<<20, func(t *testing.T, _, dir string) {
		s, p := openPool(t, dir)
		v := create(t, p, Spec{Name: "v", Size: 64 * MiB})
		thin := create(t, p, Spec{Name: "thin", Size: 64 * MiB, Allocation: Thin})
		before := observe(t, p, v.ID)
		_, err := p.Create(ctx, Spec{Name: "w", Size: 1 << 30})
		wantError(t, err, ErrNoSpace)
		_, err = p.Grow(ctx, v.ID, 1<<30)
		wantError(t, err, ErrNoSpace)
		_, err = p.Grow(ctx, thin.ID, 1<<30)
		wantError(t, err, ErrNoSpace)
		honest := p.account.statfs
		blind(p)
		_, err = p.Create(ctx, Spec{Name: "w", Size: 1 << 30})
		wantError(t, err, ErrNoSpace, "no space left")
		_, err = p.Grow(ctx, v.ID, 1<<30)
		wantError(t, err, ErrNoSpace, "no space left")
		p.account.statfs = honest
		// ext4 keeps the extent tree's block that it needed meanwhile.
		after := observe(t, p, v.ID)
		if after.Allocated > before.Allocated && after.Allocated <= before.Allocated+4096 {
			after.Allocated = before.Allocated
		}
		if after != before {
			t.Errorf("image is %+v, was %+v", after, before)
		}
		wantClean(t, dir)
		wantWhole(t, p, v.ID)
		wantAccount(t, s, p)
		// The rest of the pool can still be had.
		create(t, p, Spec{Name: "w", Size: p.Capacity(Thick)})
	})
}

func observe(t *testing.T, p *Pool, id string) (st fileStat) {
	t.Helper()
	f, err := p.OpenImage(ctx, id, true)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if st, err = statFile(f); err != nil {
		t.Fatal(err)
	}
	return st
}

// TestFilledPool fills the filesystem with somebody else's file.
func TestFilledPool(t *testing.T) {
	onEach(t, 512<<20, func(t *testing.T, _, dir string) {
		s, p := openPool(t, dir)
		thick := create(t, p, Spec{Name: "thick", Size: 64 * MiB, Filesystem: "ext4"})
		create(t, p, Spec{Name: "thin", Size: 64 * MiB, Allocation: Thin})
		ballast, err := os.Create(filepath.Join(filepath.Dir(dir), "ballast"))
		if err != nil {
			t.Fatal(err)
		}
		defer ballast.Close()
		chunk := make([]byte, MiB)
		for at, n := int64(0), 64*MiB; n >= 4096; {
			if allocate(ballast, at, n, false) != nil {
				n /= 2
				continue
			}
			at += n
		}
		_, err = p.Create(ctx, Spec{Name: "w", Size: MiB})
		wantError(t, err, ErrNoSpace)
		blind(p)
		for i := range 5 { // each needs a directory, a record, perhaps a block
			_, err = p.Create(ctx, Spec{Name: fmt.Sprint("w", i), Size: 16 * MiB})
			wantError(t, err, ErrNoSpace)
		}
		p.account.statfs = func() (space, error) { return spaceOf(p.root) }
		if c := p.Capacity(Thick); c != 0 {
			t.Errorf("a full pool has capacity %d", c)
		}
		if err := p.Check(ctx); err != nil {
			t.Error(err)
		}
		if h := p.Health(); len(h) != 2 || h[0].Reason != "PoolFull" || h[1].Reason != "ThinPromisesUncovered" {
			t.Errorf("health of a full pool: %v", h)
		}
		// What a thick volume was promised is still there, to the last byte.
		image, err := p.OpenImage(ctx, thick.ID, false)
		if err != nil {
			t.Fatal(err)
		}
		defer image.Close()
		// Direct: buffered, a full btrfs takes 1.7 s for each of these MiB.
		f, err := os.OpenFile(procPath(image), os.O_RDWR|syscall.O_DIRECT, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		for at := int64(0); at < thick.Size; at += MiB {
			if _, err := f.WriteAt(chunk, at); err != nil {
				t.Fatalf("write at %d: %v", at, err)
			}
		}
		if err := f.Sync(); err != nil {
			t.Fatal(err)
		}
		if err := p.Remove(ctx, thick.ID); err != nil {
			t.Fatal(err)
		}
		wantClean(t, dir)
		wantAccount(t, s, p)
	})
}

func TestConcurrentCreatesFillThePoolExactly(t *testing.T) {
	onEach(t, 512<<20, func(t *testing.T, _, dir string) {
		s, p := openPool(t, dir)
		const each = 8 * MiB
		fits := p.Capacity(Thick) / each
		var wg sync.WaitGroup
		var mu sync.Mutex
		made := int64(0)
		for i := range 2 * fits {
			wg.Go(func() {
				_, err := p.Create(ctx, Spec{Name: fmt.Sprint("v", i), Size: each})
				switch {
				case err == nil:
					mu.Lock()
					made++
					mu.Unlock()
				case !errors.Is(err, ErrNoSpace):
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if made < fits-1 || made > fits {
			t.Errorf("%d volumes made, capacity was for %d", made, fits)
		}
		wantClean(t, dir)
		wantAccount(t, s, p)
		for _, v := range s.List() {
			wantWhole(t, p, v.ID)
		}
	})
}

func TestCapacityCanBeCreated(t *testing.T) {
	onEach(t, 1<<30, func(t *testing.T, _, dir string) {
		s, p := openPool(t, dir)
		empty := p.Capacity(Thick)
		for _, alloc := range []Allocation{Thick, Thin} {
			v := create(t, p, Spec{Name: "all", Size: p.Capacity(alloc), Allocation: alloc, Filesystem: "xfs"})
			// btrfs guesses what its metadata will need, in chunks of 64 MiB.
			if c := p.Capacity(alloc); c > 8*MiB && (p.fsType != "btrfs" || c > 128*MiB) {
				t.Errorf("%s: %d bytes left of %d", alloc, c, v.Size)
			}
			if err := p.Remove(ctx, v.ID); err != nil {
				t.Fatal(err)
			}
			wantAccount(t, s, p)
			// Its blocks are free a little later, piece by piece.
			for attempt := 0; p.Capacity(Thick) < empty-8*MiB && p.lag(ctx, attempt); attempt++ {
			}
		}
		half := p.Capacity(Thick) / 2 / MiB * MiB
		v := create(t, p, Spec{Name: "half", Size: half})
		_, err := p.Grow(ctx, v.ID, half+p.Capacity(Thick))
		// btrfs may have promised what it still frees, on a machine that is busy.
		for attempt := 0; errors.Is(err, ErrNoSpace) && p.lag(ctx, attempt); attempt++ {
			_, err = p.Grow(ctx, v.ID, half+p.Capacity(Thick))
		}
		if err != nil {
			t.Fatal(err)
		}
		wantWhole(t, p, v.ID)
	})
}

// TestRoomOfARemovedVolumeIsFound: also where blocks are freed later than the image is gone.
func TestRoomOfARemovedVolumeIsFound(t *testing.T) {
	onEach(t, 512<<20, func(t *testing.T, _, dir string) {
		s, p := openPool(t, dir)
		whole := p.Capacity(Thick) - 16*MiB
		for i := range 5 {
			v := create(t, p, Spec{Name: fmt.Sprint("v", i), Size: whole})
			// On a busy machine the removal's own patience may be over before.
			if err := errors.Join(p.Remove(ctx, v.ID), s.Erased(ctx)); err != nil {
				t.Fatal(err)
			}
		}
	})
}

func TestCrashByKillOnEachFilesystem(t *testing.T) {
	onEach(t, 400<<20, func(t *testing.T, _, dir string) {
		n := 0
		crashByKill(t, func(tb testing.TB) string {
			n++
			sub := filepath.Join(dir, fmt.Sprint("run", n))
			if n > 1 {
				if err := os.RemoveAll(filepath.Join(dir, fmt.Sprint("run", n-1))); err != nil {
					tb.Fatal(err)
				}
			}
			if err := os.Mkdir(sub, 0o700); err != nil {
				tb.Fatal(err)
			}
			return sub
		}, 3)
	})
}

func TestGuardKnowsTheFilesystem(t *testing.T) {
	onEach(t, 320<<20, func(t *testing.T, fsType, dir string) {
		mountPoint := filepath.Dir(dir)
		uuid := strings.TrimSpace(roottest.Run(t, "findmnt", "-no", "SOURCE", mountPoint))
		uuid = strings.TrimSpace(roottest.Run(t, "blkid", "-p", "-o", "value", "-s", "UUID", uuid))
		if err := errors.Join(os.Remove(dir), os.Chmod(mountPoint, 0o700)); err != nil {
			t.Fatal(err)
		}
		expect := Expect{Filesystem: fsType, UUID: strings.ToUpper(uuid), MountPoint: true}
		s, err := Open(ctx, []Config{{Name: "p", Path: mountPoint, Expect: expect}}, WithRefresh(0))
		if err != nil {
			t.Fatal(err)
		}
		p := s.Pools()[0]
		create(t, p, Spec{Name: "v", Size: MiB})
		expect.PoolID, expect.Existing = p.ID(), true
		s.Close()

		roottest.Run(t, "mount", "-o", "remount,ro", mountPoint)
		_, err = Open(ctx, []Config{{Name: "p", Path: mountPoint, Expect: expect}})
		wantError(t, err, ErrPool, "read-only")
		roottest.Run(t, "mount", "-o", "remount,rw", mountPoint)
		s, err = Open(ctx, []Config{{Name: "p", Path: mountPoint, Expect: expect}}, WithRefresh(0))
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		p = s.Pools()[0]
		roottest.Run(t, "mount", "-o", "remount,ro", mountPoint)
		wantError(t, p.Check(ctx), ErrPool, "read-only")
		_, err = p.Create(ctx, Spec{Name: "w", Size: MiB})
		wantError(t, err, ErrPool, "read-only")
		wantError(t, p.Remove(ctx, VolumeID(p.ID(), "v")), ErrPool, "read-only")
		roottest.Run(t, "mount", "-o", "remount,rw", mountPoint)
		if err := p.Check(ctx); err != nil || len(p.Health()) > 0 {
			t.Fatal(err, p.Health())
		}
		if len(s.List()) != 1 {
			t.Fatal("a refused removal removed")
		}
		wantAccount(t, s, p)
	})
}

func TestPoolWhoseDiskIsMountedLater(t *testing.T) {
	disk := roottest.Pool(t, "ext4", 64<<20)
	if err := os.Chmod(disk, 0o700); err != nil {
		t.Fatal(err)
	}
	at := poolDir(t)
	a, b := madePool(t, "a"), Config{Name: "b", Path: at, Expect: Expect{Filesystem: "ext4", MountPoint: true}}
	mount := func() { roottest.Run(t, "mount", "--bind", disk, at) }
	unmount := func() { roottest.Run(t, "umount", at) }

	s := openStore(ctx, t, 0, a, b)
	wantPools(t, s, "a/b")
	wantError(t, s.Absent()[0].Err, ErrPool, "not a mount point")
	s.retry(ctx)
	mount()
	s.retry(ctx)
	wantPools(t, s, "a b/") // the mount point is proof enough to make a new pool
	p, _ := s.Pool("b")
	v := create(t, p, Spec{Name: "v", Size: size})
	b.Expect.PoolID = p.ID()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	unmount()
	if entries, err := os.ReadDir(at); err != nil || len(entries) > 0 {
		t.Fatalf("something was made below the mount point: %v %v", entries, err)
	}

	mount()
	roottest.Run(t, "mount", "-o", "remount,bind,ro", at)
	s = openStore(ctx, t, time.Millisecond, a, b)
	wantPools(t, s, "a/b")
	wantError(t, s.Absent()[0].Err, ErrPool, "read-only")
	roottest.Run(t, "mount", "-o", "remount,bind,rw", at)
	for len(s.Absent()) > 0 {
		<-time.After(time.Millisecond)
	}
	got, err := s.Get(v.ID)
	if err != nil || got.Size != size {
		t.Fatal(got, err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	unmount()
}

// TestOlderUUIDCalls are those of kernels before FS_IOC_GETFSUUID.
func TestOlderUUIDCalls(t *testing.T) {
	onEach(t, 320<<20, func(t *testing.T, fsType, dir string) {
		f, err := openPath(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		general, err := filesystemUUID(f, fsType)
		if err != nil {
			t.Fatal(err)
		}
		own, err := ownUUID(f, fsType)
		if err != nil || own != general {
			t.Fatalf("%q and %q: %v", general, own, err)
		}
	})
}

func TestPoolsOnOneFilesystemShareItsSpace(t *testing.T) {
	root := scratch(t, "btrfs", 512<<20)
	a := filepath.Join(root, "a")
	b := filepath.Join(root, "b")
	roottest.Run(t, "btrfs", "subvolume", "create", a)
	roottest.Run(t, "btrfs", "subvolume", "create", b)
	s, err := Open(ctx, []Config{{Name: "a", Path: a, Overcommit: 2}, {Name: "b", Path: b}}, WithRefresh(0))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	pa, pb := s.Pools()[0], s.Pools()[1]
	before := pb.Capacity(Thick)
	create(t, pa, Spec{Name: "v", Size: 200 * MiB, Allocation: Thin})
	if got := before - pb.Capacity(Thick); got < 99*MiB || got > 110*MiB {
		t.Errorf("the other pool's promise of 100 MiB took %d bytes", got)
	}
}

func TestMountInALeftoverIsNotEntered(t *testing.T) {
	dir := scratch(t, "ext4", 64<<20)
	s, _ := openPool(t, dir)
	s.Close()
	inner := filepath.Join(dir, ".gone-x", "mnt")
	if err := os.MkdirAll(inner, 0o700); err != nil {
		t.Fatal(err)
	}
	roottest.Run(t, "mount", "-t", "tmpfs", "tmpfs", inner)
	defer roottest.Run(t, "umount", inner)
	precious := filepath.Join(inner, "precious")
	if err := os.WriteFile(precious, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	s, p := openPool(t, dir)
	defer s.Close()
	if _, err := os.Stat(precious); err != nil {
		t.Fatal("the sweep went into another filesystem")
	}
	if h := p.Health(); len(h) != 1 || h[0].Reason != "CannotRemove" {
		t.Fatal(h)
	}
}

func TestDeviceNodeIsNotMapped(t *testing.T) {
	roottest.Require(t)
	dir := t.TempDir()
	node := filepath.Join(dir, "null")
	if err := syscall.Mknod(node, syscall.S_IFCHR|0o600, 1<<8|3); err != nil {
		t.Fatal(err)
	}
	d, err := OpenDirs([]string{dir})
	if err != nil {
		t.Fatal(err)
	}
	_, err = d.Open(node, false)
	wantError(t, err, ErrNotAllowed, "not a regular file")
}
