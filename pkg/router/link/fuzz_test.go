package link

import (
	"bytes"
	"crypto/ed25519"
	"testing"

	"github.com/csi-loop/csi-loop/pkg/image"
)

// FuzzFrame: bytes from anybody are a hello or an error, and nothing behind the
// hello is read.
func FuzzFrame(f *testing.F) {
	for _, v := range []any{
		ControllerHello{ProtocolMin: 1, ProtocolMax: 1, Driver: "csi-loop.io", Nonce: make([]byte, NonceSize), Replicas: []string{"10.0.0.1:9808"}},
		NodeHello{Protocol: 1, NodeID: "n", Token: "t", Methods: []string{"/csi.v1.Controller/CreateVolume"}},
		Verdict{Welcome: true},
		Verdict{Message: "no"},
	} {
		var b bytes.Buffer
		if err := WriteFrame(&b, v); err != nil {
			f.Fatal(err)
		}
		f.Add(append(b.Bytes(), "PRI * HTTP/2.0"...))
	}
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 'x'})
	f.Add([]byte{0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, v := range []any{&ControllerHello{}, &NodeHello{}, &Verdict{}} {
			r := bytes.NewReader(b)
			if err := ReadFrame(r, v); err != nil {
				continue
			}
			if n := len(b) - r.Len(); n < 5 || n > 4+MaxHello {
				t.Errorf("a hello of %d bytes", n)
			}
			if c, ok := v.(*ControllerHello); ok {
				if p, err := c.choose(); err == nil && (p < ProtocolMin || p > ProtocolMax) {
					t.Errorf("chose version %d of %d to %d", p, c.ProtocolMin, c.ProtocolMax)
				}
			}
		}
	})
}

// FuzzHello: no hello is let in with a pool whose key it does not have. The one
// proof it may hold is of one pool, on one connection, for one node.
func FuzzHello(f *testing.F) {
	key := ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize))
	public, ok := key.Public().(ed25519.PublicKey)
	if !ok {
		f.Fatal("no ed25519 key")
	}
	nonce, binding := make([]byte, NonceSize), []byte("binding")
	proof := Prove(Pool{ID: image.PoolID(public), Name: "p", Key: public, Sign: func(m []byte) []byte { return ed25519.Sign(key, m) }}, nonce, binding, "n")
	f.Add(1, "d", "n", proof.ID, []byte(public), proof.Signature, 1)
	f.Add(1, "d", "other", proof.ID, []byte(public), proof.Signature, 1)
	f.Add(1, "d", "n", "other", []byte(public), proof.Signature, 1)
	f.Add(1, "d", "n", proof.ID, []byte{}, []byte{}, 1)
	f.Add(1, "d", "n", proof.ID, []byte(public), proof.Signature, 65)
	f.Add(2, "d", "n", "", []byte{}, []byte{}, 0)
	f.Fuzz(func(t *testing.T, protocol int, driver, node, id string, public, signature []byte, pools int) {
		h := NodeHello{Protocol: protocol, Driver: driver, NodeID: node, Token: "t"}
		for range min(max(pools, 0), 100) {
			h.Pools = append(h.Pools, PoolProof{ID: id, Name: "p", Key: public, Signature: signature})
		}
		if err := h.Check("d", nonce, binding); err != nil {
			return
		}
		proven := node == "n" && id == proof.ID && bytes.Equal(public, proof.Key) && bytes.Equal(signature, proof.Signature)
		if protocol != 1 || driver != "d" || node == "" || len(h.Pools) > 1 || len(h.Pools) == 1 && !proven {
			t.Errorf("let in %+v", h)
		}
	})
}
