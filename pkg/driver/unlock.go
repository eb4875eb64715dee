package driver

import (
	"context"
	"errors"
	"fmt"
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
// that says so itself, or no header at all and nothing but zeros behind the place of one.
// Without a header there is no key, so even data that such zeros once were could not be
// read by anybody.
func contentOf(ctx context.Context, volumeID string, f *os.File) (content, error) {
	h, err := crypt.ReadHeader(f)
	switch {
	case err == nil && h.Label == labelUnfinished:
		return contentUnfinished, nil
	case err == nil && h.Label == labelOf(volumeID):
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
// there already is mounted. After an error a mapping may be left.
func (d *Driver) unlock(ctx context.Context, src source, want stageRecord, f *os.File, b binding, shown []string, info loop.Info, passphrase []byte) (binding, error) {
	holds, err := contentOf(ctx, want.VolumeID, f)
	if err != nil {
		return b, err
	}
	if b.encrypted() { // a crash left it, or the record was lost
		switch {
		case holds == contentOwn, holds == contentCopied && info.ReadOnly:
			if err := d.whose(d.crypt.Verify(ctx, info.Path, passphrase), src); err != nil {
				return b, err
			}
			return b, provenOwn(f, b.Mapping, want)
		case holds == contentNone, holds == contentDamaged:
			// A header opened it, so this one was lost since. The mapping has what is left
			// of the key, and stays.
			return b, fmt.Errorf("%w; %s is open all the same: save what it shows", errHeader, b.Mapping.Path)
		case len(shown) > 0:
			// A node that is shown is no user: the mapping would go, and its number with it,
			// to the next volume that somebody opens.
			return b, abortedf("%s is at %q, and the header of the volume says that nobody was given it", b.Mapping.Path, shown)
		default:
			if err := d.crypt.Close(ctx, b.Mapping); err != nil {
				return b, err
			}
		}
	}
	m, err := d.openMapping(ctx, src, info, passphrase, holds)
	if err != nil {
		return b, err
	}
	if holds != contentOwn && !info.ReadOnly {
		if err := d.furnish(ctx, src, want, info, m, holds); err != nil {
			return b, err
		}
	}
	if err := provenOwn(f, m, want); err != nil {
		return b, err
	}
	return d.mapped(b, m)
}

// openMapping opens what an image holds, under a header that it makes if that is new.
func (d *Driver) openMapping(ctx context.Context, src source, info loop.Info, passphrase []byte, holds content) (crypt.Mapping, error) {
	open := crypt.OpenSpec{Name: mappingName(info.Ref), Discard: src.spec.Encryption.Discard, ReadOnly: info.ReadOnly}
	switch {
	case holds == contentDamaged:
		return crypt.Mapping{}, errHeader
	case holds.isNew() && info.ReadOnly:
		return crypt.Mapping{}, preconditionf("nothing was written to the volume yet: it has to be staged for writing once")
	case holds.isNew():
		err := d.crypt.Format(ctx, info.Path, passphrase, crypt.FormatSpec{Offset: image.HeaderSize, BlockSize: src.spec.BlockSize, Label: labelUnfinished})
		if err != nil {
			return crypt.Mapping{}, err
		}
	}
	m, err := d.crypt.Open(ctx, info.Path, passphrase, open)
	if err != nil {
		return m, d.whose(err, src)
	}
	return m, d.checkSize(m, info.Size-image.HeaderSize)
}

// provenOwn reads the header once more before a volume is handed out: it is the one that
// opened the mapping, and if the volume can be written to it says that the content is the
// volume's. What it does not say would be made anew by the next staging.
func provenOwn(f *os.File, m crypt.Mapping, want stageRecord) error {
	h, err := crypt.ReadHeader(f)
	switch {
	case err != nil:
		return fmt.Errorf("%w: after it opened the volume: %w", image.ErrDamaged, err)
	case !m.Of(h):
		return fmt.Errorf("%w: its LUKS header was replaced by another one while it was opened", image.ErrDamaged)
	case h.Label != labelOf(want.VolumeID) && (!want.Block || !want.ReadOnly):
		return fmt.Errorf("%w: its LUKS header has the label %q and not its own", image.ErrDamaged, h.Label)
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
		err = d.images.RenewDevice(ctx, m.Path, src.spec)
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
