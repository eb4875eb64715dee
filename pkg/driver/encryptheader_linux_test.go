package driver

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"

	"github.com/csi-loop/csi-loop/internal/roottest"
	"github.com/csi-loop/csi-loop/pkg/crypt"
	"github.com/csi-loop/csi-loop/pkg/image"
)

// TestEncryptedDamage: no header over data is no empty volume.
func TestEncryptedDamage(t *testing.T) {
	e := newEncrypting(t)
	c := mountCap("ext4", oneWriter)
	id := e.create("v", c, 64*mib, nil, nil)
	e.must(e.stage(id, c, e.key(goodKey)))
	e.write(filepath.Join(e.path("staging", id), "file"))
	e.must(e.unstage(id))
	f, err := os.OpenFile(e.image(id), os.O_RDWR, 0)
	e.must(err)
	defer f.Close()
	header := make([]byte, 32<<10)
	_, err = f.ReadAt(header, 0)
	e.must(err)

	for name, damage := range map[string][]byte{"gone": make([]byte, len(header)), "overwritten": bytes.Repeat([]byte("x"), len(header))} {
		_, err = f.WriteAt(damage, 0)
		e.must(err)
		before := roottest.Run(t, "sha256sum", e.image(id))
		e.wantCode(e.stage(id, c, e.key(goodKey)), codes.DataLoss, "LUKS header")
		e.clean()
		if after := roottest.Run(t, "sha256sum", e.image(id)); after != before {
			t.Fatalf("%s: the image was changed", name)
		}
	}
	// Nor is one of somebody else's, whatever is behind it.
	_, err = f.WriteAt([]byte("LUKS\xba\xbe\x00\x01"), 0)
	e.must(err)
	e.must(f.Truncate(image.HeaderSize))
	e.must(f.Truncate(image.HeaderSize + 64*mib))
	e.wantCode(e.stage(id, c, e.key(goodKey)), codes.DataLoss, "not csi-loop's")
	e.clean()
	e.remove(id)
}

// TestEncryptedHeader: one of the two copies of a header is enough.
func TestEncryptedHeader(t *testing.T) {
	e := newEncrypting(t)
	c := mountCap("ext4", oneWriter)
	id := e.create("v", c, 64*mib, nil, nil)
	e.must(e.stage(id, c, e.key(goodKey)))
	e.write(filepath.Join(e.path("staging", id), "file"))
	e.must(e.unstage(id))
	e.damageHeader(id, 16<<10)
	e.must(e.stage(id, c, e.key(goodKey)))
	e.read(filepath.Join(e.path("staging", id), "file"))
	e.must(e.unstage(id))
	e.remove(id)
}

// damageHeader overwrites the first n bytes of an image.
func (e *encrypting) damageHeader(id string, n int) {
	e.t.Helper()
	f, err := os.OpenFile(e.image(id), os.O_RDWR, 0)
	e.must(err)
	_, err = f.WriteAt(make([]byte, n), 0)
	e.must(errors.Join(err, f.Close()))
}

// TestEncryptedHeaderLost: the header goes, and the state directory, while a raw block volume is
// published. What is open is neither closed nor made anew, and the volume is not unstaged below a pod.
func TestEncryptedHeaderLost(t *testing.T) {
	for name, write := range map[string]bool{"data": true, "nothing written": false} {
		t.Run(name, func(t *testing.T) {
			e := newEncrypting(t)
			c := blockCap(legacy)
			id := e.create("raw", c, 16*mib, nil, nil)
			e.must(e.stage(id, c, e.key(goodKey)))
			e.must(e.publish(id, c, false))
			if write {
				e.write(e.path("target", id))
			}
			unix.Sync()
			e.stop()
			e.must(os.RemoveAll(filepath.Join(e.dir, "state")))
			e.damageHeader(id, 32<<10)
			e.start()
			e.wantCode(e.stage(id, c, e.key(goodKey)), codes.DataLoss, "is open all the same")
			if len(e.mappings()) != 1 {
				t.Fatalf("mappings: %v", e.mappings())
			}
			e.wantCode(e.unstage(id), codes.FailedPrecondition, "still published")
			if write {
				e.holds(e.path("target", id))
			}
			e.must(e.unpublish(id))
			e.must(e.unstage(id))
			e.clean()
			e.remove(id)
		})
	}
}

// TestEncryptedReadOnlyCopyRecovered: a copy that was only ever read has the label of its source. It is
// found all the same when the state directory is lost, and not unstaged below a pod.
func TestEncryptedReadOnlyCopyRecovered(t *testing.T) {
	e := newEncrypting(t)
	c, ro := blockCap(legacy), blockCap(reader)
	id := e.create("raw", c, 16*mib, nil, nil)
	e.must(e.stage(id, c, e.key(goodKey)))
	e.must(e.unstage(id))
	snapshot := e.snapshot("s", id)
	copied := e.create("copy", c, 16*mib, snapshot, nil)
	e.must(e.stage(copied, ro, e.key(goodKey)))
	e.must(e.publish(copied, ro, true))
	e.stop()
	e.must(os.RemoveAll(filepath.Join(e.dir, "state")))
	e.start()
	e.wantCode(e.unstage(copied), codes.FailedPrecondition, "still published")
	e.must(e.unpublish(copied))
	e.must(e.unstage(copied))
	e.clean()
	e.remove(id, copied)
	e.removeSnapshot(snapshot)
}

// forgetful says that it labelled a header, and did not.
type forgetful struct{ encrypter }

func (forgetful) Relabel(context.Context, string, string) error { return nil }

// TestEncryptedLabelIsProven: a volume whose header does not say that it is finished would be made anew
// by its next staging. It is not handed out.
func TestEncryptedLabelIsProven(t *testing.T) {
	for _, kind := range []string{"ext4", "block"} {
		e := newEncrypting(t)
		c := capabilityOf(kind)
		id := e.create("v", c, 64*mib, nil, nil)
		e.d.crypt = forgetful{e.d.crypt}
		e.wantCode(e.stage(id, c, e.key(goodKey)), codes.DataLoss, "not its own")
		e.clean()
		e.restart()
		e.must(e.stage(id, c, e.key(goodKey)))
		e.must(e.unstage(id))
		e.remove(id)
	}
}

// copier keeps the header as it is before it gets its label.
type copier struct {
	encrypter

	image  string
	header []byte
}

func (c *copier) Relabel(ctx context.Context, device, label string) error {
	b, err := os.ReadFile(c.image)
	if err != nil {
		return err
	}
	c.header = b[:32<<10]
	return c.encrypter.Relabel(ctx, device, label)
}

// TestEncryptedOldSecondCopy: an end of cryptsetup between the two copies of a header leaves a second that
// says that nobody was given the volume. The next staging makes both the same, and hands it out then.
func TestEncryptedOldSecondCopy(t *testing.T) {
	e := newEncrypting(t)
	c := mountCap("ext4", oneWriter)
	id := e.create("v", c, 64*mib, nil, nil)
	was := &copier{encrypter: e.d.crypt, image: e.image(id)}
	e.d.crypt = was
	e.must(e.stage(id, c, e.key(goodKey)))
	e.write(filepath.Join(e.path("staging", id), "file"))
	e.must(e.unstage(id))
	f, err := os.OpenFile(e.image(id), os.O_RDWR, 0)
	e.must(err)
	defer f.Close()
	_, err = f.WriteAt(was.header[16<<10:], 16<<10)
	e.must(err)
	if copies, err := crypt.ReadCopies(f); err != nil || len(copies) != 2 || copies[0].Label != labelOf(id) || copies[1].Label != labelUnfinished {
		t.Fatalf("copies %+v, %v", copies, err)
	}
	e.must(e.stage(id, c, e.key(goodKey)))
	e.read(filepath.Join(e.path("staging", id), "file"))
	if copies, err := crypt.ReadCopies(f); err != nil || len(copies) != 2 || copies[1].Label != labelOf(id) {
		t.Fatalf("copies %+v, %v", copies, err)
	}
	e.must(e.unstage(id))
	e.damageHeader(id, 16<<10) // the second is believed now
	e.must(e.stage(id, c, e.key(goodKey)))
	e.read(filepath.Join(e.path("staging", id), "file"))
	e.must(e.unstage(id))
	e.remove(id)
}

// TestEncryptedHollowMapping: cryptsetup was ended before the mapping had a table. The next staging, and the
// start if the device is gone, end what is left; it is not in the way until a reboot.
func TestEncryptedHollowMapping(t *testing.T) {
	e := newEncrypting(t)
	t.Setenv("DM_DISABLE_UDEV", "1") // dmsetup makes the nodes itself
	c := blockCap(legacy)
	id := e.create("raw", c, 16*mib, nil, nil)
	e.must(e.stage(id, c, e.key(goodKey)))
	r, _ := e.d.state.get(id)
	name := r.Device.Mapping.Name
	e.must(e.d.letGo(r.Device.ref()))
	e.must(e.d.crypt.Close(t.Context(), r.Device.Mapping))
	roottest.Run(t, "dmsetup", "create", name, "--notable")
	e.must(e.stage(id, c, e.key(goodKey)))
	e.must(e.publish(id, c, false))
	e.write(e.path("target", id))
	e.must(e.unpublish(id))
	e.must(e.unstage(id))
	e.clean()
	roottest.Run(t, "dmsetup", "create", name, "--notable")
	e.restart()
	if left := roottest.Run(t, "dmsetup", "ls"); strings.Contains(left, MappingPrefix) {
		t.Errorf("left by the start: %s", left)
	}
	e.remove(id)
}

// TestEncryptedMappingIsHeld: the mapping of a raw block volume cannot be removed by hand, so that its number
// does not go to another below the pod.
func TestEncryptedMappingIsHeld(t *testing.T) {
	e := newEncrypting(t)
	c := blockCap(legacy)
	id := e.create("raw", c, 16*mib, nil, nil)
	e.must(e.stage(id, c, e.key(goodKey)))
	e.must(e.publish(id, c, false))
	for _, when := range []string{"staged", "started"} {
		r, _ := e.d.state.get(id)
		if out, err := exec.Command("dmsetup", "remove", r.Device.Mapping.Name).CombinedOutput(); err == nil {
			t.Fatalf("%s: removed: %s", when, out)
		}
		e.healthy(id)
		e.restart()
	}
	e.must(e.unpublish(id))
	e.must(e.unstage(id))
	e.clean()
	e.remove(id)
}
