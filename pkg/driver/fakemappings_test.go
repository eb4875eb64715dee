package driver

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/csi-loop/csi-loop/pkg/crypt"
	"github.com/csi-loop/csi-loop/pkg/image"
)

// fakeMappings are mappings over the fake's loop devices, which they keep open. The
// headers are real, as the driver reads them in the image; what is behind them is not
// encrypted: it is in one file that stands for the node of every mapping.
type fakeMappings struct {
	t         *testing.T
	k         *fakeKernel
	node      string
	over      map[string]crypt.Mapping // by the name of the loop device
	hollow    []crypt.Mapping          // without a table
	held      map[crypt.Mapping]int    // how often each is held open
	replaced  bool                     // each mapping is another as soon as it is made
	key       map[string]string        // by UUID
	formatted int
}

func newFakeMappings(t *testing.T) (*node, *fakeMappings) {
	n := newFake(t)
	m := &fakeMappings{
		t: t, k: n.fake, node: filepath.Join(n.dir, "dm-0"), over: map[string]crypt.Mapping{},
		held: map[crypt.Mapping]int{}, key: map[string]string{},
	}
	n.must(os.WriteFile(m.node, nil, 0o600))
	n.mappings, n.d.crypt = m, m
	t.Cleanup(func() {
		if len(m.over) > 0 || len(m.hollow) > 0 {
			t.Errorf("left behind: mappings %v, without a table %v", m.over, m.hollow)
		}
	})
	return n, m
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
	m.writeCopy(file, 0, 1, uuid, label)
	m.writeCopy(file, 1, 1, uuid, label)
}

// writeCopy writes one copy, the first or the second.
func (m *fakeMappings) writeCopy(file string, number int, sequence uint64, uuid, label string) {
	m.t.Helper()
	const size = 16 << 10
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		m.t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, size)
	copy(b, []string{"LUKS\xba\xbe", "SKUL\xba\xbe"}[number])
	binary.BigEndian.PutUint16(b[6:], 2)
	binary.BigEndian.PutUint64(b[8:], size)
	binary.BigEndian.PutUint64(b[16:], sequence)
	copy(b[24:], label)
	copy(b[72:], "sha256")
	copy(b[168:], uuid)
	binary.BigEndian.PutUint64(b[256:], uint64(number*size))
	sum := sha256.Sum256(b)
	copy(b[448:], sum[:])
	if _, err := f.WriteAt(b, int64(number*size)); err != nil {
		m.t.Fatal(err)
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
	m.wantHeld("label a header", m.over[filepath.Base(device)])
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
	if _, ok := m.over[below]; ok || slices.ContainsFunc(m.hollow, func(h crypt.Mapping) bool { return h.Name == s.Name }) {
		return crypt.Mapping{}, crypt.ErrBusy
	}
	if err := m.Verify(ctx, device, key); err != nil {
		return crypt.Mapping{}, err
	}
	made := crypt.Mapping{Name: s.Name, UUID: "CRYPT-LUKS2-" + strings.ReplaceAll(m.header(device).UUID, "-", "") + "-" + s.Name, Path: m.node}
	m.put(below, made)
	return made, nil
}

// put makes a mapping, which has the device below it open.
func (m *fakeMappings) put(below string, made crypt.Mapping) {
	m.over[below] = made
	m.device("/dev/"+below).openers++
}

// lose ends all mappings, whoever uses them.
func (m *fakeMappings) lose() {
	for below := range m.over {
		m.drop(below)
	}
}

func (m *fakeMappings) drop(below string) {
	delete(m.over, below)
	m.k.mu.Lock()
	defer m.k.mu.Unlock()
	if d := m.k.devices[int(nodeMinor("/dev/"+below))]; d != nil {
		d.openers--
	}
	m.k.settle()
}

func (m *fakeMappings) Close(_ context.Context, closed crypt.Mapping) error {
	if m.held[closed] > 0 {
		return crypt.ErrBusy
	}
	m.hollow = slices.DeleteFunc(m.hollow, func(h crypt.Mapping) bool { return h == closed })
	for below, have := range m.over {
		if have == closed {
			m.drop(below)
		}
	}
	return nil
}

// Hold proves nothing but that the mapping is there.
func (m *fakeMappings) Hold(held crypt.Mapping) (io.Closer, error) {
	if m.replaced {
		return nil, crypt.ErrGone
	}
	for _, have := range m.over {
		if have == held {
			m.held[held]++
			return &fakeHold{m: m, of: held}, nil
		}
	}
	return nil, crypt.ErrGone
}

type fakeHold struct {
	m    *fakeMappings
	of   crypt.Mapping
	once sync.Once
}

func (h *fakeHold) Close() error {
	h.once.Do(func() { h.m.held[h.of]-- })
	return nil
}

// wantHeld fails when a mapping is used that could be another by now.
func (m *fakeMappings) wantHeld(what string, used crypt.Mapping) {
	m.t.Helper()
	if m.held[used] == 0 {
		m.t.Errorf("%s: nothing holds the mapping %s", what, used.Name)
	}
}

func (m *fakeMappings) CloseLast(used crypt.Mapping) error {
	m.wantHeld("mark for removal", used)
	return nil
}

func (m *fakeMappings) Resize(context.Context, crypt.Mapping) error { return nil }
func (m *fakeMappings) SetReadAhead(crypt.Mapping, int64) error     { return nil }

func (m *fakeMappings) Over(device string) (all []crypt.Mapping, err error) {
	if made, ok := m.over[device]; ok {
		all = append(all, made)
	}
	return all, nil
}

func (m *fakeMappings) Hollow(prefix string) (all []crypt.Mapping, err error) {
	return slices.DeleteFunc(slices.Clone(m.hollow), func(h crypt.Mapping) bool { return !strings.HasPrefix(h.Name, prefix) }), nil
}

func (m *fakeMappings) Size(made crypt.Mapping) (int64, error) {
	for below, have := range m.over {
		if have == made {
			return m.device("/dev/"+below).info.Size - image.HeaderSize, nil
		}
	}
	return 0, errors.New("no such mapping")
}
