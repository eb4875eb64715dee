package driver

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/csi-loop/csi-loop/pkg/image"
	"github.com/csi-loop/csi-loop/pkg/loop"
	"github.com/csi-loop/csi-loop/pkg/mount"
	"github.com/csi-loop/csi-loop/pkg/partition"
)

// source is where the bytes of a volume are, before they are attached: an image
// of a pool, or a range of an image in an allowed directory.
type source struct {
	id      string
	open    func(ctx context.Context, readOnly bool) (*os.File, error)
	mapping loop.Mapping // ReadOnly and Autoclear are decided by the caller; openLocated finds a partition
	fsType  string       // filesystem made in it; "" for raw and for mapped volumes
	raw     bool         // a raw block volume; never set for mapped ones
	thick   bool
	fixed   bool // mapped: never formatted, grown or deleted
	// copied: its filesystem is a copy, and may be smaller than the volume.
	copied bool
	// holds is what the image of an encrypted volume held when its staging began.
	holds content
	// readOnly: no call may write to it.
	readOnly bool
	mapped   *mappedAttributes
	// spec is that of a volume of a pool.
	spec image.Spec
}

// encrypted says whether the image holds the volume encrypted.
func (s source) encrypted() bool { return s.spec.Encrypted() }

// source finds the source of a volume from its ID and the context of the
// request. The context decides only for volumes that no pool knows.
func (d *Driver) source(id string, context map[string]string) (source, error) {
	attributes, err := parseMapped(context)
	if err != nil {
		return source{}, err
	}
	_, _, ours := d.images.Lookup(id)
	switch {
	case attributes != nil && ours:
		return source{}, invalidf("volume %q belongs to a pool, attribute %q cannot be given", id, attrImage)
	case attributes != nil && len(id) > maxMappedID:
		return source{}, invalidf("volume_id: %d bytes are more than %d; give the PersistentVolume a shorter volumeHandle", len(id), maxMappedID)
	case attributes != nil:
		return d.mappedSource(id, attributes), nil
	}
	v, err := d.volume(id)
	if err != nil {
		return source{}, err
	}
	return d.poolSource(v), nil
}

// poolSource describes a volume of a pool.
func (d *Driver) poolSource(v image.Volume) source {
	return source{
		id: v.ID,
		open: func(ctx context.Context, readOnly bool) (*os.File, error) {
			pool, ok := d.images.Pool(v.Pool)
			if !ok {
				return nil, fmt.Errorf("pool %q: %w", v.Pool, image.ErrNotFound)
			}
			return pool.OpenImage(ctx, v.ID, readOnly)
		},
		mapping: loop.Mapping{
			BlockSize: v.BlockSize,
			DirectIO:  directIO(v.DirectIO),
			Discard:   v.Allocation == image.Thin,
			Tag:       poolTag(v.ID),
		},
		fsType: v.Filesystem,
		raw:    v.Filesystem == "",
		thick:  v.Allocation == image.Thick,
		copied: v.Source != nil,
		spec:   v.Spec,
	}
}

// mappedSource describes a byte range of an existing image.
func (d *Driver) mappedSource(id string, m *mappedAttributes) source {
	return source{
		id: id,
		open: func(_ context.Context, readOnly bool) (*os.File, error) {
			return d.dirs.Open(m.Image, readOnly)
		},
		mapping: loop.Mapping{
			Offset: m.Offset, SizeLimit: m.SizeLimit, BlockSize: m.BlockSize,
			DirectIO: directIO(m.DirectIO),
			Tag:      d.mappedTag(id),
		},
		fixed:    true,
		readOnly: m.ReadOnly,
		mapped:   m,
	}
}

// openLocated opens the source and finds its range.
func (s source) openLocated(ctx context.Context, readOnly bool) (source, *os.File, error) {
	f, err := s.open(ctx, readOnly)
	if err != nil {
		return s, nil, err
	}
	if s.mapped == nil || s.mapped.Partition == 0 {
		return s, f, nil
	}
	p, err := findPartition(f, s.mapped.Partition)
	if err != nil {
		return s, nil, errors.Join(fmt.Errorf("image %q: %w", s.mapped.Image, err), f.Close())
	}
	s.mapping.Offset, s.mapping.SizeLimit = p.Offset, p.Length
	return s, f, nil
}

func findPartition(f *os.File, number int) (partition.Partition, error) {
	st, err := f.Stat()
	if err != nil {
		return partition.Partition{}, err
	}
	return partition.Find(f, st.Size(), number)
}

// directIO turns the parameter's word into the mapping's.
func directIO(word string) loop.DirectIO {
	switch word {
	case "on":
		return loop.DirectIOOn
	case "off":
		return loop.DirectIOOff
	default:
		return loop.DirectIOAuto
	}
}

// allows checks that the volume can be used the way a asks for.
func (s source) allows(a access) error {
	switch {
	case s.fixed && a.block && s.mapped.part() && !s.mapped.Exposed:
		// LOOP_SET_STATUS64 wants no capability of who has the node open for writing,
		// which a read-only device does not prevent (fact 108).
		return preconditionf("volume %q is a part of image %q, and a pod with the raw block device could move it over the whole image. "+
			"Use volumeMode Filesystem, an image of its own, or allow that by attribute %q: \"true\"", s.id, s.mapped.Image, attrExposeImage)
	case s.fixed:
		return nil // its content is the operator's affair: raw and mount are both fine
	case a.block && !s.raw:
		return preconditionf("volume %q holds a %s filesystem and cannot be handed out as a raw block device", s.id, s.fsType)
	case !a.block && s.raw:
		return preconditionf("volume %q is a raw block volume and has no filesystem to mount", s.id)
	case !a.block && a.fsType != "" && a.fsType != s.fsType:
		return preconditionf("volume %q holds a %s filesystem, not %s", s.id, s.fsType, a.fsType)
	}
	return nil
}

// superblock reads the filesystem's superblock through the image, inside the
// mapped range. It must not be in use.
func (s source) superblock(f *os.File) (mount.Superblock, error) {
	st, err := f.Stat()
	if err != nil {
		return mount.Superblock{}, fmt.Errorf("volume %q: %w", s.id, err)
	}
	length := st.Size() - s.mapping.Offset
	if s.mapping.SizeLimit > 0 {
		length = min(length, s.mapping.SizeLimit)
	}
	sb, err := mount.ReadSuperblock(io.NewSectionReader(f, s.mapping.Offset, length))
	if err != nil {
		return sb, fmt.Errorf("volume %q: %w", s.id, err)
	}
	return sb, nil
}

// poolTag is what the devices of a pool's volume show as lo_file_name: the volume's
// ID, which holds that of its pool. A tag says which volume a device was bound for;
// that it was bound by us is for the image to prove, where there is one.
func poolTag(id string) string { return shortTag(id) }

// mappedTag is the same for a mapped volume. Its ID is free text, and may equal the
// path that losetup puts there, hence the prefix; and several nodes may have a volume
// of that ID and share a kernel, as nodes that are containers do, hence the node; as
// may two drivers on one node.
func (d *Driver) mappedTag(id string) string {
	node := sha256.Sum256([]byte(d.cfg.NodeID + "/" + d.cfg.Name))
	return shortTag("mapped:" + hex.EncodeToString(node[:4]) + ":" + id)
}

// tagOf is the tag of a volume of either kind.
func (d *Driver) tagOf(id string, mapped bool) string {
	if mapped {
		return d.mappedTag(id)
	}
	return poolTag(id)
}

// shortTag is as much of a tag as lo_file_name has room for, 63 bytes (fact 22), and
// a hash of it all if that is not the whole.
func shortTag(tag string) string {
	const room, head = 63, 40
	if len(tag) <= room {
		return tag
	}
	sum := sha256.Sum256([]byte(tag))
	return tag[:head] + "~" + hex.EncodeToString(sum[:(room-head-1)/2])
}
