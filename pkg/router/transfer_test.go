package router

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/csi-loop/csi-loop/pkg/image"
	"github.com/csi-loop/csi-loop/pkg/router/link"
	"github.com/csi-loop/csi-loop/pkg/transfer"
)

// copier makes a fakeNode one that sends and receives content: what it has of a source
// is in memory. A copy is a job of its own, as the driver's is.
type copier struct {
	*fakeNode

	mu      sync.Mutex
	sources map[string][]byte // by ID; what can be sent
	made    map[string][]byte // by directory of the volume; what came
	jobs    map[string]chan struct{}
	errs    map[string]error
	sends   int
	// sending is called before each piece that is sent.
	sending func(ctx context.Context, n int) error
	// spoil changes what is sent.
	spoil func(w io.Writer) io.Writer
	// boasts is more to describe than there is.
	boasts []string
}

func (c *cluster) copier(name string, pools ...*fakePool) *copier {
	k := &copier{
		fakeNode: c.node(name, pools...), sources: map[string][]byte{}, made: map[string][]byte{},
		jobs: map[string]chan struct{}{}, errs: map[string]error{},
	}
	k.handler, k.fakeNode.sources = k, k
	return k
}

const copyPiece = 64 << 10

func (k *copier) Describe(_ context.Context, r transfer.Request) (transfer.Description, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	b, ok := k.sources[r.ID()]
	if !ok {
		return transfer.Description{}, status.Error(codes.NotFound, "no such source")
	}
	return transfer.Description{Size: int64(len(b)), BlockSize: 4096, MkfsOptions: k.boasts}, nil
}

func (k *copier) Send(ctx context.Context, r transfer.Request, w io.Writer) error {
	k.mu.Lock()
	b := k.sources[r.ID()]
	k.sends++
	k.mu.Unlock()
	if k.spoil != nil {
		w = k.spoil(w)
	}
	out := transfer.NewWriter(w)
	if err := out.Head(transfer.Description{Size: int64(len(b)), BlockSize: 4096}); err != nil {
		return err
	}
	for n := 0; n*copyPiece < len(b); n++ {
		if k.sending != nil {
			if err := k.sending(ctx, n); err != nil {
				return errors.Join(err, out.Fail(transfer.SenderError{Code: uint32(status.Code(err)), Message: err.Error()}))
			}
		}
		if err := out.Data(int64(n*copyPiece), b[n*copyPiece:min(len(b), (n+1)*copyPiece)]); err != nil {
			return err
		}
	}
	return out.End()
}

// CreateVolume makes a copy of what another node has, in a job.
func (k *copier) CreateVolume(ctx context.Context, req *csi.CreateVolumeRequest) (*csi.CreateVolumeResponse, error) {
	offer, dir := transfer.OfferOf(ctx), image.DirName(req.GetName())
	k.mu.Lock()
	defer k.mu.Unlock()
	job, running := k.jobs[dir]
	switch _, made := k.made[dir]; {
	case made:
		return k.fakeNode.CreateVolume(ctx, req)
	case running:
	case k.errs[dir] != nil:
		err := k.errs[dir]
		delete(k.errs, dir)
		return nil, err
	case req.GetVolumeContentSource() == nil, len(k.sources) > 0:
		return k.fakeNode.CreateVolume(ctx, req)
	case offer == nil:
		return nil, status.Error(codes.Unavailable, "its source is nowhere here")
	default:
		job = make(chan struct{})
		k.jobs[dir] = job
		k.called("copy")
		go k.fetch(context.WithoutCancel(ctx), dir, offer, job)
	}
	k.mu.Unlock()
	defer k.mu.Lock()
	select {
	case <-job:
	case <-time.After(50 * time.Millisecond):
	case <-ctx.Done():
		return nil, status.FromContextError(ctx.Err()).Err()
	}
	return nil, status.Error(codes.Aborted, "it goes on")
}

func (k *copier) fetch(ctx context.Context, dir string, offer *transfer.Offer, job chan struct{}) {
	b, err := fetched(ctx, offer)
	k.mu.Lock()
	defer k.mu.Unlock()
	if err == nil {
		k.made[dir] = b
	} else {
		k.errs[dir] = status.Error(codes.Unavailable, err.Error())
	}
	delete(k.jobs, dir)
	close(job)
}

func fetched(ctx context.Context, offer *transfer.Offer) ([]byte, error) {
	conn, err := offer.Open(ctx)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	r := transfer.NewReader(conn)
	d, err := r.Head()
	if err != nil {
		return nil, err
	}
	b := make([]byte, d.Size)
	for {
		offset, data, err := r.Next()
		if errors.Is(err, io.EOF) {
			return b, nil
		}
		if err != nil {
			return nil, err
		}
		copy(b[offset:], data)
	}
}

func (k *copier) sent() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.sends
}

func (k *copier) got(name string) []byte {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.made[image.DirName(name)]
}

// twoNodes are a node with a source and one without.
func twoNodes(t *testing.T, c *cluster) (a, b *copier, id string, content []byte) {
	t.Helper()
	a, b = c.copier("a", newDisk(t, "default", gib)), c.copier("b", newDisk(t, "default", gib))
	id = image.VolumeID(a.pools[0].id, "snap")
	content = make([]byte, 10*copyPiece+5)
	_, _ = rand.Read(content)
	a.sources[id] = content
	return a, b, id, content
}

func restore(name, snapshot string, at *fakeNode) *csi.CreateVolumeRequest {
	req := create(name, 1<<20, at)
	req.VolumeContentSource = &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: snapshot}}}
	return req
}

// repeated asks until it succeeds, as the provisioner does.
func (c *cluster) repeated(t *testing.T, req *csi.CreateVolumeRequest) *csi.Volume {
	t.Helper()
	var made *csi.Volume
	eventually(t, "made: "+req.GetName(), func() bool {
		resp, err := c.csi.CreateVolume(t.Context(), req)
		if code := status.Code(err); err != nil && code != codes.Aborted && code != codes.Unavailable {
			t.Fatal(err)
		}
		made = resp.GetVolume()
		return err == nil
	})
	return made
}

func TestCopyToAnotherNode(t *testing.T) {
	c := newCluster(t)
	a, b, id, content := twoNodes(t, c)
	a.up()
	b.up()
	c.linked(a.fakeNode, b.fakeNode)
	v := c.repeated(t, restore("v", id, b.fakeNode))
	if !strings.HasPrefix(v.GetVolumeId(), b.pools[0].id) || !bytes.Equal(b.got("v"), content) {
		t.Errorf("%v", v)
	}
	if again := c.repeated(t, restore("v", id, b.fakeNode)); again.GetVolumeId() != v.GetVolumeId() {
		t.Error(again)
	}
	if n := a.sent(); n != 1 {
		t.Errorf("sent %d times", n)
	}
	eventually(t, "it is over", func() bool { s := c.router.Stats().Transfers; return s.Running == 0 && s.Done == 1 })
	if s := c.router.Stats().Transfers; s.Bytes < int64(len(content)) || s.Failed != 0 {
		t.Errorf("%+v", s)
	}

	// What does not leave its node.
	req := restore("w", id, b.fakeNode)
	req.Parameters = map[string]string{"sourceNode": "required"}
	_, err := c.csi.CreateVolume(t.Context(), req)
	code(t, err, codes.ResourceExhausted, `"a"`, "sourceNode")
	if v := c.repeated(t, restore("w", id, nil)); !strings.HasPrefix(v.GetVolumeId(), a.pools[0].id) {
		t.Error(v)
	}
	both := restore("x", id, b.fakeNode)
	both.AccessibilityRequirements.Requisite = append(both.AccessibilityRequirements.Requisite, a.topology()...)
	if v := c.repeated(t, both); !strings.HasPrefix(v.GetVolumeId(), a.pools[0].id) {
		t.Error(v)
	}
	_, err = c.csi.CreateVolume(t.Context(), restore("y", image.VolumeID(a.pools[0].id, "none"), b.fakeNode))
	code(t, err, codes.NotFound)
	a.stop()
	c.linked(b.fakeNode)
	_, err = c.csi.CreateVolume(t.Context(), restore("y", id, b.fakeNode))
	code(t, err, codes.Unavailable, `"a"`)
}

// What a node says of a source without end is its own fault, and nobody else's.
func TestEndlessDescription(t *testing.T) {
	c := newCluster(t)
	a, b, id, _ := twoNodes(t, c)
	a.boasts = []string{strings.Repeat("x", 64<<10)}
	a.up()
	b.up()
	c.linked(a.fakeNode, b.fakeNode)
	_, err := c.csi.CreateVolume(t.Context(), restore("v", id, b.fakeNode))
	code(t, err, codes.Unavailable, `"a"`)
}

// A repeated call joins the copy, and one that ends does not end it.
func TestCopyOutlivesItsCall(t *testing.T) {
	c := newCluster(t)
	a, b, id, content := twoNodes(t, c)
	open, opened := holdBack(t)
	a.sending = func(_ context.Context, n int) error {
		if n == 3 {
			<-opened
		}
		return nil
	}
	a.up()
	b.up()
	c.linked(a.fakeNode, b.fakeNode)
	for range 3 {
		eventually(t, "a call gives up", func() bool {
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
			defer cancel()
			_, err := c.csi.CreateVolume(ctx, restore("v", id, b.fakeNode))
			if status.Code(err) == codes.Aborted {
				return false // the handler of the call before still ends
			}
			code(t, err, codes.DeadlineExceeded)
			return true
		})
		_, err := c.csi.CreateVolume(t.Context(), restore("v", id, b.fakeNode))
		code(t, err, codes.Aborted)
	}
	open()
	c.repeated(t, restore("v", id, b.fakeNode))
	if b.count("copy") != 1 || a.sent() != 1 || !bytes.Equal(b.got("v"), content) {
		t.Errorf("%d copies, sent %d times", b.count("copy"), a.sent())
	}
}

// Whatever is lost in the middle, the copy is begun anew, and nothing is made of a part.
func TestCopyIsCut(t *testing.T) {
	for name, cut := range map[string]func(c *cluster, a, b *copier){
		"the source's node is restarted":   func(_ *cluster, a, _ *copier) { a.stop(); a.up() },
		"the receiver's node is restarted": func(_ *cluster, _, b *copier) { b.stop(); b.up() },
		"the controller is restarted":      func(c *cluster, _, _ *copier) { c.halt(); c.start() },
	} {
		t.Run(name, func(t *testing.T) {
			c := newCluster(t)
			a, b, id, content := twoNodes(t, c)
			reached, once := make(chan struct{}), sync.Once{}
			a.sending = func(ctx context.Context, n int) error {
				if n == 5 && a.sent() == 1 {
					once.Do(func() { close(reached) })
					select {
					case <-ctx.Done():
					case <-time.After(300 * time.Millisecond): // a stop that waits, waits no longer
					}
				}
				return nil
			}
			a.up()
			b.up()
			c.linked(a.fakeNode, b.fakeNode)
			_, err := c.csi.CreateVolume(t.Context(), restore("v", id, b.fakeNode))
			code(t, err, codes.Aborted)
			<-reached
			cut(c, a, b)
			// On a slow machine the rest may come while the stop waits.
			if got := b.got("v"); got != nil && !bytes.Equal(got, content) {
				t.Fatal("made of a part")
			}
			c.linked(a.fakeNode, b.fakeNode)
			v := c.repeated(t, restore("v", id, b.fakeNode))
			if !strings.HasPrefix(v.GetVolumeId(), b.pools[0].id) || !bytes.Equal(b.got("v"), content) {
				t.Error(v)
			}
			eventually(t, "nothing is left", func() bool {
				c.router.transfers.mu.Lock()
				defer c.router.transfers.mu.Unlock()
				return c.router.transfers.stats.Running == 0 && len(c.router.transfers.awaited) == 0
			})
		})
	}
}

// Another replica that takes over finds the copy that is under way.
func TestCopyMeetsAnotherReplica(t *testing.T) {
	c := newCluster(t)
	r := c.replica()
	a, b, id, content := twoNodes(t, c)
	open, opened := holdBack(t)
	a.sending = func(_ context.Context, n int) error {
		if n == 3 {
			<-opened
		}
		return nil
	}
	both := []string{c.address, r.address}
	c.router.SetReplicas(both)
	r.router.SetReplicas(both)
	a.up()
	b.up()
	c.linked(a.fakeNode, b.fakeNode)
	r.linked(a.fakeNode, b.fakeNode)
	_, err := c.csi.CreateVolume(t.Context(), restore("v", id, b.fakeNode))
	code(t, err, codes.Aborted)
	_, err = r.csi.CreateVolume(t.Context(), restore("v", id, b.fakeNode))
	code(t, err, codes.Aborted)
	open()
	r.repeated(t, restore("v", id, b.fakeNode))
	if b.count("copy") != 1 || a.sent() != 1 || !bytes.Equal(b.got("v"), content) {
		t.Errorf("%d copies, sent %d times", b.count("copy"), a.sent())
	}
}

// A byte that changes between the nodes is found, and the copy made anew.
func TestCopyIsDamaged(t *testing.T) {
	c := newCluster(t)
	a, b, id, content := twoNodes(t, c)
	a.spoil = func(w io.Writer) io.Writer {
		if a.sent() > 1 {
			return w
		}
		return &damage{Writer: w, at: 5*copyPiece + 1000}
	}
	a.up()
	b.up()
	c.linked(a.fakeNode, b.fakeNode)
	found := false
	eventually(t, "made", func() bool {
		_, err := c.csi.CreateVolume(t.Context(), restore("v", id, b.fakeNode))
		found = found || err != nil && strings.Contains(err.Error(), transfer.ErrCorrupt.Error())
		return err == nil
	})
	if !found || a.sent() != 2 || !bytes.Equal(b.got("v"), content) {
		t.Errorf("found: %t, sent %d times", found, a.sent())
	}
}

// damage changes one byte.
type damage struct {
	io.Writer

	at int
}

func (d *damage) Write(b []byte) (int, error) {
	if d.at >= 0 && d.at < len(b) {
		b = bytes.Clone(b)
		b[d.at] ^= 1
	}
	d.at -= len(b)
	return d.Writer.Write(b)
}

// What the sender says of itself arrives, and what it cannot send is not made.
func TestCopyRefusedByItsSource(t *testing.T) {
	c := newCluster(t)
	a, b, id, _ := twoNodes(t, c)
	a.sending = func(_ context.Context, n int) error {
		if n == 2 {
			return status.Error(codes.FailedPrecondition, "the volume is in use")
		}
		return nil
	}
	a.up()
	b.up()
	c.linked(a.fakeNode, b.fakeNode)
	eventually(t, "it is said", func() bool {
		_, err := c.csi.CreateVolume(t.Context(), restore("v", id, b.fakeNode))
		return err != nil && strings.Contains(err.Error(), "in use")
	})
	if b.got("v") != nil {
		t.Error("made of a part")
	}
	eventually(t, "it is over", func() bool { return c.router.Stats().Transfers.Running == 0 })
	if s := c.router.Stats().Transfers; s.Done != 0 || s.Failed == 0 {
		t.Errorf("it counts as done: %+v", s)
	}
}

// A node of an older csi-loop is named, at either end, and nothing is made anywhere.
func TestCopyWithAnOlderNode(t *testing.T) {
	for _, older := range []string{"a", "b"} {
		t.Run(older, func(t *testing.T) {
			c := newCluster(t)
			a, b, id, _ := twoNodes(t, c)
			for _, n := range []*copier{a, b} {
				if n.name == older {
					n.fakeNode.sources = nil
				}
				n.up()
			}
			c.linked(a.fakeNode, b.fakeNode)
			for range 2 {
				_, err := c.csi.CreateVolume(t.Context(), restore("v", id, b.fakeNode))
				code(t, err, codes.Unavailable, fmt.Sprintf("%q", older), "upgrade")
			}
			if a.count("CreateVolume")+b.count("CreateVolume") > 0 {
				t.Error("it was asked all the same")
			}
		})
	}
}

// A connection for a transfer needs a ticket, which is good for one, for the link that
// it was told on, and not for ever.
func TestTickets(t *testing.T) {
	c := newCluster(t)
	a, b, id, _ := twoNodes(t, c)
	a.up()
	b.up()
	c.linked(a.fakeNode, b.fakeNode)
	verdict := func(ticket []byte) link.Verdict {
		t.Helper()
		conn, _ := c.dialRaw(t)
		defer conn.Close()
		must(t, link.WriteFrame(conn, link.NodeHello{Protocol: link.ProtocolMax, Driver: driver, NodeID: "b", Ticket: ticket}))
		var v link.Verdict
		must(t, link.ReadFrame(conn, &v))
		return v
	}
	p, _ := c.router.table.node("b")
	offer := func() []byte {
		t.Helper()
		ticket, err := c.router.transfers.offer("v", p.session, transfer.Request{Snapshot: id})
		must(t, err)
		return ticket
	}
	if v := verdict(newTicket()); v.Welcome {
		t.Error("a ticket that was never made")
	}
	first := offer()
	if again := offer(); !bytes.Equal(again, first) {
		t.Error("a second offer for the same copy")
	}
	if v := verdict(first); !v.Welcome {
		t.Error(v.Message)
	}
	if v := verdict(first); v.Welcome {
		t.Error("a ticket that was used")
	}
	old := offer()
	c.clock.advance(offerAge)
	if v := verdict(old); v.Welcome {
		t.Error("a ticket that is too old")
	}
	c.clock.advance(-offerAge)
	lost := offer()
	b.stop()
	<-p.session.ended.Done() // a moment after it has left the table
	if v := verdict(lost); v.Welcome {
		t.Error("a ticket of a link that has ended")
	}
	// The sender's of the first copy is one more, if it comes when that has ended.
	eventually(t, "all are counted", func() bool { n := c.router.Stats().Refused[reasonTicket]; return n == 4 || n == 5 })
	c.router.transfers.mu.Lock()
	defer c.router.transfers.mu.Unlock()
	if n := len(c.router.transfers.offers) + len(c.router.transfers.byVolume); n != 0 {
		t.Errorf("%d offers are kept", n)
	}
}

// Offers do not pile up, and what goes through at a time is bounded.
func TestTransferBounds(t *testing.T) {
	now := time.Now()
	x := newTransfers(func() time.Time { return now }, 0)
	s := newSession(nil, Identity{Node: "n"}, link.NodeHello{}, nil, nil)
	defer s.end(nil)
	for i := range maxOffers {
		_, err := x.offer(strconv.Itoa(i), s, transfer.Request{Volume: "v"})
		must(t, err)
	}
	_, err := x.offer("one too many", s, transfer.Request{Volume: "v"})
	code(t, err, codes.Aborted)
	now = now.Add(offerAge)
	_, err = x.offer("one too many", s, transfer.Request{Volume: "v"})
	must(t, err)
	if len(x.offers) != 1 || len(x.byVolume) != 1 {
		t.Error(len(x.offers), len(x.byVolume))
	}
	for range maxTransfers {
		if !x.begin() {
			t.Fatal("refused")
		}
	}
	if x.begin() {
		t.Error("one too many")
	}
	x.end(nil)
	if !x.begin() {
		t.Error("refused")
	}
}

// Offers that are not used are forgotten when they expire, and with the link that they
// were made for.
func TestUnusedOffersAreForgotten(t *testing.T) {
	c := newCluster(t)
	x := c.router.transfers
	links := []*session{onChannel(c.router, "a"), onChannel(c.router, "b")}
	for _, s := range links {
		defer s.end(nil)
		_, err := x.offer(s.id.Node, s, transfer.Request{Volume: "v"})
		must(t, err)
	}
	left := func() int {
		c.router.forget()
		x.mu.Lock()
		defer x.mu.Unlock()
		return len(x.offers) + len(x.byVolume)
	}
	if n := left(); n != 4 {
		t.Errorf("%d of two that are good", n)
	}
	links[0].end(nil)
	if n := left(); n != 2 {
		t.Errorf("%d when one link has ended", n)
	}
	c.clock.advance(offerAge)
	if n := left(); n != 0 {
		t.Errorf("%d when all have expired", n)
	}
}

// A limit holds for all that is written with it together.
func TestBulkLimit(t *testing.T) {
	limit := link.NewLimit(8 << 20)
	start := time.Now()
	var wg sync.WaitGroup
	for range 2 {
		here, there := net.Pipe()
		wg.Go(func() { _, _ = io.Copy(io.Discard, there) })
		out := link.NewBulk(t.Context(), here, limit)
		wg.Go(func() {
			defer out.Close()
			if n, err := out.Write(make([]byte, 1<<20)); err != nil || n != 1<<20 {
				t.Error(n, err)
			}
		})
	}
	wg.Wait()
	if took := time.Since(start); took < 200*time.Millisecond { // 2 MiB less the burst take 242 ms
		t.Errorf("2 MiB at 8 MiB a second took %v", took)
	}
	if link.NewLimit(0) != nil {
		t.Error("0 is a limit")
	}
}
