package main

import (
	"fmt"
	"hash/fnv"
	"maps"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"

	"github.com/csi-loop/csi-loop/test/vm/plan"
)

const (
	size  = 8 * mib // of a new volume
	grown = 16 * mib
)

// life is what happens to one volume and its copies. What is done is for chance, so that
// each part of it is near the beginning of some: the power goes soon.
type life struct {
	*churn
	volume   *volume
	restored *volume // nil until it is made
	snapshot string  // the same: that of the volume in use
	random   *rand.Rand
	// live: the volume can be copied while it is in use.
	live bool
	made []object // in their order
}

// object is what can be removed.
type object struct{ op, name string }

func (c *churn) newLife(kind, name string) *life {
	hash := fnv.New64()
	_, _ = hash.Write([]byte(name))
	return &life{
		churn: c, volume: &volume{churn: c, kind: kind, name: name},
		random: rand.New(rand.NewPCG(c.plan.Seed, hash.Sum64())),
		// Without reflinks nothing stops those who write to a raw device for so long.
		live: kind != "block" || c.plan.Filesystem != "ext4",
	}
}

// step does one thing between two lines of the ledger.
func (c *churn) step(e plan.Entry, do func() error) error {
	c.say(e)
	if err := do(); err != nil {
		return fmt.Errorf("%s %s: %w", e.Op, e.Volume, err)
	}
	e.Acked = true
	c.say(e)
	return nil
}

// mostly is true three times of four.
func (l *life) mostly() bool { return l.random.IntN(4) > 0 }

func (l *life) run() error {
	v := l.volume
	if err := l.create(v, size, nil); err != nil {
		return err
	}
	if err := v.attach(); err != nil {
		return err
	}
	bytes := size
	err := l.whileWritten(12, []*volume{v}, l.copyVolume)
	if err == nil && l.mostly() {
		bytes = grown
		err = l.step(plan.Entry{Op: plan.OpExpand, Volume: v.name, N: bytes}, func() error { return v.expand(bytes) })
	}
	if err == nil {
		err = l.restore()
	}
	if err == nil {
		err = l.whileWritten(6, l.attached(), l.copyGroup)
	}
	for _, a := range l.attached() {
		if err == nil {
			err = a.detach()
		}
	}
	if err == nil {
		err = l.copyUnused(bytes)
	}
	if err == nil {
		err = l.end()
	}
	return err
}

// attached lists the volumes that are written to.
func (l *life) attached() []*volume {
	if l.restored == nil {
		return []*volume{l.volume}
	}
	return []*volume{l.volume, l.restored}
}

// create makes a volume; of what from names, if that is not empty.
func (l *life) create(v *volume, size int64, from []string) error {
	e := plan.Entry{Op: plan.OpCreate, Volume: v.name, N: size, From: from}
	err := l.step(e, func() error {
		switch {
		case len(from) == 0:
			return v.create(size, nil)
		case from[0] == l.snapshot:
			return v.create(size, l.ofSnapshot(l.snapshot))
		}
		return v.create(size, l.ofVolume(from[0]))
	})
	l.made = append(l.made, object{plan.OpCreate, v.name})
	return err
}

// whileWritten does something while so many records are written to each volume, and
// ends when all of it has.
func (l *life) whileWritten(writes int64, volumes []*volume, do func() error) error {
	ends := make(chan error, len(volumes))
	for _, v := range volumes {
		go func() {
			var err error
			for range writes {
				if err == nil {
					err = l.step(plan.Entry{Op: plan.OpWrite, Volume: v.name, N: v.next}, func() error { return v.write(v.next) })
					v.next++
				}
			}
			ends <- err
		}()
	}
	err := do()
	for range volumes {
		if e := <-ends; err == nil {
			err = e
		}
	}
	return err
}

// copyVolume takes a snapshot and a clone of the volume in use.
func (l *life) copyVolume() error {
	v := l.volume
	if l.live && l.mostly() {
		name := v.name + "-s"
		if err := l.takeSnapshot(name, size); err != nil {
			return err
		}
		l.snapshot = name
	}
	if l.live && l.mostly() {
		return l.create(&volume{churn: l.churn, kind: v.kind, name: v.name + "-c"}, size, []string{v.name})
	}
	return nil
}

func (l *life) takeSnapshot(name string, size int64) error {
	err := l.step(plan.Entry{Op: plan.OpSnapshot, Volume: name, From: []string{l.volume.name}, N: size}, func() error {
		return l.volume.snapshot(name, size)
	})
	l.made = append(l.made, object{plan.OpSnapshot, name})
	return err
}

// restore makes a larger volume of the snapshot, if there is one.
func (l *life) restore() error {
	if l.snapshot == "" {
		return nil
	}
	r := &volume{churn: l.churn, kind: l.volume.kind, name: l.volume.name + "-r", areas: 1}
	if err := l.create(r, size+size/2, []string{l.snapshot}); err != nil {
		return err
	}
	l.restored = r
	return r.attach()
}

// copyGroup takes a group snapshot of all volumes in use.
func (l *life) copyGroup() error {
	if !l.live || !l.mostly() {
		return nil
	}
	return l.takeGroup(l.volume.name + "-g")
}

func (l *life) takeGroup(name string) error {
	var volumes []string
	for _, v := range l.attached() {
		volumes = append(volumes, v.name)
	}
	err := l.step(plan.Entry{Op: plan.OpGroup, Volume: name, From: volumes}, func() error { return l.group(name, volumes) })
	l.made = append(l.made, object{plan.OpGroup, name})
	return err
}

// copyUnused takes a snapshot, a clone or a group snapshot of the volume that nobody
// uses; always one, as it may be the only one of this life.
func (l *life) copyUnused(size int64) error {
	name := l.volume.name
	switch l.random.IntN(3) {
	case 0:
		return l.takeSnapshot(name+"-su", size)
	case 1:
		return l.create(&volume{churn: l.churn, kind: l.volume.kind, name: name + "-cu"}, size, []string{name})
	}
	return l.takeGroup(name + "-gu")
}

// end removes most of what was made, in any order.
func (l *life) end() error {
	l.random.Shuffle(len(l.made), func(i, j int) { l.made[i], l.made[j] = l.made[j], l.made[i] })
	for _, o := range l.made {
		if !l.mostly() {
			continue
		}
		if err := l.step(plan.Entry{Op: plan.OpDelete, Volume: o.name}, func() error { return l.remove(o.op, o.name) }); err != nil {
			return err
		}
	}
	return nil
}

// removeOld removes what outlived two boots.
func (c *churn) removeOld() error {
	for _, name := range slices.Sorted(maps.Keys(c.fates)) {
		f := c.fates[name]
		boot, err := strconv.Atoi(strings.Split(name, "-")[1])
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if f.Deleted || boot > c.plan.Boot-2 {
			continue
		}
		if err := c.step(plan.Entry{Op: plan.OpDelete, Volume: name}, func() error { return c.remove(f.Op, name) }); err != nil {
			return err
		}
	}
	return nil
}
