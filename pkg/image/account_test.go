package image

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"sync"
	"testing"
	"time"
)

// fakeDisk is a filesystem of which only the free space matters.
type fakeDisk struct {
	mu         sync.Mutex
	size, free int64 // guarded by mu
}

func (d *fakeDisk) statfs() (space, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return space{Size: d.size, Free: d.free}, nil
}

func (d *fakeDisk) use(n int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.free -= n
}

// sawBlocks records what a look at a volume found.
func sawBlocks(a *account, dir string, allocated int64) {
	before := a.of(dir)
	a.seen(dir, before, allocated)
}

func TestAccountRules(t *testing.T) {
	const gib = 1 << 30
	d := &fakeDisk{size: 100 * gib, free: 50*gib + overhead}
	a := newAccount(newLedger(), d.statfs, Reserve{Percent: 10}, 4)
	want := func(thick, thin int64) {
		t.Helper()
		if got := a.capacity(Thick); got != thick*gib {
			t.Errorf("capacity for thick is %d, want %d GiB", got, thick)
		}
		if got := a.capacity(Thin); got != thin*gib {
			t.Errorf("capacity for thin is %d, want %d GiB", got, thin)
		}
	}
	want(40, 160)
	r, err := a.take(ctx, Thin, 40*gib)
	if err != nil {
		t.Fatal(err)
	}
	want(30, 120)
	a.put("thin", charge{size: 40 * gib}, r)
	want(30, 120)
	d.use(8 * gib) // the thin volume writes: until it is looked at, too little is free
	want(22, 88)
	sawBlocks(a, "thin", 8*gib)
	want(24, 96)
	r, err = a.take(ctx, Thick, 20*gib)
	if err != nil {
		t.Fatal(err)
	}
	want(4, 16)
	d.use(20 * gib)
	a.put("thick", charge{size: 20 * gib, allocated: 20 * gib, thick: true}, r)
	want(4, 16)
	sawBlocks(a, "thick", 19*gib) // lost blocks are still promised
	want(3, 12)
	_, err = a.take(ctx, Thick, 3*gib+1)
	wantError(t, err, ErrNoSpace)
	a.drop("thin")
	a.drop("thick")
	want(12, 48)
	d.use(20 * gib)
	want(0, 0) // below the reserve
	d.use(20 * gib)
	want(0, 0) // negative free
}

// TestDiscardBeforeUse: what a thin volume discards stays promised to it when others then
// take as much, so that no more is free than there was.
func TestDiscardBeforeUse(t *testing.T) {
	const gib = 1 << 30
	for _, late := range []string{"before", "after", "during the look"} {
		t.Run(late, func(t *testing.T) {
			d := &fakeDisk{size: 100 * gib, free: 10*gib + overhead + extentsOf(100*gib)}
			a := newAccount(newLedger(), d.statfs, Reserve{}, 1)
			allocated := int64(20 * gib)
			looked := func() {}
			a.look = func(dir string) { sawBlocks(a, dir, allocated); looked() }
			discard := func() { d.use(-8 * gib); allocated -= 8 * gib }
			a.put("thin", charge{size: 20 * gib, allocated: allocated}, nil)
			a.ledger.look(nil, d.statfs)
			if late == "before" {
				discard()
			}
			r, err := a.take(ctx, Thick, 8*gib)
			if err != nil {
				t.Fatal(err)
			}
			create := func() {
				d.use(8 * gib)
				a.put("thick", charge{size: 8 * gib, allocated: 8 * gib, thick: true}, r)
			}
			switch late {
			case "before":
				create()
			case "after":
				create()
				discard()
			default:
				looked = func() { looked = func() {}; discard(); create() }
				a.ledger.look(nil, d.statfs)
			}
			if r, err := a.take(ctx, Thick, 10*gib); err == nil {
				r.release()
				t.Error("what was discarded was given away")
			} else {
				wantError(t, err, ErrNoSpace)
			}
			if got := a.capacity(Thick); got != 2*gib {
				t.Errorf("capacity is %d, want 2 GiB", got)
			}
		})
	}
}

// TestDiscardHidesAWrite: what one thin volume writes during a look is not free any more,
// also when another one discards as much after it was looked at.
func TestDiscardHidesAWrite(t *testing.T) {
	const gib = 1 << 30
	for _, pass := range []int{1, 2} {
		d := &fakeDisk{size: 100 * gib, free: 10*gib + overhead + extentsOf(100*gib)}
		a := newAccount(newLedger(), d.statfs, Reserve{}, 1)
		allocated := map[string]int64{"one": 10 * gib, "two": 10 * gib}
		for dir := range allocated {
			a.put(dir, charge{size: 14 * gib, allocated: 10 * gib}, nil)
		}
		a.ledger.look(nil, d.statfs)
		looks, first := 0, ""
		a.look = func(dir string) {
			looks++
			during := looks == 2*pass
			if during { // the first one was looked at
				d.use(4 * gib)
				allocated[dir] += 4 * gib
			}
			sawBlocks(a, dir, allocated[dir])
			if during {
				d.use(-6 * gib)
				allocated[first] -= 6 * gib
			}
			first = dir
		}
		a.ledger.look(nil, d.statfs)
		if r, err := a.take(ctx, Thick, 3*gib); err == nil {
			r.release()
			t.Errorf("in pass %d: what was promised is given away", pass)
		} else {
			wantError(t, err, ErrNoSpace)
		}
	}
}

// TestDiscardBesideARemoval: the blocks of a thin volume that is being removed are not free
// yet, and nor is what another one discarded.
func TestDiscardBesideARemoval(t *testing.T) {
	const gib = 1 << 30
	d := &fakeDisk{size: 100 * gib, free: 10*gib + overhead + extentsOf(100*gib)}
	a := newAccount(newLedger(), d.statfs, Reserve{}, 1)
	allocated := int64(20 * gib)
	a.look = func(dir string) {
		if dir == "thin" {
			sawBlocks(a, dir, allocated)
		}
	}
	a.put("thin", charge{size: 20 * gib, allocated: allocated}, nil)
	a.put("removed", charge{size: 8 * gib, allocated: 8 * gib}, nil)
	a.ledger.look(nil, d.statfs)
	d.use(-8 * gib) // discarded
	allocated -= 8 * gib
	a.drop("removed")
	r, err := a.take(ctx, Thick, 11*gib)
	if err == nil {
		r.release()
		t.Error("what was discarded was given away")
	}
	if got := a.capacity(Thick); got != 10*gib {
		t.Errorf("capacity is %d, want 10 GiB", got)
	}
	d.use(-8 * gib) // removed
	if got := a.capacity(Thick); got != 18*gib {
		t.Errorf("capacity is %d, want 18 GiB", got)
	}
}

// TestUnusedReservationCountsAgain: what a call reserved and did not use is there for the
// next one.
func TestUnusedReservationCountsAgain(t *testing.T) {
	d := &fakeDisk{size: 100 * MiB, free: 10*MiB + overhead}
	a := newAccount(newLedger(), d.statfs, Reserve{}, 1)
	a.look = func(dir string) { sawBlocks(a, dir, 20*MiB) }
	a.put("thin", charge{size: 20 * MiB, allocated: 20 * MiB}, nil)
	for range 3 {
		r, err := a.take(ctx, Thick, 10*MiB)
		if err != nil {
			t.Fatal(err)
		}
		r.release()
	}
}

func TestRefusalWaitsForSpaceCountedTwice(t *testing.T) {
	d := &fakeDisk{size: 10 * MiB, free: 10*MiB + overhead}
	a := newAccount(newLedger(), d.statfs, Reserve{}, 1)
	first, err := a.take(ctx, Thick, 5*MiB)
	if err != nil {
		t.Fatal(err)
	}
	d.use(5 * MiB) // allocated, and still reserved: 5 MiB counted twice
	got := make(chan error)
	go func() {
		r, err := a.take(ctx, Thick, 5*MiB)
		if err == nil {
			r.release()
		}
		got <- err
	}()
	select {
	case err := <-got:
		t.Fatalf("answered before the first was settled: %v", err)
	case <-time.After(20 * time.Millisecond):
	}
	first.release()
	if err := <-got; err != nil {
		t.Fatal(err)
	}
	short, cancel := context.WithTimeout(ctx, 5*time.Millisecond)
	defer cancel()
	second, err := a.take(ctx, Thick, 5*MiB)
	if err != nil {
		t.Fatal(err)
	}
	defer second.release()
	_, err = a.take(short, Thick, MiB)
	wantError(t, err, context.DeadlineExceeded)
}

// What others have reserved may be given up hours later: then it is a refusal. What the
// call itself has reserved is not waited for at all.
func TestRefusalDoesNotWaitForEver(t *testing.T) {
	for _, own := range []bool{false, true} {
		d := &fakeDisk{size: 10 * MiB, free: 10*MiB + overhead}
		a := newAccount(newLedger(), d.statfs, Reserve{}, 1)
		first, err := a.take(ctx, Thick, 8*MiB)
		if err != nil {
			t.Fatal(err)
		}
		var mine []*reservation
		words := "which other calls have reserved"
		if own {
			mine, words = []*reservation{nil, first}, "free"
		} else {
			a.patience = time.Millisecond
		}
		_, err = a.take(ctx, Thick, 8*MiB, mine...)
		wantError(t, err, ErrNoSpace, words)
		first.release()
	}
}

func TestCapacityIsNeverRefused(t *testing.T) {
	for _, overcommit := range []float64{1, 1.1, 1.5, 3, 999.9} {
		for range 200 {
			d := &fakeDisk{size: math.MaxInt64, free: rand.Int64N(1 << uint(20+rand.IntN(42)))}
			a := newAccount(newLedger(), d.statfs, Reserve{}, overcommit)
			for _, alloc := range []Allocation{Thick, Thin} {
				c := a.capacity(alloc)
				if c == 0 {
					continue
				}
				r, err := a.take(ctx, alloc, c)
				if err != nil || c%MiB != 0 {
					t.Fatalf("capacity %d of %d at %v: %v", c, d.free, overcommit, err)
				}
				r.release()
			}
		}
	}
}

// TestAccountEqualsDisk does random things and compares with what is on disk.
func TestAccountEqualsDisk(t *testing.T) {
	t.Parallel()
	random := rand.New(rand.NewPCG(1, uint64(time.Now().UnixNano())))
	dir := poolDir(t)
	s, p := openPool(t, dir)
	for i := range 400 {
		name := fmt.Sprint("v", random.IntN(12))
		id := VolumeID(p.ID(), name)
		n := (1 + random.Int64N(16)) * MiB
		var err error
		switch random.IntN(8) {
		case 0, 1:
			_, err = p.Create(ctx, Spec{Name: name, Size: n, Allocation: []Allocation{Thick, Thin}[random.IntN(2)]})
		case 2, 3:
			_, err = p.Grow(ctx, id, n)
		case 4:
			err = p.Remove(ctx, id)
		case 5:
			canceled, cancel := context.WithCancel(ctx)
			cancel()
			_, err = p.Create(canceled, Spec{Name: name, Size: n})
		case 6:
			if _, e := s.Get(id); e == nil {
				fill(t, p, id, 0, int(MiB/2))
			}
		case 7:
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			s, p = openPool(t, dir)
		}
		if err != nil && !errors.Is(err, ErrIncompatible) && !errors.Is(err, ErrNotFound) && !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
		if i%10 == 0 {
			wantAccount(t, s, p)
		}
	}
	wantAccount(t, s, p)
	wantClean(t, dir)
	for _, v := range s.List() {
		if err := p.Remove(ctx, v.ID); err != nil {
			t.Fatal(err)
		}
	}
	u := p.Usage()
	if u.Thick != 0 || u.ThinProvisioned != 0 || u.ThinAllocated != 0 || u.Volumes != 0 || u.Pending != 0 {
		t.Errorf("an empty pool has %+v", u)
	}
}

func TestLargeRemovalGoesOnWithoutTheCaller(t *testing.T) {
	dir := poolDir(t)
	hold := make(chan struct{})
	s, p := openPool(t, dir, withKill(func(point string) {
		if point == "remove: unlinking" {
			<-hold
		}
	}))
	v := create(t, p, Spec{Name: "v", Size: MiB})
	short, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
	defer cancel()
	if err := p.Remove(short, v.ID); err != nil {
		t.Fatal(err)
	}
	if len(leftovers(t, dir)) != 1 {
		t.Fatal("nothing is being removed")
	}
	if p.Usage().Volumes != 0 {
		t.Fatal("a removed volume counts")
	}
	create(t, p, Spec{Name: "v", Size: 2 * MiB}) // the name is free at once
	closed := make(chan error)
	go func() { closed <- s.Close() }()
	select {
	case <-closed:
		t.Fatal("Close did not wait for the removal")
	case <-time.After(20 * time.Millisecond):
	}
	close(hold)
	if err := <-closed; err != nil {
		t.Fatal(err)
	}
	wantClean(t, dir)
}

// Something is kept back for the extents of large filesystems, unless the reserve is larger.
func TestRoomForExtents(t *testing.T) {
	for _, c := range []struct {
		size    int64
		reserve Reserve
		want    int64
	}{
		{1 << 30, Reserve{}, 1<<30 - overhead},
		{100 << 30, Reserve{}, 100<<30 - 504*MiB - overhead},
		{100 << 30, Reserve{Bytes: MiB}, 100<<30 - 504*MiB - overhead},
		{100 << 30, Reserve{Percent: 1}, 99<<30 - overhead},
	} {
		a := newAccount(newLedger(), func() (space, error) { return space{Size: c.size, Free: c.size}, nil }, c.reserve, 1)
		if got := a.capacity(Thick); got != c.want {
			t.Errorf("%d, reserve %v: room for %d bytes, want %d", c.size, c.reserve, got, c.want)
		}
		// A pool that was full before it was kept back.
		a.put("v", charge{size: c.want + max(0, c.size-c.reserve.of(c.size)-overhead-c.want), thick: true}, nil)
		r, err := a.take(ctx, Thick, 0)
		if err != nil {
			t.Fatalf("%d, reserve %v: what needs nothing: %v", c.size, c.reserve, err)
		}
		r.release()
		a.put("w", charge{size: MiB, thick: true}, nil)
		_, err = a.take(ctx, Thick, 0)
		wantError(t, err, ErrNoSpace)
	}
}
