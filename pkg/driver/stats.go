package driver

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/container-storage-interface/spec/lib/go/csi"
)

// NodeGetVolumeStats reports what a published or staged volume holds: bytes and
// inodes of a filesystem, the size of a raw block device. It takes no lock, so
// that it can be asked while the volume is worked on.
func (s *nodeServer) NodeGetVolumeStats(ctx context.Context, req *csi.NodeGetVolumeStatsRequest) (*csi.NodeGetVolumeStatsResponse, error) {
	d, id, path := s.d, req.GetVolumeId(), req.GetVolumePath()
	switch {
	case id == "":
		return nil, invalidf("volume_id is missing")
	case path == "":
		return nil, invalidf("volume_path is missing")
	}
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		return nil, notFoundf("volume %q: %q does not exist", id, path)
	}
	r, ok := d.state.get(id)
	if !ok {
		return nil, notFoundf("volume %q is not staged on this node", id)
	}
	if err := d.isAt(ctx, r, path); err != nil {
		return nil, fmt.Errorf("volume %q: %w", id, err)
	}
	usage, err := d.usage(ctx, r, path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("volume %q: %w", id, err)
	}
	// No lock was taken: what was measured counts only if the volume is still
	// there, and not the filesystem below.
	if err := d.isAt(ctx, r, path); err != nil {
		return nil, fmt.Errorf("volume %q: %w", id, err)
	}
	return &csi.NodeGetVolumeStatsResponse{Usage: usage}, nil
}

// usage measures the volume at path.
func (d *Driver) usage(ctx context.Context, r stageRecord, path string) ([]*csi.VolumeUsage, error) {
	if r.Block {
		info, err := d.table.Status(ctx, r.Device.ref())
		if err != nil {
			return nil, err
		}
		if r.Device.encrypted() {
			if info.Size, err = d.crypt.Size(r.Device.Mapping); err != nil {
				return nil, err
			}
		}
		return []*csi.VolumeUsage{{Unit: csi.VolumeUsage_BYTES, Total: info.Size}}, nil
	}
	st, err := d.mtab.Stats(path)
	if err != nil {
		return nil, err
	}
	usage := []*csi.VolumeUsage{{Unit: csi.VolumeUsage_BYTES, Total: st.Total, Available: st.Available, Used: st.Used}}
	if st.Inodes > 0 { // btrfs has no fixed number of them
		usage = append(usage, &csi.VolumeUsage{Unit: csi.VolumeUsage_INODES, Total: st.Inodes, Available: st.InodesFree, Used: st.InodesUsed})
	}
	return usage, nil
}
