package router

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/csi-loop/csi-loop/pkg/image"
	"github.com/csi-loop/csi-loop/pkg/report"
	"github.com/csi-loop/csi-loop/pkg/router/link"
)

// said is a stream on which a node has said everything it will.
type said struct {
	grpc.ClientStream

	words [][]byte
}

func (s *said) RecvMsg(m any) error {
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

// keyed is a pool whose key is made of one byte.
func keyed(b byte, name string) link.Pool {
	key := ed25519.NewKeyFromSeed(bytes.Repeat([]byte{b}, ed25519.SeedSize))
	public, _ := key.Public().(ed25519.PublicKey)
	return link.Pool{ID: image.PoolID(public), Name: name, Key: public, Sign: func(m []byte) []byte { return ed25519.Sign(key, m) }}
}

// onChannel is the end of a link whose numbers are always the same, so that what a node
// proves on it is too.
func onChannel(r *Router, node string, pools ...link.Pool) *session {
	nonce, binding := make([]byte, link.NonceSize), []byte("binding")
	hello := link.NodeHello{NodeID: node, DefaultPool: "default"}
	for _, p := range pools {
		hello.Pools = append(hello.Pools, link.Prove(p, nonce, binding, node))
	}
	id := Identity{Node: node, NodeUID: "uid-" + node, Pod: node, PodUID: "pod-" + node, Expires: time.Now().Add(time.Hour)}
	return newSession(r, id, hello, nonce, binding)
}

// hears takes all that a node says on a new link, until it is too much. It ends as when
// the node has hung up.
func (s *session) hears(ctx context.Context, words ...[]byte) error {
	defer s.end(nil)
	if _, err := s.router.table.admit(s); err != nil {
		return err
	}
	stream := link.Stream{ClientStream: &said{words: words}}
	pools, err := s.inventory(stream)
	if err != nil {
		return err
	}
	for _, d := range s.router.table.join(s, pools) {
		tellDuplicate(ctx, d)
	}
	return s.receive(ctx, stream)
}

// sound fails unless names and pools tell the same.
func (t *table) sound(tb testing.TB) {
	tb.Helper()
	t.mu.RLock()
	defer t.mu.RUnlock()
	for v, in := range t.names {
		for _, p := range in {
			if _, has := p.volumes[v]; !has || !t.shown(p) || p.node.pools[p.id] != p && p.node.absent[p.id] != p {
				tb.Errorf("volume %q is in pool %q of %q", v, p.id, p.node.name)
			}
		}
	}
	for _, n := range t.nodes {
		if n.pools != nil && bounded(n.pools) != nil && n.session != nil {
			tb.Errorf("%s: %v", n.name, bounded(n.pools))
		}
		for id, p := range n.absent {
			if n.pools[id] != nil || !t.shown(p) || p.absent.IsZero() {
				tb.Errorf("pool %q is not where %s had it", id, n.name)
			}
		}
		for _, p := range n.pools {
			if want := map[bool]standing{true: placeOfPool, false: copyOfPool}[t.shown(p)]; p.id != "" && n.standing[p.id] != want {
				tb.Errorf("pool %q of %s: standing %v", p.id, n.name, n.standing[p.id])
			}
			if p.id != "" && !slices.Contains(t.pools[p.id], p) {
				tb.Errorf("pool %q of %s is not known", p.id, n.name)
			}
			for v := range p.volumes {
				if t.shown(p) && !slices.Contains(t.names[v], p) {
					tb.Errorf("volume %q of pool %q is not known", v, p.id)
				}
			}
			if p.free.Thick < 0 || p.free.Thin < 0 || p.free.Thick > maxFree || p.free.Thin > maxFree {
				tb.Errorf("free: %+v", p.free)
			}
		}
	}
}

// FuzzUpdates: whatever a node says on its stream, line by line, the pools and volumes
// of another node stay where they are, and what is known of it agrees with itself: while
// it is linked, when it has hung up, and when it comes again.
func FuzzUpdates(f *testing.F) {
	honest, own, late := keyed(1, "default"), keyed(2, "default"), keyed(3, "fast")
	nonce, binding := make([]byte, link.NonceSize), []byte("binding")
	proof := func(p link.Pool, node string) string {
		b, err := json.Marshal(link.Prove(p, nonce, binding, node))
		must(f, err)
		return string(b)
	}
	for _, lines := range [][]string{
		{`{"pools":[{"id":"OWN","added":["x","y"],"free":{"thick":1,"thin":2}}]}`, `{"complete":true}`, `{"pools":[{"id":"OWN","removed":["x"]}]}`},
		{`{"complete":true}`, `{"proofs":[` + proof(late, "evil") + `],"pools":[{"id":"LATE","added":["z"]}],"token":"t"}`},
		{`{"complete":true}`, `{"proofs":[` + proof(late, "honest") + `]}`},
		{`{"proofs":[` + proof(honest, "evil") + `],"pools":[{"id":"HONEST","added":["x"],"removed":["precious"]}]}`, `{"complete":true}`},
		{`{"complete":true}`, `{"pools":[{"id":"HONEST","removed":["precious"]}]}`},
		{`{"pools":[{"added":["precious"]},{"removed":["precious"]}]}`, `{"complete":true}`, `{"pools":[{"added":["a"]}]}`},
		{`{"complete":true,"pools":[{"id":"OWN","free":{"thick":-1,"thin":9223372036854775807}}]}`},
		{`{"pools":[{"id":"OWN","added":["a b","` + strings.Repeat("x", 300) + `"]}]}`},
		{`null`, `{}`, `[]`, ``},
	} {
		f.Add(strings.NewReplacer("OWN", own.ID, "HONEST", honest.ID, "LATE", late.ID).Replace(strings.Join(lines, "\n")))
	}
	f.Fuzz(func(t *testing.T, text string) {
		r := New(Config{Self: "a", Driver: driver})
		good := onChannel(r, "honest", honest)
		defer good.end(nil)
		_, err := r.table.admit(good)
		must(t, err)
		has := newPool(honest.ID, honest.Name, true)
		has.volumes["precious"] = struct{}{}
		r.table.join(good, map[string]*pool{"": newPool("", "", false), honest.ID: has})

		words := bytes.Split([]byte(text), []byte("\n"))
		for range 2 {
			evil := onChannel(r, "evil", own)
			if evil.hears(t.Context(), words...) == nil {
				t.Error("a stream ended without an error")
			}
			r.table.sound(t)
			r.table.leave(evil)
			r.table.sound(t)
			if !r.table.owns(good, honest.ID) || !slices.Contains(r.table.names["precious"], has) {
				t.Errorf("%q: the honest node lost what it has", text)
			}
		}
	})
}

// FuzzReport: what a node says of itself is refused, or is within bounds, and nothing in
// it is of a pool that another node has.
func FuzzReport(f *testing.F) {
	honest, own := keyed(1, "default"), keyed(2, "default")
	whole, err := json.Marshal(report.Page{Next: "volumes/x", Machine: report.Machine{
		Time: time.Unix(1, 0).UTC(), Pools: []report.Pool{{Name: "default", ID: own.ID}}, Volumes: []report.Volume{{ID: own.ID + ".v", Used: new(int64), IO: &report.IO{}}},
		Snapshots: []report.Snapshot{{ID: own.ID + ".s"}}, Templates: []report.Template{{ID: own.ID + ".t"}}, Copies: []report.Copy{{Name: "c"}},
		Problems: []report.Problem{{Kind: report.Degraded}},
	}})
	must(f, err)
	for _, text := range []string{
		string(whole), "", "null", "[]", "{}", `{"volumes":[{},{"id":" "},{"id":"HONEST.v"},{"id":"mapped-1"}],"pools":[{"id":"HONEST"},{}]}`,
		`{"snapshots":[{"id":"HONEST.s"}],"templates":[{"id":"HONEST.t"}],"next":"volumes/"}`, `{"volumes":[{"size":-1,"allocated":1e30}]}`,
		`{"time":"yesterday"}`, `{"volumes":[{}` + strings.Repeat(",{}", report.PageSize) + `]}`, `{"volumes":[{"io":{"reads":-1}}]}`,
	} {
		f.Add(strings.ReplaceAll(text, "HONEST", honest.ID))
	}
	r := New(Config{Self: "a", Driver: driver})
	for node, p := range map[string]link.Pool{"honest": honest, "evil": own} {
		s := onChannel(r, node, p)
		_, err := r.table.admit(s)
		must(f, err)
		r.table.join(s, map[string]*pool{"": newPool("", "", false), p.ID: newPool(p.ID, p.Name, true)})
	}
	f.Fuzz(func(t *testing.T, text string) {
		p, size, err := link.FetchReport(t.Context(), page(text), "")
		if err != nil {
			if size != 0 || len(p.Volumes)+len(p.Snapshots)+len(p.Templates)+len(p.Pools) != 0 {
				t.Errorf("%v, and %+v", err, p)
			}
			return
		}
		if n := max(len(p.Volumes), len(p.Snapshots), len(p.Templates)); size != len(text) || n > report.PageSize {
			t.Errorf("%d bytes of %d, %d entries", size, len(text), n)
		}
		p = r.ownPage(r.table.nodes["evil"].session, p)
		for _, pool := range p.Pools {
			if pool.ID == honest.ID {
				t.Errorf("it tells of pool %+v", pool)
			}
		}
		var ids []string
		for _, v := range p.Volumes {
			ids = append(ids, v.ID)
		}
		for _, s := range p.Snapshots {
			ids = append(ids, s.ID)
		}
		for _, made := range p.Templates {
			ids = append(ids, made.ID)
		}
		for _, id := range ids {
			if poolID, _, ok := image.ParseID(id); strings.TrimSpace(id) == "" || ok && poolID == honest.ID {
				t.Errorf("it tells of %q", id)
			}
		}
		again, err := json.Marshal(p)
		must(t, err)
		if _, _, err := link.FetchReport(t.Context(), page(again), ""); err != nil && len(again) < 1<<16 {
			t.Errorf("%s became %s: %v", text, again, err)
		}
	})
}
