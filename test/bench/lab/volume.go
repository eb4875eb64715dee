//go:build linux

package lab

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Volume is a volume of the driver that is published.
type Volume struct {
	ID     string
	Target string // mount point, or device node of a raw block volume
	driver *Driver
	stage  string
}

// Capability is that of a volume with the filesystem, or of a raw "block" volume.
func Capability(kind string) *csi.VolumeCapability {
	c := &csi.VolumeCapability{AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER}}
	if kind == "block" {
		c.AccessType = &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}}
	} else {
		c.AccessType = &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{FsType: kind}}
	}
	return c
}

// NewVolume makes, stages and publishes a volume of size bytes. Remove it.
func (d *Driver) NewVolume(ctx context.Context, name, kind string, size int64, parameters map[string]string) (*Volume, error) {
	c := Capability(kind)
	made, err := d.Controller.CreateVolume(ctx, &csi.CreateVolumeRequest{
		Name: name, CapacityRange: &csi.CapacityRange{RequiredBytes: size}, VolumeCapabilities: []*csi.VolumeCapability{c}, Parameters: parameters,
	})
	if err != nil {
		return nil, err
	}
	v := &Volume{ID: made.GetVolume().GetVolumeId(), driver: d, stage: filepath.Join(d.dir, "stage-"+name)}
	if err := os.MkdirAll(v.stage, 0o700); err != nil {
		return nil, errors.Join(err, v.Remove(ctx))
	}
	_, err = d.Node.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{VolumeId: v.ID, StagingTargetPath: v.stage, VolumeCapability: c, VolumeContext: made.GetVolume().GetVolumeContext()})
	if err == nil {
		v.Target = filepath.Join(d.dir, "target-"+name)
		_, err = d.Node.NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{VolumeId: v.ID, StagingTargetPath: v.stage, TargetPath: v.Target, VolumeCapability: c, VolumeContext: made.GetVolume().GetVolumeContext()})
	}
	if err != nil {
		return nil, errors.Join(err, v.Remove(ctx))
	}
	return v, nil
}

// Remove unpublishes, unstages and deletes the volume, also when ctx has ended.
func (v *Volume) Remove(ctx context.Context) error {
	ctx = context.WithoutCancel(ctx)
	var errs []error
	if v.Target != "" {
		_, err := v.driver.Node.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: v.ID, TargetPath: v.Target})
		errs = append(errs, err)
	}
	err := again(func() error {
		_, err := v.driver.Node.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: v.ID, StagingTargetPath: v.stage})
		return err
	})
	return errors.Join(append(errs, err, v.driver.Delete(ctx, v.ID))...)
}

// again repeats a call that is answered ABORTED, as it is while another program has
// the device open, for a while.
func again(call func() error) (err error) {
	for range 30 {
		if err = call(); status.Code(err) != codes.Aborted {
			return err
		}
		time.Sleep(100 * time.Millisecond)
	}
	return err
}

// Delete deletes a volume that is not staged, also when ctx has ended.
func (d *Driver) Delete(ctx context.Context, id string) error {
	_, err := d.Controller.DeleteVolume(context.WithoutCancel(ctx), &csi.DeleteVolumeRequest{VolumeId: id})
	return err
}
