package integration

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

// kind is one way to use a volume.
type kind struct {
	name      string
	fs        string // "" is a raw block volume
	size      int64
	thin      bool
	mapped    bool // a byte range of a file in the site's images directory
	ephemeral bool
	reader    bool  // published a second time, read-only
	grown     int64 // expanded to that while it is published
}

// block tells whether the volume is handed out as a device.
func (k kind) block() bool { return k.fs == "" }

var (
	ext4   = kind{name: "ext4", fs: "ext4", size: 32 * mib}
	xfs    = kind{name: "xfs", fs: "xfs", size: 300 * mib}
	btrfs  = kind{name: "btrfs", fs: "btrfs", size: 128 * mib}
	block  = kind{name: "block", size: 8 * mib}
	mapped = kind{name: "mapped", fs: "ext4", size: 16 * mib, mapped: true}
)

// volume is one volume and where it is.
type volume struct {
	*site
	kind

	id      string
	want    int64             // its size now, in bytes
	context map[string]string // volume_context
	mode    csi.VolumeCapability_AccessMode_Mode
	flags   []string
	seed    uint64 // of its data
	source  *csi.VolumeContentSource
	base    string // directory of its staging path and targets; "" is the site's
	// limit bounds the calls about it; nil is as long as kubelet waits.
	limit func() time.Duration
}

// volume describes a volume that does not exist yet.
func (s *site) volume(k kind, name string) *volume {
	v := &volume{site: s, kind: k, id: name, want: k.size, mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER, seed: rand.Uint64()}
	if k.ephemeral {
		v.mode = csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER
		v.context = map[string]string{"csi.storage.k8s.io/ephemeral": "true", "size": strconv.FormatInt(k.size, 10)}
	}
	return v
}

func (v *volume) capability() *csi.VolumeCapability {
	c := &csi.VolumeCapability{AccessMode: &csi.VolumeCapability_AccessMode{Mode: v.mode}}
	if v.block() {
		c.AccessType = &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}}
	} else {
		c.AccessType = &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{FsType: v.fs, MountFlags: v.flags}}
	}
	return c
}

// staging and target are the paths a CO gives; n numbers the targets.
func (v *volume) staging() string { return filepath.Join(cmp.Or(v.base, v.dir), "stage", v.key()) }

func (v *volume) target(n int) string {
	return filepath.Join(cmp.Or(v.base, v.dir), "pods", fmt.Sprintf("%s-%d", v.key(), n))
}

// key is the part of the ID after the pool's.
func (v *volume) key() string { return v.id[strings.IndexByte(v.id, '.')+1:] }

// image is the volume's file.
func (v *volume) image() string {
	if v.mapped {
		return v.context["image"]
	}
	return filepath.Join(v.pool, "volumes", v.key(), "disk.img")
}

// device is the node of the volume's writable loop device, "" if there is none.
func (v *volume) device() string {
	for _, line := range append(roottest.Loops(v.pool), roottest.Loops(v.images)...) {
		name, path, _ := strings.Cut(line, " over ")
		ro, _ := os.ReadFile("/sys/block/" + name + "/ro")
		if path == v.image() && strings.TrimSpace(string(ro)) == "0" {
			return "/dev/" + name
		}
	}
	return ""
}

func (v *volume) parameters() map[string]string {
	if v.thin {
		return map[string]string{"allocation": "thin"}
	}
	return nil
}

// create makes the volume; of a mapped one, the image that it maps a part of.
func (v *volume) create() error {
	switch {
	case v.ephemeral:
		return nil
	case v.mapped:
		return v.makeImage()
	}
	ctx, cancel := v.call()
	defer cancel()
	r, err := v.controller().CreateVolume(ctx, &csi.CreateVolumeRequest{
		Name: v.key(), CapacityRange: &csi.CapacityRange{RequiredBytes: v.size},
		VolumeCapabilities: []*csi.VolumeCapability{v.capability()}, Parameters: v.parameters(), VolumeContentSource: v.source,
	})
	if err != nil {
		return err
	}
	v.id = r.GetVolume().GetVolumeId()
	if got := r.GetVolume().GetCapacityBytes(); got != v.want {
		return fmt.Errorf("the volume has %d bytes, want %d", got, v.want)
	}
	return nil
}

// Where a mapped volume lies in its image.
const mappedOffset, mappedRest = 16 * mib, 4 * mib

// makeImage makes a file with a filesystem in its middle, and a pattern around it.
func (v *volume) makeImage() error {
	path := filepath.Join(v.images, v.id+".img")
	v.context = map[string]string{"image": path, "offset": strconv.FormatInt(mappedOffset, 10), "sizeLimit": strconv.FormatInt(v.size, 10)}
	if v.fs == "" {
		v.context["exposeImage"] = "true"
	}
	if _, err := os.Stat(path); err == nil {
		return nil
	}
	inner := filepath.Join(v.dir, v.id+".inner")
	defer os.Remove(inner)
	if err := os.WriteFile(inner, nil, 0o600); err != nil {
		return err
	}
	if err := os.Truncate(inner, v.size); err != nil {
		return err
	}
	if out, err := roottest.Output("mkfs."+v.fs, "-q", inner); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	content, err := os.ReadFile(inner)
	if err != nil {
		return err
	}
	frame := func(n int64) []byte { return bytes.Repeat([]byte("around!!"), int(n/8)) }
	return os.WriteFile(path, append(append(frame(mappedOffset), content...), frame(mappedRest)...), 0o600)
}

// checkFrame proves that nothing outside the range was written.
func (v *volume) checkFrame() error {
	content, err := os.ReadFile(v.image())
	if err != nil {
		return err
	}
	end := mappedOffset + v.size
	if int64(len(content)) != end+mappedRest {
		return fmt.Errorf("the image has %d bytes, it had %d", len(content), end+mappedRest)
	}
	for _, part := range [][]byte{content[:mappedOffset], content[end:]} {
		if len(bytes.ReplaceAll(part, []byte("around!!"), nil)) != 0 {
			return errors.New("bytes outside the mapped range were written")
		}
	}
	return nil
}

func (v *volume) stage() error {
	if v.ephemeral {
		return nil
	}
	if err := os.MkdirAll(v.staging(), 0o750); err != nil {
		return err
	}
	ctx, cancel := v.call()
	defer cancel()
	_, err := v.node().NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{
		VolumeId: v.id, StagingTargetPath: v.staging(), VolumeCapability: v.capability(), VolumeContext: v.context,
	})
	return err
}

func (v *volume) unstage() error {
	if v.ephemeral {
		return nil
	}
	ctx, cancel := v.call()
	defer cancel()
	_, err := v.node().NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: v.id, StagingTargetPath: v.staging()})
	if err != nil {
		return err
	}
	if err := os.Remove(v.staging()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("the staging path after unstage: %w", err)
	}
	return nil
}

func (v *volume) publish(n int, readOnly bool) error {
	ctx, cancel := v.call()
	defer cancel()
	r := &csi.NodePublishVolumeRequest{
		VolumeId: v.id, TargetPath: v.target(n), VolumeCapability: v.capability(), Readonly: readOnly, VolumeContext: v.context,
	}
	if !v.ephemeral {
		r.StagingTargetPath = v.staging()
	}
	_, err := v.node().NodePublishVolume(ctx, r)
	return err
}

func (v *volume) unpublish(n int) error {
	ctx, cancel := v.call()
	defer cancel()
	_, err := v.node().NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: v.id, TargetPath: v.target(n)})
	if err != nil {
		return err
	}
	if _, err := os.Lstat(v.target(n)); !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("the target is left after unpublish: %w", errors.Join(err, os.ErrExist))
	}
	return nil
}

// remove deletes the volume.
func (v *volume) remove() error {
	if v.ephemeral {
		return nil
	}
	if v.mapped {
		if _, err := os.Stat(v.image()); errors.Is(err, os.ErrNotExist) {
			return nil
		}
		if err := v.checkFrame(); err != nil {
			return err
		}
		return os.Remove(v.image())
	}
	ctx, cancel := v.call()
	defer cancel()
	_, err := v.controller().DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: v.id})
	return err
}

// expand makes the image larger, and what is published follows. Where the kernel
// does not let a mounted ext4 grow, that is what the node must say.
func (v *volume) expand(size int64) error {
	if err := v.expandImage(size); err != nil {
		return err
	}
	ctx, cancel := v.call()
	defer cancel()
	want := &csi.CapacityRange{RequiredBytes: size}
	n, err := v.node().NodeExpandVolume(ctx, &csi.NodeExpandVolumeRequest{VolumeId: v.id, VolumePath: v.target(0), StagingTargetPath: v.staging(), CapacityRange: want, VolumeCapability: v.capability()})
	if v.fs == "ext4" && !canGrowExt4() {
		if status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "CAP_SYS_RESOURCE") {
			return fmt.Errorf("NodeExpandVolume of ext4 without CAP_SYS_RESOURCE: %w", err)
		}
		return nil
	}
	if err != nil {
		return err
	}
	if n.GetCapacityBytes() != size {
		return fmt.Errorf("NodeExpandVolume = %v, want %d bytes", n, size)
	}
	return v.checkSize()
}

// expandImage is the controller's part of expand.
func (v *volume) expandImage(size int64) error {
	ctx, cancel := v.call()
	defer cancel()
	r, err := v.controller().ControllerExpandVolume(ctx, &csi.ControllerExpandVolumeRequest{
		VolumeId: v.id, CapacityRange: &csi.CapacityRange{RequiredBytes: size}, VolumeCapability: v.capability(),
	})
	if err != nil {
		return err
	}
	v.want = size
	if r.GetCapacityBytes() != size || !r.GetNodeExpansionRequired() {
		return fmt.Errorf("ControllerExpandVolume = %v, want %d bytes and the node's part", r, size)
	}
	return nil
}

// checkSize compares the device, the image and, roughly, the filesystem with the
// size that the volume should have.
func (v *volume) checkSize() error {
	if !v.mapped && !v.ephemeral {
		st, err := os.Stat(v.image())
		if err != nil {
			return err
		}
		if st.Size() != v.want {
			return fmt.Errorf("the image has %d bytes, want %d", st.Size(), v.want)
		}
	}
	if v.block() {
		got, err := deviceSize(v.target(0))
		if err == nil && got != v.want {
			err = fmt.Errorf("the device has %d bytes, want %d", got, v.want)
		}
		return err
	}
	if v.fs == "ext4" && v.want != v.size && !canGrowExt4() {
		return nil
	}
	var st syscall.Statfs_t
	if err := syscall.Statfs(v.target(0), &st); err != nil {
		return err
	}
	// Journals, logs and the like take a part of a small filesystem.
	if total := int64(st.Blocks) * st.Bsize; total > v.want || total < v.want*3/5 {
		return fmt.Errorf("the filesystem has %d bytes, its volume %d", total, v.want)
	}
	return nil
}

// places are the offsets of a raw volume that get data.
func (v *volume) places() []int64 { return []int64{0, v.size / 2 &^ 4095, v.size - chunk} }

// chunk is how much data one place or file gets, in bytes.
const chunk = 256 << 10

// pattern is the data number n of the volume.
func (v *volume) pattern(n int) []byte {
	b := make([]byte, chunk)
	fill := rand.NewChaCha8([32]byte(fmt.Appendf(nil, "%16x%16x", v.seed, n)))
	_, _ = fill.Read(b)
	return b
}

// write writes data number n through target 0, and waits until it is on disk.
func (v *volume) write(n int) error {
	if !v.block() {
		return writeFile(filepath.Join(v.target(0), fmt.Sprint("data-", n)), v.pattern(n), 0, os.O_CREATE|os.O_TRUNC)
	}
	for i, at := range v.places() {
		if err := writeFile(v.target(0), v.pattern(n+i), at, 0); err != nil {
			return err
		}
	}
	return nil
}

// read compares the data number n with what was written, through target t.
func (v *volume) read(n, t int) error {
	if !v.block() {
		return compareFile(filepath.Join(v.target(t), fmt.Sprint("data-", n)), v.pattern(n), 0)
	}
	for i, at := range v.places() {
		if err := compareFile(v.target(t), v.pattern(n+i), at); err != nil {
			return err
		}
	}
	return nil
}

func writeFile(path string, data []byte, at int64, flags int) error {
	f, err := os.OpenFile(path, os.O_WRONLY|flags, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(data, at)
	return errors.Join(err, f.Sync(), f.Close())
}

func compareFile(path string, want []byte, at int64) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	got := make([]byte, len(want))
	if _, err := f.ReadAt(got, at); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if !bytes.Equal(got, want) {
		return fmt.Errorf("%s at %d is not what was written", path, at)
	}
	return nil
}

// step fails the test when one step of a volume's life fails.
func (v *volume) step(what string, err error) {
	v.t.Helper()
	if err != nil {
		v.t.Fatalf("%s of %s volume %q: %s", what, v.name(), v.id, explain(err))
	}
}

func (v *volume) name() string { return v.kind.name }

// up creates, stages and publishes the volume at target 0.
func (v *volume) up() *volume {
	v.t.Helper()
	v.step("create", v.create())
	v.step("stage", v.stage())
	v.step("publish", v.publish(0, false))
	return v
}

// down ends the life of a volume that is published at target 0.
func (v *volume) down() {
	v.t.Helper()
	v.step("unpublish", asCO(v, func() error { return v.unpublish(0) }))
	v.step("unstage", asCO(v, v.unstage))
	v.step("delete", asCO(v, v.remove))
}

// asCO repeats a call that was answered ABORTED, as a CO does: on a busy machine
// somebody may just be looking at a device or a mount.
func asCO(v *volume, call func() error) (err error) {
	v.t.Helper()
	eventually(v.t, func() string {
		if err = call(); status.Code(err) == codes.Aborted {
			return explain(err)
		}
		return ""
	})
	return err
}

// wantCode fails the test unless err has the code, and names all of the words.
func wantCode(t interface {
	Helper()
	Errorf(string, ...any)
}, what string, err error, code codes.Code, words ...string,
) {
	t.Helper()
	if status.Code(err) != code {
		t.Errorf("%s: %s; want %s", what, explain(err), code)
		return
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%s: %q does not name %q", what, err, w)
		}
	}
}

// volumes lists the IDs that the driver knows.
func (s *site) volumes() []string {
	s.t.Helper()
	r, err := s.controller().ListVolumes(context.Background(), &csi.ListVolumesRequest{})
	must(s.t, err)
	var ids []string
	for _, e := range r.GetEntries() {
		ids = append(ids, e.GetVolume().GetVolumeId())
	}
	return ids
}
