package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/csi-loop/csi-loop/test/vm/plan"
)

// check compares what is there with what must be.
func (c *churn) check() error {
	// Before anything is attached, which may allocate.
	errs := []error{c.checkAccount()}
	sizes, err := c.listed()
	if err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(sizes)) {
		if err := c.checkObject(name, sizes[name]); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", name, err))
		}
	}
	for name, f := range c.fates {
		if _, there := sizes[name]; f.Created && !there {
			errs = append(errs, fmt.Errorf("%s was acknowledged and is lost", name))
		}
	}
	errs = append(errs, c.checkRestore(sizes))
	var health *csi.NodeGetStorageHealthResponse
	err = call(func(ctx context.Context) (err error) {
		health, err = c.node().NodeGetStorageHealth(ctx, &csi.NodeGetStorageHealthRequest{})
		return err
	})
	if err != nil || len(health.GetBackendHealth()) > 0 {
		errs = append(errs, fmt.Errorf("health: %v, %w", health.GetBackendHealth(), err))
	}
	return errors.Join(append(errs, c.checkLeftovers(slices.Collect(maps.Keys(sizes))))...)
}

// listed gives what the driver lists, with its size; a group snapshot has none, and is
// there if one of its snapshots is.
func (c *churn) listed() (map[string]int64, error) {
	sizes := map[string]int64{}
	return sizes, call(func(ctx context.Context) error {
		volumes, err := c.controller().ListVolumes(ctx, &csi.ListVolumesRequest{})
		if err != nil {
			return err
		}
		for _, e := range volumes.GetEntries() {
			sizes[c.name(e.GetVolume().GetVolumeId())] = e.GetVolume().GetCapacityBytes()
		}
		snapshots, err := c.controller().ListSnapshots(ctx, &csi.ListSnapshotsRequest{})
		if err != nil {
			return err
		}
		for _, e := range snapshots.GetEntries() {
			s := e.GetSnapshot()
			if !s.GetReadyToUse() {
				return fmt.Errorf("%v is listed and not ready", s)
			}
			if group := s.GetGroupSnapshotId(); group != "" {
				sizes[c.name(group)] = 0
			} else {
				sizes[c.name(s.GetSnapshotId())] = s.GetSizeBytes()
			}
		}
		return nil
	})
}

// checkObject compares something that is listed with its fate.
func (c *churn) checkObject(name string, size int64) error {
	f := c.fates[name]
	switch {
	case f == nil:
		return errors.New("nobody made it")
	case f.Deleted:
		return errors.New("its deletion was acknowledged")
	case size < f.MinSize || size > f.MaxSize:
		return fmt.Errorf("it has %d bytes, not %d to %d", size, f.MinSize, f.MaxSize)
	}
	switch f.Op {
	case plan.OpGroup:
		return c.checkGroup(name, f)
	case plan.OpSnapshot:
		var found []*csi.ListSnapshotsResponse_Entry
		err := call(func(ctx context.Context) error {
			r, err := c.controller().ListSnapshots(ctx, &csi.ListSnapshotsRequest{SourceVolumeId: c.id(f.From[0]), SnapshotId: c.id(name)})
			found = r.GetEntries()
			return err
		})
		if err != nil || len(found) != 1 {
			return fmt.Errorf("it is not listed as of %s: %v, %w", f.From[0], found, err)
		}
		return c.checkSnapshot(name, f.Kind, size, f.Areas)
	}
	return c.checkVolume(name, size, f)
}

// checkGroup checks that all of a group is there, and looks into each of its snapshots.
func (c *churn) checkGroup(name string, f *plan.Fate) error {
	var group *csi.VolumeGroupSnapshot
	err := call(func(ctx context.Context) error {
		r, err := c.groups().GetVolumeGroupSnapshot(ctx, &csi.GetVolumeGroupSnapshotRequest{GroupSnapshotId: c.id(name)})
		group = r.GetGroupSnapshot()
		return err
	})
	if err != nil {
		return err
	}
	if len(group.GetSnapshots()) != len(f.Members) {
		return fmt.Errorf("it has %v, want snapshots of %q", group.GetSnapshots(), f.From)
	}
	for _, s := range group.GetSnapshots() {
		areas, ok := f.Members[c.name(s.GetSourceVolumeId())]
		if !ok {
			return fmt.Errorf("it has %v, which is of none of %q", s, f.From)
		}
		if err := c.checkSnapshot(c.name(s.GetSnapshotId()), f.Kind, s.GetSizeBytes(), areas); err != nil {
			return fmt.Errorf("of %s: %w", c.name(s.GetSourceVolumeId()), err)
		}
	}
	return nil
}

// checkVolume attaches a volume and reads it.
func (c *churn) checkVolume(name string, size int64, f *plan.Fate) error {
	image := pool + "/csi/volumes/" + name + "/disk.img"
	st, err := os.Stat(image)
	if err != nil {
		return err
	}
	// An image that grew before its record did is cut when it is opened.
	if st.Size() < size || st.Size() > f.MaxSize {
		return fmt.Errorf("its image has %d bytes, its record says %d", st.Size(), size)
	}
	v := &volume{churn: c, kind: f.Kind, name: name}
	if err := v.attach(); err != nil {
		return err
	}
	err = checkAreas(v.file(), f.Areas)
	if err := errors.Join(err, v.detach()); err != nil {
		return err
	}
	return checkFilesystem(image, f.Kind)
}

// checkSnapshot reads a snapshot without the driver's help.
func (c *churn) checkSnapshot(name, kind string, size int64, areas []plan.Area) error {
	image := pool + "/csi/snapshots/" + name + "/disk.img"
	st, err := os.Stat(image)
	if err != nil {
		return err
	}
	if st.Size() != size {
		return fmt.Errorf("its image has %d bytes, its record says %d", st.Size(), size)
	}
	if kind == "block" {
		return checkAreas(image, areas)
	}
	dir := work + "/look"
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	// Whoever froze it left nothing to recover.
	if out, err := exec.Command("mount", "-t", "ext4", "-o", "ro,loop", image, dir).CombinedOutput(); err != nil {
		return fmt.Errorf("mount: %w: %s", err, out)
	}
	err = checkAreas(dir+"/"+records, areas)
	if out, e := exec.Command("umount", dir).CombinedOutput(); e != nil {
		err = errors.Join(err, fmt.Errorf("umount: %w: %s", e, out))
	}
	if err != nil {
		return err
	}
	return checkFilesystem(image, kind)
}

// checkFilesystem looks for damage in the filesystem of an image that nobody uses.
func checkFilesystem(image, kind string) error {
	if kind == "block" {
		return nil
	}
	if out, err := exec.Command("e2fsck", "-fn", image).CombinedOutput(); err != nil {
		return fmt.Errorf("e2fsck: %w: %s", err, out)
	}
	return nil
}

// checkAreas reads all areas of a file or device. What is behind the end of a file is
// zero, and so is all of one that is not there.
func checkAreas(path string, areas []plan.Area) error {
	f, err := os.Open(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		f = nil
	case err != nil:
		return err
	default:
		defer f.Close()
	}
	for i, a := range areas {
		got := make([]byte, plan.AreaSize)
		if f != nil {
			if _, err := f.ReadAt(got, int64(i)*plan.AreaSize); err != nil && !errors.Is(err, io.EOF) {
				return err
			}
		}
		if err := a.Check(got); err != nil {
			return err
		}
	}
	return nil
}

// checkRestore makes a volume of one of the snapshots, and removes it.
func (c *churn) checkRestore(sizes map[string]int64) error {
	for _, name := range slices.Sorted(maps.Keys(sizes)) {
		f := c.fates[name]
		if f == nil || f.Op != plan.OpSnapshot {
			continue
		}
		v := &volume{churn: c, kind: f.Kind, name: name + "-check"}
		err := v.create(sizes[name], c.ofSnapshot(name))
		if err == nil {
			err = v.attach()
		}
		if err == nil {
			err = errors.Join(checkAreas(v.file(), f.Areas), v.detach())
		}
		if err == nil {
			err = c.remove(plan.OpCreate, v.name)
		}
		if err != nil {
			return fmt.Errorf("restore %s: %w", name, err)
		}
		return nil
	}
	return nil
}

// checkLeftovers looks for what should not be there besides what is listed: in the pool,
// among mounts, loop devices and records of the node. What ends by itself is waited for.
func (c *churn) checkLeftovers(listed []string) error {
	var err error
	for range 50 {
		if err = c.leftovers(listed); err == nil {
			return nil
		}
		time.Sleep(100 * time.Millisecond)
	}
	return err
}

func (c *churn) leftovers(listed []string) error {
	want := map[string][]string{"volumes": {}, "snapshots": {}, "groups": {}}
	for _, name := range listed {
		f := c.fates[name]
		if f == nil {
			continue // an error already
		}
		kind := map[string]string{plan.OpCreate: "volumes", plan.OpSnapshot: "snapshots", plan.OpGroup: "groups"}[f.Op]
		want[kind] = append(want[kind], name)
		if f.Op == plan.OpGroup {
			want["snapshots"] = append(want["snapshots"], slices.Repeat([]string{"group-"}, len(f.Members))...)
		}
	}
	var found []string
	for dir, names := range want {
		var have []string
		for _, path := range glob(pool + "/csi/" + dir + "/*") {
			name := filepath.Base(path)
			if dir == "snapshots" && strings.HasPrefix(name, "group-") {
				name = "group-" // the driver chose the rest
			}
			have = append(have, name)
		}
		slices.Sort(have)
		slices.Sort(names)
		if !slices.Equal(have, names) {
			found = append(found, fmt.Sprintf("%s: there are %q, and %q are listed", dir, have, names))
		}
	}
	found = append(found, glob(pool+"/csi/.*", pool+"/csi/*/.*", work+"/state/*/*")...)
	for _, f := range glob("/sys/block/loop*/loop/backing_file") {
		if b, err := os.ReadFile(f); err == nil {
			found = append(found, "loop device over "+strings.TrimSpace(string(b)))
		}
	}
	b, err := os.ReadFile("/proc/self/mountinfo")
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], work+"/") && f[4] != pool {
			found = append(found, "mount "+f[4])
		}
	}
	if len(found) > 0 {
		err = errors.Join(err, fmt.Errorf("left behind: %q", found))
	}
	return err
}

func glob(patterns ...string) []string {
	var all []string
	for _, p := range patterns {
		found, _ := filepath.Glob(p)
		all = append(all, found...)
	}
	return all
}
