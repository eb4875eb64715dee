package driver

import (
	"slices"

	"github.com/container-storage-interface/spec/lib/go/csi"
)

// defaultFilesystem is made when a request names none.
const defaultFilesystem = "ext4"

// filesystems are the types that volumes can be made with, mounted and grown.
var filesystems = []string{"ext2", "ext3", "ext4", "xfs", "btrfs"}

// accessModes are those that one node can honour. The multi-node writer modes
// are not: the data is on one node.
var accessModes = []csi.VolumeCapability_AccessMode_Mode{
	csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER,
	csi.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY,
	csi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY,
	csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER,
	csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER,
}

// access is a CSI volume capability after validation.
type access struct {
	block  bool
	fsType string   // filesystem asked for; "" for block, or when none was named
	flags  []string // mount flags as given
	mode   csi.VolumeCapability_AccessMode_Mode
}

// readOnly says whether the access mode forbids writing.
func (a access) readOnly() bool {
	return a.mode == csi.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY ||
		a.mode == csi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY
}

// exclusive says whether the volume may be published at one target only.
// SINGLE_NODE_WRITER is counted here because a plugin with the capability
// SINGLE_NODE_MULTI_WRITER is asked for it only by COs that mean one writer.
func (a access) exclusive() bool {
	return a.mode == csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER ||
		a.mode == csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER
}

// parseAccess checks one capability. What it refuses is INVALID_ARGUMENT.
func parseAccess(c *csi.VolumeCapability) (access, error) {
	if c == nil {
		return access{}, invalidf("volume_capability is missing")
	}
	a := access{mode: c.GetAccessMode().GetMode()}
	switch t := c.GetAccessType().(type) {
	case *csi.VolumeCapability_Block:
		a.block = true
	case *csi.VolumeCapability_Mount:
		a.fsType = t.Mount.GetFsType()
		a.flags = t.Mount.GetMountFlags()
		if t.Mount.GetVolumeMountGroup() != "" {
			return a, invalidf("volume_capability: volume_mount_group is not supported: filesystems on a block device have no group option")
		}
	default:
		return a, invalidf("volume_capability: access_type must be block or mount")
	}
	if a.mode == csi.VolumeCapability_AccessMode_UNKNOWN {
		return a, invalidf("volume_capability: access_mode is missing")
	}
	if !slices.Contains(accessModes, a.mode) {
		return a, invalidf("volume_capability: access mode %s cannot be honoured: the data is on one node", a.mode)
	}
	if a.fsType != "" && !slices.Contains(filesystems, a.fsType) {
		return a, invalidf("volume_capability: filesystem %q is not supported, use one of %v", a.fsType, filesystems)
	}
	return a, nil
}

// volumeAccess is what all capabilities of one volume add up to.
type volumeAccess struct {
	block  bool
	fsType string // never "" unless block
}

// parseAccesses checks the capabilities of a volume to be made: one kind of
// access, and one filesystem, which is fallback when none is named.
func parseAccesses(caps []*csi.VolumeCapability, fallback string) (volumeAccess, error) {
	if len(caps) == 0 {
		return volumeAccess{}, invalidf("volume_capabilities is missing")
	}
	var sum volumeAccess
	for i, c := range caps {
		a, err := parseAccess(c)
		if err != nil {
			return sum, err
		}
		if !a.block && a.fsType == "" {
			a.fsType = or(fallback, defaultFilesystem)
		}
		this := volumeAccess{a.block, a.fsType}
		if i > 0 && this != sum {
			return sum, invalidf("volume_capabilities: a volume is either a raw block device or one filesystem, not %s and %s", sum, this)
		}
		sum = this
	}
	return sum, nil
}

func (v volumeAccess) String() string {
	if v.block {
		return "block"
	}
	return v.fsType
}
