package driver

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"

	"github.com/csi-loop/csi-loop/internal/roottest"
	"github.com/csi-loop/csi-loop/pkg/image"
)

const marker = "nobody who has the disk only may read this line"

func (e *encrypting) write(path string) {
	e.t.Helper()
	e.must(os.WriteFile(path, bytes.Repeat([]byte(marker), 4096), 0o600))
}

func (e *encrypting) read(path string) {
	e.t.Helper()
	b, err := os.ReadFile(path)
	e.must(err)
	if !bytes.Equal(b, bytes.Repeat([]byte(marker), 4096)) {
		e.t.Fatalf("%s holds something else", path)
	}
}

// holds is read for a file or a device, which is longer.
func (e *encrypting) holds(path string) {
	e.t.Helper()
	b, err := os.ReadFile(path)
	e.must(err)
	if !bytes.HasPrefix(b, bytes.Repeat([]byte(marker), 4096)) {
		e.t.Fatalf("%s holds something else", path)
	}
}

// hidden fails when the image shows what was written to the volume.
func (e *encrypting) hidden(id string) {
	e.t.Helper()
	unix.Sync()
	b, err := os.ReadFile(e.image(id))
	e.must(err)
	if bytes.Contains(b, []byte(marker)) {
		e.t.Fatal("the image shows the text")
	}
}

var encryptedSizes = map[string]int64{"ext4": 64 * mib, "xfs": 320 * mib, "btrfs": 256 * mib}

func TestEncryptedFilesystem(t *testing.T) {
	for _, fs := range []string{"ext4", "xfs", "btrfs"} {
		for _, allocation := range []string{"thick", "thin"} {
			if allocation == "thick" && fs != "ext4" {
				continue // what is allocated does not depend on what is in it
			}
			t.Run(fs+" "+allocation, func(t *testing.T) {
				e := newEncrypting(t)
				c, size := mountCap(fs, oneWriter), encryptedSizes[fs]
				id := e.create("v", c, size, nil, map[string]string{"allocation": allocation, "readAhead": "2Mi"})
				e.refusals(id, c)
				e.life(id, c, size)
				e.copies(id, c, size)
				e.remove(id)
			})
		}
	}
}

// refusals are of a volume that was never staged.
func (e *encrypting) refusals(id string, c *csi.VolumeCapability) {
	e.t.Helper()
	e.wantCode(e.stage(id, c, nil), codes.InvalidArgument, "node-stage-secret")
	e.wantCode(e.stage(id, c, map[string]string{"key": goodKey}), codes.InvalidArgument, `"passphrase"`)
	e.wantCode(e.stage(id, c, e.key("short")), codes.InvalidArgument, "5 bytes")
	e.clean()
	if st, err := os.Stat(e.image(id)); err != nil || st.Size() != encryptedSizes[c.GetMount().GetFsType()]+image.HeaderSize {
		e.t.Fatalf("the image is %v, %v", st.Size(), err)
	}
}

// readsAhead checks the read-ahead, in KiB, of the mapping of a volume that is staged.
func (e *encrypting) readsAhead(id string, want int) {
	e.t.Helper()
	r, _ := e.d.state.get(id)
	loop := fmt.Sprintf("/sys/block/loop%d/", r.Device.Number)
	mappings, err := filepath.Glob(loop + "holders/*/queue/read_ahead_kb")
	if err != nil || len(mappings) != 1 {
		e.t.Fatalf("the mappings of %s: %q, %v", loop, mappings, err)
	}
	got, err := os.ReadFile(mappings[0])
	e.must(err)
	if strings.TrimSpace(string(got)) != strconv.Itoa(want) {
		e.t.Fatalf("%s: %s, want %d", mappings[0], got, want)
	}
}

// life is the life of one volume.
func (e *encrypting) life(id string, c *csi.VolumeCapability, size int64) {
	e.t.Helper()
	e.must(e.stage(id, c, e.key(goodKey)))
	e.must(e.stage(id, c, e.key(goodKey)))
	staging := e.path("staging", id)
	e.write(filepath.Join(staging, "file"))
	e.must(e.publish(id, c, false))
	e.read(filepath.Join(e.path("target", id), "file"))
	e.healthy(id)
	e.hidden(id)

	e.restart()
	e.healthy(id)
	e.must(e.stage(id, c, e.key(goodKey)))
	before := e.total(id, staging)
	e.readsAhead(id, 2048)
	e.expand(id, size+128*mib)
	e.readsAhead(id, 2048)
	if after := e.total(id, e.path("target", id)); after < before+100*mib {
		e.t.Fatalf("%d bytes before the growth by 128 MiB, %d after", before, after)
	}
	e.healthy(id)
	e.must(e.unpublish(id))
	e.must(e.unstage(id))
	e.must(e.unstage(id))
	e.clean()

	e.wantCode(e.stage(id, c, e.key(badKey)), codes.InvalidArgument, "does not open the volume")
	e.clean()
	e.must(e.stage(id, c, e.key(goodKey)))
	e.read(filepath.Join(staging, "file"))

	// The kubelet, or a person, unmounts behind our back: all goes with the last mount.
	e.must(unix.Unmount(staging, 0))
	e.clean()
	e.must(e.stage(id, c, e.key(goodKey)))
	e.read(filepath.Join(staging, "file"))

	// The state directory is lost.
	e.stop()
	e.must(os.RemoveAll(filepath.Join(e.dir, "state")))
	e.start()
	e.wantCode(e.stage(id, c, e.key(badKey)), codes.InvalidArgument, "does not open the volume")
	e.read(filepath.Join(staging, "file")) // and is left as it was
	e.must(e.stage(id, c, e.key(goodKey)))
	e.read(filepath.Join(staging, "file"))
	e.must(e.unstage(id))
	e.clean()
}

// copies makes a snapshot and a clone of a volume in use, and uses all at once.
func (e *encrypting) copies(id string, c *csi.VolumeCapability, size int64) {
	e.t.Helper()
	size += 128 * mib
	e.must(e.stage(id, c, e.key(goodKey)))
	snapshot := e.snapshot("s", id)
	restored := e.create("restored", c, size+64*mib, snapshot, map[string]string{"allocation": "thin"})
	clone := e.create("clone", c, size, &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Volume{
		Volume: &csi.VolumeContentSource_VolumeSource{VolumeId: id},
	}}, map[string]string{"allocation": "thin"})
	e.must(os.Remove(filepath.Join(e.path("staging", id), "file")))
	e.wantCode(e.stage(restored, c, e.key(badKey)), codes.InvalidArgument, "passphrase of its source")
	for _, copied := range []string{restored, clone} {
		e.must(e.stage(copied, c, e.key(goodKey)))
		e.read(filepath.Join(e.path("staging", copied), "file"))
		e.healthy(copied)
		e.must(e.unstage(copied))
		e.must(e.stage(copied, c, e.key(goodKey))) // it is its own now
		e.hidden(copied)
	}
	if fs := c.GetMount().GetFsType(); fs != "xfs" { // mounted with nouuid
		uuids := map[string]string{}
		for _, v := range []string{id, restored, clone} {
			r, _ := e.d.state.get(v)
			uuid := strings.TrimSpace(roottest.Run(e.t, "blkid", "-p", "-s", "UUID", "-o", "value", r.Device.Mapping.Path))
			if other, ok := uuids[uuid]; ok {
				e.t.Errorf("%s and %s both have the UUID %s", v, other, uuid)
			}
			uuids[uuid] = v
		}
	}
	if total := e.total(restored, e.path("staging", restored)); total < e.total(clone, e.path("staging", clone))+50*mib {
		e.t.Errorf("the restored volume has %d bytes", total)
	}
	for _, v := range []string{restored, clone, id} {
		e.must(e.unstage(v))
	}
	e.clean()
	e.remove(restored, clone)
	e.removeSnapshot(snapshot)
}

func TestEncryptedBlock(t *testing.T) {
	e := newEncrypting(t)
	c, size := blockCap(legacy), 16*mib
	id := e.create("raw", c, size, nil, nil)
	target := e.path("target", id)
	e.wantCode(e.stage(id, blockCap(reader), e.key(goodKey)), codes.FailedPrecondition, "staged for writing")
	e.clean()
	e.must(e.stage(id, c, e.key(goodKey)))
	e.must(e.publish(id, c, false))
	if total := e.total(id, target); total != size {
		t.Fatalf("it has %d bytes, not %d", total, size)
	}
	e.write(target)
	e.healthy(id)
	snapshot := e.snapshot("s", id) // what was written is still in the mapping's cache
	e.hidden(id)
	e.restart()
	e.healthy(id)
	e.expand(id, 2*size)
	if total := e.total(id, target); total != 2*size {
		t.Fatalf("it has %d bytes, not %d", total, 2*size)
	}
	e.must(e.unpublish(id))
	e.wantCode(e.publish(id, c, true), codes.InvalidArgument, "read-only")
	e.must(e.unstage(id))
	e.clean()
	e.wantCode(e.stage(id, c, e.key(badKey)), codes.InvalidArgument, "does not open the volume")
	e.clean()

	ro := blockCap(reader)
	e.must(e.stage(id, ro, e.key(goodKey)))
	e.must(e.publish(id, ro, true))
	if err := os.WriteFile(target, []byte("x"), 0o600); err == nil {
		t.Error("a read-only volume was written to")
	}
	e.must(e.unpublish(id))
	e.must(e.unstage(id))
	e.clean()

	restored := e.create("restored", c, size, snapshot, nil)
	e.must(e.stage(restored, c, e.key(goodKey)))
	e.must(e.publish(restored, c, false))
	b, err := os.ReadFile(e.path("target", restored))
	e.must(err)
	if want := bytes.Repeat([]byte(marker), 4096); !bytes.HasPrefix(b, want) {
		t.Error("the restored volume holds something else")
	}
	e.must(e.unpublish(restored))

	// The state directory is lost while it is staged.
	e.stop()
	e.must(os.RemoveAll(filepath.Join(e.dir, "state")))
	e.start()
	e.must(e.unstage(restored))
	e.clean()
	e.remove(id, restored)
	e.removeSnapshot(snapshot)
}

// TestEncryptedDiscard: what a filesystem discards is given back only if the class says so.
func TestEncryptedDiscard(t *testing.T) {
	for _, discard := range []string{"true", "false"} {
		t.Run(discard, func(t *testing.T) {
			e := newEncrypting(t)
			c := mountCap("ext4", oneWriter)
			id := e.create("v", c, 96*mib, nil, map[string]string{"allocation": "thin", "encryptedDiscard": discard})
			e.must(e.stage(id, c, e.key(goodKey)))
			file := filepath.Join(e.path("staging", id), "file")
			e.must(os.WriteFile(file, make([]byte, 48*mib), 0o600))
			unix.Sync()
			full := e.blocks(id)
			e.must(os.Remove(file))
			unix.Sync()
			out, err := exec.Command("fstrim", e.path("staging", id)).CombinedOutput()
			unix.Sync()
			given := full - e.blocks(id)
			switch {
			case discard == "true" && (err != nil || given < 40*mib):
				t.Errorf("given back %d of %d bytes: %v, %s", given, full, err, out)
			case discard == "false" && (err == nil || given > mib):
				t.Errorf("given back %d of %d bytes: %s", given, full, out)
			}
			e.must(e.unstage(id))
			e.remove(id)
		})
	}
}

func (e *encrypting) blocks(id string) int64 {
	e.t.Helper()
	var st unix.Stat_t
	e.must(unix.Stat(e.image(id), &st))
	return st.Blocks * 512
}
