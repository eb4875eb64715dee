package driver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"google.golang.org/grpc/codes"
	"k8s.io/klog/v2"

	"github.com/csi-loop/csi-loop/pkg/image"
	"github.com/csi-loop/csi-loop/pkg/transfer"
)

// prepareFetch takes the locks for a copy of what another node has, and returns what
// makes it.
func (d *Driver) prepareFetch(want wanted, key string, offer *transfer.Offer) (func(context.Context) error, error) {
	pool, err := d.pool(want.Pool)
	if err != nil {
		return nil, err
	}
	unlock, err := d.lockAll("CreateVolume", key)
	if err != nil {
		return nil, err
	}
	w, err := d.receiving.begin(want.Name)
	if err != nil {
		unlock()
		return nil, err
	}
	return func(ctx context.Context) (err error) {
		defer unlock()
		defer func() { d.receiving.end(w, err) }()
		in := &inflow{offer: offer, flow: w}
		defer in.close()
		start := time.Now()
		v, err := pool.CreateFromInflow(ctx, want.Spec, specOf(offer.Source), in)
		if err != nil {
			return fmt.Errorf("create volume %q in pool %q from %v of another node: %w", want.Name, pool.Name(), want.Source, err)
		}
		klog.FromContext(ctx).Info("Created volume from another node", "volume", v.ID, "pool", v.Pool, "size", v.Size, "filesystem", v.Filesystem,
			"allocation", v.Allocation, "source", v.Source, "bytes", w.done.Load(), "took", time.Since(start).String())
		return nil
	}, nil
}

// specOf is the source as the other node describes it.
func specOf(d transfer.Description) image.Spec {
	return image.Spec{
		Size: d.Size, Filesystem: d.Filesystem, BlockSize: d.BlockSize, MkfsOptions: d.MkfsOptions,
		Encryption: image.Encryption{Type: d.Encryption},
	}
}

// offered judges what another node says of a source, whose word is not taken for
// anything that this node would not make itself.
func offered(o *transfer.Offer) (image.Spec, error) {
	s := specOf(o.Source)
	if s.Filesystem != "" && !slices.Contains(filesystems, s.Filesystem) {
		return s, unavailablef("the source's node speaks of a filesystem %q", s.Filesystem)
	}
	options, err := image.ParseMkfsOptions(s.Filesystem, s.MkfsOptions)
	if err != nil {
		return s, unavailablef("the source's node speaks of mkfs options that are not allowed: %v", err)
	}
	if s.Size <= 0 || s.Size%image.MiB != 0 || s.BlockSize < 512 || s.BlockSize > 4096 || s.BlockSize&(s.BlockSize-1) != 0 || !slices.Equal(options, s.MkfsOptions) {
		return s, unavailablef("the source's node speaks of %d bytes in blocks of %d, mkfs options %q", s.Size, s.BlockSize, s.MkfsOptions)
	}
	if s.Encrypted() && (s.Encryption.Type != image.LUKS2 || s.Size <= image.HeaderSize) {
		return s, unavailablef("the source's node speaks of %d bytes that are encrypted by %q", s.Size, s.Encryption.Type)
	}
	return s, nil
}

// inflow is what comes from another node. It connects when the volume's space is there.
type inflow struct {
	offer *transfer.Offer
	flow  *flow
	from  io.Closer
	r     *transfer.Reader
}

// Next implements image.Inflow.
func (i *inflow) Next(ctx context.Context) (int64, []byte, error) {
	if i.r == nil {
		if err := i.open(ctx); err != nil {
			return 0, nil, inflowError(ctx, err)
		}
	}
	offset, data, err := i.r.Next()
	i.flow.done.Add(int64(len(data)))
	if err != nil && !errors.Is(err, io.EOF) {
		err = inflowError(ctx, err)
	}
	return offset, data, err
}

func (i *inflow) open(ctx context.Context) error {
	from, err := i.offer.Open(ctx)
	if err != nil {
		return fmt.Errorf("%w: no connection for it: %w", transfer.ErrCut, err)
	}
	i.from, i.r = from, transfer.NewReader(from)
	head, err := i.r.Head()
	if err != nil {
		return err
	}
	i.flow.total.Store(head.Bytes)
	was, is := i.offer.Source, head
	if is.Size != was.Size || is.Filesystem != was.Filesystem || is.BlockSize != was.BlockSize || is.Encryption != was.Encryption {
		return abortedf("the source has changed meanwhile, from %+v to %+v", was, is)
	}
	return nil
}

func (i *inflow) close() {
	if i.from != nil {
		_ = i.from.Close()
	}
}

// inflowError is why nothing more comes: that the copy was cancelled is said before
// what that did to its connection.
func inflowError(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if f, ok := errors.AsType[*transfer.SenderError](err); ok {
		return failure(f)
	}
	return err
}

// senderCode is what a sender's code means for the copy. What it says of itself is never
// taken for a word about this node, which Kubernetes would choose another for.
func senderCode(code uint32) codes.Code {
	switch c := codes.Code(code); c {
	case codes.NotFound, codes.FailedPrecondition, codes.Aborted, codes.DataLoss, codes.InvalidArgument:
		return c
	default:
		return codes.Unavailable
	}
}
