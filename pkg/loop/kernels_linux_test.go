package loop

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

// bareBind binds a loop device by the bare call, as no part of csi-loop does: without
// naming a block size if that is 0.
func bareBind(t *testing.T, backing *os.File, flags, blockSize uint32) (device *os.File) {
	t.Helper()
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	check(t, err)
	defer control.Close()
	for {
		number, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		check(t, err)
		device, err := os.OpenFile("/dev/loop"+strconv.Itoa(number), os.O_RDWR, 0)
		if errors.Is(err, unix.ENXIO) || errors.Is(err, unix.ENOENT) { // somebody removed it
			continue
		}
		check(t, err)
		config := unix.LoopConfig{Fd: uint32(backing.Fd()), Size: blockSize, Info: unix.LoopInfo64{Flags: flags}}
		err = unix.IoctlLoopConfigure(int(device.Fd()), &config)
		if errors.Is(err, unix.EBUSY) { // somebody was faster
			check(t, device.Close())
			continue
		}
		check(t, err)
		t.Cleanup(func() {
			check(t, unix.IoctlSetInt(int(device.Fd()), unix.LOOP_CLR_FD, 0))
			check(t, device.Close())
		})
		return device
	}
}

func blockSizeOf(t *testing.T, device *os.File) int {
	t.Helper()
	size, err := unix.IoctlGetInt(int(device.Fd()), unix.BLKSSZGET)
	check(t, err)
	return size
}

// A block size that nobody named is 512, or what direct I/O on the file needs (fact 17).
func TestBlockSizeThatNobodyNamed(t *testing.T) {
	roottest.Require(t)
	pool := roottest.Pool(t, "xfs", 320<<20)
	path := filepath.Join(pool, "a")
	f, err := os.Create(path)
	check(t, err)
	defer f.Close()
	check(t, second(f.WriteAt(make([]byte, 1<<20), 0)))
	check(t, f.Sync())
	roottest.Run(t, "cp", "--reflink=always", path, path+"-shared")
	if got := blockSizeOf(t, bareBind(t, f, 0, 0)); got != 512 {
		t.Errorf("through the page cache it is %d, want 512", got)
	}
	direct, err := os.OpenFile(path+"-shared", os.O_RDWR|unix.O_DIRECT, 0)
	check(t, err)
	defer direct.Close()
	if got, want := blockSizeOf(t, bareBind(t, direct, unix.LO_FLAGS_DIRECT_IO, 0)), directIOAlignment(t, direct); got != want {
		t.Errorf("with direct I/O it is %d, the file needs %d", got, want)
	}
}

// What kernels make of a changed block size (fact 18) and of new settings (fact 39) of a
// device with a mounted filesystem differs; none may harm the filesystem.
func TestChangesUnderAMount(t *testing.T) {
	roottest.Require(t)
	dir := t.TempDir()
	f, err := os.Create(filepath.Join(dir, "image"))
	check(t, err)
	defer f.Close()
	check(t, f.Truncate(16<<20))
	roottest.Run(t, "mkfs.ext4", "-q", "-b", "1024", f.Name())
	device := bareBind(t, f, 0, 512)
	target := filepath.Join(dir, "target")
	check(t, os.Mkdir(target, 0o700))
	check(t, unix.Mount(device.Name(), target, "ext4", 0, ""))
	defer func() { check(t, unix.Unmount(target, 0)) }()
	check(t, os.WriteFile(filepath.Join(target, "file"), []byte("before"), 0o600))

	err = unix.IoctlSetInt(int(device.Fd()), unix.LOOP_SET_BLOCK_SIZE, 1024)
	t.Logf("LOOP_SET_BLOCK_SIZE under a mount: %v", err)
	switch got := blockSizeOf(t, device); {
	case err == nil && got != 1024, err != nil && got != 512:
		t.Errorf("the answer was %v, and the size is %d", err, got)
	case err != nil && !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.EAGAIN):
		t.Errorf("the answer was %v", err)
	}
	status, err := unix.IoctlLoopGetStatus64(int(device.Fd()))
	check(t, err)
	copy(status.File_name[:], "new tag")
	err = unix.IoctlLoopSetStatus64(int(device.Fd()), status)
	t.Logf("LOOP_SET_STATUS64 under a mount: %v", err)
	after, statusErr := unix.IoctlLoopGetStatus64(int(device.Fd()))
	check(t, statusErr)
	tagged := strings.HasPrefix(string(after.File_name[:]), "new tag")
	if err != nil && !errors.Is(err, unix.EBUSY) || tagged != (err == nil) {
		t.Errorf("the answer was %v, and the tag was set: %v", err, tagged)
	}

	g, err := os.OpenFile(filepath.Join(target, "file"), os.O_RDWR, 0)
	check(t, err)
	defer g.Close()
	check(t, second(g.WriteAt([]byte("after"), 0)))
	check(t, g.Sync())
}

// Writing to an image whose filesystem is full fails: as EIO, or as ENOSPC (fact 45).
func TestWriteToAFullFilesystemBelow(t *testing.T) {
	roottest.Require(t)
	for name, flags := range map[string]int{"buffered": 0, "direct": unix.O_DIRECT} {
		t.Run(name, func(t *testing.T) {
			pool := roottest.Pool(t, "ext4", 16<<20)
			f, err := os.OpenFile(filepath.Join(pool, "image"), os.O_RDWR|os.O_CREATE|flags, 0o600)
			check(t, err)
			defer f.Close()
			check(t, f.Truncate(64<<20))
			device := bareBind(t, f, 0, 4096)
			for n := range 64 {
				if _, err = device.WriteAt(make([]byte, 1<<20), int64(n)<<20); err != nil {
					break
				}
			}
			err = errors.Join(err, device.Sync())
			t.Logf("64 MiB written to a filesystem of 16: %v", err)
			if !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EIO) {
				t.Errorf("writing ended with %v", err)
			}
		})
	}
}
