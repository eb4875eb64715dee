package driver

import (
	"context"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/status"
	"k8s.io/klog/v2"

	"github.com/csi-loop/csi-loop/pkg/image"
)

// metadataServer is the CSI SnapshotMetadata service over the snapshots of this node.
type metadataServer struct {
	csi.UnimplementedSnapshotMetadataServer
	d *Driver
}

// mostResults bounds the entries of one message; as many are sent if the caller does
// not say how many.
const mostResults = 4096

// GetMetadataAllocated streams the ranges of a snapshot that may hold data.
func (s *metadataServer) GetMetadataAllocated(req *csi.GetMetadataAllocatedRequest, stream csi.SnapshotMetadata_GetMetadataAllocatedServer) error {
	id := req.GetSnapshotId()
	return s.d.streamed(stream.Context(), "GetMetadataAllocated", func(ctx context.Context) error {
		if id == "" {
			return invalidf("snapshot_id is missing")
		}
		v, err := s.d.oneSnapshot(id)
		if err != nil {
			return err
		}
		c, err := newChunks(req.GetStartingOffset(), req.GetMaxResults(), v.Volume.Content(), func(size int64, blocks []*csi.BlockMetadata) error {
			return stream.Send(&csi.GetMetadataAllocatedResponse{
				BlockMetadataType: csi.BlockMetadataType_VARIABLE_LENGTH, VolumeCapacityBytes: size, BlockMetadata: blocks,
			})
		})
		if err != nil {
			return err
		}
		c.header = v.Volume.Size - v.Volume.Content()
		if err := s.d.images.Allocated(ctx, id, c.header+req.GetStartingOffset(), c.add); err != nil {
			return err
		}
		return c.end()
	})
}

// GetMetadataDelta streams the ranges of a snapshot that may differ from another one of
// the same volume.
func (s *metadataServer) GetMetadataDelta(req *csi.GetMetadataDeltaRequest, stream csi.SnapshotMetadata_GetMetadataDeltaServer) error {
	base, target := req.GetBaseSnapshotId(), req.GetTargetSnapshotId()
	return s.d.streamed(stream.Context(), "GetMetadataDelta", func(ctx context.Context) error {
		switch "" {
		case base:
			return invalidf("base_snapshot_id is missing")
		case target:
			return invalidf("target_snapshot_id is missing")
		}
		if a, b := poolOf(base), poolOf(target); a != b && a != "" && b != "" {
			// Whether it can be reached or not: snapshots are in the pool of their volume.
			return invalidf("snapshots %q and %q are in two pools, and so of two volumes", base, target)
		}
		if _, err := s.d.oneSnapshot(base); err != nil {
			return err
		}
		v, err := s.d.oneSnapshot(target)
		if err != nil {
			return err
		}
		c, err := newChunks(req.GetStartingOffset(), req.GetMaxResults(), v.Volume.Content(), func(size int64, blocks []*csi.BlockMetadata) error {
			return stream.Send(&csi.GetMetadataDeltaResponse{
				BlockMetadataType: csi.BlockMetadataType_VARIABLE_LENGTH, VolumeCapacityBytes: size, BlockMetadata: blocks,
			})
		})
		if err != nil {
			return err
		}
		c.header = v.Volume.Size - v.Volume.Content()
		if err := s.d.images.Delta(ctx, base, target, c.header+req.GetStartingOffset(), c.add); err != nil {
			return err
		}
		return c.end()
	})
}

// poolOf is the pool's part of an ID, "" if it is none that pools make.
func poolOf(id string) string {
	poolID, _, _ := image.ParseID(id)
	return poolID
}

// chunks puts ranges into messages.
type chunks struct {
	size int64 // of the snapshot
	// header is what the image has before the content. Encryption is by blocks, so that
	// one which differs in the image is one that differs in the content.
	header int64
	limit  int
	send   func(size int64, blocks []*csi.BlockMetadata) error
	sent   bool
	next   []*csi.BlockMetadata
}

// newChunks checks what both calls have in common.
func newChunks(from int64, limit int32, size int64, send func(int64, []*csi.BlockMetadata) error) (*chunks, error) {
	switch {
	case from < 0 || from > size:
		return nil, outOfRangef("starting_offset %d is not from 0 to the snapshot's size %d", from, size)
	case limit < 0:
		return nil, invalidf("max_results %d is negative", limit)
	case limit == 0:
		limit = mostResults
	}
	return &chunks{size: size, limit: min(int(limit), mostResults), send: send}, nil
}

func (c *chunks) add(r image.Range) error {
	c.next = append(c.next, &csi.BlockMetadata{ByteOffset: r.Start - c.header, SizeBytes: r.End - r.Start})
	if len(c.next) < c.limit {
		return nil
	}
	return c.flush()
}

func (c *chunks) flush() error {
	err := c.send(c.size, c.next)
	c.sent, c.next = true, nil
	return err
}

// end sends the rest: at least one message, which tells the size.
func (c *chunks) end() error {
	if len(c.next) == 0 && c.sent {
		return nil
	}
	return c.flush()
}

// streamed does for a streaming call what the interceptor does for others.
func (d *Driver) streamed(ctx context.Context, method string, work func(ctx context.Context) error) error {
	log := klog.FromContext(ctx).WithValues("method", method)
	start := time.Now()
	_, err := guarded(klog.NewContext(ctx, log), nil, func(ctx context.Context, _ any) (any, error) { return nil, work(ctx) }, log)
	err = toStatus(err)
	took := time.Since(start).Round(time.Microsecond)
	if d.cfg.Observe != nil {
		d.cfg.Observe(method, status.Code(err).String(), took)
	}
	if err != nil {
		logFailure(log, err, took)
		return err
	}
	log.V(4).Info("Done", "took", took.String())
	return nil
}
