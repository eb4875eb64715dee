package mount

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

func TestMountLife(t *testing.T) {
	roottest.Require(t)
	for _, fsType := range []string{"ext2", "ext3", "ext4", "xfs", "btrfs"} {
		t.Run(fsType, func(t *testing.T) {
			m, ctx := New(), t.Context()
			device, _ := loopFS(t, fsType)
			target := filepath.Join(t.TempDir(), "target")
			spec := Spec{Source: device, Target: target, FSType: fsType, Options: []string{"noatime,nosuid", "nodev"}}
			fds := openFDs(t)
			mustMount(t, m, spec)
			if info, err := os.Stat(target); err != nil || !info.IsDir() {
				t.Fatal(info, err)
			}
			got := mustAt(t, m, target)
			major, minor := rdev(t, device)
			if got.Path != target || got.Root != "/" || got.FSType != fsType || got.ReadOnly || got.Source != device {
				t.Errorf("%+v", got)
			}
			if fsType != "btrfs" && (got.Major != major || got.Minor != minor) {
				t.Errorf("%+v is not %d:%d", got, major, minor)
			}
			if !slices.Equal(got.Options, []string{"rw", "nosuid", "nodev", "noatime"}) {
				t.Errorf("options %q", got.Options)
			}
			write(t, target+"/file", "content")

			if err := m.Mount(ctx, spec); err != nil {
				t.Errorf("again: %v", err)
			}
			readOnly := spec
			readOnly.ReadOnly = true
			foreign(t, m.Mount(ctx, readOnly))
			other, _ := loopFS(t, "ext4")
			foreign(t, m.Mount(ctx, Spec{Source: other, Target: target, FSType: fsType}))
			foreign(t, m.Mount(ctx, Spec{Source: other, Target: target, FSType: "ext4"}))
			if of, err := m.OfDevice(deviceAt(t, m, device)); err != nil || len(of) != 1 || of[0].Path != target {
				t.Errorf("mounts of the device: %+v, %v", of, err)
			}
			s, err := m.Stats(target)
			if err != nil || s.Total < 20*miB || s.Available <= 0 || s.Used < 0 || (s.Inodes == 0) != (fsType == "btrfs") {
				t.Errorf("%+v, %v", s, err)
			}
			err = m.Check(ctx, fsType, device)
			if strings.HasPrefix(fsType, "ext") {
				isErrno(t, err, syscall.EBUSY)
			} else if !errors.Is(err, ErrUnsupported) {
				t.Error(err)
			}

			for range 2 {
				if err := m.Unmount(ctx, target); err != nil {
					t.Error(err)
				}
			}
			notAt(t, m, target)
			if of, err := m.OfDevice(deviceAt(t, m, device)); err != nil || len(of) != 0 {
				t.Errorf("mounts of the device: %+v, %v", of, err)
			}
			if err := m.Mount(ctx, readOnly); err != nil {
				t.Fatal(err)
			}
			if got := mustAt(t, m, target); !got.ReadOnly || got.SuperOptions[0] != "ro" || got.Options[0] != "ro" {
				t.Errorf("%+v", got)
			}
			isErrno(t, os.WriteFile(target+"/file", nil, 0o644), syscall.EROFS)
			if read(t, target+"/file") != "content" {
				t.Error("the file changed")
			}
			foreign(t, m.Mount(ctx, spec))
			for range 2 {
				if err := m.Remove(ctx, target); err != nil {
					t.Error(err)
				}
			}
			if _, err := os.Lstat(target); !os.IsNotExist(err) {
				t.Errorf("the target is left: %v", err)
			}
			if n := openFDs(t); n != fds {
				t.Errorf("%d descriptors, %d before", n, fds)
			}
		})
	}
}

func TestMountFailuresSayWhy(t *testing.T) {
	roottest.Require(t)
	m, ctx := New(), t.Context()
	ext4, _ := loopFS(t, "ext4")
	image := mkfsImage(t, "ext4", 32*miB)
	readOnly := loopOver(t, image, "-r")
	blank := filepath.Join(t.TempDir(), "blank")
	write(t, blank, "")
	if err := os.Truncate(blank, 16*miB); err != nil {
		t.Fatal(err)
	}
	empty := loopOver(t, blank)
	dir := t.TempDir()
	target := filepath.Join(dir, "target")
	file := filepath.Join(dir, "file")
	dirty := dirtyReadOnly(t, m)
	longNode := newDir(t, dir, strings.Repeat("n", 250)) + "/node"
	if err := os.Symlink(ext4, longNode); err != nil {
		t.Fatal(err)
	}
	write(t, file, "")
	link := filepath.Join(dir, "link")
	if err := os.Symlink(newDir(t, dir, "linked"), link); err != nil {
		t.Fatal(err)
	}
	fds := openFDs(t)
	for _, tc := range []struct {
		name  string
		spec  Spec
		errno error
		words string
	}{
		{"no superblock", Spec{Source: empty, Target: target, FSType: "ext4"}, syscall.EINVAL, "no intact ext4"},
		{"another filesystem", Spec{Source: ext4, Target: target, FSType: "xfs"}, syscall.EINVAL, "no intact xfs"},
		{"read-only device", Spec{Source: readOnly, Target: target, FSType: "ext4"}, syscall.EACCES, "read-only"},
		{"read-only device with a log to replay", Spec{Source: dirty, Target: target, FSType: "ext4", ReadOnly: true}, syscall.EROFS, "replayed"},
		{"path of the device too long", Spec{Source: longNode, Target: target, FSType: "ext4"}, syscall.ENAMETOOLONG, "too long"},
		{"missing device", Spec{Source: "/dev/no-such-node", Target: target, FSType: "ext4"}, syscall.ENOENT, "/dev/no-such-node"},
		{"not a device", Spec{Source: file, Target: target, FSType: "ext4"}, syscall.ENOTBLK, file},
		{"target is a file", Spec{Source: ext4, Target: file, FSType: "ext4"}, syscall.ENOTDIR, "is a regular file and has to be a directory"},
		{"target is a link", Spec{Source: ext4, Target: link, FSType: "ext4"}, syscall.ELOOP, "symbolic link"},
		{"target is a link, with a slash", Spec{Source: ext4, Target: link + "/", FSType: "ext4"}, syscall.ELOOP, "symbolic link"},
		{"no parent", Spec{Source: ext4, Target: dir + "/a/b", FSType: "ext4"}, syscall.ENOENT, "parent directory does not exist"},
		{"parent is a file", Spec{Source: ext4, Target: file + "/b", FSType: "ext4"}, syscall.ENOTDIR, "make target"},
		{"relative target", Spec{Source: ext4, Target: "target", FSType: "ext4"}, syscall.EINVAL, "absolute"},
		{"root", Spec{Source: ext4, Target: "/", FSType: "ext4"}, syscall.EINVAL, "root directory"},
		{"component too long", Spec{Source: ext4, Target: dir + "/" + strings.Repeat("x", 300), FSType: "ext4"}, syscall.ENAMETOOLONG, "xxx"},
		{"path too long", Spec{Source: ext4, Target: dir + strings.Repeat("/xx", 1500), FSType: "ext4"}, syscall.ENAMETOOLONG, "bytes)"},
		{"kernel refuses a value", Spec{Source: ext4, Target: target, FSType: "ext4", Options: []string{"noatime,commit=999999999"}}, syscall.EINVAL, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			err := m.Mount(ctx, tc.spec)
			if !errors.Is(err, tc.errno) || !strings.Contains(err.Error(), tc.words) {
				t.Errorf("got %v", err)
			}
			t.Log(err)
			if _, err := os.Lstat(target); !os.IsNotExist(err) {
				t.Errorf("the target is left: %v", err)
			}
		})
	}
	t.Run("the kernel's own words", func(t *testing.T) {
		_, err := newMount(ext4, "ext4", Options{Super: []Param{{Key: "bogus"}}})
		err = explain(err, Spec{FSType: "ext4"}, target)
		var o *OptionError
		if !errors.As(err, &o) || o.Option != "bogus" || !strings.Contains(o.Reason, "Unknown parameter") {
			t.Errorf("got %v", err)
		}
		isErrno(t, err, syscall.EINVAL)
		t.Log(err)
	})
	t.Run("a fault is not the option's", func(t *testing.T) {
		err := explain(&configError{op: "set option", param: "noatime", err: syscall.EIO}, Spec{FSType: "ext4"}, target)
		if errors.As(err, new(*OptionError)) || errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "noatime") {
			t.Errorf("got %v", err)
		}
		isErrno(t, err, syscall.EIO)
	})
	t.Run("a filesystem that this kernel lacks", func(t *testing.T) {
		_, err := newMount(ext4, "nosuchfs", Options{})
		err = explain(err, Spec{FSType: "nosuchfs", Source: ext4}, target)
		if !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), "module") {
			t.Errorf("got %v", err)
		}
		// Kernels differ in how much they say; our own advice is there in any case.
		err = explain(&configError{op: "open filesystem", words: "Can't open blockdev", err: syscall.EACCES}, Spec{FSType: "ext4"}, target)
		if !strings.Contains(err.Error(), "Can't open blockdev; the device is read-only") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("mounted elsewhere with another read-only setting", func(t *testing.T) {
		mustMount(t, m, Spec{Source: ext4, Target: target, FSType: "ext4"})
		err := m.Mount(ctx, Spec{Source: ext4, Target: target + "2", FSType: "ext4", ReadOnly: true})
		if !errors.Is(err, ErrBusy) {
			t.Errorf("got %v", err)
		}
	})
	if n := openFDs(t); n != fds {
		t.Errorf("%d descriptors, %d before", n, fds)
	}
}

// dirtyReadOnly is a read-only device with an ext4 that was not unmounted.
func dirtyReadOnly(t *testing.T, m *Mounter) string {
	t.Helper()
	image := mkfsImage(t, "ext4", 32*miB)
	device, target := loopOver(t, image), t.TempDir()
	mustMount(t, m, Spec{Source: device, Target: target, FSType: "ext4"})
	write(t, target+"/file", "content")
	shutdown(t, target)
	if err := m.Unmount(t.Context(), target); err != nil {
		t.Fatal(err)
	}
	return loopOver(t, image, "-r")
}

func TestMountOptionsReachTheKernel(t *testing.T) {
	roottest.Require(t)
	m := New()
	for fsType, options := range map[string][]string{
		"ext2":  {"noquota", "errors=remount-ro"},
		"ext3":  {"data=journal", "commit=7"},
		"ext4":  {"lazytime", "data=writeback", "commit=30", "nobarrier", "stripe=16", "nodelalloc", "errors=remount-ro", "inode_readahead_blks=64", "max_batch_time=0", "nodiscard"},
		"xfs":   {"largeio", "logbsize=256k", "logbufs=8", "allocsize=64m", "wsync", "swalloc", "nouuid", "inode64", "noquota"},
		"btrfs": {"compress=zstd:3", "autodefrag", "commit=60", "nossd", "thread_pool=4", "max_inline=1024", "nodiscard", "noacl"},
	} {
		t.Run(fsType, func(t *testing.T) {
			device, _ := loopFS(t, fsType)
			target := filepath.Join(t.TempDir(), "target")
			mustMount(t, m, Spec{Source: device, Target: target, FSType: fsType, Options: options})
			got := mustAt(t, m, target)
			t.Log(got.SuperOptions)
			for _, want := range map[string][]string{
				"ext3": {"data=journal", "commit=7"}, "ext4": {"lazytime", "data=writeback", "commit=30", "nodelalloc"},
				"xfs": {"wsync", "logbsize=256k", "nouuid"}, "btrfs": {"compress=zstd:3", "commit=60", "autodefrag", "nossd"},
			}[fsType] {
				if !slices.Contains(got.SuperOptions, want) {
					t.Errorf("%s is not in %q", want, got.SuperOptions)
				}
			}
		})
	}
}

// Whatever the two ways of asking say about a mount, they say the same.
func TestAtAgreesWithMountinfo(t *testing.T) {
	roottest.Require(t)
	fast, slow := New(), New(withoutStatmount())
	device, _ := loopFS(t, "ext4")
	dir := t.TempDir()
	for i, name := range []string{"plain", "with space", "new\nline", "tab\there", `back\slash`, "käse-日本", "no\u00a0break\u2003\u0085", "#hash", "ends ", strings.Repeat("y", 255)} {
		target := filepath.Join(dir, name)
		options := [][]string{nil, {"noatime", "nosymfollow"}, {"strictatime,lazytime,sync"}, {"nodiratime,noexec"}}[i%4]
		mustMount(t, fast, Spec{Source: device, Target: target, FSType: "ext4", Options: options})
		write(t, target+"/file", "x")
		got, want := mustAt(t, fast, target), mustAt(t, slow, target)
		if got.Path != target {
			t.Errorf("path %q, want %q", got.Path, target)
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Error(name, d)
		}
		bound := filepath.Join(dir, "bind of "+name[:min(len(name), 200)])
		write(t, bound, "")
		mustBind(t, fast, BindSpec{Source: target + "/file", Target: bound, ReadOnly: i%2 == 0})
		if d := cmp.Diff(mustAt(t, slow, bound), mustAt(t, fast, bound)); d != "" {
			t.Error(bound, d)
		}
	}
	if len(mustList(t, fast)) != len(strings.Split(strings.TrimSpace(read(t, "/proc/self/mountinfo")), "\n")) {
		t.Error("a line of mountinfo was not understood")
	}
}

func mustList(tb testing.TB, m *Mounter) []Mount {
	tb.Helper()
	l, err := m.List()
	if err != nil {
		tb.Fatal(err)
	}
	return l
}

func TestLongPaths(t *testing.T) {
	roottest.Require(t)
	m, ctx := New(), t.Context()
	device, _ := loopFS(t, "ext4")
	dir := t.TempDir()
	for len(dir) < 3700 {
		dir += "/" + strings.Repeat("d", 200)
	}
	dir = newDir(t, dir)
	target := dir + "/" + strings.Repeat("t", 4000-len(dir)-1)
	for _, m := range []*Mounter{m, New(withoutStatmount())} {
		mustMount(t, m, Spec{Source: device, Target: target, FSType: "ext4"})
		if got := mustAt(t, m, target); got.Path != target || len(got.Path) != 4000 {
			t.Errorf("a path of %d bytes became %d", len(target), len(got.Path))
		}
		if err := m.Remove(ctx, target); err != nil {
			t.Error(err)
		}
	}
}

// A call that was cancelled before it began leaves nothing; one that waits for
// its turn gives up.
func TestCancelledMount(t *testing.T) {
	roottest.Require(t)
	m := New()
	device, _ := loopFS(t, "ext4")
	target := filepath.Join(t.TempDir(), "target")
	unlock, err := m.targets.lock(t.Context(), target)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- m.Mount(ctx, Spec{Source: device, Target: target, FSType: "ext4"}) }()
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	unlock()
	if _, err := os.Lstat(target); !os.IsNotExist(err) {
		t.Errorf("the target is left: %v", err)
	}
}

func TestConcurrentMounts(t *testing.T) {
	roottest.Require(t)
	m, ctx := New(), t.Context()
	const volumes, callers = 64, 3
	dir := t.TempDir()
	devices := make([]string, volumes)
	first := mkfsImage(t, "ext4", 4*miB)
	for i := range devices {
		image := filepath.Join(dir, name(i)+".img")
		write(t, image, read(t, first))
		devices[i] = loopOver(t, image)
	}
	fds := openFDs(t)
	var wg sync.WaitGroup
	for i := range volumes {
		staging, publish := filepath.Join(dir, "s"+name(i)), filepath.Join(dir, "p"+name(i))
		wg.Go(func() {
			var same sync.WaitGroup
			for range callers {
				same.Go(func() {
					if err := m.Mount(ctx, Spec{Source: devices[i], Target: staging, FSType: "ext4"}); err != nil {
						t.Error(err)
					}
					if err := m.Bind(ctx, BindSpec{Source: staging, Target: publish, ReadOnly: i%2 == 0}); err != nil {
						t.Error(err)
					}
				})
			}
			same.Wait()
			if n := layers(t, m, staging) + layers(t, m, publish); n != 2 {
				t.Errorf("%d mounts on %s and %s", n, staging, publish)
			}
			for range callers {
				same.Go(func() {
					if err := m.Remove(ctx, publish); err != nil {
						t.Error(err)
					}
				})
			}
			same.Wait()
			if err := m.Remove(ctx, staging); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := openFDs(t); n != fds {
		t.Errorf("%d descriptors, %d before", n, fds)
	}
	if len(m.targets.held) != 0 {
		t.Errorf("%d locks left", len(m.targets.held))
	}
}

func layers(tb testing.TB, m *Mounter, path string) (n int) {
	tb.Helper()
	for _, found := range mustList(tb, m) {
		if found.Path == path {
			n++
		}
	}
	return n
}

// A mount made below a shared directory shows up in the other namespace, which
// is how a pod's driver mounts for the kubelet, and goes away there too.
func TestPropagation(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	m, ctx := New(), t.Context()
	device, _ := loopFS(t, "ext4")
	dir := t.TempDir()
	kubelet, peer := newDir(t, dir, "kubelet"), newDir(t, dir, "peer")
	for _, step := range []error{
		unix.Mount("tmpfs", kubelet, "tmpfs", 0, ""), unix.Mount("", kubelet, "", unix.MS_SHARED, ""), unix.Mount(kubelet, peer, "", unix.MS_BIND, ""),
	} {
		if step != nil {
			t.Fatal(step)
		}
	}
	staging, publish := kubelet+"/staging", kubelet+"/publish"
	mustMount(t, m, Spec{Source: device, Target: staging, FSType: "ext4"})
	mustBind(t, m, BindSpec{Source: staging, Target: publish, ReadOnly: true})
	for _, p := range []string{"/staging", "/publish"} {
		got, there := mustAt(t, m, kubelet+p), mustAt(t, m, peer+p)
		if there.Path != peer+p || there.Major != got.Major || there.Minor != got.Minor || there.ReadOnly != got.ReadOnly {
			t.Errorf("%+v is not %+v", there, got)
		}
	}
	isErrno(t, os.WriteFile(peer+"/publish/x", nil, 0o644), syscall.EROFS)
	for _, p := range []string{"/publish", "/staging"} {
		if err := m.Unmount(ctx, kubelet+p); err != nil {
			t.Error(err)
		}
		notAt(t, m, peer+p)
	}
	_ = unix.Unmount(peer, 0)
	_ = unix.Unmount(kubelet, 0)
}
