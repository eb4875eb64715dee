package loop

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
)

// once runs do before the given call happens for the n-th time from now.
func (k *fake) once(call string, n int, do func()) {
	var seen, busy atomic.Int32
	k.before = func(c string) error {
		if c == call && busy.Load() == 0 && seen.Add(1) == int32(n) {
			busy.Store(1) // what do itself calls does not count
			do()
			busy.Store(0)
		}
		return nil
	}
}

func contextWithCancelOn(t testing.TB, k *fake, call string) (context.Context, func()) {
	ctx, cancel := context.WithCancel(t.Context())
	k.once(call, 1, cancel)
	return ctx, cancel
}

func onFakes(t *testing.T, test func(*testing.T, *machine)) {
	for _, g := range generations {
		t.Run(g.name, func(t *testing.T) { test(t, fakeMachine(t, g)) })
	}
}

func TestTheFastPathLooksAtNoOtherDevice(t *testing.T) {
	m := fakeMachine(t, generations[0])
	manager := m.manager(t)
	before := m.fake.count("Numbers") + m.fake.count("Lock")
	d := m.attach(t, manager, "a", whole)
	m.detach(t, manager, d)
	if found := must(manager.Find(t.Context(), m.image(t, "a")))(t); len(found) != 0 {
		t.Errorf("found %+v", found)
	}
	if after := m.fake.count("Numbers") + m.fake.count("Lock"); after != before {
		t.Error("the devices were listed, or the image locked")
	}
}

func TestAnotherBindsTheNumberBetweenGetFreeAndConfigure(t *testing.T) {
	onFakes(t, func(t *testing.T, m *machine) {
		manager := m.manager(t)
		foreign := m.image(t, "foreign")
		var n int
		var h handle
		m.fake.once("Configure", 1, func() { n, h = m.bind(t, config{File: foreign, BlockSize: 512}, forWriting) })
		d := m.attach(t, manager, "a", whole)
		if d.Ref().Number == n {
			t.Errorf("loop%d is bound twice", n)
		}
		if st, err := h.Status(); err != nil || st.Flags&flagAutoclear != 0 {
			t.Errorf("the foreign device was touched: %+v, %v", st, err)
		}
		m.detach(t, manager, d)
		m.release(t, n, h)
	})
}

func TestTheLowestNumberIsClaimedAndNeverBound(t *testing.T) {
	onEveryMachineFake(t, func(t *testing.T, m *machine) {
		manager := m.manager(t)
		release := m.claim(t, 0)
		a := m.attach(t, manager, "a", whole)
		b := m.attach(t, manager, "b", whole)
		m.detach(t, manager, a, b)
		release()
	})
}

func TestAnotherClearsTheNumberAfterTheBind(t *testing.T) {
	onEveryMachineFake(t, func(t *testing.T, m *machine) {
		manager := m.manager(t)
		m.fake.once("Status", 1, func() {
			h := must(m.node(m.fake.bound()[0], forReading))(t)
			check(t, errors.Join(h.Clear(), h.Close()))
		})
		before := m.fake.count("Configure")
		d := m.attach(t, manager, "a", whole)
		if n := m.fake.count("Configure") - before; n != 2 {
			t.Errorf("bound %d times, want a second try", n)
		}
		if d.Info().Autoclear || d.Reused() {
			t.Errorf("got %+v", d.Info())
		}
		m.detach(t, manager, d)
	})
}

func TestTheNumberIsRemovedBetweenGetFreeAndOpen(t *testing.T) {
	onFakes(t, func(t *testing.T, m *machine) {
		manager := m.manager(t)
		m.fake.once("Attr "+attrDev, 1, func() { check(t, m.Remove(0)) })
		d := m.attach(t, manager, "a", whole)
		m.detach(t, manager, d)
	})
}

// A program that knows nothing of our lock binds the image while we do.
func TestAnotherBindsTheImageMeanwhile(t *testing.T) {
	onFakes(t, func(t *testing.T, m *machine) {
		for _, at := range []string{"GetFree", "Configure", "DiskSeq", "Geometry"} {
			manager := m.manager(t)
			var n int
			var h handle
			m.image(t, "a") // made before the hook runs
			m.fake.once(at, 1, func() {
				f := m.reopen(t, "a", os.O_RDWR)
				n, h = m.bind(t, config{File: f, BlockSize: 512}, forWriting)
				check(t, f.Close())
			})
			_, err := manager.Attach(t.Context(), m.image(t, "a"), whole)
			var ce *ConflictError
			if !errors.As(err, &ce) || ce.Ref.Number != n {
				t.Errorf("at %s: error %v, want a conflict with loop%d", at, err, n)
			}
			if b := m.fake.bound(); !slices.Equal(b, []int{n}) {
				t.Errorf("at %s: bound %v, want only the foreign loop%d", at, b, n)
			}
			m.release(t, n, h)
		}
	})
}

func TestAPassingOpenerDelaysTheUndoing(t *testing.T) {
	onEveryMachineFake(t, func(t *testing.T, m *machine) {
		manager := m.manager(t)
		m.fake.noDirectIO = true
		var udev handle
		m.fake.once("Geometry", 1, func() {
			udev = must(m.node(m.fake.bound()[0], forReading))(t)
			// It leaves while we wait.
			m.fake.once("Attr "+attrDiskSeq, 3, func() { check(t, udev.Close()) })
		})
		want := whole
		want.DirectIO = DirectIOOn
		_, err := manager.Attach(t.Context(), m.image(t, "a"), want)
		wantErr(t, "attach", err, ErrDirectIO)
		if b := m.fake.bound(); len(b) != 0 {
			t.Errorf("left bound: %v", b)
		}
	})
}

func TestInterruptedConfigure(t *testing.T) {
	for _, bound := range []bool{false, true} {
		t.Run(fmt.Sprintf("bound %v", bound), func(t *testing.T) {
			onFakes(t, func(t *testing.T, m *machine) {
				manager := m.manager(t)
				var done atomic.Bool
				interrupt := func(call string) error {
					if call == "Configure" && done.CompareAndSwap(false, true) {
						return syscall.EINTR
					}
					return nil
				}
				if bound {
					m.fake.after = func(call string, err error) error { return errors.Join(err, interrupt(call)) }
				} else {
					m.fake.before = interrupt
				}
				d := m.attach(t, manager, "a", whole)
				if b := m.fake.bound(); len(b) != 1 {
					t.Errorf("bound: %v", b)
				}
				m.detach(t, manager, d)
			})
		})
	}
}

func TestLosetupClearsBehindOurBack(t *testing.T) {
	onEveryMachine(t, func(t *testing.T, m *machine) {
		manager := m.manager(t)
		d := m.attach(t, manager, "a", whole)
		check(t, d.Close())
		h := must(m.node(d.Ref().Number, forReading))(t)
		check(t, errors.Join(h.Clear(), h.Close()))
		check(t, manager.Detach(t.Context(), d.Ref()))
		_, err := manager.Hold(t.Context(), d.Ref())
		wantErr(t, "hold", err, ErrNotBound)
		if manager.Attached() != 0 {
			t.Error("still counted")
		}
		m.detach(t, manager, m.attach(t, manager, "a", whole))
	})
}

// Every system call of every operation fails once: after an error nothing of ours
// stays bound and no handle stays open, and what succeeds did so in spite of it.
func TestEveryCallFailsOnce(t *testing.T) {
	thin := whole
	thin.Discard = true
	auto := whole
	auto.Autoclear = true
	scenarios := []struct {
		name    string
		mapping Mapping
		prepare func(t *testing.T, m *machine)
	}{
		{"alone", whole, func(*testing.T, *machine) {}},
		{"autoclear", auto, func(*testing.T, *machine) {}},
		{"the image is open elsewhere", whole, func(t *testing.T, m *machine) { m.image(t, "a") }},
		{"a masked number is recycled", thin, func(t *testing.T, m *machine) {
			manager := m.manager(t)
			m.detach(t, manager, m.attach(t, manager, "b", whole))
		}},
		{"private dev", whole, func(_ *testing.T, m *machine) { m.fake.privateDev = true; clear(m.fake.nodes) }},
	}
	for _, s := range scenarios {
		for _, errno := range []syscall.Errno{syscall.EIO, syscall.ENXIO, syscall.ENOENT, syscall.EBUSY} {
			t.Run(s.name+"/"+errno.Error(), func(t *testing.T) {
				onEveryMachineFake(t, func(t *testing.T, m *machine) {
					failures := 0
					for n := 1; ; n++ {
						s.prepare(t, m)
						fired := m.faultyCycle(t, s.mapping, n, errno, &failures)
						if !fired {
							break
						}
					}
					if failures == 0 && errno == syscall.EIO {
						t.Error("no fault made Attach fail: the test tests nothing")
					}
				})
			})
		}
	}
}

// faultyCycle attaches and detaches with the n-th call failing. It returns false if
// there were fewer calls.
func (m *machine) faultyCycle(t *testing.T, want Mapping, n int, errno error, failures *int) (fired bool) {
	t.Helper()
	manager := m.manager(t)
	calls, failed := 0, ""
	m.fake.before = func(call string) error {
		if calls++; calls == n {
			failed = call
			return errno
		}
		return nil
	}
	defer func() { m.fake.before = nil }()
	f := m.image(t, "a")
	defer f.Close()
	d, err := manager.Attach(t.Context(), f, want)
	if err != nil {
		*failures++
		if b, open := m.fake.bound(), m.fake.openHandles(); len(b) != 0 || open != 0 {
			t.Fatalf("call %d (%s) fails: %v; left bound %v, %d handles open", n, failed, err, b, open)
		}
		if manager.Attached() != 0 || len(manager.held) != 0 || manager.pending != 0 {
			t.Errorf("call %d (%s): still counted", n, failed)
		}
		return true
	}
	if d.Size() != testSize || m.fake.openHandles() != 1 {
		t.Errorf("call %d (%s): size %d, %d handles open", n, failed, d.Size(), m.fake.openHandles())
	}
	if !errors.Is(errno, syscall.EIO) {
		m.fake.before = nil // these errnos are the proof that Detach waits for
	}
	check(t, d.Close())
	if err := manager.Detach(t.Context(), d.Ref()); err != nil {
		if open := m.fake.openHandles(); open != 0 {
			t.Fatalf("call %d (%s): detach: %v; %d handles open", n, failed, err, open)
		}
		check(t, manager.Detach(t.Context(), d.Ref()))
	}
	if b, open := m.fake.bound(), m.fake.openHandles(); len(b) != 0 || open != 0 {
		t.Fatalf("call %d (%s): after detach bound %v, %d handles open", n, failed, b, open)
	}
	return failed != ""
}

func TestManyAtOnce(t *testing.T) {
	onEveryMachine(t, func(t *testing.T, m *machine) {
		managers := []*Manager{m.manager(t), m.manager(t)}
		inParallel(t, 64, func(i int) error {
			manager := managers[i%2]
			want := whole
			want.Tag, want.Discard, want.Autoclear = fmt.Sprint("many-", i), i%3 == 0, i%5 == 0
			name := fmt.Sprint("many-", i)
			for range 4 {
				if err := m.cycle(t, manager, name, want); err != nil {
					return fmt.Errorf("%s: %w", name, err)
				}
			}
			return nil
		})
		if n := managers[0].Attached() + managers[1].Attached(); n != 0 {
			t.Errorf("%d still counted", n)
		}
	})
}

// cycle attaches, looks, and detaches, without ending the test.
func (m *machine) cycle(t testing.TB, manager *Manager, name string, want Mapping) error {
	f := m.image(t, name)
	d, err := manager.Attach(t.Context(), f, want)
	if err != nil {
		return err
	}
	id, err := FileIDOf(f)
	if err != nil {
		return err
	}
	in, err := manager.Inspect(t.Context(), d.Ref().Number)
	if err != nil {
		return err
	}
	if in.Ref != d.Ref() || in.Image != id || in.Tag != want.Tag || d.Reused() {
		return fmt.Errorf("got %+v, reused %v", in, d.Reused())
	}
	return errors.Join(f.Close(), d.Close(), manager.Detach(t.Context(), d.Ref()))
}

// Equal mappings of one image, asked for by many at once, are one device.
func TestManyAtOnceOverOneImage(t *testing.T) {
	onEveryMachine(t, func(t *testing.T, m *machine) {
		managers := []*Manager{m.manager(t), m.manager(t), m.manager(t)}
		m.image(t, "one")
		var mu sync.Mutex
		var devices []*Device
		inParallel(t, 24, func(i int) error {
			d, err := managers[i%3].Attach(t.Context(), m.image(t, "one"), whole)
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				devices = append(devices, d)
			}
			return err
		})
		bound := 0
		for _, d := range devices {
			if d.Ref() != devices[0].Ref() {
				t.Errorf("two devices: %v and %v", d.Ref(), devices[0].Ref())
			}
			if !d.Reused() {
				bound++
			}
			check(t, d.Close())
		}
		if bound != 1 {
			t.Errorf("%d of %d say that they bound it", bound, len(devices))
		}
		check(t, managers[0].Detach(t.Context(), devices[0].Ref()))
	})
}

func inParallel(t *testing.T, n int, do func(i int) error) {
	t.Helper()
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			if err := do(i); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}

func TestWarmAndTrim(t *testing.T) {
	onFakes(t, func(t *testing.T, m *machine) {
		manager := m.manager(t, WithWarm(4)) // two are there already
		check(t, manager.Warm(t.Context()))
		check(t, manager.Warm(t.Context()))
		if n := must(m.Numbers())(t); len(n) != 4 {
			t.Errorf("devices %v, want 4", n)
		}
		var devices []*Device
		for i := range 10 {
			devices = append(devices, m.attach(t, manager, strconv.Itoa(i), whole))
		}
		m.detach(t, manager, devices...)
		foreign := must(m.Add(-1))(t)
		opener := must(m.node(9, forReading))(t)
		check(t, manager.Trim(t.Context()))
		numbers := must(m.Numbers())(t)
		slices.Sort(numbers)
		if want := []int{0, 1, 9, foreign}; !slices.Equal(numbers, want) {
			t.Errorf("after Trim %v, want %v: two of others, an open one, a foreign one", numbers, want)
		}
		check(t, opener.Close())
	})
}

func TestTrimOnTheKernelLeavesOthersAlone(t *testing.T) {
	m := realMachine(t)
	foreign := must(m.Add(-1))(t)
	t.Cleanup(func() { _ = m.Remove(foreign) })
	manager := m.manager(t, WithWarm(0))
	ours := must(manager.kernel.Add(-1))(t)
	manager.note(ours)
	check(t, manager.Trim(t.Context()))
	if _, err := m.Attr(foreign, attrDev); err != nil {
		t.Errorf("the foreign loop%d: %v", foreign, err)
	}
	if _, err := m.Attr(ours, attrDev); !absent(err) {
		t.Errorf("our own loop%d is still there (%v)", ours, err)
	}
}
