package loop

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

var whole = Mapping{BlockSize: 4096, Tag: "csi-loop test"}

// attach attaches a newly opened image and expects success.
func (m *machine) attach(t testing.TB, manager *Manager, name string, want Mapping) *Device {
	t.Helper()
	f := m.image(t, name)
	d, err := manager.Attach(t.Context(), f, want)
	check(t, err)
	check(t, f.Close())
	return d
}

// detach closes and detaches, and expects the binding gone.
func (m *machine) detach(t testing.TB, manager *Manager, devices ...*Device) {
	t.Helper()
	for _, d := range devices {
		check(t, d.Close())
	}
	for _, d := range devices {
		check(t, manager.Detach(t.Context(), d.Ref()))
		if got, err := manager.Inspect(t.Context(), d.Ref().Number); err == nil && got.Ref == d.Ref() {
			t.Errorf("%v is still bound after Detach", d.Ref())
		}
	}
}

func TestAttachAndDetach(t *testing.T) {
	onEveryMachine(t, func(t *testing.T, m *machine) {
		manager := m.manager(t)
		f := m.image(t, "a")
		for _, c := range []struct {
			name string
			Mapping
			size int64
		}{
			{"whole", Mapping{BlockSize: 4096}, testSize},
			{"read-only", Mapping{BlockSize: 512, ReadOnly: true}, testSize},
			{"range", Mapping{BlockSize: 512, Offset: 512, SizeLimit: 1024}, 1024},
			{"to the end", Mapping{BlockSize: 1024, Offset: 1 << 20}, testSize - 1<<20},
			{"limit to the end", Mapping{BlockSize: 2048, Offset: testSize - 4096, SizeLimit: 4096}, 4096},
			{"with all flags", Mapping{BlockSize: 4096, Autoclear: true, Discard: true, Tag: "t"}, testSize},
		} {
			d, err := manager.Attach(t.Context(), f, c.Mapping)
			if err != nil {
				t.Fatalf("%s: %v", c.name, err)
			}
			want := Info{
				Ref: d.Ref(), State: Bound, Path: d.Path(), Image: must(FileIDOf(f))(t), BackingPath: f.Name(),
				Offset: c.Offset, SizeLimit: c.SizeLimit, Size: c.size, BlockSize: c.BlockSize,
				ReadOnly: c.ReadOnly, Autoclear: c.Autoclear, Discard: c.Discard, Tag: c.Tag,
			}
			check(t, second(fmt.Sscanf(must(m.Attr(d.Ref().Number, attrDev))(t), "%d:%d", &want.Major, &want.Minor)))
			if diff := cmp.Diff(want, d.Info()); diff != "" {
				t.Errorf("%s: -want +got\n%s", c.name, diff)
			}
			if diff := cmp.Diff(want, must(manager.Inspect(t.Context(), d.Ref().Number))(t)); diff != "" {
				t.Errorf("%s: Inspect: -want +got\n%s", c.name, diff)
			}
			if d.Reused() || d.Size() != c.size || manager.Attached() != 1 {
				t.Errorf("%s: reused %v, size %d, attached %d", c.name, d.Reused(), d.Size(), manager.Attached())
			}
			m.detach(t, manager, d)
			check(t, d.Close()) // twice is once
			check(t, manager.Detach(t.Context(), d.Ref()))
			if manager.Attached() != 0 {
				t.Errorf("%s: %d attached after Detach", c.name, manager.Attached())
			}
		}
	})
}

func TestBadRequestsTouchNothing(t *testing.T) {
	for _, g := range generations {
		m := fakeMachine(t, g)
		manager := m.manager(t)
		f := m.image(t, "a")
		readOnly := m.reopen(t, "a", os.O_RDONLY)
		dir, err := os.Open(m.dir)
		check(t, err)
		defer dir.Close()
		before := m.fake.count("Configure") + m.fake.count("GetFree")
		for _, c := range []struct {
			name  string
			file  *os.File
			edit  func(*Mapping)
			field string
		}{
			{"no block size", f, func(m *Mapping) { m.BlockSize = 0 }, "BlockSize"},
			{"beyond the file", f, func(m *Mapping) { m.SizeLimit = testSize + 4096 }, "SizeLimit"},
			{"writable over a read-only file", readOnly, func(*Mapping) {}, "ReadOnly"},
			{"a directory", dir, func(m *Mapping) { m.ReadOnly = true }, "backing"},
		} {
			want := whole
			c.edit(&want)
			_, err := manager.Attach(t.Context(), c.file, want)
			var me *MappingError
			if !errors.As(err, &me) || me.Field != c.field {
				t.Errorf("%s: %v", c.name, err)
			}
		}
		closed := m.image(t, "b")
		check(t, closed.Close())
		_, err = manager.Attach(t.Context(), closed, whole)
		if err == nil {
			t.Error("a closed file is taken")
		}
		if after := m.fake.count("Configure") + m.fake.count("GetFree"); after != before {
			t.Errorf("%d calls for loop devices", after-before)
		}
	}
}

func TestReuseConflictAndNeighbours(t *testing.T) {
	onEveryMachine(t, func(t *testing.T, m *machine) {
		manager := m.manager(t)
		low := Mapping{BlockSize: 4096, SizeLimit: 1 << 20, Tag: "t"}
		a := m.attach(t, manager, "a", low)

		again := m.attach(t, manager, "a", low)
		if !again.Reused() || again.Ref() != a.Ref() {
			t.Errorf("an equal mapping got %v, reused %v; want %v", again.Ref(), again.Reused(), a.Ref())
		}
		high := low
		high.Offset = 1 << 20
		b := m.attach(t, manager, "a", high)
		if b.Reused() || b.Ref() == a.Ref() {
			t.Error("an adjacent range is not a device of its own")
		}
		for field, edit := range map[string]func(*Mapping){
			"Offset":    func(m *Mapping) { m.Offset = 4096 },
			"SizeLimit": func(m *Mapping) { m.SizeLimit = 8192 },
			"BlockSize": func(m *Mapping) { m.BlockSize = 512 },
			"Autoclear": func(m *Mapping) { m.Autoclear = true },
			"Tag":       func(m *Mapping) { m.Tag = "other" },
		} {
			want := low
			edit(&want)
			_, err := manager.Attach(t.Context(), m.image(t, "a"), want)
			var ce *ConflictError
			if !errors.As(err, &ce) || ce.Field != field {
				t.Errorf("%s differs: error %v", field, err)
			}
		}
		ro := Mapping{BlockSize: 4096, ReadOnly: true}
		c := m.attach(t, manager, "a", ro)
		if c.Reused() || !c.Info().ReadOnly {
			t.Errorf("a read-only mapping beside writable ones: %+v", c.Info())
		}
		c2 := m.attach(t, manager, "a", ro)
		if !c2.Reused() {
			t.Error("an equal read-only mapping is not reused")
		}
		ro.BlockSize = 512
		c3 := m.attach(t, manager, "a", ro)
		if c3.Reused() {
			t.Error("a read-only mapping with another block size is reused")
		}
		found := must(manager.Find(t.Context(), m.image(t, "a")))(t)
		if len(found) != 4 {
			t.Errorf("Find gives %d devices, want 4: %+v", len(found), found)
		}
		check(t, errors.Join(again.Close(), c2.Close()))
		m.detach(t, manager, a, b, c, c3)
		if found := must(manager.Find(t.Context(), m.image(t, "a")))(t); len(found) != 0 {
			t.Errorf("Find after all: %+v", found)
		}
	})
}

func TestOneOpenFileAttachedByTwoManagers(t *testing.T) {
	onEveryMachine(t, func(t *testing.T, m *machine) {
		one, two := m.manager(t), m.manager(t)
		f := m.image(t, "a")
		a := must(one.Attach(t.Context(), f, whole))(t)
		b := must(two.Attach(t.Context(), f, whole))(t) // the lease would be granted
		if a.Ref() != b.Ref() || !b.Reused() {
			t.Errorf("bound twice: %v and %v", a.Ref(), b.Ref())
		}
		check(t, b.Close())
		m.detach(t, one, a)
		c := must(two.Attach(t.Context(), f, whole))(t) // marked: slow, but works
		m.detach(t, two, c)
	})
}

func TestAutoclearIsHeldByTheDevice(t *testing.T) {
	onEveryMachine(t, func(t *testing.T, m *machine) {
		manager := m.manager(t)
		want := whole
		want.Autoclear = true
		d := m.attach(t, manager, "a", want)
		again := m.attach(t, manager, "a", want)
		if !again.Reused() {
			t.Error("a held autoclear device is not reused")
		}
		check(t, d.Close())
		if got := must(manager.Inspect(t.Context(), d.Ref().Number))(t); got.Ref != d.Ref() || got.State != Bound {
			t.Errorf("still held by the other Device: %+v", got)
		}
		check(t, again.Close())
		check(t, manager.WaitUnbound(t.Context(), d.Ref()))
		if manager.Attached() != 0 {
			t.Error("still counted")
		}
	})
}

func TestStateOfAutoclearDevices(t *testing.T) {
	onEveryMachine(t, func(t *testing.T, m *machine) {
		manager := m.manager(t, impatient())
		want := whole
		want.Autoclear = true
		d := m.attach(t, manager, "a", want)
		n := d.Ref().Number
		release := m.claim(t, n) // mounted
		check(t, d.Close())
		if got := must(manager.Inspect(t.Context(), n))(t); got.State != Bound {
			t.Errorf("claimed: %v", got.State)
		}
		restarted := m.manager(t)
		mounted := m.attach(t, restarted, "a", want)
		if !mounted.Reused() {
			t.Error("a mounted device is not reused after a restart")
		}
		check(t, mounted.Close())

		stray := must(m.node(n, forReading))(t)
		release() // unmounted, and somebody still reads
		if got := must(manager.Inspect(t.Context(), n))(t); got.State != Rundown {
			t.Errorf("neither claimed nor held: %v", got.State)
		}
		_, err := manager.Attach(t.Context(), m.image(t, "a"), want)
		wantErr(t, "attach over a device in rundown", err, ErrBusy)
		wantErr(t, "wait", manager.WaitUnbound(t.Context(), d.Ref()), ErrBusy)
		check(t, stray.Close())
		check(t, manager.WaitUnbound(t.Context(), d.Ref()))
	})
}

func TestDetachOfABusyDevice(t *testing.T) {
	onEveryMachine(t, func(t *testing.T, m *machine) {
		manager := m.manager(t, impatient())
		d := m.attach(t, manager, "a", whole)
		wantErr(t, "detach while we hold it", manager.Detach(t.Context(), d.Ref()), ErrBusy)
		if got := must(manager.Inspect(t.Context(), d.Ref().Number))(t); got.Autoclear {
			t.Error("it was cleared while we hold it")
		}
		opener := must(m.node(d.Ref().Number, forReading))(t)
		check(t, d.Close())
		wantErr(t, "detach in use", manager.Detach(t.Context(), d.Ref()), ErrBusy)
		if got := must(manager.Inspect(t.Context(), d.Ref().Number))(t); got.State != Rundown || got.Ref != d.Ref() {
			t.Errorf("in use after Detach: %+v", got)
		}
		if manager.Attached() != 1 {
			t.Error("a busy device is not counted")
		}
		_, err := manager.Attach(t.Context(), m.image(t, "a"), whole)
		wantErr(t, "attach over rundown", err, ErrBusy)
		other := whole
		other.SizeLimit = 4096
		_, err = manager.Attach(t.Context(), m.image(t, "a"), other)
		wantErr(t, "attach another range over rundown", err, ErrBusy)
		wantErr(t, "detach again", manager.Detach(t.Context(), d.Ref()), ErrBusy)
		check(t, opener.Close())
		check(t, manager.Detach(t.Context(), d.Ref()))
		m.detach(t, manager, m.attach(t, manager, "a", whole))
	})
}

func TestDetachEndsWithItsContext(t *testing.T) {
	m := fakeMachine(t, generations[0])
	manager := m.manager(t)
	d := m.attach(t, manager, "a", whole)
	opener := must(m.node(d.Ref().Number, forReading))(t)
	check(t, d.Close())
	ctx, cancel := contextWithCancelOn(t, m.fake, "Clear")
	defer cancel()
	err := manager.Detach(ctx, d.Ref())
	wantErr(t, "detach", err, ErrBusy)
	wantErr(t, "detach", err, ctx.Err())
	check(t, opener.Close())
	check(t, manager.WaitUnbound(t.Context(), d.Ref()))
}

func TestHoldAfterARestart(t *testing.T) {
	onEveryMachine(t, func(t *testing.T, m *machine) {
		first := m.manager(t)
		d := m.attach(t, first, "a", whole)
		ref := d.Ref()
		check(t, errors.Join(d.Close(), first.Close()))

		second := m.manager(t)
		var found []Info
		all, _, err := second.Survey(t.Context())
		check(t, err)
		for _, in := range all {
			if in.Ref == ref {
				found = append(found, in)
			}
		}
		if diff := cmp.Diff([]Info{d.Info()}, found); diff != "" {
			t.Errorf("Survey: -want +got\n%s", diff)
		}
		held := must(second.Hold(t.Context(), ref))(t)
		if !held.Reused() || second.Attached() != 1 {
			t.Errorf("reused %v, attached %d", held.Reused(), second.Attached())
		}
		m.detach(t, second, held)
		_, err = second.Hold(t.Context(), ref)
		wantErr(t, "hold a stale ref", err, ErrNotBound)
		_, err = second.Grow(t.Context(), ref)
		wantErr(t, "grow a stale ref", err, ErrNotBound)

		// The number is bound anew: the old ref must not reach the new binding.
		d = m.attach(t, second, "b", whole)
		stale := Ref{d.Ref().Number, ref.DiskSeq}
		check(t, second.Detach(t.Context(), stale))
		check(t, second.WaitUnbound(t.Context(), stale))
		if got := must(second.Inspect(t.Context(), stale.Number))(t); got.Ref != d.Ref() || got.Autoclear {
			t.Errorf("a stale ref reached %+v", got)
		}
		m.detach(t, second, d)
		check(t, second.Detach(t.Context(), Ref{1<<20 - 1, 1})) // never was
	})
}

func TestLimit(t *testing.T) {
	onEveryMachine(t, func(t *testing.T, m *machine) {
		manager := m.manager(t, WithMax(2))
		if manager.Limit() != 2 {
			t.Errorf("Limit = %d", manager.Limit())
		}
		auto := whole
		auto.Autoclear = true
		a, b := m.attach(t, manager, "a", auto), m.attach(t, manager, "b", whole)
		_, err := manager.Attach(t.Context(), m.image(t, "c"), whole)
		wantErr(t, "a third", err, ErrLimit)
		again := m.attach(t, manager, "b", whole) // no further device
		check(t, again.Close())
		check(t, a.Close()) // the kernel frees it; nobody tells the manager
		// A passer-by may have it open for a moment.
		check(t, m.manager(t, WithRetry(Retry{Settle: time.Minute})).WaitUnbound(t.Context(), a.Ref()))
		c := m.attach(t, manager, "c", whole)
		_, err = manager.Attach(t.Context(), m.image(t, "a"), whole)
		wantErr(t, "a third again", err, ErrLimit)
		m.detach(t, manager, b, c)
		m.detach(t, manager, m.attach(t, manager, "a", whole))
	})
}

func TestDiscardAfterMaskedNumberIsRecycled(t *testing.T) {
	onEveryMachine(t, func(t *testing.T, m *machine) {
		manager := m.manager(t)
		thin := whole
		thin.Discard = true
		if d := m.attach(t, manager, "probe", thin); !d.Info().Discard {
			m.detach(t, manager, d)
			t.Skip("the file system below cannot punch holes")
		} else {
			m.detach(t, manager, d)
		}
		for range 3 {
			d := m.attach(t, manager, "a", whole)
			if d.Info().Discard {
				t.Error("thick, and discard is not masked")
			}
			m.detach(t, manager, d)
			d = m.attach(t, manager, "a", thin)
			if !d.Info().Discard {
				t.Error("thin, and discard is masked")
			}
			m.detach(t, manager, d)
		}
	})
}

func TestDiscardWhereTheFileSystemHasNone(t *testing.T) {
	m := fakeMachine(t, generations[0])
	m.fake.noDiscard = true
	manager := m.manager(t)
	thin := whole
	thin.Discard = true
	d := m.attach(t, manager, "a", thin)
	if d.Info().Discard {
		t.Error("discard from nowhere")
	}
	m.detach(t, manager, d)
}

// Linux 5.16 to 5.18: the mask is taken, read back, and heeded by nobody.
func TestKernelThatDiscardsThroughTheMask(t *testing.T) {
	m := fakeMachine(t, generation{clearAtOnce: true, maskResets: true, maskRevocable: true, maskIsWord: true})
	manager := m.manager(t)
	_, err := manager.Attach(t.Context(), m.image(t, "a"), whole)
	wantErr(t, "an image that is to keep its blocks", err, ErrDiscard)
	if b := m.fake.bound(); len(b) != 0 {
		t.Errorf("left bound: %v", b)
	}
	thin, reading := whole, whole
	thin.Discard, reading.ReadOnly = true, true
	m.detach(t, manager, m.attach(t, manager, "a", thin))
	m.detach(t, manager, m.attach(t, manager, "a", reading))
}

func TestDirectIOOnTheFake(t *testing.T) {
	m := fakeMachine(t, generations[0])
	manager := m.manager(t)
	for _, dropped := range []bool{false, true} {
		m.fake.noDirectIO = dropped
		for _, dio := range []DirectIO{DirectIOOff, DirectIOAuto, DirectIOOn} {
			want := whole
			want.DirectIO = dio
			d, err := manager.Attach(t.Context(), m.image(t, "a"), want)
			if dropped && dio == DirectIOOn {
				wantErr(t, "direct I/O required", err, ErrDirectIO)
				if b := m.fake.bound(); len(b) != 0 {
					t.Errorf("left bound: %v", b)
				}
				continue
			}
			check(t, err)
			if got := d.Info().DirectIO; got != (dio != DirectIOOff && !dropped) {
				t.Errorf("asked %v, dropped %v: direct %v", dio, dropped, got)
			}
			m.detach(t, manager, d)
		}
	}
}

func TestGrow(t *testing.T) {
	onEveryMachine(t, func(t *testing.T, m *machine) {
		manager := m.manager(t)
		d := m.attach(t, manager, "a", whole)
		check(t, os.Truncate(filepath.Join(m.dir, "a"), 2*testSize))
		if size, err := manager.Grow(t.Context(), d.Ref()); err != nil || size != 2*testSize {
			t.Errorf("Grow = %d, %v", size, err)
		}
		if d.Size() != 2*testSize {
			t.Errorf("Size = %d", d.Size())
		}
		// Grown by somebody who died before he told the device: reused as it is.
		check(t, os.Truncate(filepath.Join(m.dir, "a"), 3*testSize))
		again := m.attach(t, manager, "a", whole)
		if !again.Reused() || again.Info().Size != 2*testSize {
			t.Errorf("reused %v with size %d", again.Reused(), again.Info().Size)
		}
		check(t, again.Close())
		m.detach(t, manager, d)
	})
}

func TestReadAhead(t *testing.T) {
	onEveryMachine(t, func(t *testing.T, m *machine) {
		manager := m.manager(t)
		d := m.attach(t, manager, "a", whole)
		before := must(manager.ReadAhead(t.Context(), d.Ref()))(t)
		if before <= 0 {
			t.Errorf("%d bytes before", before)
		}
		for _, want := range []int64{0, 64 << 10, 1 << 20, 1 << 20, before} {
			check(t, manager.SetReadAhead(t.Context(), d.Ref(), want))
			if got := must(manager.ReadAhead(t.Context(), d.Ref()))(t); got != want {
				t.Errorf("set %d, got %d", want, got)
			}
			if got := must(m.Attr(d.Ref().Number, attrReadAhead))(t); got != strconv.FormatInt(want>>10, 10) {
				t.Errorf("the kernel says %s KiB, want %d bytes", got, want)
			}
		}
		gone := d.Ref()
		m.detach(t, manager, d)
		wantErr(t, "set of a binding that is gone", manager.SetReadAhead(t.Context(), gone, 0), ErrNotBound)
		_, err := manager.ReadAhead(t.Context(), gone)
		wantErr(t, "get of a binding that is gone", err, ErrNotBound)
	})
}

func TestRemove(t *testing.T) {
	onEveryMachine(t, func(t *testing.T, m *machine) {
		manager := m.manager(t, WithRetry(Retry{Attempts: 3}))
		d := m.attach(t, manager, "a", whole)
		var te *TransitionError
		if err := manager.Remove(t.Context(), d.Ref().Number); !errors.As(err, &te) || te.From != Bound {
			t.Errorf("remove a bound device: %v", err)
		}
		m.detach(t, manager, d)

		// A high number: others are given the lowest.
		n := must(m.Add(30000 + os.Getpid()%10000))(t)
		opener := must(m.node(n, forReading))(t)
		wantErr(t, "remove an open device", manager.Remove(t.Context(), n), ErrBusy)
		check(t, opener.Close())
		check(t, manager.Remove(t.Context(), n))
		_, err := manager.Inspect(t.Context(), n)
		wantErr(t, "inspect a removed device", err, ErrNotExist)
		check(t, manager.Remove(t.Context(), n))
	})
}

func TestPrivateDev(t *testing.T) {
	onEveryMachine(t, func(t *testing.T, m *machine) {
		dev, nodes := filepath.Join(t.TempDir(), "dev"), filepath.Join(m.dir, "nodes")
		check(t, os.Mkdir(dev, 0o755))
		var manager *Manager
		if m.fake != nil {
			m.fake.mu.Lock()
			m.fake.privateDev = true
			clear(m.fake.nodes)
			m.fake.mu.Unlock()
			manager = m.manager(t, WithDev(dev), WithNodeDir(nodes))
		} else {
			manager = must(New(t.Context(), WithDev(dev), WithNodeDir(nodes)))(t)
			t.Cleanup(func() { _ = manager.Close() })
		}
		d := m.attach(t, manager, "a", whole)
		if filepath.Dir(d.Path()) != nodes {
			t.Errorf("path %s is not in %s", d.Path(), nodes)
		}
		found := must(manager.Find(t.Context(), m.image(t, "a")))(t)
		if len(found) != 1 || found[0].Path != d.Path() {
			t.Errorf("Find = %+v", found)
		}
		m.detach(t, manager, d)
	})
}

func TestNewOnAKernelThatLacksSomething(t *testing.T) {
	for name, lack := range map[string]func(*fake){
		"LOOP_CONFIGURE": func(k *fake) { k.noConfigure = true },
		"diskseq":        func(k *fake) { k.noDiskSeq = true },
		"sysfs": func(k *fake) {
			k.before = func(call string) error {
				if call == "Numbers" {
					return syscall.ENOENT
				}
				return nil
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			m := fakeMachine(t, generations[0])
			lack(m.fake)
			_, err := New(t.Context(), withKernel(m.kernel))
			wantErr(t, "New", err, ErrUnsupported)
			t.Log(err)
		})
	}
	_, err := New(t.Context(), WithDev(t.TempDir()), WithSysfs(t.TempDir()))
	wantErr(t, "no loop driver", err, ErrUnsupported)
	t.Log(err)
}

func TestStatusIsOfOneBinding(t *testing.T) {
	onEveryMachine(t, func(t *testing.T, m *machine) {
		manager := m.manager(t)
		d := m.attach(t, manager, "a", whole)
		in := must(manager.Status(t.Context(), d.Ref()))(t)
		if diff := cmp.Diff(d.Info(), in); diff != "" {
			t.Errorf("-attached +status\n%s", diff)
		}
		if id := must(m.Attr(in.Number, attrDev))(t); id != fmt.Sprintf("%d:%d", in.Major, in.Minor) {
			t.Errorf("numbers %d:%d, sysfs says %s", in.Major, in.Minor, id)
		}
		m.detach(t, manager, d)
		_, err := manager.Status(t.Context(), d.Ref())
		wantErr(t, "stale", err, ErrNotBound)
	})
}
