package driver

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"syscall"
	"unicode/utf8"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/wrapperspb"
	"k8s.io/klog/v2"

	"github.com/csi-loop/csi-loop/pkg/image"
	"github.com/csi-loop/csi-loop/pkg/loop"
	"github.com/csi-loop/csi-loop/pkg/transfer"
)

// controllerServer is the CSI Controller service over the pools of this node.
type controllerServer struct {
	csi.UnimplementedControllerServer
	d *Driver
}

// controllerRPCs are the optional calls this service answers.
var controllerRPCs = []csi.ControllerServiceCapability_RPC_Type{
	csi.ControllerServiceCapability_RPC_CREATE_DELETE_VOLUME,
	csi.ControllerServiceCapability_RPC_LIST_VOLUMES,
	csi.ControllerServiceCapability_RPC_GET_CAPACITY,
	csi.ControllerServiceCapability_RPC_EXPAND_VOLUME,
	csi.ControllerServiceCapability_RPC_CREATE_DELETE_SNAPSHOT,
	csi.ControllerServiceCapability_RPC_LIST_SNAPSHOTS,
	csi.ControllerServiceCapability_RPC_GET_SNAPSHOT,
	csi.ControllerServiceCapability_RPC_CLONE_VOLUME,
	csi.ControllerServiceCapability_RPC_GET_VOLUME,
	csi.ControllerServiceCapability_RPC_MODIFY_VOLUME,
	csi.ControllerServiceCapability_RPC_SINGLE_NODE_MULTI_WRITER,
	csi.ControllerServiceCapability_RPC_GET_VOLUME_HEALTH,
	csi.ControllerServiceCapability_RPC_LIST_VOLUME_HEALTH,
}

// ControllerCapabilities are the optional calls of the Controller service.
func ControllerCapabilities() []csi.ControllerServiceCapability_RPC_Type {
	return slices.Clone(controllerRPCs)
}

// ControllerGetCapabilities lists controllerRPCs.
func (s *controllerServer) ControllerGetCapabilities(context.Context, *csi.ControllerGetCapabilitiesRequest) (*csi.ControllerGetCapabilitiesResponse, error) {
	caps := make([]*csi.ControllerServiceCapability, len(controllerRPCs))
	for i, t := range controllerRPCs {
		caps[i] = &csi.ControllerServiceCapability{Type: &csi.ControllerServiceCapability_Rpc{Rpc: &csi.ControllerServiceCapability_RPC{Type: t}}}
	}
	return &csi.ControllerGetCapabilitiesResponse{Capabilities: caps}, nil
}

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

// pool finds the pool that a request means: INVALID_ARGUMENT when there is none of
// that name, UNAVAILABLE when it cannot be used now.
func (d *Driver) pool(named string) (*image.Pool, error) {
	name := d.poolName(named)
	if pool, ok := d.images.Pool(name); ok {
		return pool, nil
	}
	if d.images.Configured(name) {
		return nil, unavailablef("pool %q of node %q cannot be used now: see the node's storage health, or its log", name, d.cfg.NodeID)
	}
	return nil, invalidf("parameter %q: there is no pool %q on node %q", paramPool, name, d.cfg.NodeID)
}

// volume finds a volume of a pool: NOT_FOUND only when no pool can have it.
func (d *Driver) volume(id string) (image.Volume, error) {
	v, err := d.images.Get(id)
	if err == nil {
		return v, nil
	}
	if _, _, known := d.images.Lookup(id); known {
		v, err = d.images.Get(id) // its pool may have come in a moment ago
	} else if err := d.foreignPool(id); err != nil {
		return v, err
	}
	if err != nil {
		return v, fmt.Errorf("volume %q: %w", id, err)
	}
	return v, nil
}

// poolName is the pool that a request means.
func (d *Driver) poolName(named string) string { return or(named, d.cfg.DefaultPool) }

// reachable says whether a volume of this node satisfies the topology asked
// for: RESOURCE_EXHAUSTED when not, the code that makes Kubernetes choose anew.
func (d *Driver) reachable(t *csi.TopologyRequirement) error {
	if len(t.GetRequisite()) == 0 || slices.ContainsFunc(t.GetRequisite(), d.matches) {
		return nil
	}
	return exhaustedf("node %q is in none of the topologies asked for, its segment is %s=%s", d.cfg.NodeID, d.topologyKey(), d.cfg.NodeID)
}

// matches says whether this node lies in a topology.
func (d *Driver) matches(t *csi.Topology) bool {
	for key, value := range t.GetSegments() {
		if key != d.topologyKey() || value != d.cfg.NodeID {
			return false
		}
	}
	return true
}

// topology is this node's.
func (d *Driver) topology() *csi.Topology {
	return &csi.Topology{Segments: map[string]string{d.topologyKey(): d.cfg.NodeID}}
}

// csiVolume is a volume in CSI's words.
func (d *Driver) csiVolume(v image.Volume) *csi.Volume {
	return &csi.Volume{
		VolumeId: v.ID, CapacityBytes: v.Content(), ContentSource: csiSource(v.Source),
		AccessibleTopology: []*csi.Topology{d.topology()},
	}
}

// DeleteVolume removes a volume. One that is unknown is gone already; one that
// is staged or attached is refused.
func (s *controllerServer) DeleteVolume(ctx context.Context, req *csi.DeleteVolumeRequest) (*csi.DeleteVolumeResponse, error) {
	d, id := s.d, req.GetVolumeId()
	if id == "" {
		return nil, invalidf("volume_id is missing")
	}
	pool, _, ok := d.images.Lookup(id)
	if !ok {
		return &csi.DeleteVolumeResponse{}, d.foreignPool(id)
	}
	unlock, err := d.lockVolume(id, "DeleteVolume")
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := d.removable(ctx, pool, id); err != nil {
		return nil, err
	}
	klog.FromContext(ctx).Info("Removing volume", "volume", id, "pool", pool.Name())
	if err := pool.Remove(ctx, id); err != nil {
		return nil, fmt.Errorf("delete volume %q: %w", id, err)
	}
	if err := d.state.drop(id); err != nil { // a staging that came to nothing
		return nil, err
	}
	return &csi.DeleteVolumeResponse{}, nil
}

// foreignPool tells an ID that no pool ever made, which is a volume that does
// not exist (nil), from one of a pool that is not configured here: that volume
// may well exist, and must not be reported as gone.
func (d *Driver) foreignPool(id string) error {
	if poolID, _, ok := image.ParseID(id); ok {
		return unavailablef("volume %q belongs to the pool with ID %q, which is not configured on node %q", id, poolID, d.cfg.NodeID)
	}
	return nil
}

// removable refuses the removal of a volume that is in use.
func (d *Driver) removable(ctx context.Context, pool *image.Pool, id string) error {
	if v, err := d.images.Get(id); err == nil && v.Ephemeral != nil {
		return preconditionf("volume %q is the inline ephemeral volume of a pod and goes with it", id)
	}
	if r, ok := d.state.get(id); ok {
		live, err := d.stagingAlive(ctx, r)
		if err != nil {
			return err
		}
		if live {
			return preconditionf("volume %q is staged at %q", id, r.StagingPath)
		}
		left, err := d.publicationsLeft(ctx, r)
		if err != nil {
			return err
		}
		if len(left) > 0 {
			return preconditionf("volume %q is published at %q", id, left)
		}
	}
	return d.unattached(ctx, pool, id)
}

// unattached refuses a volume whose image a loop device shows.
func (d *Driver) unattached(ctx context.Context, pool *image.Pool, id string) error {
	f, err := pool.OpenImage(ctx, id, true)
	switch {
	case errors.Is(err, image.ErrNotFound):
		return nil
	case errors.Is(err, image.ErrDamaged):
		return d.unattachedDamaged(ctx, pool, id) // it must still be deletable
	case err != nil:
		return err
	}
	defer f.Close()
	bound, err := d.table.Find(ctx, f)
	if err != nil {
		return err
	}
	if len(bound) > 0 {
		return preconditionf("volume %q is attached to %s", id, bound[0].Path)
	}
	return nil
}

// unattachedDamaged is unattached for a volume whose image is not what it should
// be: a device may show what stands in its place.
func (d *Driver) unattachedDamaged(ctx context.Context, pool *image.Pool, id string) error {
	dev, ino, err := pool.ImageInode(ctx, id)
	if errors.Is(err, image.ErrNotFound) {
		return nil // no file that could be attached
	}
	if errors.Is(err, syscall.ELOOP) || errors.Is(err, syscall.ENOTDIR) {
		return nil // a link in the place of the directory: removal takes the link
	}
	if err != nil {
		return err
	}
	all, err := d.table.FindAll(ctx)
	if err != nil {
		return err
	}
	for _, info := range all {
		if info.Image == (loop.FileID{Dev: dev, Ino: ino}) {
			return preconditionf("volume %q is attached to %s", id, info.Path)
		}
	}
	return nil
}

// ValidateVolumeCapabilities confirms what a volume can do; what it cannot is an
// answer without confirmation, not an error.
func (s *controllerServer) ValidateVolumeCapabilities(_ context.Context, req *csi.ValidateVolumeCapabilitiesRequest) (*csi.ValidateVolumeCapabilitiesResponse, error) {
	switch {
	case req.GetVolumeId() == "":
		return nil, invalidf("volume_id is missing")
	case len(req.GetVolumeCapabilities()) == 0:
		return nil, invalidf("volume_capabilities is missing")
	}
	src, err := s.d.source(req.GetVolumeId(), req.GetVolumeContext())
	if err != nil {
		return nil, err
	}
	if no := s.d.confirm(src, req); no != nil {
		return &csi.ValidateVolumeCapabilitiesResponse{Message: no.Error()}, nil //nolint:nilerr // not confirmed is an answer
	}
	return &csi.ValidateVolumeCapabilitiesResponse{Confirmed: &csi.ValidateVolumeCapabilitiesResponse_Confirmed{
		VolumeContext:      req.GetVolumeContext(),
		VolumeCapabilities: req.GetVolumeCapabilities(),
		Parameters:         req.GetParameters(),
		MutableParameters:  req.GetMutableParameters(),
	}}, nil
}

// confirm returns why the volume cannot do what is asked, or nil.
func (d *Driver) confirm(src source, req *csi.ValidateVolumeCapabilitiesRequest) error {
	for _, c := range req.GetVolumeCapabilities() {
		a, err := parseAccess(c)
		if err != nil {
			return err
		}
		if err := src.allows(a); err != nil {
			return err
		}
	}
	if _, err := parseMutable(req.GetMutableParameters()); err != nil {
		return err
	}
	if len(req.GetMutableParameters()) > 0 && src.fixed {
		return invalidf("a mapped volume has no mutable parameters")
	}
	if len(req.GetParameters()) == 0 {
		return nil
	}
	p, err := parseParams(req.GetParameters())
	if err != nil {
		return err
	}
	v, err := d.images.Get(src.id)
	if err != nil {
		return err
	}
	want := wanted{Pool: p.pool, Spec: v.Spec}
	want.Allocation, want.BlockSize, want.DirectIO, want.Encryption = p.allocation, p.blockSize, p.directIO, p.encryption
	if p.fsType != "" && v.Filesystem != "" {
		want.Filesystem = p.fsType
	}
	if want.MkfsOptions, err = image.ParseMkfsOptions(v.Filesystem, p.mkfsOptions); err != nil {
		return err
	}
	return compatible(v, want, capacity{}, d.poolName(p.pool))
}

// GetCapacity says how large one more volume may be, in the pool and with the
// allocation asked for.
func (s *controllerServer) GetCapacity(_ context.Context, req *csi.GetCapacityRequest) (*csi.GetCapacityResponse, error) {
	p, err := parseParams(req.GetParameters())
	if err != nil {
		return nil, err
	}
	fsType := p.fsType
	if caps := req.GetVolumeCapabilities(); len(caps) > 0 {
		acc, err := parseAccesses(caps, fsType)
		if err != nil {
			return nil, err
		}
		fsType = acc.fsType
	}
	if t := req.GetAccessibleTopology(); t != nil && !s.d.matches(t) {
		return &csi.GetCapacityResponse{}, nil
	}
	pool, ok := s.d.images.Pool(s.d.poolName(p.pool))
	if !ok {
		// Another node may have a pool of that name; this one has no room in it.
		return &csi.GetCapacityResponse{}, nil
	}
	if p.template != "" {
		if _, err := pool.Template(p.template); err != nil {
			// Another node may have the template; this one can make no volume of it.
			return &csi.GetCapacityResponse{}, nil //nolint:nilerr // as above
		}
	}
	free := pool.Capacity(p.allocation)
	if p.encryption.Type != "" {
		if err := s.d.canEncrypt(p.encryption); err != nil {
			// Another node may have dm-crypt.
			return &csi.GetCapacityResponse{}, nil //nolint:nilerr // as above
		}
		free = max(0, free-image.HeaderSize)
	}
	return &csi.GetCapacityResponse{
		AvailableCapacity: free,
		MaximumVolumeSize: wrapperspb.Int64(free),
		MinimumVolumeSize: wrapperspb.Int64(max(image.MinimumSize(fsType), sizeUnit)),
	}, nil
}

// ControllerExpandVolume makes the image larger. The filesystem follows in
// NodeExpandVolume, or when the volume is staged next.
func (s *controllerServer) ControllerExpandVolume(ctx context.Context, req *csi.ControllerExpandVolumeRequest) (*csi.ControllerExpandVolumeResponse, error) {
	d, id := s.d, req.GetVolumeId()
	switch {
	case id == "":
		return nil, invalidf("volume_id is missing")
	case req.GetCapacityRange() == nil:
		return nil, invalidf("capacity_range is missing")
	}
	c, err := parseCapacity(req.GetCapacityRange())
	if err != nil {
		return nil, err
	}
	unlock, err := d.lockVolume(id, "ControllerExpandVolume")
	if err != nil {
		return nil, err
	}
	defer unlock()
	v, err := d.volume(id)
	if err != nil {
		return nil, err
	}
	if req.GetVolumeCapability() != nil {
		a, err := parseAccess(req.GetVolumeCapability())
		if err != nil {
			return nil, err
		}
		if err := d.poolSource(v).allows(a); err != nil {
			return nil, invalidf("%v", err)
		}
	}
	if v, err = d.growImage(ctx, v, c); err != nil {
		return nil, err
	}
	return &csi.ControllerExpandVolumeResponse{CapacityBytes: v.Content(), NodeExpansionRequired: true}, nil
}

// smallestGrown is the smallest size, in bytes, that the kernel resizes a mounted
// filesystem to, where that is more than what one can be made with. An image must
// not grow to where its filesystem cannot follow: it grows to there at least.
var smallestGrown = map[string]int64{"btrfs": 256 << 20}

// growImage makes the image satisfy the range. A volume is never made smaller.
func (d *Driver) growImage(ctx context.Context, v image.Volume, c capacity) (image.Volume, error) {
	if c.limit > 0 && v.Content() > c.limit {
		return v, outOfRangef("volume %q has %d bytes, more than limit_bytes %d, and cannot shrink", v.ID, v.Content(), c.limit)
	}
	if c.required <= v.Content() {
		return v, nil
	}
	size, err := c.imageSize(smallestGrown[v.Filesystem], v.Encryption)
	if err != nil {
		return v, err
	}
	pool, err := d.pool(v.Pool)
	if err != nil {
		return v, err
	}
	grown, err := pool.Grow(ctx, v.ID, size)
	if err != nil {
		return v, fmt.Errorf("expand volume %q to %d bytes: %w", v.ID, size, err)
	}
	klog.FromContext(ctx).Info("Grew image", "volume", v.ID, "from", v.Size, "size", grown.Size)
	return grown, nil
}

// ControllerGetVolume describes one volume.
func (s *controllerServer) ControllerGetVolume(_ context.Context, req *csi.ControllerGetVolumeRequest) (*csi.ControllerGetVolumeResponse, error) {
	if req.GetVolumeId() == "" {
		return nil, invalidf("volume_id is missing")
	}
	v, err := s.d.volume(req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	return &csi.ControllerGetVolumeResponse{Volume: s.d.csiVolume(v), Status: &csi.ControllerGetVolumeResponse_VolumeStatus{}}, nil
}
