package loop

import (
	"bytes"
	"errors"
	"os"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

func TestParseCounters(t *testing.T) {
	want := Counters{
		Reads: 101, ReadBytes: 3456 * 512, ReadTime: 17 * time.Millisecond,
		Writes: 204, WriteBytes: 6144 * 512, WriteTime: 40 * time.Millisecond, Busy: 33 * time.Millisecond,
	}
	if got, err := parseCounters(fakeStat); err != nil || got != want {
		t.Error(cmp.Diff(want, got), err)
	}
	for name, text := range map[string]string{"nothing": "", "too few": "1 2 3", "no number": "1 2 3 4 5 6 7 8 9 x 11", "negative": "-1 2 3 4 5 6 7 8 9 10 11"} {
		if got, err := parseCounters(text); err == nil {
			t.Errorf("%s: %+v", name, got)
		}
	}
}

// Counters are those of one binding, and of nobody who had the number before or after.
func TestCountersAreOfABinding(t *testing.T) {
	m := fakeMachine(t, generations[0])
	manager := m.manager(t)
	d := m.attach(t, manager, "a", whole)
	if c := must(manager.Counters(d.Ref()))(t); c.Reads != 101 {
		t.Errorf("%+v", c)
	}
	stale := d.Ref()
	stale.DiskSeq--
	if c, err := manager.Counters(stale); !errors.Is(err, ErrNotBound) {
		t.Errorf("another binding's: %+v, %v", c, err)
	}
	if c, err := manager.Counters(Ref{Number: 4711, DiskSeq: 1}); !errors.Is(err, ErrNotExist) {
		t.Errorf("no device: %+v, %v", c, err)
	}
	check(t, d.Close())
	check(t, manager.Detach(t.Context(), d.Ref()))
}

// What is written through a real device is counted, to the byte.
func TestCountersOfTheKernel(t *testing.T) {
	roottest.Require(t)
	m := realMachine(t)
	manager := m.manager(t)
	d := m.attach(t, manager, "a", whole)
	before := must(manager.Counters(d.Ref()))(t)
	f := must(os.OpenFile(d.Path(), os.O_RDWR|unix.O_DIRECT, 0))(t)
	block, err := unix.Mmap(-1, 0, 64<<10, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	check(t, err)
	defer func() { _ = unix.Munmap(block) }()
	copy(block, bytes.Repeat([]byte{7}, len(block)))
	must(f.WriteAt(block, 0))(t)
	must(f.ReadAt(block[:32<<10], 0))(t)
	check(t, f.Close())
	after := must(manager.Counters(d.Ref()))(t)
	if w, r := after.WriteBytes-before.WriteBytes, after.ReadBytes-before.ReadBytes; w != 64<<10 || r < 32<<10 || after.Writes == before.Writes || after.Reads == before.Reads {
		t.Errorf("%d bytes written and %d read: %+v, %+v", w, r, before, after)
	}
	check(t, d.Close())
	check(t, manager.Detach(t.Context(), d.Ref()))
}
