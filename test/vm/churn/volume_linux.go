package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/csi-loop/csi-loop/test/vm/plan"
)

func (c *churn) controller() csi.ControllerClient  { return csi.NewControllerClient(c.conn) }
func (c *churn) groups() csi.GroupControllerClient { return csi.NewGroupControllerClient(c.conn) }
func (c *churn) node() csi.NodeClient              { return csi.NewNodeClient(c.conn) }

// id is the ID of what has a name: all names are plain, and so their own directories.
func (c *churn) id(name string) string { return c.poolID + "." + name }

// call repeats a call as a CO does, as long as the driver asks for that.
func call(f func(ctx context.Context) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	for {
		err := f(ctx)
		switch status.Code(err) {
		case codes.Aborted, codes.Unavailable:
		default:
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// copying lets volumes be copied while they are in use, on any pool, however slow this
// machine is.
var copying = map[string]string{"copyInUse": "true", "freezeTimeout": "5m"}

// volume is one volume of a kind: "ext4", "block" or "thin".
type volume struct {
	*churn
	kind, name string
	// areas is how many were copied into it; its own is behind them.
	areas int64
	next  int64 // number of the next write
}

func (v *volume) capability() *csi.VolumeCapability {
	c := &csi.VolumeCapability{AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER}}
	if v.kind == "block" {
		c.AccessType = &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}}
	} else {
		c.AccessType = &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{FsType: "ext4"}}
	}
	return c
}

func (v *volume) staging() string { return work + "/stage/" + v.name }
func (v *volume) target() string  { return work + "/target/" + v.name }

// file is where the records are.
func (v *volume) file() string {
	if v.kind == "block" {
		return v.target()
	}
	return v.target() + "/" + records
}

// records is the name of the file in volumes with a filesystem.
const records = "records"

func (v *volume) attach() error {
	for _, dir := range []string{v.staging(), filepath.Dir(v.target())} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return err
		}
	}
	return call(func(ctx context.Context) error {
		_, err := v.node().NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{VolumeId: v.id(v.name), StagingTargetPath: v.staging(), VolumeCapability: v.capability()})
		if err == nil {
			_, err = v.node().NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{
				VolumeId: v.id(v.name), StagingTargetPath: v.staging(), TargetPath: v.target(), VolumeCapability: v.capability(),
			})
		}
		return err
	})
}

func (v *volume) detach() error {
	return call(func(ctx context.Context) error {
		_, err := v.node().NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: v.id(v.name), TargetPath: v.target()})
		if err == nil {
			_, err = v.node().NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: v.id(v.name), StagingTargetPath: v.staging()})
		}
		return err
	})
}

// create makes the volume, of a snapshot or a volume if from says so.
func (v *volume) create(size int64, from *csi.VolumeContentSource) error {
	parameters := map[string]string{}
	if v.kind == "thin" {
		parameters["allocation"] = "thin"
	}
	if from.GetVolume() != nil {
		maps.Copy(parameters, copying)
	}
	return call(func(ctx context.Context) error {
		r, err := v.controller().CreateVolume(ctx, &csi.CreateVolumeRequest{
			Name: v.name, CapacityRange: &csi.CapacityRange{RequiredBytes: size}, VolumeCapabilities: []*csi.VolumeCapability{v.capability()},
			Parameters: parameters, VolumeContentSource: from,
		})
		if err == nil && r.GetVolume().GetVolumeId() != v.id(v.name) {
			err = fmt.Errorf("its ID is %q", r.GetVolume().GetVolumeId())
		}
		return err
	})
}

func (v *volume) expand(size int64) error {
	capacity := &csi.CapacityRange{RequiredBytes: size}
	return call(func(ctx context.Context) error {
		_, err := v.controller().ControllerExpandVolume(ctx, &csi.ControllerExpandVolumeRequest{VolumeId: v.id(v.name), CapacityRange: capacity, VolumeCapability: v.capability()})
		if err == nil {
			_, err = v.node().NodeExpandVolume(ctx, &csi.NodeExpandVolumeRequest{
				VolumeId: v.id(v.name), VolumePath: v.target(), StagingTargetPath: v.staging(), CapacityRange: capacity, VolumeCapability: v.capability(),
			})
		}
		return err
	})
}

// write writes one record and waits until it is on the disk.
func (v *volume) write(n int64) error {
	f, err := os.OpenFile(v.file(), os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(plan.Record(v.name, n), v.areas*plan.AreaSize+plan.Offset(n))
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil && n == 0 && v.kind != "block" {
		err = syncDir(v.target()) // the name of a new file
	}
	return err
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// snapshot takes a snapshot of a volume of that size.
func (v *volume) snapshot(name string, size int64) error {
	return call(func(ctx context.Context) error {
		r, err := v.controller().CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: name, SourceVolumeId: v.id(v.name), Parameters: copying})
		if s := r.GetSnapshot(); err == nil && (!s.GetReadyToUse() || s.GetSnapshotId() != v.id(name) || s.GetSizeBytes() != size) {
			err = fmt.Errorf("CreateSnapshot = %v, want %d bytes, ready", r, size)
		}
		return err
	})
}

// group takes a group snapshot of volumes.
func (c *churn) group(name string, volumes []string) error {
	var sources []string
	for _, v := range volumes {
		sources = append(sources, c.id(v))
	}
	return call(func(ctx context.Context) error {
		r, err := c.groups().CreateVolumeGroupSnapshot(ctx, &csi.CreateVolumeGroupSnapshotRequest{Name: name, SourceVolumeIds: sources, Parameters: copying})
		if g := r.GetGroupSnapshot(); err == nil && (!g.GetReadyToUse() || g.GetGroupSnapshotId() != c.id(name) || len(g.GetSnapshots()) != len(volumes)) {
			err = fmt.Errorf("CreateVolumeGroupSnapshot = %v, want snapshots of %q", r, volumes)
		}
		return err
	})
}

// remove removes what was made by an operation.
func (c *churn) remove(op, name string) error {
	return call(func(ctx context.Context) (err error) {
		switch op {
		case plan.OpSnapshot:
			_, err = c.controller().DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: c.id(name)})
		case plan.OpGroup:
			_, err = c.groups().DeleteVolumeGroupSnapshot(ctx, &csi.DeleteVolumeGroupSnapshotRequest{GroupSnapshotId: c.id(name)})
		default:
			_, err = c.controller().DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: c.id(name)})
		}
		return err
	})
}

// ofSnapshot and ofVolume are sources of a copy.
func (c *churn) ofSnapshot(name string) *csi.VolumeContentSource {
	return &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{
		Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: c.id(name)},
	}}
}

func (c *churn) ofVolume(name string) *csi.VolumeContentSource {
	return &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Volume{
		Volume: &csi.VolumeContentSource_VolumeSource{VolumeId: c.id(name)},
	}}
}

// name is id back again.
func (c *churn) name(id string) string { return strings.TrimPrefix(id, c.poolID+".") }
