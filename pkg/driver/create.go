package driver

import (
	"context"
	"fmt"
	"slices"
	"unicode/utf8"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"k8s.io/klog/v2"

	"github.com/csi-loop/csi-loop/pkg/image"
	"github.com/csi-loop/csi-loop/pkg/transfer"
)

// CreateVolume makes a volume, formatted and allocated, or finds the one that
// an earlier call of the same name made.
func (s *controllerServer) CreateVolume(ctx context.Context, req *csi.CreateVolumeRequest) (*csi.CreateVolumeResponse, error) {
	d := s.d
	want, size, err := d.parseCreate(req, transfer.OfferOf(ctx))
	if err != nil {
		if req.GetVolumeContentSource() == nil || codeOf(err) != codes.Unavailable {
			return nil, err
		}
		// The source may be on another node, and its offer have come with an earlier call.
		if err := d.copyJob(ctx, req, func(string) (func(context.Context) error, error) { return nil, err }); err != nil {
			return nil, err
		}
		return s.CreateVolume(ctx, req) // now there is the volume
	}
	if want.Source != nil {
		return d.createCopy(ctx, req, want, size)
	}
	unlock, err := d.locks.lock(image.DirName(want.Name), "CreateVolume")
	if err != nil {
		return nil, err
	}
	defer unlock()

	if have, ok := d.images.Find(want.Name); ok {
		return d.existing(ctx, req, have, want, size)
	}
	if err := d.suits(req, want); err != nil {
		return nil, err
	}
	pool, err := d.pool(want.Pool)
	if err != nil {
		return nil, err
	}
	v, err := pool.Create(ctx, want.Spec)
	if err != nil {
		return nil, fmt.Errorf("create volume %q in pool %q: %w", want.Name, pool.Name(), err)
	}
	klog.FromContext(ctx).Info("Created volume", "volume", v.ID, "pool", v.Pool, "size", v.Size, "filesystem", v.Filesystem, "allocation", v.Allocation)
	return &csi.CreateVolumeResponse{Volume: d.csiVolume(v)}, nil
}

// existing answers with the volume that exists, if it is the one that is wanted. Its
// mutable parameters are not compared, as they may have changed since: those of the
// request are set. A CO that repeats a call has not seen the volume yet.
// Precondition: the caller holds the lock of the volume.
func (d *Driver) existing(ctx context.Context, req *csi.CreateVolumeRequest, have image.Volume, want wanted, size capacity) (*csi.CreateVolumeResponse, error) {
	if err := d.same(req, have, want, size); err != nil {
		return nil, err
	}
	have, err := d.tune(ctx, have, want.Mutable)
	if err != nil {
		return nil, err
	}
	return &csi.CreateVolumeResponse{Volume: d.csiVolume(have)}, nil
}

// same refuses a volume that exists if it is not the one that is wanted.
func (d *Driver) same(req *csi.CreateVolumeRequest, have image.Volume, want wanted, size capacity) error {
	if err := compatible(have, want, size, d.poolName(want.Pool)); err != nil {
		return err
	}
	if err := d.reachable(req.GetAccessibilityRequirements()); err != nil {
		return existsf("volume %q exists as %q, but: %v", want.Name, have.ID, err)
	}
	return nil
}

// suits refuses a volume that does not exist yet and cannot be made on this node:
// RESOURCE_EXHAUSTED.
func (d *Driver) suits(req *csi.CreateVolumeRequest, want wanted) error {
	if err := d.reachable(req.GetAccessibilityRequirements()); err != nil {
		return err
	}
	return d.canEncrypt(want.Encryption)
}

// wanted is a CreateVolume request after validation.
type wanted struct {
	image.Spec
	Pool    string       // as named by the request; "" is the default pool
	Mutable image.Tuning // of mutable_parameters, which win over those of the class
	freeze  snapshotParams
}

// parseCreate checks a CreateVolume request and says what to make.
func (d *Driver) parseCreate(req *csi.CreateVolumeRequest, offer *transfer.Offer) (wanted, capacity, error) {
	var none wanted
	if err := checkName(req.GetName()); err != nil {
		return none, capacity{}, err
	}
	p, err := parseParams(req.GetParameters())
	if err != nil {
		return none, capacity{}, err
	}
	mutable, err := parseMutable(req.GetMutableParameters())
	if err != nil {
		return none, capacity{}, err
	}
	p.tuning = p.tuning.Merge(mutable)
	c, err := parseCapacity(req.GetCapacityRange())
	if err != nil {
		return none, c, err
	}
	if req.GetVolumeContentSource() != nil {
		src, err := parseSource(req.GetVolumeContentSource())
		if err != nil {
			return none, c, err
		}
		want, err := d.parseCopy(req, p, c, src, offer) // a claim's source counts more than its class' template
		want.Mutable = mutable
		return want, c, err
	}
	if p.template != "" {
		src, err := d.templateSource(req.GetName(), p)
		if err != nil {
			return none, c, err
		}
		want, err := d.parseCopy(req, p, c, src, nil)
		want.Mutable = mutable
		return want, c, err
	}
	acc, err := parseAccesses(req.GetVolumeCapabilities(), p.fsType)
	if err != nil {
		return none, c, err
	}
	mkfsOptions, err := image.ParseMkfsOptions(acc.fsType, p.mkfsOptions)
	if err != nil {
		return none, c, invalidf("parameter %q: %v", paramMkfsOptions, err)
	}
	size, err := c.imageSize(image.MinimumSize(acc.fsType), p.encryption)
	if err != nil {
		return none, c, err
	}
	return wanted{Pool: p.pool, Mutable: mutable, Spec: image.Spec{
		Name: req.GetName(), Size: size, Allocation: p.allocation, Filesystem: acc.fsType,
		BlockSize: p.blockSize, DirectIO: p.directIO, MkfsOptions: mkfsOptions, Encryption: p.encryption, Tuning: p.tuning,
	}}, c, nil
}

// checkName applies CSI's rules for names: not empty, at most 128 bytes, UTF-8
// without control characters other than tab, newline and carriage return.
func checkName(name string) error {
	switch {
	case name == "":
		return invalidf("name is missing")
	case len(name) > 128:
		return invalidf("name: %d bytes are more than 128", len(name))
	case !utf8.ValidString(name):
		return invalidf("name %q is not UTF-8", name)
	}
	for _, r := range name {
		if r < 0x20 && r != '\t' && r != '\n' && r != '\r' || r >= 0x7f && r <= 0x9f {
			return invalidf("name %q has the control character U+%04X", name, r)
		}
	}
	return nil
}

// compatible says whether the volume that exists is what a repeated request
// asks for. It is the one place where this is compared.
func compatible(have image.Volume, want wanted, size capacity, pool string) error {
	differs := func(what string, a, b any) error {
		return existsf("volume %q exists as %q with %s %v, the request asks for %v", want.Name, have.ID, what, a, b)
	}
	switch {
	case have.Ephemeral != nil:
		return existsf("volume %q exists as an inline ephemeral volume", want.Name)
	case have.Encryption != want.Encryption:
		return differs("encryption", have.Encryption, want.Encryption)
	case !size.holds(have.Content()):
		return existsf("volume %q exists as %q with %d bytes, the request asks for required_bytes %d and limit_bytes %d", want.Name, have.ID, have.Content(), size.required, size.limit)
	case have.Pool != pool:
		return differs("pool", have.Pool, pool)
	case have.Filesystem != want.Filesystem:
		return differs("filesystem", or(have.Filesystem, "none (raw block)"), or(want.Filesystem, "none (raw block)"))
	case have.Allocation != want.Allocation:
		return differs("allocation", have.Allocation, want.Allocation)
	case have.BlockSize != want.BlockSize:
		return differs("block size", have.BlockSize, want.BlockSize)
	case have.DirectIO != want.DirectIO:
		return differs("direct I/O", have.DirectIO, want.DirectIO)
	case have.Source.String() != want.Source.String():
		return differs("source", have.Source, want.Source)
	case !slices.Equal(have.MkfsOptions, want.MkfsOptions):
		return differs("mkfs options", have.MkfsOptions, want.MkfsOptions)
	}
	return nil
}

func or(s, instead string) string {
	if s == "" {
		return instead
	}
	return s
}
