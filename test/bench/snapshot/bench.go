//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/csi-loop/csi-loop/test/bench/lab"
)

// bench is one situation that is measured.
type bench struct {
	o    options
	s    situation
	d    *lab.Driver
	pool *lab.Pool
	r    *report

	v     *lab.Volume
	image string // the volume's
	bare  string // directory for bare copies, on the pool's filesystem
	next  int
}

func (b *bench) run(ctx context.Context) (err error) {
	b.bare = filepath.Join(b.pool.Dir, "bare")
	if err := os.MkdirAll(b.bare, 0o700); err != nil {
		return err
	}
	b.v, err = b.d.NewVolume(ctx, b.s.name, b.o.filesystem, b.s.size, map[string]string{"allocation": b.s.allocation})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.v.Remove(ctx)) }()
	b.image = b.imageOf("volumes", b.v.ID)
	if err := fill(b.v.Target, b.s.size/4*3, b.s.size/4*3/1024); err != nil {
		return err
	}
	if b.s.fragmented {
		if err := scatter(b.v.Target, b.o.writes); err != nil {
			return err
		}
	}
	extents, err := extents(b.image)
	if err != nil {
		return err
	}
	b.r.note(b.s.name, "extents", strconv.FormatInt(extents, 10))
	if err := b.snapshots(ctx); err != nil {
		return fmt.Errorf("snapshots: %w", err)
	}
	if err := b.copies(ctx); err != nil {
		return fmt.Errorf("copies: %w", err)
	}
	if err := b.delta(ctx); err != nil {
		return fmt.Errorf("delta: %w", err)
	}
	return nil
}

// imageOf is the path of the image of a volume or snapshot.
func (b *bench) imageOf(kind, id string) string {
	_, dir, _ := strings.Cut(id, ".")
	return filepath.Join(b.pool.Dir, "pool", kind, dir, "disk.img")
}

// snapshots takes snapshots of the volume in use, the driver and bare calls in turn.
func (b *bench) snapshots(ctx context.Context) (err error) {
	w, err := startWriter(b.v.Target)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.end()) }()
	ways := []struct {
		name string
		take func() (time.Duration, error)
	}{
		{"bare", func() (time.Duration, error) { return bare(b.v.Target, b.image, b.bare, false) }},
		{"durable", func() (time.Duration, error) { return bare(b.v.Target, b.image, b.bare, true) }},
		{"driver", func() (time.Duration, error) { return b.snapshot(ctx) }},
		{"idle", func() (time.Duration, error) { // what the writer's gaps are without anything
			time.Sleep(50 * time.Millisecond)
			return 0, nil
		}},
	}
	for i := range b.o.rounds + 1 {
		// In any order: a copy that was deleted is still being freed for a while, at the
		// cost of what comes next.
		for _, j := range rand.Perm(len(ways)) {
			way := ways[j]
			time.Sleep(100 * time.Millisecond)
			from := time.Now()
			took, err := way.take()
			if err != nil {
				return fmt.Errorf("%s: %w", way.name, err)
			}
			stall, err := w.gap(from, from.Add(max(took, 50*time.Millisecond)))
			if err != nil {
				return fmt.Errorf("writer: %w", err)
			}
			if i == 0 {
				continue // the first time loads programs and extents
			}
			b.r.add(b.s.name, way.name+"/time", took)
			b.r.add(b.s.name, way.name+"/stall", stall)
		}
	}
	return nil
}

// snapshot makes one and deletes it; the time is that of making it.
func (b *bench) snapshot(ctx context.Context) (time.Duration, error) {
	start := time.Now()
	id, err := b.take(ctx)
	took := time.Since(start)
	if err != nil {
		return 0, err
	}
	return took, b.drop(ctx, id)
}

func (b *bench) take(ctx context.Context) (id string, err error) {
	b.next++
	made, err := b.d.Controller.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: fmt.Sprintf("%s-%d", b.s.name, b.next), SourceVolumeId: b.v.ID})
	return made.GetSnapshot().GetSnapshotId(), err
}

func (b *bench) drop(ctx context.Context, id string) error {
	_, err := b.d.Controller.DeleteSnapshot(context.WithoutCancel(ctx), &csi.DeleteSnapshotRequest{SnapshotId: id})
	return err
}

// copies measures restores and clones beside a bare reflink and a full copy.
func (b *bench) copies(ctx context.Context) (err error) {
	id, err := b.take(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.drop(ctx, id)) }()
	snapshot := b.imageOf("snapshots", id)
	for i := range max(1, b.o.rounds/10) {
		for _, c := range []struct {
			name       string
			allocation string
			source     *csi.VolumeContentSource
		}{
			{"restore-thin", "thin", source(id, "")},
			{"restore-thick", "thick", source(id, "")},
			{"clone-thin", "thin", source("", b.v.ID)},
		} {
			if c.allocation == "thick" && b.s.allocation == "thin" {
				continue // 64 GiB of blocks: what that takes is a disk's to say
			}
			took, err := b.copy(ctx, fmt.Sprintf("%s-%s-%d", b.s.name, c.name, i), c.allocation, c.source)
			if err != nil {
				return fmt.Errorf("%s: %w", c.name, err)
			}
			b.r.add(b.s.name, c.name+"/time", took)
		}
		took, err := bare("", snapshot, b.bare, true)
		if err != nil {
			return err
		}
		b.r.add(b.s.name, "reflink/time", took)
		took, copied, err := copyAll(snapshot, b.bare)
		if err != nil {
			return err
		}
		b.r.add(b.s.name, "full-copy/time", took)
		b.r.note(b.s.name, "data", fmt.Sprintf("%d MiB", copied/lab.MiB))
	}
	return nil
}

func source(snapshot, volume string) *csi.VolumeContentSource {
	if volume != "" {
		return &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Volume{Volume: &csi.VolumeContentSource_VolumeSource{VolumeId: volume}}}
	}
	return &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: snapshot}}}
}

// copy makes a volume from a source and deletes it; the time is that of making it,
// with the calls repeated that were answered ABORTED.
func (b *bench) copy(ctx context.Context, name, allocation string, from *csi.VolumeContentSource) (time.Duration, error) {
	req := &csi.CreateVolumeRequest{
		Name: name, CapacityRange: &csi.CapacityRange{RequiredBytes: b.s.size}, VolumeContentSource: from,
		VolumeCapabilities: []*csi.VolumeCapability{lab.Capability(b.o.filesystem)}, Parameters: map[string]string{"allocation": allocation},
	}
	start := time.Now()
	made, err := b.d.Controller.CreateVolume(ctx, req)
	for err != nil && strings.Contains(err.Error(), "code = Aborted") {
		made, err = b.d.Controller.CreateVolume(ctx, req)
	}
	took := time.Since(start)
	if err != nil {
		return 0, err
	}
	return took, b.d.Delete(ctx, made.GetVolume().GetVolumeId())
}

// delta lists what changed between two snapshots, and what was read for that.
func (b *bench) delta(ctx context.Context) (err error) {
	one, err := b.take(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.drop(ctx, one)) }()
	if err := scatter(b.v.Target, 1000); err != nil {
		return err
	}
	two, err := b.take(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.drop(ctx, two)) }()
	for range max(1, b.o.rounds/6) {
		read, err := b.readBytes()
		if err != nil {
			return err
		}
		start := time.Now()
		ranges, bytes, err := b.deltaOnce(ctx, one, two)
		if err != nil {
			return err
		}
		b.r.add(b.s.name, "delta/time", time.Since(start))
		after, err := b.readBytes()
		if err != nil {
			return err
		}
		b.r.note(b.s.name, "delta", fmt.Sprintf("%d ranges, %d KiB changed", ranges, bytes/1024))
		b.r.most(b.s.name, "delta read from the pool's disk, bytes", after.disk-read.disk)
		b.r.most(b.s.name, "delta read by the driver, bytes", after.process-read.process)
	}
	return nil
}

func (b *bench) deltaOnce(ctx context.Context, base, target string) (ranges int, bytes int64, err error) {
	stream, err := b.d.Metadata.GetMetadataDelta(ctx, &csi.GetMetadataDeltaRequest{BaseSnapshotId: base, TargetSnapshotId: target})
	if err != nil {
		return 0, 0, err
	}
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return ranges, bytes, nil
		}
		if err != nil {
			return 0, 0, err
		}
		for _, r := range m.GetBlockMetadata() {
			ranges, bytes = ranges+1, bytes+r.GetSizeBytes()
		}
	}
}

// reading is what was read so far, in bytes.
type reading struct{ disk, process int64 }

// readBytes looks at the pool's disk and at the driver's process. No image is in the
// page cache (the volume's device uses direct I/O, and what copyAll read is dropped), so
// data that somebody looks at is read from the disk.
func (b *bench) readBytes() (r reading, err error) {
	f, err := os.Open(b.imageOf("volumes", b.v.ID))
	if err != nil {
		return r, err
	}
	defer f.Close()
	stat, err := os.ReadFile("/sys/class/block/" + filepath.Base(b.pool.Device) + "/stat")
	if err != nil {
		return r, err
	}
	sectors, err := strconv.ParseInt(strings.Fields(string(stat))[2], 10, 64)
	if err != nil {
		return r, err
	}
	io, err := os.ReadFile(fmt.Sprintf("/proc/%d/io", b.d.PID()))
	if err != nil {
		return r, err
	}
	_, rest, _ := strings.Cut(string(io), "\nread_bytes: ")
	r.process, err = strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
	r.disk = sectors * 512
	return r, err
}
