package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

// disk is a device of the device mapper that can be made to fail, with a filesystem.
type disk struct {
	t              *testing.T
	name, fs, root string
	below          string // the loop device that it lies on
	sectors        int64
	healthy        string // its table
	mounted        bool
}

// newDisk makes a disk with a filesystem and mounts it. The test is skipped where the
// kernel has no device mapper, and fails where the virtual machine should have one.
func newDisk(t *testing.T, fs string, mkfs ...string) *disk {
	t.Helper()
	roottest.Require(t)
	// The node may be there, made by a package, and lead nowhere.
	control, err := os.OpenFile("/dev/mapper/control", os.O_RDWR, 0)
	if err == nil {
		err = control.Close()
	}
	if err != nil {
		if os.Getenv("CSI_LOOP_VM") != "" {
			t.Fatal("the virtual machine has no device mapper: ", err)
		}
		t.Skip("this kernel has no device mapper: make test-disk runs it in a virtual machine")
	}
	t.Setenv("DM_DISABLE_UDEV", "1") // dmsetup makes the nodes itself
	const size = 600 * mib
	dir := t.TempDir()
	file := filepath.Join(dir, "disk.img")
	must(t, os.WriteFile(file, nil, 0o600))
	must(t, os.Truncate(file, size))
	d := &disk{t: t, name: fmt.Sprintf("csi-loop-%d-%s", os.Getpid(), fs), fs: fs, root: filepath.Join(dir, "pool"), sectors: size / 512}
	must(t, os.Mkdir(d.root, 0o755))
	d.below = roottest.Losetup(t, file)
	t.Cleanup(func() { roottest.Run(t, "losetup", "-d", d.below) })
	d.healthy = fmt.Sprintf("0 %d linear %s 0", d.sectors, d.below)
	roottest.Run(t, "dmsetup", "create", d.name, "--table", d.healthy)
	t.Cleanup(func() { roottest.Run(t, "dmsetup", "remove", "--retry", d.name) })
	roottest.Run(t, append(mkfs, "/dev/mapper/"+d.name)...)
	d.mount()
	t.Cleanup(d.umount)
	return d
}

func (d *disk) mount() {
	d.t.Helper()
	must(d.t, unix.Mount("/dev/mapper/"+d.name, d.root, d.fs, 0, ""))
	d.mounted = true
}

func (d *disk) umount() {
	d.t.Helper()
	if d.mounted {
		eventually(d.t, func() string {
			if err := unix.Unmount(d.root, 0); err != nil {
				return "umount the disk: " + err.Error()
			}
			return ""
		})
		d.mounted = false
	}
}

// becomes replaces the disk's table, and keeps its size. What is under way ends first.
func (d *disk) becomes(table string) {
	d.t.Helper()
	roottest.Run(d.t, "dmsetup", "suspend", "--nolockfs", d.name)
	roottest.Run(d.t, "dmsetup", "load", d.name, "--table", table)
	roottest.Run(d.t, "dmsetup", "resume", d.name)
}

// TestFailingDisk: the pool's disk fails under volumes in use, as a whole or for writing only. Nobody is told that something was
// done that was not; health says what is the matter; volumes can be taken down, and the driver ends. When the disk is back and its
// filesystem mounted again, everything that was acknowledged is there.
func TestFailingDisk(t *testing.T) {
	for _, fs := range []struct {
		name string
		mkfs []string
	}{
		{"ext4", []string{"mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0"}},
		{"xfs", []string{"mkfs.xfs", "-q", "-f"}},
		{"btrfs", []string{"mkfs.btrfs", "-q", "-f"}},
	} {
		for _, failure := range []string{"error", "flakey"} {
			t.Run(fs.name+"/"+failure, func(t *testing.T) {
				d := newDisk(t, fs.name, fs.mkfs...)
				table := fmt.Sprintf("0 %d error", d.sectors)
				if failure == "flakey" { // can be read, and fails each write, for ever
					table = fmt.Sprintf("0 %d flakey %s 0 0 3600 1 error_writes", d.sectors, d.below)
				}
				failUnderUse(t, d, table)
			})
		}
	}
}

func failUnderUse(t *testing.T, d *disk, failing string) {
	t.Helper()
	pool := filepath.Join(d.root, "csi")
	must(t, os.Mkdir(pool, 0o700))
	s := newSite(t, siteConfig{pool: pool})
	used, idle := s.volume(ext4, "used").up(), s.rest(block, "idle")
	used.step("write", used.write(0))

	d.becomes(failing)
	failed := 0
	for n := range 8 {
		if used.write(1+n) != nil {
			failed++
		}
	}
	if failed == 0 {
		t.Error("every write succeeded and was synced on a disk that fails")
	}
	for n := range 3 {
		v := s.volume(block, "new-"+strconv.Itoa(n))
		wantRefused(t, "create", v.create())
		wantRefused(t, "expand", idle.expandImage(2*idle.size))
	}
	eventually(t, func() string {
		got := strings.Join(idle.healthOf(), "\n")
		if !strings.Contains(got, "INACCESSIBLE PoolInaccessible") {
			return "health of a volume on a disk that failed: " + got
		}
		return ""
	})
	used.step("unpublish", asCO(used, func() error { return used.unpublish(0) }))
	used.step("unstage", asCO(used, used.unstage))
	s.stop()

	d.becomes(d.healthy)
	d.umount()
	d.mount()
	s.start()
	if st, err := os.Stat(idle.image()); err != nil || st.Size() != idle.size && st.Size() != 2*idle.size {
		t.Errorf("the image of the volume that was not expanded: %v, %v", st, err)
	}
	idle.want = idle.size
	for _, v := range []*volume{used, idle} {
		v.step("stage", v.stage())
		v.step("publish", v.publish(0, false))
		v.step("read what was synced before", v.read(0, 0))
		v.step("write", v.write(1))
		v.step("read", v.read(1, 0))
		v.wantHealth("")
		v.down()
	}
	v := s.volume(block, "new-0").up()
	v.down()
}

// wantRefused fails the test unless a call on a failing disk failed, with words.
func wantRefused(t *testing.T, what string, err error) {
	t.Helper()
	if code := status.Code(err); code != codes.Unavailable && code != codes.Internal {
		t.Errorf("%s on a disk that fails: %s", what, explain(err))
		return
	}
	for _, word := range []string{"input/output error", "read-only", "unusable"} {
		if strings.Contains(err.Error(), word) {
			return
		}
	}
	t.Errorf("%s on a disk that fails does not say what is wrong: %v", what, err)
}
