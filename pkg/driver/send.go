package driver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc/status"
	"k8s.io/klog/v2"

	"github.com/csi-loop/csi-loop/pkg/image"
	"github.com/csi-loop/csi-loop/pkg/transfer"
)

// Sources is what this node sends to others, when the controller asks for it. Errors
// are statuses.
type Sources struct{ d *Driver }

// Sources returns what this node can send.
func (d *Driver) Sources() Sources { return Sources{d} }

// Describe says what a source is, without opening it.
func (s Sources) Describe(_ context.Context, r transfer.Request) (transfer.Description, error) {
	spec, err := s.d.requested(r)
	return describe(spec), toStatus(err)
}

// Send writes the content of a source, or why it cannot be had. A source that is a
// volume stays as it was when Send began, for as long as that takes; its own writers
// wait as for a snapshot.
func (s Sources) Send(ctx context.Context, r transfer.Request, w io.Writer) error {
	logger := klog.FromContext(ctx)
	out := transfer.NewWriter(w)
	ctx, stop := out.Beating(ctx, transfer.BeatEvery)
	defer stop()
	start := time.Now()
	n, err := s.d.send(ctx, r, out)
	if err == nil {
		logger.Info("Sent to another node", "source", r.ID(), "bytes", n, "took", time.Since(start).String())
		return nil
	}
	if cause := context.Cause(ctx); cause != nil {
		err = errors.Join(err, cause)
	}
	err = toStatus(err)
	logger.Error(err, "Cannot send to another node", "source", r.ID(), "bytes", n, "took", time.Since(start).String())
	st := status.Convert(err)
	return errors.Join(err, out.Fail(transfer.SenderError{Code: uint32(st.Code()), Message: st.Message()}))
}

// requested finds the source of a request.
func (d *Driver) requested(r transfer.Request) (image.Spec, error) {
	switch {
	case (r.Snapshot == "") == (r.Volume == ""):
		return image.Spec{}, invalidf("%q and %q: need a snapshot or a volume", r.Snapshot, r.Volume)
	case r.Snapshot != "":
		s, err := d.oneSnapshot(r.Snapshot)
		return s.Volume, err
	}
	v, err := d.snapshotable(r.Volume)
	return v.Spec, err
}

func describe(s image.Spec) transfer.Description {
	return transfer.Description{Size: s.Size, Filesystem: s.Filesystem, BlockSize: s.BlockSize, MkfsOptions: s.MkfsOptions, Encryption: s.Encryption.Type}
}

// send sends a source, and returns how many bytes of data that were.
func (d *Driver) send(ctx context.Context, r transfer.Request, out *transfer.Writer) (n int64, err error) {
	w, err := d.sending.begin(r.ID())
	if err != nil {
		return 0, err
	}
	defer func() { d.sending.end(w, err) }()
	c, err := d.openContent(ctx, r)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	w.total.Store(c.Bytes)
	head := describe(c.Spec)
	head.Bytes = c.Bytes
	if err := out.Head(head); err != nil {
		return 0, err
	}
	b := make([]byte, transfer.MaxPiece)
	said := time.Now()
	for {
		offset, k, err := c.Next(ctx, b)
		switch {
		case errors.Is(err, io.EOF):
			return n, out.End()
		case err != nil:
			return n, err
		}
		if err := out.Data(offset, b[:k]); err != nil {
			return n, err
		}
		n = w.done.Add(int64(k))
		if time.Since(said) >= logEvery {
			said = time.Now()
			klog.FromContext(ctx).Info("Sending to another node", "source", r.ID(), "bytes", n, "of", c.Bytes)
		}
	}
}

// logEvery is the pause between two words about a copy's progress.
const logEvery = 10 * time.Second

// openContent makes a source hold still, and opens it as it was then.
func (d *Driver) openContent(ctx context.Context, r transfer.Request) (*image.Content, error) {
	if _, err := d.requested(r); err != nil {
		return nil, err
	}
	if r.Snapshot != "" {
		return d.images.OpenContent(ctx, image.Source{Snapshot: r.Snapshot}, nil)
	}
	p := defaultSnapshotParams()
	for _, key := range slices.Sorted(maps.Keys(r.Parameters)) {
		if key != paramFreezeTimeout && key != paramCopyInUse {
			continue
		}
		if err := p.set(key, r.Parameters[key]); err != nil {
			return nil, err
		}
	}
	unlock, err := d.lockVolume(r.Volume, "CreateVolume")
	if err != nil {
		return nil, err
	}
	defer unlock()
	v, err := d.snapshotable(r.Volume) // again: it may have grown
	if err != nil {
		return nil, err
	}
	quiesce, err := d.quiesceAll(ctx, p, v)
	if err != nil {
		return nil, err
	}
	c, err := d.images.OpenContent(ctx, image.Source{Volume: r.Volume}, quiesce)
	if err != nil {
		return nil, fmt.Errorf("volume %q: %w", r.Volume, err)
	}
	return c, nil
}

// failure is an error of the sender's in words of this node: those that another node
// would not change stay what they are.
func failure(f *transfer.SenderError) error {
	return &codeError{code: senderCode(f.Code), msg: strings.ToValidUTF8(f.Error(), "?")}
}
