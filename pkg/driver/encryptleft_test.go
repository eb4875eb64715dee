package driver

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/csi-loop/csi-loop/pkg/crypt"
	"github.com/csi-loop/csi-loop/pkg/image"
	"github.com/csi-loop/csi-loop/pkg/loop"
)

// stageWith stages with a passphrase.
func (v volume) stageWith(key string) error {
	_, err := v.n.client.NodeStageVolume(v.n.t.Context(), &csi.NodeStageVolumeRequest{
		VolumeId: v.id, StagingTargetPath: v.staging(), VolumeCapability: v.cap, Secrets: map[string]string{"passphrase": key},
	})
	return err
}

func (v volume) imageFile() string {
	_, dir, _ := image.ParseID(v.id)
	return filepath.Join(v.n.pool[0].Path, "volumes", dir, "disk.img")
}

const leftKey, otherKey = "correct horse", "paper clip"

var encrypted = map[string]string{"encrypted": "true"}

// A start that could not look into the pool takes up what a first staging left. It is not
// handed out: the staging after that would make it anew, and what a pod wrote would be lost.
func TestUnfinishedMappingIsNotHandedOut(t *testing.T) {
	n, m := newFakeMappings(t)
	v := n.create("v", 16*mib, blockCap(legacy), encrypted)
	n.must(v.stageWith(leftKey))
	r := n.record(v.id)
	m.writeHeader(v.imageFile(), m.header("/dev/loop0").UUID, labelUnfinished)
	code(t, v.publish("a", false), codes.FailedPrecondition)
	n.must(v.stageWith(leftKey))
	if got := m.header("/dev/loop0"); m.formatted != 2 || got.Label != labelOf(v.id) {
		t.Fatalf("formatted %d times, header %+v, record before %+v", m.formatted, got, r)
	}
	n.must(v.publish("a", false))
	v.down("a")
}

// A record that was made anew while the pool was away does not know that the volume is
// encrypted. The device with the ciphertext is not handed out in its place.
func TestCiphertextIsNotHandedOut(t *testing.T) {
	n, m := newFakeMappings(t)
	v := n.create("v", 16*mib, blockCap(legacy), encrypted)
	n.must(v.stageWith(leftKey))
	r := n.record(v.id)
	r.Encrypted, r.Device.Mapping, r.Mode = false, crypt.Mapping{}, ""
	n.must(n.d.state.put(r))
	code(t, v.publish("a", false), codes.FailedPrecondition)
	n.must(v.stageWith(leftKey))
	if r := n.record(v.id); !r.Encrypted || !r.Device.encrypted() || m.formatted != 1 {
		t.Fatalf("staged as %+v, formatted %d times", r, m.formatted)
	}
	v.down()
}

// A mapping tells that a volume is encrypted whose pool is away.
func TestRecoveredByItsMapping(t *testing.T) {
	n, m := newFakeMappings(t)
	file := filepath.Join(n.dir, "away.img")
	n.must(os.WriteFile(file, make([]byte, 17*mib), 0o600))
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	n.must(err)
	defer f.Close()
	id := image.VolumeID("aaaaaaaaaaaaaaaaaaaa", "v")
	dev, err := n.fake.Attach(t.Context(), f, loop.Mapping{BlockSize: 4096, Tag: poolTag(id)})
	n.must(err)
	m.put("loop0", crypt.Mapping{Name: mappingName(dev.Info().Ref), Path: m.node})
	r := stageRecord{VolumeID: id}
	if found, err := n.d.recoverStaging(t.Context(), &r); err != nil || !found || !r.Block || !r.Encrypted || !r.Device.encrypted() {
		t.Errorf("%v, %v: %+v", found, err, r)
	}
	m.lose()
	n.must(dev.Close())
	n.must(n.fake.Detach(t.Context(), dev.Info().Ref))
}

// A mapping whose node is shown stays, whatever the header says by now: its number would
// go to another volume.
func TestShownMappingStays(t *testing.T) {
	for name, c := range map[string]struct {
		label string
		lost  bool // the record, but for what the call itself writes
	}{
		"of another volume":       {labelOf("other"), false},
		"unfinished":              {labelUnfinished, false},
		"of another volume, lost": {labelOf("other"), true},
		"unfinished, lost":        {labelUnfinished, true},
	} {
		t.Run(name, func(t *testing.T) {
			n, m := newFakeMappings(t)
			v := n.create("v", 16*mib, blockCap(legacy), encrypted)
			n.must(v.stageWith(leftKey))
			n.must(v.publish("a", false))
			m.writeHeader(v.imageFile(), m.header("/dev/loop0").UUID, c.label)
			r := n.record(v.id)
			r.Device = binding{} // a crash, or a state directory that was lost
			if c.lost {
				r.Targets = nil
			}
			n.must(n.d.state.put(r))
			code(t, v.stageWith(leftKey), codes.Aborted)
			if len(m.over) != 1 || m.formatted != 1 {
				t.Fatalf("mappings %v, formatted %d times", m.over, m.formatted)
			}
			n.must(v.unpublish("a"))
			n.must(v.unstage())
			n.must(v.delete())
		})
	}
}

// What a crash left of a staging goes with a final error: nobody would unstage it.
func TestFinalErrorLeavesNoDevice(t *testing.T) {
	n, m := newFakeMappings(t)
	v := n.create("v", 16*mib, blockCap(legacy), encrypted)
	n.must(v.stageWith(leftKey))
	r := n.record(v.id)
	m.lose()
	n.must(n.d.letGo(r.Device.ref()))
	r.Device = binding{}
	n.must(n.d.state.put(r))
	code(t, v.stageWith(otherKey), codes.InvalidArgument)
	if all, _ := n.fake.FindAll(t.Context()); len(all) > 0 {
		t.Fatalf("left: %+v", all)
	}
	// Nor does a start keep one.
	n.must(v.stageWith(leftKey))
	m.lose()
	n.restart()
	if all, _ := n.fake.FindAll(t.Context()); len(all) > 0 {
		t.Fatalf("left by the start: %+v", all)
	}
	n.must(v.delete())
}
