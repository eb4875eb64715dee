package driver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"k8s.io/klog/v2"

	"github.com/csi-loop/csi-loop/pkg/crypt"
	"github.com/csi-loop/csi-loop/pkg/image"
	"github.com/csi-loop/csi-loop/pkg/loop"
)

// content is what an encrypted image holds.
type content int

const (
	contentNone       content = iota // nothing was ever written behind the place of a header
	contentUnfinished                // what an interrupted first staging left; no tenant saw it
	contentOwn                       // the volume's
	contentCopied                    // a copy of another volume's, with that one's identity
	contentDamaged                   // data, and no header that could open it
)

// isNew says whether no tenant ever wrote to it.
func (c content) isNew() bool { return c == contentNone || c == contentUnfinished }

// contentOf looks what an image holds. Only what is certain counts as new: a header
// that says so itself in each copy that is whole, or no header at all and nothing but zeros
// behind the place of one. Without a header there is no key, so even data that such zeros
// once were could not be read by anybody.
func contentOf(ctx context.Context, volumeID string, f *os.File) (content, error) {
	copies, err := crypt.ReadCopies(f)
	switch {
	case err == nil && copies[0].Label == labelUnfinished:
		if copies[len(copies)-1].Label != labelUnfinished {
			return contentDamaged, nil // a label is never taken back
		}
		return contentUnfinished, nil
	case err == nil && copies[0].Label == labelOf(volumeID):
		return contentOwn, nil
	case err == nil:
		return contentCopied, nil
	case errors.Is(err, crypt.ErrForeign):
		return contentDamaged, nil // somebody else's, whatever is behind it
	case !errors.Is(err, crypt.ErrNoHeader):
		return contentDamaged, err
	}
	blank, err := image.Blank(ctx, f, image.HeaderSize)
	if err != nil || !blank {
		return contentDamaged, err
	}
	return contentNone, nil
}

// errHeader says that no header opens what an image holds.
var errHeader = fmt.Errorf("%w: its LUKS header is damaged, missing, or not csi-loop's, and there may be data behind it", image.ErrDamaged)

// unlock opens the mapping of a volume whose device is attached as b says, makes what is
// in a new one, and gives a copy an identity of its own. shown is where a mapping that is
// there already is mounted. held keeps the mapping, from before anything is done with it;
// the caller closes it. After an error there is none, and a mapping may be left.
func (d *Driver) unlock(ctx context.Context, src source, want stageRecord, f *os.File, b binding, shown []string, info loop.Info, passphrase []byte) (_ binding, held io.Closer, err error) {
	holds := src.holds // as contentOf has it
	if b.encrypted() { // a crash left it, or the record was lost
		switch {
		case holds == contentOwn, holds == contentCopied && info.ReadOnly:
			return d.takeUp(ctx, src, want, f, b, info, passphrase)
		case holds == contentNone, holds == contentDamaged:
			// A header opened it, so this one was lost since. The mapping has what is left
			// of the key, and stays.
			return b, nil, fmt.Errorf("%w; %s is open all the same: save what it shows", errHeader, b.Mapping.Path)
		case len(shown) > 0:
			// A node that is shown is no user: the mapping would go, and its number with it,
			// to the next volume that somebody opens.
			return b, nil, abortedf("%s is at %q, and the header of the volume says that nobody was given it", b.Mapping.Path, shown)
		default:
			if err := errors.Join(d.letGo(info.Ref), d.crypt.Close(ctx, b.Mapping)); err != nil {
				return b, nil, err
			}
		}
	}
	m, held, err := d.openMapping(ctx, src, info, passphrase, holds)
	if err != nil {
		return b, nil, err
	}
	if holds != contentOwn && !info.ReadOnly {
		err = d.furnish(ctx, src, want, info, m, holds)
	}
	return d.proven(f, want, b, m, held, err)
}

// takeUp is unlock for a mapping that is there already.
func (d *Driver) takeUp(ctx context.Context, src source, want stageRecord, f *os.File, b binding, info loop.Info, passphrase []byte) (binding, io.Closer, error) {
	held, err := d.crypt.Hold(b.Mapping)
	if err != nil {
		return b, nil, err
	}
	return d.proven(f, want, b, b.Mapping, held, d.whose(d.crypt.Verify(ctx, info.Path, passphrase), src))
}

// proven ends unlock: with the binding of a mapping that is held if err is nil and the
// header is its own, or without holding it.
func (d *Driver) proven(f *os.File, want stageRecord, b binding, m crypt.Mapping, held io.Closer, err error) (binding, io.Closer, error) {
	if err == nil {
		err = provenOwn(f, m, want)
	}
	if err == nil {
		b, err = d.mapped(b, m)
	}
	if err != nil {
		return b, nil, errors.Join(err, held.Close())
	}
	return b, held, nil
}

// openMapping opens what an image holds, under a header that it makes if that is new, and
// holds it.
func (d *Driver) openMapping(ctx context.Context, src source, info loop.Info, passphrase []byte, holds content) (crypt.Mapping, io.Closer, error) {
	open := crypt.OpenSpec{Name: mappingName(info.Ref), Discard: src.spec.Encryption.Discard, ReadOnly: info.ReadOnly}
	switch {
	case holds == contentDamaged:
		return crypt.Mapping{}, nil, errHeader
	case holds.isNew() && info.ReadOnly:
		return crypt.Mapping{}, nil, preconditionf("nothing was written to the volume yet: it has to be staged for writing once")
	case holds.isNew():
		err := d.crypt.Format(ctx, info.Path, passphrase, crypt.FormatSpec{Offset: image.HeaderSize, BlockSize: src.spec.BlockSize, Label: labelUnfinished})
		if err != nil {
			return crypt.Mapping{}, nil, err
		}
	}
	m, err := d.crypt.Open(ctx, info.Path, passphrase, open)
	if err != nil {
		return m, nil, d.whose(err, src)
	}
	held, err := d.crypt.Hold(m)
	if err != nil {
		return m, nil, err
	}
	if err := d.checkSize(m, info.Size-image.HeaderSize); err != nil {
		return m, nil, errors.Join(err, held.Close())
	}
	return m, held, nil
}

// provenOwn reads the header once more before a volume is handed out: it is the one that
// opened the mapping, and if the volume can be written to it says that the content is the
// volume's. What it does not say would be made anew by the next staging. So would it be by
// one that finds the newer copy of the header damaged, if the older one still says that
// nobody was given the volume.
func provenOwn(f *os.File, m crypt.Mapping, want stageRecord) error {
	copies, err := crypt.ReadCopies(f)
	if err != nil {
		return fmt.Errorf("%w: after it opened the volume: %w", image.ErrDamaged, err)
	}
	h, written := copies[0], !want.Block || !want.ReadOnly
	switch {
	case !m.Of(h):
		return fmt.Errorf("%w: its LUKS header was replaced by another one while it was opened", image.ErrDamaged)
	case written && h.Label != labelOf(want.VolumeID):
		return fmt.Errorf("%w: its LUKS header has the label %q and not its own", image.ErrDamaged, h.Label)
	case written && copies[len(copies)-1].Label == labelUnfinished:
		return fmt.Errorf("%w: the second copy of its LUKS header still has the label %q", image.ErrDamaged, labelUnfinished)
	}
	return nil
}

// whose says, of a passphrase that does not open, whose it has to be.
func (d *Driver) whose(err error, src source) error {
	if !errors.Is(err, crypt.ErrPassphrase) {
		return err
	}
	if src.copied {
		return fmt.Errorf("%w: the node-stage secret does not open the volume; a copy opens with the passphrase of its source (%v)", err, src.spec.Source)
	}
	return fmt.Errorf("%w: the node-stage secret does not open the volume; it needs the one that it was staged with first", err)
}

// furnish makes the filesystem in a new mapping, or makes that of a copy one of its own.
// The label comes last and makes it so: until then the next staging begins again. So it
// goes on when ctx ends: a large filesystem may take longer than the kubelet waits, and
// would otherwise never be ready. The call that follows finds it done.
func (d *Driver) furnish(ctx context.Context, src source, want stageRecord, info loop.Info, m crypt.Mapping, holds content) error {
	ctx = context.WithoutCancel(ctx)
	var err error
	if holds.isNew() {
		err = d.images.FormatDevice(ctx, m.Path, src.spec)
	} else {
		if err = d.images.RenewDevice(ctx, m.Path, src.spec); err == nil {
			shown := info
			shown.Path, shown.Size = m.Path, info.Size-image.HeaderSize
			err = d.growCopy(ctx, src, want, shown)
		}
	}
	if err == nil {
		err = syncNode(m.Path)
	}
	if err == nil {
		err = d.crypt.Relabel(ctx, info.Path, labelOf(want.VolumeID))
	}
	if err != nil {
		return err
	}
	klog.FromContext(ctx).Info("Made an encrypted volume ready", "device", info.Path, "mapping", m.Name, "filesystem", src.spec.Filesystem, "copy", holds == contentCopied)
	return nil
}

// checkSize refuses a mapping that is not what the volume is: a header from elsewhere.
func (d *Driver) checkSize(m crypt.Mapping, want int64) error {
	size, err := d.crypt.Size(m)
	if err != nil {
		return err
	}
	if size != want {
		return fmt.Errorf("%w: its LUKS header maps %d bytes, its device has room for %d", image.ErrDamaged, size, want)
	}
	return nil
}
