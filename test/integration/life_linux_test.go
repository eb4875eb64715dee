package integration

import (
	"fmt"
	"testing"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

// event is one step in the life of a volume.
type event struct {
	name string
	do   func(v *volume) error
	// serves says that the volume is published after it.
	serves bool
	// once: it is no call of CSI and is not repeated.
	once bool
}

// life is the whole life of a volume of kind k, with one restaging in the middle.
func (k kind) life() []event {
	published := k.publishedPart()
	first := []event{{"create", (*volume).create, false, false}, {"stage", (*volume).stage, false, false}}
	middle := []event{
		{"unstage", (*volume).unstage, false, false},
		{"stage again", (*volume).stage, false, false},
		{"publish again", func(v *volume) error { return v.publish(0, false) }, true, false},
		{"read back", func(v *volume) error { return v.read(0, 0) }, true, true},
		{"check size", (*volume).checkSize, true, true},
		{"unpublish again", func(v *volume) error { return v.unpublish(0) }, false, false},
	}
	last := []event{{"unstage for good", (*volume).unstage, false, false}, {"delete", (*volume).remove, false, false}}
	if k.ephemeral { // its data goes with its one publication
		return published
	}
	return append(append(append(first, published...), middle...), last...)
}

func (k kind) publishedPart() []event {
	events := []event{
		{"publish", func(v *volume) error { return v.publish(0, false) }, true, false},
		{"write", func(v *volume) error { return v.write(0) }, true, true},
	}
	if k.reader {
		events = append(events,
			event{"publish read-only", func(v *volume) error { return v.publish(1, true) }, true, false},
			event{"read read-only", func(v *volume) error { return v.read(0, 1) }, true, true})
	}
	if k.grown > 0 {
		events = append(events, event{"expand", func(v *volume) error { return v.expand(k.grown) }, true, false})
	}
	if k.reader {
		events = append(events, event{"unpublish read-only", func(v *volume) error { return v.unpublish(1) }, true, false})
	}
	return append(events, event{"unpublish", func(v *volume) error { return v.unpublish(0) }, false, false})
}

var killKinds = []kind{
	{name: "ext4", fs: "ext4", size: 32 * mib, reader: true},
	{name: "ext4-grown", fs: "ext4", size: 32 * mib, grown: 64 * mib},
	{name: "xfs-grown", fs: "xfs", size: 300 * mib, grown: 364 * mib, reader: true},
	{name: "btrfs-grown", fs: "btrfs", size: 128 * mib, grown: 320 * mib, reader: true},
	{name: "block", size: 8 * mib, grown: 12 * mib},
	{name: "block-reader", size: 8 * mib, reader: true, grown: 12 * mib},
	mapped,
	{name: "ephemeral", fs: "ext4", size: 32 * mib, ephemeral: true},
	{name: "thin", fs: "ext4", size: 64 * mib, thin: true},
}

// TestKillBetweenRPCs kills the driver after each step of a volume's life, starts
// it again and goes on: every step succeeds, the data is there, nothing is left.
func TestKillBetweenRPCs(t *testing.T) {
	t.Parallel()
	roottest.Require(t)
	for _, k := range killKinds {
		t.Run(k.name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t, siteConfig{})
			events := k.life()
			for cut := range events {
				if testing.Short() && cut%3 != 0 {
					continue
				}
				v := s.volume(k, fmt.Sprintf("cut%d", cut))
				for i, e := range events {
					v.step(fmt.Sprintf("%q, killed after %q:", e.name, events[cut].name), e.do(v))
					if i == cut {
						s.kill()
						v.servesWhileDead(e)
						s.start()
					}
				}
				s.checkClean()
				if t.Failed() {
					return
				}
			}
		})
	}
}

// TestKillAfterEveryRPC kills the driver after every step, and repeats the step, as
// a CO does that did not get the answer.
func TestKillAfterEveryRPC(t *testing.T) {
	t.Parallel()
	roottest.Require(t)
	for _, k := range killKinds {
		t.Run(k.name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t, siteConfig{})
			v := s.volume(k, "every")
			for _, e := range k.life() {
				v.step(e.name, e.do(v))
				s.kill()
				v.servesWhileDead(e)
				s.start()
				if !e.once {
					v.step(e.name+", repeated", e.do(v))
				}
			}
		})
	}
}

// servesWhileDead proves that a published volume does not need the driver.
func (v *volume) servesWhileDead(after event) {
	v.t.Helper()
	if !after.serves {
		return
	}
	v.step("write without a driver", v.write(0))
	v.step("read without a driver", v.read(0, 0))
}
