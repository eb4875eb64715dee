package link

import (
	"bytes"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/csi-loop/csi-loop/internal/roottest"
	"github.com/csi-loop/csi-loop/pkg/image"
	"github.com/csi-loop/csi-loop/pkg/transfer"
)

func TestMain(m *testing.M) { roottest.Main(m) }

var write = flag.Bool("write", false, "write the golden files, for a new version of the protocol only")

// said is one of everything that version 1 says, with all fields.
func said() map[string]any {
	key := ed25519.NewKeyFromSeed(bytes.Repeat([]byte{7}, ed25519.SeedSize))
	public, _ := key.Public().(ed25519.PublicKey)
	pool := Pool{ID: image.PoolID(public), Name: "default", Key: public, Sign: func(b []byte) []byte { return ed25519.Sign(key, b) }}
	nonce, binding := goldenChannel()
	proof := Prove(pool, nonce, binding, "node-1")
	return map[string]any{
		"controller-hello": ControllerHello{
			ProtocolMin: 1, ProtocolMax: 1, Driver: "csi-loop.io", Version: "v0.1.0", Nonce: nonce, Self: "10.0.0.1:9808", Replicas: []string{"10.0.0.1:9808", "10.0.0.2:9808"},
		},
		"node-hello": NodeHello{
			Protocol: 1, Driver: "csi-loop.io", Version: "v0.1.0", NodeID: "node-1", Token: "a.b.c",
			Methods: []string{"/csi.v1.Controller/CreateVolume"}, DefaultPool: "default", Pools: []PoolProof{proof},
		},
		"verdict": Verdict{Welcome: true, Message: "why not"},
		"update": Update{
			Complete: true, Token: "d.e.f", Proofs: []PoolProof{proof},
			Pools: []PoolUpdate{{ID: pool.ID, Added: []string{"pvc-a"}, Removed: []string{"pvc-b"}, Free: &Free{Thick: 1, Thin: 2}}},
		},
		"transfer-hello": NodeHello{Protocol: 1, Driver: "csi-loop.io", Version: "v0.1.0", NodeID: "node-1", Ticket: nonce},
		"offer": Offer{
			Source: transfer.Description{Size: 1 << 30, Filesystem: "ext4", BlockSize: 4096, MkfsOptions: []string{"-N", "5"}, Bytes: 1},
			Ticket: nonce, Address: "10.0.0.1:9808",
		},
		"send": sendOrder{
			Request: transfer.Request{Snapshot: "s", Volume: "v", Parameters: map[string]string{"copyInUse": "true"}}, Ticket: nonce, Address: "10.0.0.1:9808",
		},
		"order": Order{Replicas: []string{"10.0.0.1:9808"}, Notice: "a notice", Ping: true},
	}
}

func goldenChannel() (nonce, binding []byte) {
	return bytes.Repeat([]byte{1}, NonceSize), bytes.Repeat([]byte{2}, 32)
}

func golden(t *testing.T, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", "v1", name+".json"))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// What version 1 said is what is said today. If this fails, nodes and controllers of
// the release before do not understand each other: make the change one that they may
// ignore, or a new version of the protocol with golden files of its own.
func TestGolden(t *testing.T) {
	for name, v := range said() {
		b, err := json.MarshalIndent(v, "", "  ")
		if err != nil {
			t.Fatal(err)
		}
		b = append(b, '\n')
		if *write {
			if err := os.WriteFile(filepath.Join("testdata", "v1", name+".json"), b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if diff := cmp.Diff(string(golden(t, name)), string(b)); diff != "" {
			t.Errorf("%s: -version 1 +today\n%s", name, diff)
		}
	}
}

func read[T any](t *testing.T, name string, change func(string) string) T {
	t.Helper()
	var v T
	if err := json.Unmarshal([]byte(change(string(golden(t, name)))), &v); err != nil {
		t.Fatal(err)
	}
	return v
}

// The hello of a node of version 1 is accepted, proofs and all; and so is one that
// says more than version 1 did.
func TestOldNode(t *testing.T) {
	nonce, binding := goldenChannel()
	for name, change := range map[string]func(string) string{
		"as it was":    func(s string) string { return s },
		"with a field": func(s string) string { return strings.Replace(s, "{", `{"new": {"a": [1]},`, 1) },
	} {
		h := read[NodeHello](t, "node-hello", change)
		if err := h.Check("csi-loop.io", nonce, binding); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if h.NodeID != "node-1" || h.Token != "a.b.c" || len(h.Pools) != 1 || h.DefaultPool != "default" {
			t.Errorf("%s: %+v", name, h)
		}
		if err := h.Check("csi-loop.io", nonce, nonce); err == nil {
			t.Errorf("%s: the proof holds for another channel", name)
		}
	}
}

// A node picks the newest version that both speak, and says so when there is none.
func TestChoose(t *testing.T) {
	for name, tt := range map[string]struct {
		low, high, want int
	}{
		"the same":             {ProtocolMin, ProtocolMax, ProtocolMax},
		"a newer controller":   {ProtocolMin, ProtocolMax + 1, ProtocolMax},
		"an older controller":  {0, ProtocolMin, ProtocolMin},
		"much newer":           {ProtocolMax + 1, ProtocolMax + 2, 0},
		"much older":           {0, ProtocolMin - 1, 0},
		"nonsense is no range": {ProtocolMax + 1, ProtocolMin - 1, 0},
	} {
		h := read[ControllerHello](t, "controller-hello", func(s string) string { return strings.Replace(s, "{", `{"new": true,`, 1) })
		h.ProtocolMin, h.ProtocolMax = tt.low, tt.high
		got, err := h.choose()
		if got != tt.want || (err != nil) != (tt.want == 0) || err != nil && !errors.Is(err, ErrVersion) {
			t.Errorf("%s: %d, %v", name, got, err)
		}
	}
}

func TestUnsoundHellos(t *testing.T) {
	nonce, binding := goldenChannel()
	for name, change := range map[string]func(*NodeHello){
		"long node":         func(h *NodeHello) { h.NodeID = strings.Repeat("n", 254) },
		"long version":      func(h *NodeHello) { h.Version = strings.Repeat("v", 129) },
		"long default pool": func(h *NodeHello) { h.DefaultPool = strings.Repeat("p", 129) },
		"odd pool name":     func(h *NodeHello) { h.Pools[0].Name = "a\nb" },
		"long pool name":    func(h *NodeHello) { h.Pools[0].Name = strings.Repeat("p", 101) },
		"a pool twice":      func(h *NodeHello) { h.Pools = append(h.Pools, h.Pools[0]) },
		"another node":      func(h *NodeHello) { h.NodeID = "node-2" },
	} {
		h := read[NodeHello](t, "node-hello", func(s string) string { return s })
		change(&h)
		if err := h.Check("csi-loop.io", nonce, binding); err == nil {
			t.Errorf("%s is accepted", name)
		}
	}
}

func FuzzReadFrame(f *testing.F) {
	var b bytes.Buffer
	if err := WriteFrame(&b, said()["node-hello"]); err != nil {
		f.Fatal(err)
	}
	f.Add(b.Bytes())
	f.Add([]byte{0, 0, 0, 2, '{', '}'})
	nonce, binding := goldenChannel()
	f.Fuzz(func(_ *testing.T, b []byte) {
		var h NodeHello
		r := bytes.NewReader(b)
		if ReadFrame(r, &h) == nil {
			_ = h.Check("csi-loop.io", nonce, binding)
		}
	})
}
