package mount

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	mountutils "k8s.io/mount-utils"
)

// Mounter does everything in this package that needs the kernel. Any number of
// goroutines may use it; calls for one target run one after the other.
type Mounter struct {
	proc      string        // where /proc is
	busyTime  time.Duration // how long an unmount insists
	statmount bool          // ask statmount(2) before mountinfo
	targets   locks
	helpers   helpers
}

// Option changes how New sets up a Mounter.
type Option func(*Mounter)

// WithProc names the directory where proc is mounted. The default is "/proc".
func WithProc(dir string) Option { return func(m *Mounter) { m.proc = dir } }

// WithBusyTime bounds how long Unmount tries again before it answers ErrBusy.
// The default, 100 ms, outlives the moment between fork and exec of a program
// that this process starts, in which the child holds a copy of every descriptor;
// it is not meant to wait for somebody to finish. 0 or less: one try.
func WithBusyTime(d time.Duration) Option { return func(m *Mounter) { m.busyTime = d } }

// withoutStatmount makes At behave as on a kernel before 6.8.
func withoutStatmount() Option { return func(m *Mounter) { m.statmount = false } }

// New returns a Mounter. It asks the kernel nothing.
func New(options ...Option) *Mounter {
	m := &Mounter{proc: "/proc", busyTime: 100 * time.Millisecond, statmount: true}
	for _, o := range options {
		o(m)
	}
	return m
}

// cleanPath returns path without "." and doubled slashes (a trailing slash would
// make the kernel follow a link). It must be absolute and not the root.
func cleanPath(op, path string) (string, error) {
	fail := func(words string) error {
		return &OpError{Op: op, Path: path, Err: syscall.EINVAL, Words: words}
	}
	switch {
	case !filepath.IsAbs(path):
		return "", fail("the path must be absolute")
	case strings.IndexByte(path, 0) >= 0:
		return "", fail("the path contains a zero byte")
	}
	clean := filepath.Clean(path)
	if clean == "/" {
		return "", fail("refusing the root directory")
	}
	return clean, nil
}

// List returns all mounts that this process can see, from one read of mountinfo,
// in the kernel's order. A mount that is there before the call and after it is
// never missing (Linux 5.8).
func (m *Mounter) List() ([]Mount, error) {
	text, err := os.ReadFile(filepath.Join(m.proc, "self", "mountinfo"))
	if err != nil {
		return nil, fmt.Errorf("list mounts: %w", err)
	}
	return parseMountinfo(text), nil
}

// At returns the uppermost mount at exactly path, which may be a directory or a
// file. false with a nil error: nothing is mounted there, or there is no such
// path, or it is a symbolic link. A mount whose filesystem is dead (its device
// gone, EIO from every call) is found too, so that it can be unmounted.
//
// The cost does not depend on the number of mounts where the kernel has
// statmount with all that is needed (6.13); before, mountinfo is read once, and
// only if something is mounted there.
func (m *Mounter) At(path string) (Mount, bool, error) {
	path, err := cleanPath("look at", path)
	if err != nil {
		return Mount{}, false, err
	}
	return m.at(path)
}

// at is At for a clean path.
func (m *Mounter) at(path string) (Mount, bool, error) {
	p, err := look(path)
	switch {
	case err == nil && !p.mountRoot:
		return Mount{}, false, nil
	case err == nil:
		return m.describe(path, p)
	case isMissing(err):
		return Mount{}, false, nil
	case !isDead(err):
		return Mount{}, false, &OpError{Op: "look at", Path: path, Err: err}
	}
	// The filesystem is dead. mountinfo lives.
	found, ok, listErr := m.atByPath(path)
	if listErr != nil || !ok {
		return Mount{}, false, errors.Join(&OpError{Op: "look at", Path: path, Err: err}, listErr)
	}
	return found, true, nil
}

// isDead says whether a look at a path failed in the way it fails on a mount
// whose filesystem or device is gone: what mount-utils calls a corrupted mount,
// and a root directory that the filesystem itself calls damaged.
func isDead(err error) bool {
	var errno syscall.Errno
	return errors.As(err, &errno) && (mountutils.IsCorruptedMnt(errno) || errno == errUnclean)
}

// describe returns the mount with the number that a look at path found.
func (m *Mounter) describe(path string, p place) (Mount, bool, error) {
	if m.statmount && p.uniqueID {
		found, err := statmount(p.mountID)
		if err == nil {
			return found, true, nil
		}
		if !errors.Is(err, errNoStatmount) && !isMissing(err) {
			return Mount{}, false, &OpError{Op: "describe mount", Path: path, Err: err}
		}
	}
	number, err := mountNumber(path)
	if err != nil {
		return Mount{}, false, &OpError{Op: "describe mount", Path: path, Err: err}
	}
	mounts, err := m.List()
	if err != nil {
		return Mount{}, false, err
	}
	for _, found := range mounts {
		if uint64(found.ID) == number {
			return found, true, nil
		}
	}
	// Unmounted meanwhile, or mounted outside this process' root.
	return Mount{}, false, nil
}

// atByPath finds a mount by the path that mountinfo shows, which has no links.
func (m *Mounter) atByPath(path string) (Mount, bool, error) {
	mounts, err := m.List()
	if err != nil {
		return Mount{}, false, err
	}
	dir, err := filepath.EvalSymlinks(filepath.Dir(path))
	if err != nil {
		dir = filepath.Dir(path)
	}
	found, ok := topAt(mounts, filepath.Join(dir, filepath.Base(path)))
	return found, ok, nil
}

// Device is a block device as mounts show it.
type Device struct {
	Major, Minor uint32 // the device's numbers
	// NodeMajor and NodeMinor number the filesystem that its node is on, as a rule
	// the devtmpfs of /dev. Only binds from there are binds of the node: a node
	// with the same numbers can be made by anybody who may call mknod(2).
	NodeMajor, NodeMinor uint32
}

// DeviceAt returns what the node of a block device at path tells of it.
func (m *Mounter) DeviceAt(path string) (Device, error) {
	p, err := look(path)
	if err == nil && !p.isBlock() {
		err = syscall.ENOTBLK
	}
	if err != nil {
		return Device{}, &OpError{Op: "look at device", Path: path, Err: err}
	}
	var d Device
	d.Major, d.Minor = devNumbers(p.rdev)
	d.NodeMajor, d.NodeMinor = devNumbers(p.dev)
	return d, nil
}

// OfDevice returns the mounts that show a block device: its filesystem, wherever
// and however often it is mounted, and binds of its node. Empty and nil error:
// none in this mount namespace. A node that another mount covers is not found.
func (m *Mounter) OfDevice(d Device) ([]Mount, error) {
	mounts, err := m.List()
	if err != nil {
		return nil, err
	}
	var out []Mount
	for _, found := range mounts {
		if found.IsOf(d) {
			out = append(out, found)
		}
	}
	return out, nil
}

// IsOf reports whether a mount shows a block device: its filesystem, or a bind of
// its node. Names decide nothing. Where mountinfo does not number a mount by its
// device, it looks at the source (btrfs) or at the path (a bind of a node), which
// lie on the filesystem of the nodes: no server is asked.
func (m Mount) IsOf(d Device) bool {
	is := func(p place, err error) bool {
		a, b := devNumbers(p.rdev)
		return err == nil && p.isBlock() && a == d.Major && b == d.Minor
	}
	switch {
	case m.Major == d.Major && m.Minor == d.Minor:
		return true
	case m.FSType == "btrfs" && strings.HasPrefix(m.Source, "/"):
		return is(lookThrough(m.Source))
	default:
		return m.Root != "/" && m.Major == d.NodeMajor && m.Minor == d.NodeMinor && is(look(m.Path))
	}
}

func isMissing(err error) bool {
	return errors.Is(err, syscall.ENOENT) || errors.Is(err, syscall.ENOTDIR)
}

// pause sleeps for about d, or until ctx ends.
func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d/2 + rand.N(d)) //nolint:gosec // jitter is no secret
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// typeName is a word for what lies at a path, for error texts.
func typeName(mode fs.FileMode) string {
	switch {
	case mode.IsDir():
		return "a directory"
	case mode.IsRegular():
		return "a regular file"
	case mode&fs.ModeSymlink != 0:
		return "a symbolic link"
	case mode&fs.ModeCharDevice != 0:
		return "a character device"
	case mode&fs.ModeDevice != 0:
		return "a block device"
	default:
		return "neither a file nor a directory"
	}
}
