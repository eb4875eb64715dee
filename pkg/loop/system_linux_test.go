package loop

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

// What only the running kernel can show: bytes, mounts, other programs, processes.

func TestBytesOfAWindow(t *testing.T) {
	m := realMachine(t)
	manager := m.manager(t)
	f := m.image(t, "a")
	const offset, limit = 1<<20 + 512, 64 << 10
	pattern := bytes.Repeat([]byte("window! "), limit/8)
	check(t, second(f.WriteAt(pattern, offset)))
	d := m.attach(t, manager, "a", Mapping{Offset: offset, SizeLimit: limit, BlockSize: 512})

	node, err := os.OpenFile(d.Path(), os.O_RDWR, 0)
	check(t, err)
	got := make([]byte, limit+512)
	n, _ := node.Read(got)
	if n != limit || !bytes.Equal(got[:n], pattern) {
		t.Errorf("read %d bytes, want the window's %d", n, limit)
	}
	check(t, second(node.WriteAt(bytes.Repeat([]byte{'x'}, 512), limit-512)))
	if _, err := node.WriteAt(make([]byte, 512), limit); err == nil {
		t.Error("a write behind the window succeeds")
	}
	check(t, errors.Join(node.Sync(), node.Close()))
	m.detach(t, manager, d)

	all := make([]byte, testSize)
	check(t, second(f.ReadAt(all, 0)))
	if all[offset+limit-1] != 'x' || all[offset+limit] != 0 || all[offset+limit-513] != ' ' || all[offset-1] != 0 {
		t.Error("the write did not land on the window's last block alone")
	}
}

func second(_ int, err error) error { return err }

// Facts 62, 63: with discard masked neither a discard nor zeroing takes blocks from
// the image; without the mask a discard does.
func TestDiscardMaskKeepsTheImageAllocated(t *testing.T) {
	m := realMachine(t)
	manager := m.manager(t)
	for _, thin := range []bool{false, true, false} {
		f := m.image(t, "a")
		check(t, withFD(f, func(fd int) error { return unix.Fallocate(fd, 0, 0, testSize) }))
		want := whole
		want.Discard = thin
		d := m.attach(t, manager, "a", want)
		node := must(os.OpenFile(d.Path(), os.O_RDWR, 0))(t)
		whole := [2]uint64{0, testSize}
		request := func(op uint) (errno error) {
			check(t, withFD(node, func(fd int) error {
				if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(op), uintptr(unsafe.Pointer(&whole))); e != 0 {
					errno = e
				}
				return nil
			}))
			return errno
		}
		discard := request(unix.BLKDISCARD)
		if thin {
			check(t, discard)
		} else {
			wantErr(t, "discard", discard, unix.EOPNOTSUPP)
			check(t, request(unix.BLKZEROOUT))
		}
		check(t, errors.Join(node.Sync(), node.Close()))
		st := must(fstat(f))(t)
		if kept := st.Blocks*512 >= testSize; kept == thin {
			t.Errorf("thin %v: %d of %d bytes are allocated", thin, st.Blocks*512, testSize)
		}
		check(t, f.Close())
		m.detach(t, manager, d)
	}
}

func TestReadOnlyRejectsWrites(t *testing.T) {
	m := realMachine(t)
	manager := m.manager(t)
	m.image(t, "a")
	for name, flags := range map[string]int{"writable file": os.O_RDWR, "read-only file": os.O_RDONLY} {
		d, err := manager.Attach(t.Context(), m.reopen(t, "a", flags), Mapping{BlockSize: 4096, ReadOnly: true})
		check(t, err)
		node, err := os.OpenFile(d.Path(), os.O_RDWR, 0)
		if err == nil {
			_, err = node.WriteAt(make([]byte, 4096), 0)
			check(t, node.Close())
		}
		wantErr(t, name, err, unix.EPERM)
		m.detach(t, manager, d)
	}
}

// TestSync: what another opener wrote to the node is in the image afterwards.
func TestSync(t *testing.T) {
	m := realMachine(t)
	manager := m.manager(t)
	m.image(t, "a")
	d, err := manager.Attach(t.Context(), m.reopen(t, "a", os.O_RDWR), Mapping{BlockSize: 4096, DirectIO: DirectIOAuto})
	check(t, err)
	writer, err := os.OpenFile(d.Path(), os.O_RDWR, 0)
	check(t, err)
	block := bytes.Repeat([]byte{7}, 4096)
	check(t, second(writer.WriteAt(block, 8192)))
	check(t, manager.Sync(t.Context(), d.Ref()))
	got := make([]byte, 4096)
	check(t, second(m.reopen(t, "a", os.O_RDONLY).ReadAt(got, 8192)))
	if !bytes.Equal(got, block) {
		t.Errorf("the image has %d", got[0])
	}
	check(t, writer.Close())
	gone := d.Ref()
	m.detach(t, manager, d)
	if err := manager.Sync(t.Context(), gone); !errors.Is(err, ErrNotBound) {
		t.Errorf("sync of a device that is gone: %v", err)
	}
}

// TestDropCache: two devices over one image have two page caches.
func TestDropCache(t *testing.T) {
	m := realMachine(t)
	manager := m.manager(t)
	m.image(t, "a")
	attach := func(flags int, readOnly bool) (*Device, *os.File) {
		d, err := manager.Attach(t.Context(), m.reopen(t, "a", flags), Mapping{BlockSize: 4096, ReadOnly: readOnly, DirectIO: DirectIOAuto})
		check(t, err)
		node, err := os.OpenFile(d.Path(), flags, 0)
		check(t, err)
		return d, node
	}
	w, writer := attach(os.O_RDWR, false)
	r, reader := attach(os.O_RDONLY, true)
	for round := byte(1); round <= 3; round++ {
		block := bytes.Repeat([]byte{round}, 4096)
		check(t, second(writer.WriteAt(block, 0)))
		check(t, writer.Sync())
		check(t, manager.DropCache(t.Context(), r.Ref()))
		got := make([]byte, 4096)
		check(t, second(reader.ReadAt(got, 0)))
		if !bytes.Equal(got, block) {
			t.Fatalf("round %d: read %d", round, got[0])
		}
	}
	check(t, writer.Close())
	check(t, reader.Close())
	gone := r.Ref()
	m.detach(t, manager, r)
	m.detach(t, manager, w)
	wantErr(t, "stale", manager.DropCache(t.Context(), gone), ErrNotBound)
}

func TestMountHoldsAnAutoclearDevice(t *testing.T) {
	m := realMachine(t)
	manager := m.manager(t)
	roottest.Run(t, "mkfs.ext4", "-q", "-b", "4096", m.image(t, "a").Name())
	want := whole
	want.Autoclear = true
	d := m.attach(t, manager, "a", want)
	target := t.TempDir()
	check(t, unix.Mount(d.Path(), target, "ext4", 0, ""))
	defer func() { _ = unix.Unmount(target, 0) }()
	check(t, d.Close())

	if got := must(manager.Inspect(t.Context(), d.Ref().Number))(t); got.State != Bound || got.Ref != d.Ref() {
		t.Errorf("mounted: %+v", got)
	}
	restarted := m.manager(t, impatient())
	again := m.attach(t, restarted, "a", want)
	if !again.Reused() {
		t.Error("not reused")
	}
	check(t, again.Close())
	wantErr(t, "detach while mounted", restarted.Detach(t.Context(), d.Ref()), ErrBusy)
	var te *TransitionError
	if err := manager.Remove(t.Context(), d.Ref().Number); !errors.As(err, &te) {
		t.Errorf("remove while mounted: %v", err)
	}
	check(t, unix.Unmount(target, 0))
	check(t, manager.WaitUnbound(t.Context(), d.Ref()))
}

// A reflinked file on XFS needs 4096-byte direct I/O on kernels that say so, and then
// 512-byte blocks lose it (fact 61). Others grant it, and it works.
func TestDirectIOAutoFallsBackAndOnFails(t *testing.T) {
	roottest.Require(t)
	pool := roottest.Pool(t, "xfs", 320<<20)
	k := realKernel(t, t.TempDir())
	m := &machine{kernel: k, dir: pool}
	manager := m.manager(t)
	f := m.image(t, "a")
	check(t, second(f.WriteAt(make([]byte, 1<<20), 0)))
	check(t, f.Sync())
	roottest.Run(t, "cp", "--reflink=always", f.Name(), filepath.Join(pool, "b"))
	coarse := directIOAlignment(t, f) > 512
	check(t, f.Close())
	refused := ErrDirectIO
	if !coarse {
		refused = nil
	}
	for _, c := range []struct {
		dio    DirectIO
		block  int
		direct bool
		err    error
	}{
		{DirectIOOn, 4096, true, nil},
		{DirectIOAuto, 4096, true, nil},
		{DirectIOOff, 4096, false, nil},
		{DirectIOAuto, 512, !coarse, nil},
		{DirectIOOn, 512, !coarse, refused},
	} {
		f := m.image(t, "a")
		d, err := manager.Attach(t.Context(), f, Mapping{BlockSize: c.block, DirectIO: c.dio})
		check(t, f.Close())
		wantErr(t, fmt.Sprint(c), err, c.err)
		if err != nil {
			continue
		}
		if got := d.Info().DirectIO; got != c.direct {
			t.Errorf("%v with %d-byte blocks: direct %v", c.dio, c.block, got)
		}
		wantBlock(t, d.Path(), c.block)
		m.detach(t, manager, d)
	}
	if left := roottest.Loops(pool); len(left) != 0 {
		t.Errorf("left bound: %v", left)
	}
	// An O_DIRECT file switches it on by itself (fact 19), also where it was not wanted.
	_, err := manager.Attach(t.Context(), m.reopen(t, "a", os.O_RDWR|unix.O_DIRECT), whole)
	wantErr(t, "off, with an O_DIRECT file", err, ErrDirectIO)
}

// directIOAlignment is what the kernel says that direct I/O on a file needs.
func directIOAlignment(t *testing.T, f *os.File) int {
	t.Helper()
	const statxDIOAlign = 0x2000 // Linux 6.1
	var st unix.Statx_t
	check(t, unix.Statx(int(f.Fd()), "", unix.AT_EMPTY_PATH, statxDIOAlign, &st))
	if st.Mask&statxDIOAlign == 0 || st.Dio_offset_align == 0 {
		t.Fatal("the kernel does not know the alignment of direct I/O on XFS")
	}
	return int(st.Dio_offset_align)
}

// wantBlock writes one block to a device without the page cache, its second, and reads
// it again.
func wantBlock(t *testing.T, device string, size int) {
	t.Helper()
	f, err := os.OpenFile(device, os.O_RDWR|unix.O_DIRECT, 0)
	check(t, err)
	defer f.Close()
	memory, err := unix.Mmap(-1, 0, 2*4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	check(t, err)
	defer func() { check(t, unix.Munmap(memory)) }()
	want, got := memory[:size], memory[4096:4096+size]
	copy(want, bytes.Repeat([]byte{byte(size / 512)}, size))
	check(t, second(f.WriteAt(want, int64(size))))
	check(t, second(f.ReadAt(got, int64(size))))
	if !bytes.Equal(got, want) {
		t.Errorf("a block of %d bytes came back differently", size)
	}
}

func losetup(t testing.TB, args ...string) string {
	t.Helper()
	return strings.TrimSpace(roottest.Run(t, append([]string{"losetup"}, args...)...))
}

func TestLosetupShowsOurDevices(t *testing.T) {
	m := realMachine(t)
	manager := m.manager(t)
	d := m.attach(t, manager, "a", Mapping{Offset: 4096, SizeLimit: 8192, BlockSize: 4096, ReadOnly: true, Autoclear: true, Tag: "pool.volume-1"})
	out := losetup(t, "-l", "-n", "-O", "NAME,OFFSET,SIZELIMIT,AUTOCLEAR,RO,DIO,LOG-SEC,BACK-FILE", d.Path())
	want := fmt.Sprintf("%s 4096 8192 1 1 0 4096 %s", d.Path(), filepath.Join(m.dir, "a"))
	if got := strings.Join(strings.Fields(out), " "); got != want {
		t.Errorf("losetup -l:\n%s\nwant\n%s", got, want)
	}
	if got := losetup(t, "-j", filepath.Join(m.dir, "a")); !strings.HasPrefix(got, d.Path()+":") {
		t.Errorf("losetup -j: %q", got)
	}
	if out, err := exec.Command("losetup", "-n", "-O", "REF", d.Path()).Output(); err == nil && strings.TrimSpace(string(out)) != "pool.volume-1" {
		t.Errorf("losetup REF: %q", out)
	}
	m.detach(t, manager, d)
}

func TestDevicesOfLosetupAreForeign(t *testing.T) {
	m := realMachine(t)
	manager := m.manager(t)
	f := m.image(t, "a")
	node := roottest.Losetup(t, "-b", "4096", f.Name())
	defer losetup(t, "-d", node)

	found := must(manager.Find(t.Context(), f))(t) // by inode
	if len(found) != 1 || found[0].Path != node || found[0].Image != must(FileIDOf(f))(t) {
		t.Fatalf("Find = %+v, want %s", found, node)
	}
	_, err := manager.Attach(t.Context(), f, whole)
	var ce *ConflictError
	if !errors.As(err, &ce) || ce.Ref != found[0].Ref {
		t.Errorf("attach over it: %v", err)
	}
	ro := m.attach(t, manager, "a", Mapping{BlockSize: 4096, ReadOnly: true}) // beside it is fine
	m.detach(t, manager, ro)
	check(t, errors.Join(manager.Warm(t.Context()), manager.Trim(t.Context())))
	var te *TransitionError
	if err := manager.Remove(t.Context(), found[0].Number); !errors.As(err, &te) {
		t.Errorf("remove: %v", err)
	}
	after := must(manager.Inspect(t.Context(), found[0].Number))(t)
	if after != found[0] || manager.Attached() != 0 {
		t.Errorf("touched:\n%+v\n%+v", found[0], after)
	}
}

func TestLosetupDetachesBehindOurBack(t *testing.T) {
	m := realMachine(t)
	manager := m.manager(t)
	d := m.attach(t, manager, "a", whole)
	losetup(t, "-d", d.Path()) // we hold it: cleared, and bound until we leave
	check(t, d.Close())
	check(t, manager.Detach(t.Context(), d.Ref()))
	d = m.attach(t, manager, "a", whole)
	check(t, d.Close())
	losetup(t, "-d", d.Path())
	check(t, manager.WaitUnbound(t.Context(), d.Ref()))
	if manager.Attached() != 0 {
		t.Error("still counted")
	}
}

func TestUnlinkedImageAndBackingPath(t *testing.T) {
	m := realMachine(t)
	manager := m.manager(t)
	d := m.attach(t, manager, "a", whole)
	check(t, os.Remove(filepath.Join(m.dir, "a")))
	fresh := m.image(t, "a") // another inode at the same path (fact 24)
	if found := must(manager.Find(t.Context(), fresh))(t); len(found) != 0 {
		t.Errorf("a new image at an old path looks attached: %+v", found)
	}
	e := must(manager.Attach(t.Context(), fresh, whole))(t)
	if e.Reused() {
		t.Error("and reuses the old device")
	}
	if got := must(manager.Inspect(t.Context(), d.Ref().Number))(t); !strings.HasSuffix(got.BackingPath, " (deleted)") {
		t.Errorf("backing path %q", got.BackingPath)
	}
	m.detach(t, manager, d, e)
}

// The lease has to be right wherever images may lie.
func TestLeaseOnEveryFileSystem(t *testing.T) {
	roottest.Require(t)
	dirs := map[string]string{
		"ext4":  roottest.Pool(t, "ext4", 64<<20),
		"xfs":   roottest.Pool(t, "xfs", 320<<20),
		"btrfs": roottest.Pool(t, "btrfs", 128<<20),
	}
	scratch := t.TempDir()
	mountAt := func(name, fsType, data string) {
		dir := filepath.Join(scratch, name)
		check(t, os.MkdirAll(dir, 0o755))
		if err := unix.Mount(name, dir, fsType, 0, data); err != nil {
			t.Logf("no %s here: %v", fsType, err)
			return
		}
		t.Cleanup(func() { check(t, unix.Unmount(dir, 0)) })
		dirs[name] = dir
	}
	mountAt("tmpfs", "tmpfs", "size=64m")
	for _, d := range []string{"lower", "upper", "work"} {
		check(t, os.Mkdir(filepath.Join(scratch, d), 0o755))
	}
	mountAt("overlay", "overlay", fmt.Sprintf("lowerdir=%[1]s/lower,upperdir=%[1]s/upper,workdir=%[1]s/work", scratch))
	for name, dir := range dirs {
		t.Run(name, func(t *testing.T) {
			m := &machine{kernel: realKernel(t, scratch), dir: dir}
			for _, c := range contract {
				if strings.HasPrefix(c.name, "lease") {
					t.Run(c.name, func(t *testing.T) { leaseIn(t, m, c.test) })
				}
			}
			manager := m.manager(t)
			d := m.attach(t, manager, "a", whole)
			if again := m.attach(t, manager, "a", whole); !again.Reused() {
				t.Error("bound twice")
			} else {
				check(t, again.Close())
			}
			m.detach(t, manager, d)
		})
	}
}

// leaseIn runs a contract case with its temporary files on the machine's directory.
func leaseIn(t *testing.T, m *machine, test func(*testing.T, *machine)) {
	t.Setenv("TMPDIR", m.dir)
	test(t, m)
}

// Who opens an image while the lease is held breaks it: the holder gets SIGIO, whose
// default is to end the process. The Go runtime ignores it.
func TestABrokenLeaseIsHarmless(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a")
	check(t, os.WriteFile(path, nil, 0o600))
	f := must(os.OpenFile(path, os.O_RDWR, 0))(t)
	defer f.Close()
	check(t, withFD(f, func(fd int) error {
		return second(unix.FcntlInt(uintptr(fd), unix.F_SETLEASE, unix.F_WRLCK))
	}))
	_, err := unix.Open(path, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	wantErr(t, "open without waiting", err, unix.EWOULDBLOCK)
	done := make(chan error)
	go func() {
		g, err := os.OpenFile(path, os.O_RDWR, 0)
		done <- errors.Join(err, g.Close())
	}()
	if sole, _ := (hostFiles{}).Sole(f, looking); !sole { // takes it again, and drops it
		t.Log("the lease is being broken")
		check(t, withFD(f, func(fd int) error {
			return second(unix.FcntlInt(uintptr(fd), unix.F_SETLEASE, unix.F_UNLCK))
		}))
	}
	check(t, <-done)
}

// --- two processes

const childVariable = "CSI_LOOP_TEST_CHILD"

// child is the other process: it attaches and detaches until it has done its rounds.
// The variable holds the directory, the number of rounds and a name.
func child() int {
	arg := strings.Split(os.Getenv(childVariable), ",")
	rounds, err := strconv.Atoi(arg[1])
	if err == nil {
		err = childRounds(arg[0], arg[2], rounds)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, arg[2], err)
		return 1
	}
	return 0
}

func childRounds(dir, name string, rounds int) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	manager, err := New(ctx)
	if err != nil {
		return err
	}
	defer manager.Close()
	for range rounds {
		if err := shareImage(ctx, manager, filepath.Join(dir, "shared")); err != nil {
			return err
		}
		f, err := os.OpenFile(filepath.Join(dir, name), os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			return err
		}
		err = f.Truncate(testSize)
		d, aerr := manager.Attach(ctx, f, whole)
		if err = errors.Join(err, aerr, f.Close()); err != nil {
			return err
		}
		if d.Reused() {
			return errors.New("a private image was attached by somebody else")
		}
		if err := errors.Join(d.Close(), manager.Detach(ctx, d.Ref())); err != nil {
			return err
		}
	}
	return nil
}

// shareImage attaches an image that the other process wants, too. Whoever comes
// second may be refused; nobody may get a device of his own beside the other's.
func shareImage(ctx context.Context, manager *Manager, path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	want := whole
	want.Tag = strconv.Itoa(os.Getpid())
	d, err := manager.Attach(ctx, f, want)
	var ce *ConflictError
	if errors.As(err, &ce) || errors.Is(err, ErrBusy) {
		return nil
	} else if err != nil {
		return err
	}
	found, err := manager.Find(ctx, f)
	if err != nil {
		return err
	}
	settled := 0 // a device that its binder has yet to undo is not one
	for _, in := range found {
		if in.Autoclear {
			continue
		}
		settled++
	}
	// flock makes the managers take turns, except for a fast one that bound between
	// our two looks; that one finds us and withdraws.
	if settled > 2 {
		return fmt.Errorf("%d writable devices over one image: %+v", settled, found)
	}
	if err := writeAlone(d, want.Tag); err != nil {
		return err
	}
	return errors.Join(d.Close(), manager.Detach(ctx, d.Ref()))
}

// writeAlone fails if somebody else writes to the image meanwhile.
func writeAlone(d *Device, tag string) error {
	node, err := os.OpenFile(d.Path(), os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		return err
	}
	defer node.Close()
	buf, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return err
	}
	defer unix.Munmap(buf)
	for range 5 {
		copy(buf, tag)
		if _, err := node.WriteAt(buf, 0); err != nil {
			return err
		}
		clear(buf)
		if _, err := node.ReadAt(buf, 0); err != nil {
			return err
		}
		if !bytes.HasPrefix(buf, []byte(tag)) {
			return fmt.Errorf("another process wrote %q over %q", buf[:16], tag)
		}
	}
	return nil
}

func TestTwoProcesses(t *testing.T) {
	m := realMachine(t)
	check(t, m.image(t, "shared").Close())
	rounds := 30
	if testing.Short() {
		rounds = 5
	}
	self, err := os.Executable()
	check(t, err)
	inParallel(t, 3, func(i int) error {
		cmd := exec.Command(self)
		cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%s,%d,child-%d", childVariable, m.dir, rounds, i))
		out, err := cmd.CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
}

// A process that dies without a word leaves nothing if the mapping is autoclear.
func TestAutoclearSurvivesNoCrash(t *testing.T) {
	m := realMachine(t)
	manager := m.manager(t)
	want := whole
	want.Autoclear = true
	d := m.attach(t, manager, "a", want)
	// What the kernel does at exit is close the descriptor.
	check(t, unix.Close(int(d.handle.(*patient).handle.(linuxHandle))))
	check(t, manager.WaitUnbound(t.Context(), d.Ref()))
	d.handle = nil
	if _, err := manager.Hold(t.Context(), d.Ref()); !errors.Is(err, ErrNotBound) {
		t.Errorf("hold: %v", err)
	}
}
