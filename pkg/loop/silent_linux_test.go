package loop

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// hangs has the Status of a device wait for the returned function.
func (k *fake) hangs(number int) (end func()) {
	over := make(chan struct{})
	k.mu.Lock()
	defer k.mu.Unlock()
	k.hang = map[int]chan struct{}{number: over}
	return func() {
		k.mu.Lock()
		k.hang = nil
		k.mu.Unlock()
		close(over)
	}
}

// A foreign device over a file whose filesystem hangs keeps nobody from finding and attaching
// other files. What it may show is neither said to be unattached nor attached once more.
// In virtual time an answer is late only if it is held back, however busy the machine is.
func TestDeviceThatDoesNotAnswer(t *testing.T) { synctest.Test(t, deviceThatDoesNotAnswer) }

func deviceThatDoesNotAnswer(t *testing.T) {
	k := newFake(t, generations[0])
	m := &machine{fake: k, kernel: k, dir: t.TempDir()}
	manager := m.manager(t, WithRetry(Retry{Settle: 200 * time.Millisecond, Answer: 50 * time.Millisecond}))
	ctx := t.Context()
	attach := func(name string) (*Device, error) {
		return manager.Attach(ctx, m.image(t, name), Mapping{BlockSize: 512, ReadOnly: true})
	}
	foreign, err := attach("foreign.img")
	check(t, err)
	ours, err := attach("ours.img")
	check(t, err)
	manager.shown = nil // it was bound before this process was there
	end := k.hangs(foreign.info.Number)

	bound, silent, err := manager.Survey(ctx)
	check(t, err)
	if len(bound) != 1 || bound[0].Ref != ours.Ref() || len(silent) != 1 || silent[0].Ref != foreign.Ref() ||
		filepath.Base(silent[0].BackingPath) != "foreign.img" || silent[0].Image != (FileID{}) {
		t.Errorf("bound %+v, silent %+v", bound, silent)
	}
	listed, err := List(ctx, withKernel(k), WithRetry(Retry{Answer: 50 * time.Millisecond}))
	if len(listed) != 1 || listed[0].Ref != ours.Ref() || !errors.Is(err, ErrSilent) || !strings.Contains(err.Error(), foreign.info.Path) {
		t.Errorf("List: %v, %v", listed, err)
	}
	if _, err := manager.Status(ctx, foreign.Ref()); !errors.Is(err, ErrSilent) {
		t.Errorf("Status: %v", err)
	}
	if _, err := manager.Hold(ctx, foreign.Ref()); !errors.Is(err, ErrSilent) {
		t.Errorf("Hold: %v", err)
	}

	// Others, also where each device has to be looked at.
	found, err := manager.Find(ctx, m.image(t, "ours.img"))
	if err != nil || len(found) != 1 {
		t.Errorf("%v, %v", found, err)
	}
	again, err := attach("ours.img")
	check(t, err)
	if !again.Reused() {
		t.Error("attached once more")
	}
	check(t, again.Close())

	// What it shows, and what it may show.
	check(t, os.Mkdir(filepath.Join(m.dir, "other"), 0o700))
	for _, name := range []string{"foreign.img", "other/foreign.img"} {
		m.image(t, name) // open twice: each device has to be looked at
		if found, err := manager.Find(ctx, m.image(t, name)); !errors.Is(err, ErrSilent) {
			t.Errorf("%s: found %v, %v", name, found, err)
		}
		before := len(k.bound())
		if dev, err := attach(name); !errors.Is(err, ErrSilent) {
			t.Errorf("%s: attached %v, %v", name, dev, err)
		}
		if now := len(k.bound()); now != before {
			t.Errorf("%s: %d devices, %d before", name, now, before)
		}
	}
	// The name of one of several links says nothing.
	m.image(t, "linked.img")
	check(t, os.Link(filepath.Join(m.dir, "linked.img"), filepath.Join(m.dir, "second.img")))
	if found, err := manager.Find(ctx, m.image(t, "linked.img")); !errors.Is(err, ErrSilent) {
		t.Errorf("found %v, %v", found, err)
	}
	// What it said before it fell silent is known.
	manager.remember(foreign.Ref(), foreign.info.Image)
	if found, err := manager.Find(ctx, m.image(t, "other/foreign.img")); err != nil || len(found) != 0 {
		t.Errorf("found %v, %v", found, err)
	}
	if found, err := manager.Find(ctx, m.image(t, "foreign.img")); !errors.Is(err, ErrSilent) {
		t.Errorf("found %v, %v", found, err)
	}
	manager.remember(Ref{Number: foreign.info.Number, DiskSeq: foreign.info.DiskSeq - 1}, foreign.info.Image)
	if found, err := manager.Find(ctx, m.image(t, "other/foreign.img")); !errors.Is(err, ErrSilent) {
		t.Errorf("found %v, %v", found, err)
	}
	// One question waits, however often it was asked.
	if n := k.openHandles(); n != 4 { // foreign, ours, the question's, and that of List
		t.Errorf("%d handles are open", n)
	}

	end()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(time.Millisecond) {
		if _, err := manager.Status(ctx, foreign.Ref()); err == nil {
			break
		} else if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	if all, silent, err := manager.Survey(ctx); err != nil || len(all) != 2 || len(silent) != 0 {
		t.Errorf("%v, %v, %v", all, silent, err)
	}
	for _, dev := range []*Device{foreign, ours} {
		check(t, dev.Close())
		check(t, manager.Detach(ctx, dev.Ref()))
	}
}

func TestMayBe(t *testing.T) {
	for _, c := range []struct {
		backing, name string
		want          bool
	}{
		{"/mnt/nfs/a.img", "/pool/volumes/v/disk.img", false},
		{"/disk.img", "/pool/volumes/v/disk.img", true},
		{"/mnt/disk.img (deleted)", "disk.img", true},
		{"/mnt/disk.img", "/pool/disk.img (deleted)", true},
		{"", "disk.img", true},
	} {
		if got := (Info{BackingPath: c.backing}).MayBe(c.name); got != c.want {
			t.Errorf("%q, %q: %v", c.backing, c.name, got)
		}
	}
}
