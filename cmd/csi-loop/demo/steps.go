package demo

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"syscall"

	"github.com/container-storage-interface/spec/lib/go/csi"
)

const mib = int64(1 << 20)

// Sizes of the story's volumes, in bytes. XFS is made from 300 MiB on.
const (
	filesSize  = 300 * mib
	grownSize  = 600 * mib
	smallSize  = 64 * mib
	rawSize    = 64 * mib
	mappedFrom = 8 * mib // where the range begins in its image
)

// step is one step of the story.
type step struct {
	title string
	run   func(ctx context.Context) error
}

// steps is the story.
func (d *demo) steps() []step {
	fsType := d.cast.files.capability.GetMount().GetFsType()
	return []step{
		{"The driver starts and is ready", d.stepStart},
		{fmt.Sprintf("A volume is made: %s, %s, every block allocated", bytesText(filesSize), fsType), d.stepCreate},
		{"It is attached to a loop device and mounted", d.stepStage},
		{"A pod gets it, and writes a file", d.stepWrite},
		{"The pod goes, the device is freed; a new pod reads the same bytes", d.stepRestage},
		{fmt.Sprintf("It grows to %s while a file on it is open", bytesText(grownSize)), d.stepGrow},
		{"A second pod gets it read-only: a write is refused", d.stepReadOnly},
		{fmt.Sprintf("Another volume, %s, is filled: the next byte is refused", bytesText(smallSize)), d.stepFill},
		{fmt.Sprintf("A raw block volume, %s, is written to its very end", bytesText(rawSize)), d.stepBlock},
		{"A byte range of an existing disk image becomes a volume", d.stepMapped},
		{"The driver is killed, files stay readable, a new driver carries on", d.stepKill},
		{"Everything is unpublished, unstaged and deleted", d.stepTearDown},
		{"The driver stops, and nothing is left", d.stepProof},
	}
}

func (d *demo) stepStart(ctx context.Context) error {
	if err := d.startDriver(ctx); err != nil {
		return err
	}
	st, err := os.Stat(d.socket())
	if err != nil {
		return err
	}
	d.out.factf("process", "%d, %s", d.driver.cmd.Process.Pid, st.Mode())
	d.out.factf("socket", "%s", d.socket())
	return nil
}

func (d *demo) stepCreate(ctx context.Context) error {
	if err := d.create(ctx, d.cast.files, filesSize); err != nil {
		return err
	}
	return d.showImage(d.cast.files, filesSize)
}

func (d *demo) stepStage(ctx context.Context) error {
	v := d.cast.files
	if err := d.stage(ctx, v); err != nil {
		return err
	}
	if _, err := d.showLoop(v.image, filesSize, false); err != nil {
		return err
	}
	if err := d.showMount(v.staging); err != nil {
		return err
	}
	_, err := d.showDF(v.staging)
	return err
}

const firstPod, secondPod = "pod-a", "pod-b"

// letter is the file that is written once and read again and again.
func (d *demo) letter() string { return filepath.Join(d.target(d.cast.files, firstPod), "letter") }

func (d *demo) stepWrite(ctx context.Context) error {
	target, err := d.publish(ctx, d.cast.files, firstPod, false)
	if err != nil {
		return err
	}
	if err := d.showMount(target); err != nil {
		return err
	}
	if err := writeFile(d.letter(), letterSize, d.cast.files.name); err != nil {
		return err
	}
	if err := d.showFile(d.letter()); err != nil {
		return err
	}
	_, err = d.showDF(target)
	return err
}

const letterSize = 32 * mib

func (d *demo) stepRestage(ctx context.Context) error {
	v := d.cast.files
	if err := d.detach(ctx, v); err != nil {
		return err
	}
	if l, err := loopOver(v.image, false); err == nil {
		return fmt.Errorf("%s still shows the image after NodeUnstageVolume", l.node())
	}
	if _, err := os.Lstat(d.target(v, firstPod)); !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("the target is still there after NodeUnpublishVolume: %w", err)
	}
	d.out.factf("now", "no mount, no target, no loop device over the image")
	if err := d.stage(ctx, v); err != nil {
		return err
	}
	if _, err := d.publish(ctx, v, firstPod, false); err != nil {
		return err
	}
	if _, err := d.showLoop(v.image, filesSize, false); err != nil {
		return err
	}
	return d.showFile(d.letter())
}

func (d *demo) stepGrow(ctx context.Context) error {
	v := d.cast.files
	target := d.target(v, firstPod)
	before, err := d.showDF(target)
	if err != nil {
		return err
	}
	f, err := os.Open(d.letter())
	if err != nil {
		return err
	}
	defer f.Close()
	size := &csi.CapacityRange{RequiredBytes: grownSize}
	_, err = call(ctx, d.client, "ControllerExpandVolume", d.client.controller.ControllerExpandVolume, &csi.ControllerExpandVolumeRequest{
		VolumeId: v.id, CapacityRange: size, VolumeCapability: v.capability,
	})
	if err != nil {
		return err
	}
	_, err = call(ctx, d.client, "NodeExpandVolume", d.client.node.NodeExpandVolume, &csi.NodeExpandVolumeRequest{
		VolumeId: v.id, VolumePath: target, StagingTargetPath: v.staging, CapacityRange: size, VolumeCapability: v.capability,
	})
	if err != nil {
		return err
	}
	if err := d.showImage(v, grownSize); err != nil {
		return err
	}
	if _, err := d.showLoop(v.image, grownSize, false); err != nil {
		return err
	}
	after, err := d.showDF(target)
	if err != nil {
		return err
	}
	if grown := after.total - before.total; grown < (grownSize-filesSize)*9/10 {
		return fmt.Errorf("the filesystem grew by %d bytes only", grown)
	}
	return d.showFile(d.letter())
}

func (d *demo) stepReadOnly(ctx context.Context) error {
	v := d.cast.files
	target, err := d.publish(ctx, v, secondPod, true)
	if err != nil {
		return err
	}
	if err := d.showMount(target); err != nil {
		return err
	}
	if err := d.showFile(filepath.Join(target, "letter")); err != nil {
		return err
	}
	if err := d.refused("write", syscall.EROFS, writeFile(filepath.Join(target, "note"), 1, "")); err != nil {
		return err
	}
	note := filepath.Join(d.target(v, firstPod), "note")
	if err := writeFile(note, 1, ""); err != nil {
		return err
	}
	d.out.factf("write", "%s: accepted, the first pod may still write", note)
	return d.unpublish(ctx, v, target)
}

func (d *demo) stepFill(ctx context.Context) error {
	v := d.cast.full
	if err := d.create(ctx, v, smallSize); err != nil {
		return err
	}
	if err := d.stage(ctx, v); err != nil {
		return err
	}
	target, err := d.publish(ctx, v, firstPod, false)
	if err != nil {
		return err
	}
	before, err := d.showDF(target)
	if err != nil {
		return err
	}
	written, err := fill(ctx, filepath.Join(target, "filling"))
	d.out.factf("written", "%d bytes of %d that were free", written, before.free)
	if err := d.refused("next byte", syscall.ENOSPC, err); err != nil {
		return err
	}
	if _, err := d.showDF(target); err != nil {
		return err
	}
	if written < before.free*9/10 {
		return fmt.Errorf("only %d of %d free bytes could be written", written, before.free)
	}
	// The pool pays for a thick volume when it is made, not when it is written.
	if err := d.showImage(v, smallSize); err != nil {
		return err
	}
	other := filepath.Join(d.target(d.cast.files, firstPod), "note")
	if err := writeFile(other, mib, "after"); err != nil {
		return fmt.Errorf("another volume suffers: %w", err)
	}
	d.out.factf("others", "%s: accepted, the pool and its other volumes do not notice", other)
	return nil
}

func (d *demo) stepBlock(ctx context.Context) error {
	v := d.cast.raw
	if err := d.create(ctx, v, rawSize); err != nil {
		return err
	}
	if err := d.stage(ctx, v); err != nil {
		return err
	}
	target, err := d.publish(ctx, v, firstPod, false)
	if err != nil {
		return err
	}
	if _, err := d.showLoop(v.image, rawSize, false); err != nil {
		return err
	}
	st, err := os.Stat(target)
	if err != nil {
		return err
	}
	d.out.factf("target", "%s (%s)", target, st.Mode())
	if err := writeDevice(target, rawSize, v.name); err != nil {
		return err
	}
	if err := d.refused("next byte", syscall.ENOSPC, writeByte(target, rawSize)); err != nil {
		return err
	}
	want := sumOf(rawSize, v.name)
	for _, path := range []string{target, v.image} {
		got, size, err := sumFile(path)
		if err != nil {
			return err
		}
		d.out.factf("read", "%s: %s, sha256 %.16s... as written", path, bytesText(size), got)
		if got != want || size != rawSize {
			return fmt.Errorf("%s has %d bytes with sha256 %s instead of %d with %s", path, size, got, rawSize, want)
		}
	}
	return nil
}

// stepMapped makes a disk image as other tools make them: something in front, a
// filesystem, something behind. The filesystem is that of the full volume,
// copied: an image is an ordinary file.
func (d *demo) stepMapped(ctx context.Context) error {
	from, v := d.cast.full, d.cast.mapped
	want, _, err := sumFile(filepath.Join(d.target(from, firstPod), "filling"))
	if err != nil {
		return err
	}
	if err := d.detach(ctx, from); err != nil {
		return err
	}
	v.image = filepath.Join(d.imageDir(), "disk.img")
	if err := wrapImage(v.image, from.image, mappedFrom); err != nil {
		return err
	}
	d.out.factf("image", "%s: %s, a filesystem from byte %d on", v.image, bytesText(smallSize+2*mappedFrom), mappedFrom)
	v.id = "range-of-disk-img"
	v.context = map[string]string{
		"image": v.image, "offset": strconv.FormatInt(mappedFrom, 10), "sizeLimit": strconv.FormatInt(smallSize, 10), "readOnly": "true",
	}
	if err := d.stage(ctx, v); err != nil {
		return err
	}
	target, err := d.publish(ctx, v, firstPod, true)
	if err != nil {
		return err
	}
	l, err := d.showLoop(v.image, smallSize, true)
	if err != nil {
		return err
	}
	if l.offset != mappedFrom || l.sizeLimit != smallSize {
		return fmt.Errorf("%s shows offset %d and limit %d", l.node(), l.offset, l.sizeLimit)
	}
	if err := d.showMount(target); err != nil {
		return err
	}
	got, size, err := sumFile(filepath.Join(target, "filling"))
	if err != nil {
		return err
	}
	d.out.factf("file", "%s/filling, %d bytes, sha256 %.16s...", target, size, got)
	if got != want {
		return fmt.Errorf("the file has sha256 %s instead of %s", got, want)
	}
	return d.refused("write", syscall.EROFS, writeFile(filepath.Join(target, "note"), 1, ""))
}
