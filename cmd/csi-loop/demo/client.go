package demo

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
)

// client plays the CSI client: an orchestrator such as Kubernetes.
type client struct {
	conn       *grpc.ClientConn
	identity   csi.IdentityClient
	controller csi.ControllerClient
	node       csi.NodeClient
	out        *printer
}

func connect(socket string, out *printer) (*client, error) {
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, err
	}
	return &client{
		conn: conn, out: out,
		identity: csi.NewIdentityClient(conn), controller: csi.NewControllerClient(conn), node: csi.NewNodeClient(conn),
	}, nil
}

// waitReady asks until the driver says that it is ready.
func (c *client) waitReady(ctx context.Context) error {
	for {
		resp, err := call(ctx, c, "Probe", c.identity.Probe, &csi.ProbeRequest{})
		if err != nil || resp.GetReady().GetValue() {
			return err
		}
		if err := pause(ctx, 5*time.Millisecond); err != nil {
			return err
		}
	}
}

// call makes one CSI call and notes its time.
func call[Q, R any](ctx context.Context, c *client, method string, f func(context.Context, Q, ...grpc.CallOption) (R, error), req Q) (R, error) {
	start := time.Now()
	resp, err := f(ctx, req)
	c.out.call(method, subject(req), time.Since(start))
	if err != nil {
		return resp, &callError{method, err}
	}
	return resp, nil
}

// subject is the volume that a request is about, for people.
func subject(req any) string {
	if r, ok := req.(interface{ GetVolumeId() string }); ok {
		pool, dir, ok := strings.Cut(r.GetVolumeId(), ".")
		if !ok {
			return pool // a mapped volume's ID is free text
		}
		return dir
	}
	if r, ok := req.(interface{ GetName() string }); ok {
		return r.GetName()
	}
	return ""
}

// callError is a refused call.
type callError struct {
	method string
	err    error
}

func (e *callError) Error() string {
	s := status.Convert(e.err)
	return fmt.Sprintf("%s: %s: %s", e.method, s.Code(), s.Message())
}

func (e *callError) Unwrap() error { return e.err }

// volume is one volume of the story, and what the demo has asked for so far: it
// is noted before a call, so that a clean-up takes back what half happened.
type volume struct {
	name       string
	capability *csi.VolumeCapability
	context    map[string]string // of a mapped volume
	staging    string

	id      string
	image   string // the file behind it
	made    bool
	staged  bool
	targets []string
}

// cast is all volumes of the story.
type cast struct {
	files  *volume // with the filesystem that can grow here
	full   *volume // a small one, to be filled
	raw    *volume // a raw block device
	mapped *volume // a range of an image that was there before
}

func newCast(dir string, n needs) cast {
	role := func(name string, c *csi.VolumeCapability) *volume {
		return &volume{name: name, capability: c, staging: filepath.Join(dir, "staging", name)}
	}
	// Two publications of one volume need a mode that allows two.
	files := mountCapability(n.fsType(), csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER)
	return cast{
		files:  role("files", files),
		full:   role("small", mountCapability("ext4", csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER)),
		raw:    role("raw", blockCapability()),
		mapped: role("range", mountCapability("ext4", csi.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY)),
	}
}

func (c cast) all() []*volume { return []*volume{c.mapped, c.raw, c.full, c.files} }

func mountCapability(fsType string, mode csi.VolumeCapability_AccessMode_Mode) *csi.VolumeCapability {
	return &csi.VolumeCapability{
		AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{FsType: fsType}},
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: mode},
	}
}

func blockCapability() *csi.VolumeCapability {
	return &csi.VolumeCapability{
		AccessType: &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}},
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
	}
}

// create makes a thick volume.
func (d *demo) create(ctx context.Context, v *volume, size int64) error {
	v.made = true
	resp, err := call(ctx, d.client, "CreateVolume", d.client.controller.CreateVolume, &csi.CreateVolumeRequest{
		Name: v.name, VolumeCapabilities: []*csi.VolumeCapability{v.capability},
		CapacityRange: &csi.CapacityRange{RequiredBytes: size},
	})
	if err != nil {
		return err
	}
	v.id = resp.GetVolume().GetVolumeId()
	_, dir, _ := strings.Cut(v.id, ".")
	v.image = filepath.Join(d.poolDir(), "volumes", dir, "disk.img")
	return nil
}

func (d *demo) stage(ctx context.Context, v *volume) error {
	if err := makeDir(v.staging); err != nil {
		return err
	}
	v.staged = true
	_, err := call(ctx, d.client, "NodeStageVolume", d.client.node.NodeStageVolume, &csi.NodeStageVolumeRequest{
		VolumeId: v.id, StagingTargetPath: v.staging, VolumeCapability: v.capability, VolumeContext: v.context,
	})
	return err
}

// target is where pod gets the volume.
func (d *demo) target(v *volume, pod string) string {
	return filepath.Join(d.dir, "pods", pod, v.name)
}

// publish gives the volume to a pod, and returns where.
func (d *demo) publish(ctx context.Context, v *volume, pod string, readOnly bool) (string, error) {
	target := d.target(v, pod)
	if err := makeDir(filepath.Dir(target)); err != nil {
		return "", err
	}
	v.targets = append(v.targets, target)
	_, err := call(ctx, d.client, "NodePublishVolume", d.client.node.NodePublishVolume, &csi.NodePublishVolumeRequest{
		VolumeId: v.id, StagingTargetPath: v.staging, TargetPath: target,
		VolumeCapability: v.capability, VolumeContext: v.context, Readonly: readOnly,
	})
	return target, err
}

func (d *demo) unpublish(ctx context.Context, v *volume, target string) error {
	_, err := call(ctx, d.client, "NodeUnpublishVolume", d.client.node.NodeUnpublishVolume, &csi.NodeUnpublishVolumeRequest{
		VolumeId: v.id, TargetPath: target,
	})
	if err == nil {
		v.targets = slices.DeleteFunc(v.targets, func(t string) bool { return t == target })
	}
	return err
}

// unstage repeats the call while the device is in use, as an orchestrator does: a
// process with a mount namespace of its own may have a copy of the mount.
func (d *demo) unstage(ctx context.Context, v *volume) error {
	err := patiently(ctx, func() error {
		_, err := call(ctx, d.client, "NodeUnstageVolume", d.client.node.NodeUnstageVolume, &csi.NodeUnstageVolumeRequest{
			VolumeId: v.id, StagingTargetPath: v.staging,
		})
		return err
	})
	if status.Code(err) == codes.Aborted {
		return fmt.Errorf("%w (does a process in another mount namespace hold the mount?)", err)
	}
	if err == nil {
		v.staged = false
	}
	return err
}

func (d *demo) remove(ctx context.Context, v *volume) error {
	_, err := call(ctx, d.client, "DeleteVolume", d.client.controller.DeleteVolume, &csi.DeleteVolumeRequest{VolumeId: v.id})
	if err == nil {
		v.made = false
	}
	return err
}

// detach takes a volume away from everybody.
func (d *demo) detach(ctx context.Context, v *volume) error {
	for _, target := range slices.Clone(v.targets) {
		if err := d.unpublish(ctx, v, target); err != nil {
			return err
		}
	}
	if !v.staged {
		return nil
	}
	return d.unstage(ctx, v)
}

// tearDown takes everything back, in any state of the story. It goes on after an
// error, and repeats what is answered with "not now".
func (d *demo) tearDown(ctx context.Context) error {
	var errs []error
	for _, v := range d.cast.all() {
		if v.id == "" && v.made {
			// The answer of CreateVolume was lost. Asking again finds the volume or makes it.
			errs = append(errs, patiently(ctx, func() error { return d.create(ctx, v, 0) }))
		}
		if v.id == "" {
			continue
		}
		errs = append(errs, patiently(ctx, func() error { return d.detach(ctx, v) }))
		if v.made {
			errs = append(errs, patiently(ctx, func() error { return d.remove(ctx, v) }))
		}
	}
	return errors.Join(errs...)
}

// patience bounds how long a call is repeated.
const patience = 15 * time.Second

// patiently repeats a call that is answered with "not now".
func patiently(ctx context.Context, f func() error) error {
	deadline := time.Now().Add(patience)
	for {
		err := f()
		if status.Code(err) != codes.Aborted || time.Now().After(deadline) || pause(ctx, 50*time.Millisecond) != nil {
			return err
		}
	}
}
