package driver

import (
	"context"
	"fmt"
	"sync"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/proto"
	"k8s.io/klog/v2"

	"github.com/csi-loop/csi-loop/pkg/image"
	"github.com/csi-loop/csi-loop/pkg/transfer"
)

// parseSource takes the source of a new volume out of a request.
func parseSource(s *csi.VolumeContentSource) (*image.Source, error) {
	var src image.Source
	switch t := s.GetType().(type) {
	case *csi.VolumeContentSource_Snapshot:
		src.Snapshot = t.Snapshot.GetSnapshotId()
	case *csi.VolumeContentSource_Volume:
		src.Volume = t.Volume.GetVolumeId()
	default:
		return nil, invalidf("volume_content_source: need a snapshot or a volume")
	}
	if src == (image.Source{}) {
		return nil, invalidf("volume_content_source: the ID is missing")
	}
	return &src, nil
}

// csiSource is parseSource back again.
func csiSource(s *image.Source) *csi.VolumeContentSource {
	switch {
	case s == nil, s.Template != "", s.File != "":
		return nil // not asked for as a content source
	case s.Snapshot != "":
		return &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{
			Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: s.Snapshot},
		}}
	}
	return &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Volume{
		Volume: &csi.VolumeContentSource_VolumeSource{VolumeId: s.Volume},
	}}
}

// parseCopy says what to make of a request for a copy. What it does not name is that
// of the source: size, filesystem, block size and mkfs options.
func (d *Driver) parseCopy(req *csi.CreateVolumeRequest, p params, c capacity, src *image.Source, offer *transfer.Offer) (wanted, error) {
	var none wanted
	from, err := d.sourceSpec(req.GetName(), src, offer)
	if err != nil {
		return none, err
	}
	acc, err := parseAccesses(req.GetVolumeCapabilities(), or(p.fsType, from.Filesystem))
	if err != nil {
		return none, err
	}
	// They were for the source's mkfs; a mistake in them is one all the same.
	if _, err := image.ParseMkfsOptions(acc.fsType, p.mkfsOptions); err != nil {
		return none, invalidf("parameter %q: %v", paramMkfsOptions, err)
	}
	if c.required == 0 {
		c.required = from.Content()
		if c.limit > 0 && c.limit < from.Content() {
			return none, outOfRangef("capacity_range: the source has %d bytes, limit_bytes is %d", from.Content(), c.limit)
		}
	}
	if p.encryption.Type != from.Encryption.Type {
		// Said before sizes are compared, which differ by the header.
		return none, invalidf("parameter %q: the source is %s, the class asks for %s, and a copy is what its source is", paramEncrypted, from.Encryption, p.encryption)
	}
	size, err := c.copySize(from)
	if err != nil {
		return none, err
	}
	if !p.hasBlockSize {
		p.blockSize = from.BlockSize
	}
	return wanted{Pool: p.pool, freeze: p.freeze, Spec: image.Spec{
		Name: req.GetName(), Size: size, Allocation: p.allocation, Filesystem: acc.fsType,
		BlockSize: p.blockSize, DirectIO: p.directIO, MkfsOptions: from.MkfsOptions, Source: src, Encryption: p.encryption, Tuning: p.tuning,
	}}, nil
}

// copySize chooses the size of the image of a copy: what is required, rounded up to what a new
// volume with that filesystem would get. So the claim that a source was made for, in
// the same words, is enough for a copy of it. A size below the source's may come of
// it, which is for others to refuse.
func (c capacity) copySize(from image.Spec) (int64, error) {
	size, err := c.size(image.MinimumSize(from.Filesystem))
	grown := smallestGrown[from.Filesystem]
	switch {
	case err != nil || size == from.Content() || size >= grown || from.Content() > grown:
	case size < from.Content(): // from has grown from such a size, to the next one that there is
		size, err = c.size(from.Content())
	default:
		size, err = c.size(grown)
	}
	if err != nil {
		return 0, err
	}
	return withHeader(size, from.Encryption)
}

// sourceSpec describes the source of a copy: by the copy itself, if it exists, as the
// source may be gone by then. What is in a pool of another node is described by the
// offer that came with the call: a pool of that ID that is open here, too, is a copy.
func (d *Driver) sourceSpec(name string, src *image.Source, offer *transfer.Offer) (image.Spec, error) {
	if have, ok := d.images.Find(name); ok && have.Source != nil && *have.Source == *src {
		return have.Spec, nil
	}
	if src.Template != "" {
		return d.templateSpec(src.Template)
	}
	if offer != nil {
		return offered(offer)
	}
	if src.Snapshot != "" {
		s, err := d.oneSnapshot(src.Snapshot)
		return s.Volume, err
	}
	v, err := d.snapshotable(src.Volume)
	return v.Spec, err
}

// createCopy makes a volume from a snapshot or a volume, or finds the one that an
// earlier call of the same name made.
func (d *Driver) createCopy(ctx context.Context, req *csi.CreateVolumeRequest, want wanted, size capacity) (*csi.CreateVolumeResponse, error) {
	// A job may go on, or have ended, for a call that asked for another place.
	if _, ok := d.images.Find(want.Name); !ok {
		if err := d.suits(req, want); err != nil {
			return nil, err
		}
	}
	err := d.copyJob(ctx, req, func(key string) (func(context.Context) error, error) {
		if have, ok := d.images.Find(want.Name); ok {
			// The tuning follows when the job is done, under the volume's lock.
			return func(context.Context) error { return nil }, d.same(req, have, want, size)
		}
		if offer := transfer.OfferOf(ctx); offer != nil {
			return d.prepareFetch(want, key, offer)
		}
		return d.prepareCopy(want, key)
	})
	if err != nil {
		return nil, err
	}
	have, ok := d.images.Find(want.Name)
	if !ok {
		return nil, abortedf("volume %q was removed meanwhile", want.Name)
	}
	if want.Mutable.IsZero() {
		if err := d.same(req, have, want, size); err != nil {
			return nil, err
		}
		return &csi.CreateVolumeResponse{Volume: d.csiVolume(have)}, nil
	}
	unlock, err := d.locks.lock(image.DirName(want.Name), "CreateVolume")
	if err != nil {
		return nil, err
	}
	defer unlock()
	return d.existing(ctx, req, have, want, size)
}

// copyJob joins the job that an earlier call for the same copy started, or starts one.
func (d *Driver) copyJob(ctx context.Context, req *csi.CreateVolumeRequest, prepare func(key string) (func(context.Context) error, error)) error {
	key := image.DirName(req.GetName())
	wish, err := proto.MarshalOptions{Deterministic: true}.Marshal(&csi.CreateVolumeRequest{
		CapacityRange: req.GetCapacityRange(), VolumeCapabilities: req.GetVolumeCapabilities(),
		Parameters: req.GetParameters(), MutableParameters: req.GetMutableParameters(), VolumeContentSource: req.GetVolumeContentSource(),
	})
	if err != nil {
		return err
	}
	return d.jobs.do(ctx, key, "CreateVolume", string(wish), func() (func(context.Context) error, error) { return prepare(key) })
}

// prepareCopy takes the locks for a copy and returns what makes it. That of a source
// volume is given back as soon as its content is fixed. A snapshot needs none: it does
// not change, and what is being copied stays when it is removed.
func (d *Driver) prepareCopy(want wanted, key string) (func(context.Context) error, error) {
	pool, err := d.pool(want.Pool)
	if err != nil {
		return nil, err
	}
	keys := []string{key}
	if want.Source.Volume != "" {
		_, dir, _ := image.ParseID(want.Source.Volume)
		if dir == key { // in another pool, but of the same name: the lock is one for both
			return nil, existsf("volume %q exists as %q", want.Name, want.Source.Volume)
		}
		keys = append(keys, dir)
	}
	unlock, err := d.lockAll("CreateVolume", keys[:1]...)
	if err != nil {
		return nil, err
	}
	unlockSource, err := d.lockAll("CreateVolume", keys[1:]...)
	if err != nil {
		unlock()
		return nil, err
	}
	unlockSource = sync.OnceFunc(unlockSource)
	return func(ctx context.Context) error {
		defer unlock()
		defer unlockSource()
		quiesce, err := d.quiesceSource(ctx, want, unlockSource)
		if err != nil {
			return err
		}
		v, err := pool.CreateFrom(ctx, want.Spec, quiesce)
		if err != nil {
			return fmt.Errorf("create volume %q in pool %q from %v: %w", want.Name, pool.Name(), want.Source, err)
		}
		klog.FromContext(ctx).Info("Created volume", "volume", v.ID, "pool", v.Pool, "size", v.Size, "filesystem", v.Filesystem, "allocation", v.Allocation, "source", v.Source)
		return nil
	}, nil
}

// quiesceSource is quiesceAll for the source of a copy. done is called when its content
// is fixed.
func (d *Driver) quiesceSource(ctx context.Context, want wanted, done func()) (image.Quiesce, error) {
	if want.Source.Volume == "" {
		return nil, nil
	}
	v, err := d.snapshotable(want.Source.Volume)
	if err != nil {
		return nil, err
	}
	quiesce, err := d.quiesceAll(ctx, want.freeze, v)
	if err != nil {
		return nil, err
	}
	if quiesce == nil {
		return func(context.Context) (func() error, error) { return func() error { done(); return nil }, nil }, nil
	}
	return func(ctx context.Context) (func() error, error) {
		resume, err := quiesce(ctx)
		if err != nil {
			return nil, err
		}
		return func() error {
			defer done()
			return resume()
		}, nil
	}, nil
}
