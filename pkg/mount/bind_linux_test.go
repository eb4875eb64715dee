package mount

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

func TestBindDirectory(t *testing.T) {
	roottest.Require(t)
	for _, fsType := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(fsType, func(t *testing.T) {
			m, ctx := New(), t.Context()
			device, _ := loopFS(t, fsType)
			dir := t.TempDir()
			staging, publish := filepath.Join(dir, "staging"), filepath.Join(dir, "publish")
			mustMount(t, m, Spec{Source: device, Target: staging, FSType: fsType, Options: []string{"noatime"}})
			write(t, staging+"/file", "content")
			fds := openFDs(t)

			spec := BindSpec{Source: staging, Target: publish, Flags: NoSuid | NoExec, Mount: mustAt(t, m, staging).ID}
			mustBind(t, m, spec)
			write(t, publish+"/through", "written through")
			if got := mustAt(t, m, publish); got.ReadOnly || got.Root != "/" || !slices.Equal(got.Options, []string{"rw", "nosuid", "noexec", "noatime"}) {
				t.Errorf("%+v", got)
			}
			if err := m.Bind(ctx, spec); err != nil {
				t.Errorf("again: %v", err)
			}
			readOnly := spec
			readOnly.ReadOnly = true
			foreign(t, m.Bind(ctx, readOnly))
			foreign(t, m.Bind(ctx, BindSpec{Source: staging, Target: publish, Flags: NoDev}))
			foreign(t, m.Bind(ctx, BindSpec{Source: dir, Target: publish}))
			foreign(t, m.Mount(ctx, Spec{Source: device, Target: publish, FSType: fsType, ReadOnly: true}))
			if of, err := m.OfDevice(deviceAt(t, m, device)); err != nil || len(of) != 2 {
				t.Errorf("mounts of the device: %+v, %v", of, err)
			}
			if err := m.Remove(ctx, publish); err != nil {
				t.Fatal(err)
			}

			mustBind(t, m, readOnly)
			if got := mustAt(t, m, publish); !got.ReadOnly || got.SuperOptions[0] != "rw" {
				t.Errorf("%+v", got)
			}
			for name, err := range map[string]error{
				"create": os.WriteFile(publish+"/new", nil, 0o644), "overwrite": os.WriteFile(publish+"/file", nil, 0o644), "mkdir": os.Mkdir(publish+"/d", 0o755),
				"remove": os.Remove(publish + "/file"), "chmod": os.Chmod(publish+"/file", 0o600), "rename": os.Rename(publish+"/file", publish+"/x"), "truncate": os.Truncate(publish+"/file", 0),
			} {
				if !errors.Is(err, syscall.EROFS) {
					t.Errorf("%s on a read-only bind: %v", name, err)
				}
			}
			write(t, staging+"/more", "still writable")
			if read(t, publish+"/file") != "content" || read(t, publish+"/more") != "still writable" {
				t.Error("the bind shows something else")
			}
			if err := m.Bind(ctx, readOnly); err != nil {
				t.Errorf("again: %v", err)
			}
			foreign(t, m.Bind(ctx, spec))
			// While it is published, the device cannot be freed.
			if err := m.Unmount(ctx, staging); err != nil {
				t.Errorf("staging may go first: %v", err)
			}
			isErrno(t, claimable(device), syscall.EBUSY)
			if err := m.Remove(ctx, publish); err != nil {
				t.Error(err)
			}
			if err := claimable(device); err != nil {
				t.Errorf("the device is not free after the last unmount: %v", err)
			}
			if n := openFDs(t); n != fds {
				t.Errorf("%d descriptors, %d before", n, fds)
			}
		})
	}
}

// A writer who hammers the target while it is bound read-only over and over must
// not once get through.
func TestReadOnlyBindHasNoWritableInstant(t *testing.T) {
	roottest.Require(t)
	m, ctx := New(), t.Context()
	dir := t.TempDir()
	source, target := newDir(t, dir, "source"), newDir(t, dir, "target")
	stop, done := make(chan struct{}), make(chan struct{})
	var tries atomic.Int64
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
			}
			// Before the bind this makes a file in the target itself, hidden then.
			if f, err := os.OpenFile(target+"/probe", os.O_CREATE|os.O_WRONLY, 0o600); err == nil {
				_ = f.Close()
			}
			tries.Add(1)
		}
	}()
	for range 300 {
		if err := m.Bind(ctx, BindSpec{Source: source, Target: target, ReadOnly: true}); err != nil {
			t.Fatal(err)
		}
		if err := m.Unmount(ctx, target); err != nil {
			t.Fatal(err)
		}
	}
	close(stop)
	<-done
	if _, err := os.Lstat(source + "/probe"); !os.IsNotExist(err) {
		t.Errorf("a write got through a read-only bind (%d tries)", tries.Load())
	}
}

func TestBindFileAndDeviceNode(t *testing.T) {
	roottest.Require(t)
	m, ctx := New(), t.Context()
	device, _ := loopFS(t, "ext4")
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	write(t, file, "content")

	target := filepath.Join(dir, "bound file")
	mustBind(t, m, BindSpec{Source: file, Target: target, ReadOnly: true})
	isErrno(t, os.WriteFile(target, []byte("x"), 0o644), syscall.EROFS)
	if read(t, target) != "content" {
		t.Error("the bind shows something else")
	}
	if err := m.Remove(ctx, target); err != nil {
		t.Error(err)
	}

	node := filepath.Join(dir, "node")
	spec := BindSpec{Source: device, Target: node}
	mustBind(t, m, spec)
	if err := m.Bind(ctx, spec); err != nil {
		t.Errorf("again: %v", err)
	}
	major, minor := rdev(t, device)
	if a, b := rdev(t, node); a != major || b != minor {
		t.Errorf("%d:%d, want %d:%d", a, b, major, minor)
	}
	if of, err := m.OfDevice(deviceAt(t, m, device)); err != nil || len(of) != 1 || of[0].Path != node {
		t.Errorf("mounts of the device: %+v, %v", of, err)
	}
	// A node that somebody made elsewhere is not the device's.
	strange, shown := filepath.Join(dir, "foreign-node"), filepath.Join(dir, "foreign-shown")
	if err := unix.Mknod(strange, unix.S_IFBLK|0o600, int(unix.Mkdev(major, minor))); err != nil {
		t.Fatal(err)
	}
	mustBind(t, m, BindSpec{Source: strange, Target: shown})
	if of, err := m.OfDevice(deviceAt(t, m, device)); err != nil || len(of) != 1 || of[0].Path != node {
		t.Errorf("mounts of the device beside a node of somebody else: %+v, %v", of, err)
	}
	if err := m.Remove(ctx, shown); err != nil {
		t.Error(err)
	}
	// The same device through another node is the same thing.
	own := filepath.Join(dir, "own-node")
	if err := unix.Mknod(own, unix.S_IFBLK|0o600, int(unix.Mkdev(major, minor))); err != nil {
		t.Fatal(err)
	}
	if err := m.Bind(ctx, BindSpec{Source: own, Target: node}); err != nil {
		t.Errorf("through another node: %v", err)
	}
	other, _ := loopFS(t, "ext4")
	foreign(t, m.Bind(ctx, BindSpec{Source: other, Target: node}))
	foreign(t, m.Bind(ctx, BindSpec{Source: file, Target: node}))
	if err := m.Remove(ctx, node); err != nil {
		t.Error(err)
	}

	// Read-only is the node's, not the device's: documented, and so here.
	spec.ReadOnly = true
	mustBind(t, m, spec)
	isErrno(t, os.Chmod(node, 0o777), syscall.EROFS)
	f, err := os.OpenFile(node, os.O_RDWR, 0)
	if err != nil {
		t.Fatalf("the kernel has learnt to protect devices, say so in the documentation: %v", err)
	}
	_ = f.Close()
	if err := m.Remove(ctx, node); err != nil {
		t.Error(err)
	}
	// A node that is no mount target's stays.
	isErrno(t, m.Remove(ctx, own), syscall.EINVAL)
}

func TestBindFailuresSayWhy(t *testing.T) {
	roottest.Require(t)
	m, ctx := New(), t.Context()
	dir := t.TempDir()
	source, file, target := newDir(t, dir, "source"), filepath.Join(dir, "file"), filepath.Join(dir, "target")
	write(t, file, "")
	existing := newDir(t, dir, "existing")
	link := filepath.Join(dir, "link")
	if err := os.Symlink(source, link); err != nil {
		t.Fatal(err)
	}
	fds := openFDs(t)
	for _, tc := range []struct {
		name  string
		spec  BindSpec
		errno error
		words string
	}{
		{"missing source", BindSpec{Source: dir + "/none", Target: target}, syscall.ENOENT, "none"},
		{"relative source", BindSpec{Source: "source", Target: target}, syscall.EINVAL, "absolute"},
		{"source is a link", BindSpec{Source: link, Target: target}, syscall.ELOOP, "the source is a symbolic link"},
		{"source is a character device", BindSpec{Source: "/dev/null", Target: target}, syscall.EINVAL, "a character device"},
		{"target is a link", BindSpec{Source: source, Target: link}, syscall.ELOOP, "the target is a symbolic link"},
		{"directory on a file", BindSpec{Source: source, Target: file}, syscall.ENOTDIR, "is a regular file and has to be a directory"},
		{"file on a directory", BindSpec{Source: file, Target: existing}, syscall.EISDIR, "is a directory and has to be a file"},
		{"file on a link", BindSpec{Source: file, Target: link}, syscall.ELOOP, "symbolic link"},
		{"source in another mount", BindSpec{Source: source, Target: target, Mount: 1 << 30}, ErrBusy, "another mount is there"},
		{"no parent", BindSpec{Source: file, Target: dir + "/a/b"}, syscall.ENOENT, "parent directory"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			err := m.Bind(ctx, tc.spec)
			if !errors.Is(err, tc.errno) || !strings.Contains(err.Error(), tc.words) {
				t.Errorf("got %v", err)
			}
			if _, err := os.Lstat(target); !os.IsNotExist(err) {
				t.Errorf("the target is left: %v", err)
			}
		})
	}
	if entries, err := os.ReadDir(source); err != nil || len(entries) != 0 {
		t.Errorf("something came through the link: %v, %v", entries, err)
	}
	if n := openFDs(t); n != fds {
		t.Errorf("%d descriptors, %d before", n, fds)
	}
}

// What others mounted inside the staging directory stays there.
func TestBindIsNotRecursive(t *testing.T) {
	roottest.Require(t)
	m := New()
	dir := t.TempDir()
	source, target := newDir(t, dir, "source"), filepath.Join(dir, "target")
	mustBind(t, m, BindSpec{Source: newDir(t, dir, "other"), Target: newDir(t, source, "below")})
	write(t, dir+"/other/file", "")
	mustBind(t, m, BindSpec{Source: source, Target: target})
	if _, err := os.Lstat(target + "/below/file"); !os.IsNotExist(err) {
		t.Errorf("a mount below the source came along: %v", err)
	}
}

func TestBindOfReadOnlyStaysReadOnly(t *testing.T) {
	roottest.Require(t)
	m, ctx := New(), t.Context()
	device, _ := loopFS(t, "ext4")
	dir := t.TempDir()
	staging, publish := dir+"/staging", dir+"/publish"
	mustMount(t, m, Spec{Source: device, Target: staging, FSType: "ext4", ReadOnly: true})
	mustBind(t, m, BindSpec{Source: staging, Target: publish})
	isErrno(t, os.WriteFile(publish+"/x", nil, 0o600), syscall.EROFS)
	for _, readOnly := range []bool{false, true} {
		if err := m.Bind(ctx, BindSpec{Source: staging, Target: publish, ReadOnly: readOnly}); err != nil {
			t.Errorf("again: %v", err)
		}
	}
}

func TestTargetInsideReadOnlyFilesystem(t *testing.T) {
	roottest.Require(t)
	m, ctx := New(), t.Context()
	device, _ := loopFS(t, "ext4")
	other, _ := loopFS(t, "ext4")
	dir := t.TempDir()
	outer := dir + "/outer"
	mustMount(t, m, Spec{Source: device, Target: outer, FSType: "ext4"})
	newDir(t, outer, "ready")
	write(t, outer+"/file", "")
	if err := m.Unmount(ctx, outer); err != nil {
		t.Fatal(err)
	}
	mustMount(t, m, Spec{Source: device, Target: outer, FSType: "ext4", ReadOnly: true})

	isErrno(t, m.Mount(ctx, Spec{Source: other, Target: outer + "/missing", FSType: "ext4"}), syscall.EROFS)
	isErrno(t, m.Bind(ctx, BindSpec{Source: dir, Target: outer + "/missing"}), syscall.EROFS)
	isErrno(t, m.Bind(ctx, BindSpec{Source: other, Target: outer + "/missing"}), syscall.EROFS)
	// What is there already can be mounted on.
	mustMount(t, m, Spec{Source: other, Target: outer + "/ready", FSType: "ext4"})
	mustBind(t, m, BindSpec{Source: other, Target: outer + "/file"})
	write(t, outer+"/ready/file", "")
	isErrno(t, m.Remove(ctx, outer+"/ready"), syscall.EROFS)
	notAt(t, m, outer+"/ready")
}

func TestUnmountTakesEveryLayer(t *testing.T) {
	roottest.Require(t)
	m, ctx := New(), t.Context()
	dir := t.TempDir()
	target := newDir(t, dir, "target")
	device, _ := loopFS(t, "ext4")
	mustMount(t, m, Spec{Source: device, Target: target, FSType: "ext4"})
	for _, n := range []string{"a", "b", "c"} {
		if err := unix.Mount(newDir(t, dir, n), target, "", unix.MS_BIND, ""); err != nil {
			t.Fatal(err)
		}
	}
	if n := layers(t, m, target); n != 4 {
		t.Fatalf("%d layers", n)
	}
	for _, m := range []*Mounter{m, New(withoutStatmount())} {
		if got := mustAt(t, m, target); !strings.HasSuffix(got.Root, "/c") {
			t.Errorf("the uppermost is %+v", got)
		}
	}
	foreign(t, m.Mount(ctx, Spec{Source: device, Target: target, FSType: "ext4"}))
	if err := m.Remove(ctx, target); err != nil {
		t.Fatal(err)
	}
	if n := layers(t, m, target); n != 0 {
		t.Errorf("%d layers", n)
	}
	if err := claimable(device); err != nil {
		t.Error(err)
	}
}

func TestBusyIsAnAnswer(t *testing.T) {
	roottest.Require(t)
	m, ctx := New(), t.Context()
	device, _ := loopFS(t, "ext4")
	target := t.TempDir() + "/target"
	mustMount(t, m, Spec{Source: device, Target: target, FSType: "ext4"})
	f, err := os.Create(target + "/open")
	if err != nil {
		t.Fatal(err)
	}
	for _, call := range []func(context.Context, string) error{m.Unmount, m.Remove, New(WithBusyTime(0)).Unmount} {
		if err := call(ctx, target); !errors.Is(err, ErrBusy) || !errors.Is(err, syscall.EBUSY) {
			t.Errorf("got %v", err)
		}
		mustAt(t, m, target)
	}
	short, cancel := context.WithCancel(ctx)
	slow := make(chan error)
	go func() { slow <- New(WithBusyTime(1<<40)).Unmount(short, target) }()
	cancel()
	if err := <-slow; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	// A short use, such as that of a child between fork and exec, is waited out.
	slow = make(chan error)
	go func() { slow <- New(WithBusyTime(1<<40)).Unmount(ctx, target) }()
	_ = f.Close()
	if err := <-slow; err != nil {
		t.Error(err)
	}
	notAt(t, m, target)
}

func TestRemoveKeepsWhatIsNotATarget(t *testing.T) {
	roottest.Require(t)
	m, ctx := New(), t.Context()
	dir := t.TempDir()
	full := newDir(t, dir, "full")
	write(t, full+"/file", "")
	write(t, dir+"/contents", "x")
	write(t, dir+"/empty", "")
	if err := os.Symlink(full, dir+"/link"); err != nil {
		t.Fatal(err)
	}
	isErrno(t, m.Remove(ctx, full), syscall.ENOTEMPTY)
	isErrno(t, m.Remove(ctx, dir+"/contents"), syscall.ENOTEMPTY)
	isErrno(t, m.Remove(ctx, dir+"/link"), syscall.EINVAL)
	isErrno(t, m.Remove(ctx, dir+"/link/"), syscall.EINVAL)
	for _, gone := range []string{"/empty", "/missing", "/missing/below", "/contents/below"} {
		if err := m.Remove(ctx, dir+gone); err != nil {
			t.Errorf("%s: %v", gone, err)
		}
	}
	if _, err := os.Lstat(full + "/file"); err != nil {
		t.Error(err)
	}
	// Nothing mounted at the link: its target's mounts stay.
	target := newDir(t, dir, "target")
	mustBind(t, m, BindSpec{Source: full, Target: target})
	if err := os.Symlink(target, dir+"/to-target"); err != nil {
		t.Fatal(err)
	}
	notAt(t, m, dir+"/to-target")
	if err := m.Unmount(ctx, dir+"/to-target/"); err != nil {
		t.Error(err)
	}
	mustAt(t, m, target)
	// Below a link is fine: directories are trusted.
	if err := os.Symlink(dir, dir+"/self"); err != nil {
		t.Fatal(err)
	}
	if got := mustAt(t, m, dir+"/self/target"); got.Path != target {
		t.Errorf("%+v", got)
	}
}

// A source that is deleted while it is bound stays usable and can be unmounted.
func TestDeletedSource(t *testing.T) {
	roottest.Require(t)
	m, ctx := New(), t.Context()
	dir := t.TempDir()
	source, target := newDir(t, dir, "source"), dir+"/target"
	spec := BindSpec{Source: source, Target: target}
	mustBind(t, m, spec)
	if err := os.Remove(source); err != nil {
		t.Fatal(err)
	}
	for _, m := range []*Mounter{m, New(withoutStatmount())} {
		if got := mustAt(t, m, target); got.Path != target || !strings.HasSuffix(got.Root, "/source//deleted") {
			t.Errorf("%+v", got)
		}
	}
	isErrno(t, m.Bind(ctx, spec), syscall.ENOENT)
	newDir(t, source)
	foreign(t, m.Bind(ctx, spec))
	// The kernel does not attach a removed directory anew, though it is there.
	isErrno(t, m.Bind(ctx, BindSpec{Source: target, Target: dir + "/again"}), syscall.ENOENT)
	if _, err := os.Lstat(dir + "/again"); !os.IsNotExist(err) {
		t.Errorf("the target is left: %v", err)
	}
	if err := m.Remove(ctx, target); err != nil {
		t.Error(err)
	}
}

// The device dies under a mounted filesystem: every call into it fails, and it
// can still be found, described and unmounted.
func TestDeadFilesystem(t *testing.T) {
	roottest.Require(t)
	for _, fsType := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(fsType, func(t *testing.T) {
			m, ctx := New(), t.Context()
			device, _ := loopFS(t, fsType)
			dir := t.TempDir()
			target, publish := dir+"/target", dir+"/publish"
			mustMount(t, m, Spec{Source: device, Target: target, FSType: fsType})
			mustBind(t, m, BindSpec{Source: target, Target: publish})
			write(t, target+"/file", "content")
			shutdown(t, target)
			_, statErr := os.Stat(target)
			_, statsErr := m.Stats(target)
			t.Logf("stat: %v; stats: %v; write: %v", statErr, statsErr, os.WriteFile(target+"/x", nil, 0o600))
			for _, m := range []*Mounter{m, New(withoutStatmount())} {
				for _, path := range []string{target, publish} {
					if got := mustAt(t, m, path); got.Path != path || got.FSType != fsType {
						t.Errorf("%+v", got)
					}
				}
			}
			if of, err := m.OfDevice(deviceAt(t, m, device)); err != nil || len(of) != 2 {
				t.Errorf("mounts of the device: %+v, %v", of, err)
			}
			for _, path := range []string{publish, target} {
				if err := m.Remove(ctx, path); err != nil {
					t.Error(err)
				}
			}
			if err := claimable(device); err != nil {
				t.Error(err)
			}
		})
	}
}

// shutdown makes the filesystem refuse everything from now on, as it does by
// itself when its device fails (FS_IOC_SHUTDOWN, without flushing the log).
func shutdown(t *testing.T, path string) {
	t.Helper()
	const goingdown, noLogFlush = iocRead | 4<<iocSizeShift | 'X'<<8 | 125, 2
	err := withOpen(path, 0, func(fd int) error { return unix.IoctlSetPointerInt(fd, goingdown, noLogFlush) })
	if errors.Is(err, syscall.ENOTTY) {
		t.Skip("this kernel's driver cannot be shut down")
	}
	if err != nil {
		t.Fatal(err)
	}
}
