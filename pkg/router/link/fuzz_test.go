package link

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"
	"k8s.io/klog/v2"

	"github.com/csi-loop/csi-loop/pkg/image"
	"github.com/csi-loop/csi-loop/pkg/transfer"
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

// FuzzOffer: what came with a call is refused, or is an offer that can be made again.
func FuzzOffer(f *testing.F) {
	good, err := json.Marshal(Offer{
		Source: transfer.Description{Size: 1 << 20, Filesystem: "ext4", BlockSize: 4096, MkfsOptions: []string{"-m", "1"}},
		Ticket: make([]byte, TicketSize), Address: "c:1",
	})
	if err != nil {
		f.Fatal(err)
	}
	for _, seed := range []string{string(good), "", "{}", "null", "[]", `{"source":{"size":-1}}`, `{"source":{"size":1e30}}`, `{"ticket":"!"}`, strings.Repeat("{", maxOffer+1)} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, header string) {
		ctx := metadata.NewIncomingContext(t.Context(), metadata.Pairs(OfferKey, header))
		o, err := offerOf(ctx)
		a := &Agent{}
		with, accepted := a.accept(ctx)
		if (err == nil) != (accepted == nil) || err == nil && len(header) > maxOffer {
			t.Fatalf("%v, %v", err, accepted)
		}
		if err != nil {
			if transfer.OfferOf(with) != nil {
				t.Error("what is no offer is one")
			}
			return
		}
		if got := transfer.OfferOf(with); !cmp.Equal(got.Source, o.Source) {
			t.Errorf("%+v of %+v", got.Source, o.Source)
		}
		out, err := WithOffer(t.Context(), *o)
		if err != nil {
			return // too large by now
		}
		sent, _ := metadata.FromOutgoingContext(out)
		again, err := offerOf(metadata.NewIncomingContext(t.Context(), sent))
		if err != nil || !cmp.Equal(again, o, cmpopts.EquateEmpty()) {
			t.Errorf("%+v became %+v: %v", o, again, err)
		}
	})
}

// silent is a node that sends nothing, and counts how often it should.
type silent struct{ sent atomic.Int32 }

func (*silent) Describe(_ context.Context, r transfer.Request) (transfer.Description, error) {
	return transfer.Description{Size: int64(len(r.ID())), BlockSize: len(r.Parameters)}, nil
}

func (s *silent) Send(context.Context, transfer.Request, io.Writer) error {
	s.sent.Add(1)
	return nil
}

// FuzzOrders: whatever a controller orders a node to describe or to send, the node
// answers, and never sends anything but on a connection that the order's ticket opened.
func FuzzOrders(f *testing.F) {
	order, err := json.Marshal(sendOrder{Request: transfer.Request{Snapshot: "p.s", Parameters: map[string]string{"a": "b"}}, Ticket: make([]byte, TicketSize), Address: "c:1"})
	if err != nil {
		f.Fatal(err)
	}
	for _, seed := range []string{string(order), "", "null", "{}", `{"snapshot":"p.s"}`, `{"volume":"p.v","parameters":{"a":"b"}}`, `{"request":{"volume":1}}`, `{"ticket":"AAAA","address":"x"}`} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, req []byte) {
		sources := &silent{}
		ctx := klog.NewContext(t.Context(), klog.Logger{})
		a := &Agent{cfg: Config{Sources: sources, CA: func() (*x509.CertPool, error) { return nil, net.ErrClosed }}} // no order gets a connection
		server := &recorder{}
		registerTransfer(server, &session{agent: a, ctx: ctx})
		for _, m := range server.methods {
			resp, err := m.Handler(nil, ctx, func(v any) error {
				b, ok := v.(*wrapperspb.BytesValue)
				if !ok {
					t.Fatalf("%T", v)
				}
				b.Value = req
				return nil
			}, func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
				return handle(ctx, req)
			})
			var o sendOrder
			valid := json.Unmarshal(req, &o) == nil && len(o.Ticket) == TicketSize && o.Address != ""
			if code := status.Code(err); code != codes.OK && code != codes.InvalidArgument || err == nil && resp == nil || m.MethodName == sendMethod && (err == nil) != valid {
				t.Errorf("%s: %v, %v", m.MethodName, resp, err)
			}
		}
		a.wg.Wait()
		if n := sources.sent.Load(); n != 0 {
			t.Errorf("sent %d times, without a connection", n)
		}
	})
}

// recorder is a server that only takes note of its methods.
type recorder struct{ methods []grpc.MethodDesc }

func (r *recorder) RegisterService(d *grpc.ServiceDesc, _ any) {
	r.methods = append(r.methods, d.Methods...)
}

// told is a stream on which a controller has said everything it will. It counts what
// the node answers.
type told struct {
	grpc.ServerStream

	ctx     context.Context //nolint:containedctx // a stream has one
	words   [][]byte
	answers []Update
}

func (s *told) Context() context.Context { return s.ctx }

func (s *told) RecvMsg(m any) error {
	if len(s.words) == 0 {
		return io.EOF
	}
	to, ok := m.(*wrapperspb.BytesValue)
	if !ok {
		return fmt.Errorf("%T", m)
	}
	proto.Merge(to, wrapperspb.Bytes(s.words[0]))
	s.words = s.words[1:]
	return nil
}

func (s *told) SendMsg(m any) error {
	b, ok := m.(*wrapperspb.BytesValue)
	if !ok {
		return fmt.Errorf("%T", m)
	}
	var u Update
	err := json.Unmarshal(b.GetValue(), &u)
	s.answers = append(s.answers, u)
	return err
}

// FuzzSync: whatever a controller says on the stream, line by line, the node does what is
// an order, up to the first that is none: it answers each ping, and keeps links to the
// replicas that it was told of last, and to no others.
func FuzzSync(f *testing.F) {
	for _, lines := range []string{
		`{"ping":true}` + "\n" + `{"ping":true}`, `{"replicas":["a:1","b:1"]}` + "\n" + `{"replicas":["b:1","c:1","b:1",""],"ping":true}`, `{"replicas":[]}`,
		`{"notice":"x","new":1}`, "null\n{}", "[]", `{"replicas":[""]}` + "\n" + `{"ping":1}` + "\n" + `{"ping":true}`, `{"replicas":[` + strings.Repeat(`"",`, 3000) + `""]}`,
	} {
		f.Add(lines)
	}
	f.Fuzz(func(t *testing.T, lines string) {
		ctx, cancel := context.WithCancel(klog.NewContext(t.Context(), klog.Logger{}))
		a := NewAgent(Config{
			NodeID: "n", CA: func() (*x509.CertPool, error) { return nil, net.ErrClosed }, Token: func() (string, error) { return "t", nil },
			Register: func(grpc.ServiceRegistrar) {}, Pools: func() []Pool { return nil }, RetryMin: time.Hour, RetryMax: time.Hour,
		})
		a.inventory, _ = openInventory(a.cfg.Pools, nil)
		stream := &told{ctx: ctx, words: bytes.Split([]byte(lines), []byte("\n"))}
		want, pings := []string(nil), 0
		for _, word := range stream.words {
			var o Order
			if json.Unmarshal(word, &o) != nil || bytes.Count(word, []byte{','}) >= maxHelloItems {
				break
			}
			if left := slices.DeleteFunc(o.Replicas, func(r string) bool { return r == "" }); len(left) > 0 {
				want = left
			}
			if o.Ping {
				pings++
			}
		}
		s := &session{agent: a, ctx: ctx, proven: map[string]bool{}}
		if err := s.sync(stream); err == nil {
			t.Error("the stream ended without an error")
		}
		// Before the answers it told what it has: nothing, and that this is all.
		if got := len(stream.answers) - 2; got != pings {
			t.Errorf("%d answers to %d pings", got, pings)
		}
		a.mu.Lock()
		kept := slices.Sorted(maps.Keys(a.keepers))
		a.mu.Unlock()
		if want = slices.Compact(slices.Sorted(slices.Values(want))); !slices.Equal(kept, want) {
			t.Errorf("links are kept to %q, not %q", kept, want)
		}
		if len(a.inventory.subs) > 0 {
			t.Error("the stream is still told of changes")
		}
		cancel()
		a.wg.Wait()
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
