package driver

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"os"

	"github.com/csi-loop/csi-loop/pkg/crypt"
	"github.com/csi-loop/csi-loop/pkg/image"
	"github.com/csi-loop/csi-loop/pkg/loop"
	"github.com/csi-loop/csi-loop/pkg/mount"
)

// encrypter puts mappings over loop devices; *crypt.Crypt does.
//
//nolint:interfacebloat // one device, and all that is done with it
type encrypter interface {
	Available() error
	Format(ctx context.Context, device string, passphrase []byte, s crypt.FormatSpec) error
	Relabel(ctx context.Context, device, label string) error
	Verify(ctx context.Context, device string, passphrase []byte) error
	Open(ctx context.Context, device string, passphrase []byte, s crypt.OpenSpec) (crypt.Mapping, error)
	Resize(ctx context.Context, m crypt.Mapping) error
	Close(ctx context.Context, m crypt.Mapping) error
	CloseLast(m crypt.Mapping) error
	Over(device string) ([]crypt.Mapping, error)
	Hollow(prefix string) ([]crypt.Mapping, error)
	Hold(m crypt.Mapping) (io.Closer, error)
	Size(m crypt.Mapping) (int64, error)
	SetReadAhead(m crypt.Mapping, n int64) error
}

const (
	// secretPassphrase is the entry of the node-stage secret.
	secretPassphrase = "passphrase"
	// A passphrase is that long, in bytes.
	minPassphrase, maxPassphrase = 8, 4096

	// MappingPrefix begins the names of mappings; the loop device's number and disk
	// sequence number follow, so that a name stands for one binding of one boot.
	MappingPrefix = "csi-loop-"

	// The label of a LUKS header is the mark of what is behind it. It lies in the image
	// and goes where that goes, and it is changed in one step.
	//
	// labelUnfinished: the content is being made, and nobody was ever given it.
	labelUnfinished = "csi-loop unfinished"
	// labelPrefix and a hash of a volume's ID: the content is whole, and its
	// filesystem's identity is this volume's. In a copy it still names the source.
	labelPrefix = "csi-loop "
)

// labelOf marks the content of a volume.
func labelOf(volumeID string) string {
	sum := sha256.Sum256([]byte(volumeID))
	return labelPrefix + hex.EncodeToString(sum[:16])
}

// canEncrypt refuses, before anything is made, what this node cannot do:
// RESOURCE_EXHAUSTED, the code that makes Kubernetes choose another node.
func (d *Driver) canEncrypt(e image.Encryption) error {
	if e.Type == "" {
		return nil
	}
	if err := d.crypt.Available(); err != nil {
		return exhaustedf("parameter %q: node %q cannot encrypt: %v", paramEncrypted, d.cfg.NodeID, err)
	}
	return nil
}

// passphraseOf takes the passphrase out of the secrets of a call.
func passphraseOf(secrets map[string]string) ([]byte, error) {
	p, ok := secrets[secretPassphrase]
	switch {
	case !ok:
		return nil, invalidf("the volume is encrypted, and the node-stage secret has no entry %q: its StorageClass must name a secret as csi.storage.k8s.io/node-stage-secret-name and -namespace", secretPassphrase)
	case len(p) < minPassphrase || len(p) > maxPassphrase:
		return nil, invalidf("entry %q of the node-stage secret has %d bytes, not %d to %d", secretPassphrase, len(p), minPassphrase, maxPassphrase)
	}
	return []byte(p), nil
}

// isEncrypted says whether a volume that a CO means is held encrypted.
func (d *Driver) isEncrypted(id string) bool {
	v, err := d.volumeNamed(id)
	return err == nil && v.Encrypted()
}

// fullBinding is bindingOf with the mapping over an encrypted volume's device, if there
// is one.
func (d *Driver) fullBinding(info loop.Info, encrypted bool) (binding, error) {
	b, err := d.bindingOf(info)
	if err != nil || !encrypted {
		return b, err
	}
	m, ok, err := d.mappingOver(info.Ref)
	if err != nil || !ok {
		return b, err
	}
	return d.mapped(b, m)
}

// recoveredBinding is fullBinding for a staging whose record does not tell that it was
// done. A mapping whose content is not finished does not count: it would be used, and
// made anew by the staging after that. That of a filesystem counts: it may be mounted, also
// before it is the volume's own (growCopy), and is found by that.
// Any other mapping counts, whatever its header says by now: it may be in use, and it is
// by its numbers that publications of it are found.
func (d *Driver) recoveredBinding(ctx context.Context, info loop.Info, r stageRecord) (binding, error) {
	b, err := d.fullBinding(info, r.Encrypted)
	if err != nil || !r.Block || !b.encrypted() {
		return b, err
	}
	unfinished, err := d.isUnfinished(ctx, r.VolumeID)
	if err != nil || !unfinished {
		return b, err
	}
	return d.bindingOf(info)
}

// inForce says whether a staging can be handed out: what the record describes is alive,
// and the device of a raw block volume is held. A start that could not look into the
// volume's pool may take up what a crash left, so that it can be taken down; of an
// encrypted raw block volume it may be a mapping whose content the next staging would
// make anew, or the device with the ciphertext. Neither is handed out.
func (d *Driver) inForce(ctx context.Context, r stageRecord) (bool, error) {
	live, err := d.stagingAlive(ctx, r)
	if err != nil || !live || !r.Block {
		return live, err
	}
	switch {
	case r.Device.encrypted():
		if unfinished, err := d.isUnfinished(ctx, r.VolumeID); err != nil || unfinished {
			return false, err
		}
	case r.Encrypted || r.Mapped == nil && d.isEncrypted(r.VolumeID):
		return false, nil
	}
	return d.ensureHeld(ctx, r.Device, r.Image)
}

// isUnfinished says whether the image of an encrypted volume itself tells that its first
// staging was not done. One that is gone or damaged tells nothing: it can be taken down,
// and not staged or published.
func (d *Driver) isUnfinished(ctx context.Context, id string) (bool, error) {
	v, err := d.volumeNamed(id)
	if err == nil {
		var f *os.File
		if f, err = d.poolSource(v).open(ctx, true); err == nil {
			defer f.Close()
			var h crypt.Header
			h, err = crypt.ReadHeader(f)
			return h.Label == labelUnfinished, withoutHeader(err)
		}
	}
	if errors.Is(err, image.ErrNotFound) || errors.Is(err, image.ErrDamaged) {
		err = nil
	}
	return false, err
}

// withoutHeader takes it for no error that there is no header of ours.
func withoutHeader(err error) error {
	if errors.Is(err, crypt.ErrNoHeader) || errors.Is(err, crypt.ErrForeign) {
		return nil
	}
	return err
}

// superblockAt reads the superblock of a filesystem on a device.
func superblockAt(path string) (mount.Superblock, error) {
	f, err := os.Open(path)
	if err != nil {
		return mount.Superblock{}, err
	}
	defer f.Close()
	return mount.ReadSuperblock(f)
}

// syncNode makes durable what was written to a block device, as far as it goes: the
// device below is made so by its own.
func syncNode(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}
