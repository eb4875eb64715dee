package loop

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

// machine is a kernel to test on: one of the fakes, or the running one.
type machine struct {
	kernel
	fake *fake // nil on the running kernel
	dir  string
}

// onEveryMachine runs the test on each fake, in a bubble of virtual time, and as
// root on the running kernel.
func onEveryMachine(t *testing.T, test func(*testing.T, *machine)) {
	for _, g := range generations {
		t.Run("fake "+g.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { test(t, fakeMachine(t, g)) })
		})
	}
	t.Run("kernel", func(t *testing.T) { test(t, realMachine(t)) })
}

func fakeMachine(t testing.TB, g generation) *machine {
	dir := t.TempDir()
	k := newFake(t, g)
	return &machine{kernel: k, fake: k, dir: dir}
}

func realMachine(t testing.TB) *machine {
	roottest.Require(t)
	dir := t.TempDir()
	k := realKernel(t, dir)
	t.Cleanup(func() { roottest.WaitUnbound(t, dir) }) // a passer-by on this kernel may be the last to close
	return &machine{kernel: k, dir: dir}
}

func realKernel(t testing.TB, dir string) kernel {
	t.Helper()
	k, err := newKernel("/dev", "/sys", filepath.Join(dir, "nodes"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = k.Close() })
	return k
}

// impatient is for tests in which a device is busy and stays so.
func impatient() Option { return WithRetry(Retry{Settle: 200 * time.Millisecond}) }

// manager makes a manager.
func (m *machine) manager(t testing.TB, opts ...Option) *Manager {
	t.Helper()
	k := m.kernel
	if m.fake == nil {
		k = realKernel(t, m.dir)
	}
	manager, err := New(t.Context(), append([]Option{withKernel(k)}, opts...)...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = manager.Close() })
	return manager
}

const testSize = 4 << 20

// image makes a file and opens it for reading and writing, once more each call with
// the same name.
func (m *machine) image(t testing.TB, name string) *os.File {
	t.Helper()
	path := filepath.Join(m.dir, name)
	if _, err := os.Stat(path); errors.Is(err, os.ErrNotExist) {
		f, err := os.Create(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(f.Truncate(testSize), f.Close()); err != nil {
			t.Fatal(err)
		}
	}
	return m.reopen(t, name, os.O_RDWR)
}

func (m *machine) reopen(t testing.TB, name string, flags int) *os.File {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(m.dir, name), flags, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}

// node opens a device by its number.
func (m *machine) node(number int, how access) (handle, error) {
	id, err := m.Attr(number, attrDev)
	if err != nil {
		return nil, err
	}
	return m.Open("/dev/loop"+strconv.Itoa(number), id, how)
}

// bind binds any free device as config says; others on this kernel may be faster.
func (m *machine) bind(t testing.TB, c config, how access) (int, handle) {
	t.Helper()
	for range 200 {
		n, err := m.GetFree()
		if err != nil {
			t.Fatal(err)
		}
		h, err := m.node(n, how)
		if err != nil {
			continue
		}
		err = h.Configure(c)
		if err == nil {
			return n, h
		}
		_ = h.Close()
		if !errors.Is(err, syscall.EBUSY) {
			t.Fatal(err)
		}
	}
	t.Fatal("found no free device")
	return 0, nil
}

// claim is a mount to the device: an exclusive opener.
func (m *machine) claim(t testing.TB, number int) (release func()) {
	t.Helper()
	h, err := m.node(number, forClaim)
	if err != nil {
		t.Fatal(err)
	}
	return func() { _ = h.Close() }
}

// must is for must(call())(t): the call's result, or the end of the test.
func must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		check(t, err)
		return v
	}
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantErr(t testing.TB, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: error %v, want %v", what, err, want)
	}
}

// onEveryMachineFake is onEveryMachine without the running kernel.
func onEveryMachineFake(t *testing.T, test func(*testing.T, *machine)) {
	for _, g := range generations {
		t.Run("fake "+g.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { test(t, fakeMachine(t, g)) })
		})
	}
}
