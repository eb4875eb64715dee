package driver

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/csi-loop/csi-loop/pkg/crypt"
	"github.com/csi-loop/csi-loop/pkg/image"
	"github.com/csi-loop/csi-loop/pkg/loop"
)

// fakeMappings are mappings over the fake's loop devices. The headers are real, as the
// driver reads them in the image; what is behind them is not encrypted.
type fakeMappings struct {
	t         *testing.T
	k         *fakeKernel
	node      string // a file that stands for the node of every mapping
	over      map[string]crypt.Mapping
	key       map[string]string // by UUID
	formatted int
}

func newFakeMappings(t *testing.T) (*node, *fakeMappings) {
	n := newFake(t)
	m := &fakeMappings{t: t, k: n.fake, node: filepath.Join(n.dir, "dm-0"), over: map[string]crypt.Mapping{}, key: map[string]string{}}
	n.must(os.WriteFile(m.node, nil, 0o600))
	n.d.crypt = m
	return n, m
}

// restarted is a restart of the driver, which keeps the mappings.
func (m *fakeMappings) restarted(n *node) {
	n.halt()
	n.start()
	n.d.crypt = m
}

func (m *fakeMappings) device(path string) *fakeDevice {
	m.k.mu.Lock()
	defer m.k.mu.Unlock()
	return m.k.devices[int(nodeMinor(path))]
}

func (m *fakeMappings) header(path string) crypt.Header {
	f, err := os.Open(m.device(path).path)
	if err != nil {
		m.t.Fatal(err)
	}
	defer f.Close()
	h, _ := crypt.ReadHeader(f)
	return h
}

// writeHeader writes both copies of a LUKS2 header, as far as they are read.
func (m *fakeMappings) writeHeader(file, uuid, label string) {
	m.t.Helper()
	const size = 16 << 10
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		m.t.Fatal(err)
	}
	defer f.Close()
	for i, magic := range []string{"LUKS\xba\xbe", "SKUL\xba\xbe"} {
		b := make([]byte, size)
		copy(b, magic)
		binary.BigEndian.PutUint16(b[6:], 2)
		binary.BigEndian.PutUint64(b[8:], size)
		copy(b[24:], label)
		copy(b[72:], "sha256")
		copy(b[168:], uuid)
		binary.BigEndian.PutUint64(b[256:], uint64(i*size))
		sum := sha256.Sum256(b)
		copy(b[448:], sum[:])
		if _, err := f.WriteAt(b, int64(i*size)); err != nil {
			m.t.Fatal(err)
		}
	}
}

func (m *fakeMappings) Available() error { return nil }

func (m *fakeMappings) Format(_ context.Context, device string, key []byte, s crypt.FormatSpec) error {
	m.formatted++
	uuid := fmt.Sprintf("header-%d", m.formatted)
	m.key[uuid] = string(key)
	m.writeHeader(m.device(device).path, uuid, s.Label)
	return nil
}

func (m *fakeMappings) Relabel(_ context.Context, device, label string) error {
	m.writeHeader(m.device(device).path, m.header(device).UUID, label)
	return nil
}

func (m *fakeMappings) Verify(_ context.Context, device string, key []byte) error {
	if m.key[m.header(device).UUID] != string(key) {
		return crypt.ErrPassphrase
	}
	return nil
}

func (m *fakeMappings) Open(ctx context.Context, device string, key []byte, s crypt.OpenSpec) (crypt.Mapping, error) {
	below := filepath.Base(device)
	if _, ok := m.over[below]; ok {
		return crypt.Mapping{}, crypt.ErrBusy
	}
	if err := m.Verify(ctx, device, key); err != nil {
		return crypt.Mapping{}, err
	}
	made := crypt.Mapping{Name: s.Name, UUID: "CRYPT-LUKS2-" + strings.ReplaceAll(m.header(device).UUID, "-", "") + "-" + s.Name, Path: m.node}
	m.over[below] = made
	return made, nil
}

func (m *fakeMappings) Close(_ context.Context, closed crypt.Mapping) error {
	for below, have := range m.over {
		if have == closed {
			delete(m.over, below)
		}
	}
	return nil
}

func (m *fakeMappings) CloseLast(crypt.Mapping) error               { return nil }
func (m *fakeMappings) Resize(context.Context, crypt.Mapping) error { return nil }
func (m *fakeMappings) SetReadAhead(crypt.Mapping, int64) error     { return nil }
func (m *fakeMappings) Over(device string) (all []crypt.Mapping, err error) {
	if made, ok := m.over[device]; ok {
		all = append(all, made)
	}
	return all, nil
}

func (m *fakeMappings) Size(made crypt.Mapping) (int64, error) {
	for below, have := range m.over {
		if have == made {
			return m.device("/dev/"+below).info.Size - image.HeaderSize, nil
		}
	}
	return 0, errors.New("no such mapping")
}

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
	m.over["loop0"] = crypt.Mapping{Name: mappingName(dev.Info().Ref), Path: m.node}
	r := stageRecord{VolumeID: id}
	if found, err := n.d.recoverStaging(t.Context(), &r); err != nil || !found || !r.Block || !r.Encrypted || !r.Device.encrypted() {
		t.Errorf("%v, %v: %+v", found, err, r)
	}
	n.must(dev.Close())
	n.must(n.fake.Detach(t.Context(), dev.Info().Ref))
}

// A mapping whose node is shown stays, whatever the header says by now: its number would
// go to another volume.
func TestShownMappingStays(t *testing.T) {
	for name, label := range map[string]string{"of another volume": labelOf("other"), "unfinished": labelUnfinished} {
		t.Run(name, func(t *testing.T) {
			n, m := newFakeMappings(t)
			v := n.create("v", 16*mib, blockCap(legacy), encrypted)
			n.must(v.stageWith(leftKey))
			n.must(v.publish("a", false))
			m.writeHeader(v.imageFile(), m.header("/dev/loop0").UUID, label)
			r := n.record(v.id)
			r.Device = binding{} // a crash, or a state directory that was lost
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
	n.must(n.d.letGo(r.Device.ref()))
	m.over = map[string]crypt.Mapping{}
	r.Device = binding{}
	n.must(n.d.state.put(r))
	code(t, v.stageWith(otherKey), codes.InvalidArgument)
	if all, _ := n.fake.FindAll(t.Context()); len(all) > 0 {
		t.Fatalf("left: %+v", all)
	}
	// Nor does a start keep one.
	n.must(v.stageWith(leftKey))
	m.over = map[string]crypt.Mapping{}
	m.restarted(n)
	if all, _ := n.fake.FindAll(t.Context()); len(all) > 0 {
		t.Fatalf("left by the start: %+v", all)
	}
	n.must(v.delete())
}
