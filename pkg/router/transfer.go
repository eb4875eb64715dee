package router

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"k8s.io/klog/v2"

	"github.com/csi-loop/csi-loop/pkg/router/link"
	"github.com/csi-loop/csi-loop/pkg/transfer"
)

const (
	// offerAge is how long an offer is good that no CreateVolume asked for again: as
	// long as a node goes on with a copy that nobody asks for.
	offerAge = 10 * time.Minute
	// maxOffers bounds the offers that were not used yet.
	maxOffers = 4096
	// maxTransfers bounds the transfers through this controller at a time; each takes
	// two connections and relayBuffer.
	maxTransfers = 64
	// arriveTime is how long a node may take to connect and send.
	arriveTime  = 2 * link.HelloTime
	relayBuffer = 64 << 10
)

// offer lets one node read one source, once.
type offer struct {
	ticket  []byte
	volume  string   // directory of the volume that is to be made of it
	to      *session // the link of the node that makes it
	request transfer.Request
	expires time.Time
}

// arrival is a sending node's connection that is awaited.
type arrival struct {
	from *session
	conn chan net.Conn // capacity 1
	done chan struct{} // closed when the connection is used no more
}

// ticketKey is what a ticket is known by: looking for it tells nothing about others.
type ticketKey [sha256.Size]byte

func keyOf(ticket []byte) ticketKey { return sha256.Sum256(ticket) }

// transfers is what goes from node to node. The zero value needs now.
type transfers struct {
	now   func() time.Time
	limit *rate.Limiter

	mu       sync.Mutex
	offers   map[ticketKey]*offer   // guarded by mu
	byVolume map[string]*offer      // guarded by mu; the same, by volume
	awaited  map[ticketKey]*arrival // guarded by mu
	stats    TransferStats          // guarded by mu
}

// TransferStats counts transfers through this controller.
type TransferStats struct {
	Running int
	// Bytes were passed on, as they are on the wire.
	Bytes int64
	// Done were passed on to the end, Failed were not.
	Done, Failed uint64
}

func newTransfers(now func() time.Time, perSecond int64) *transfers {
	return &transfers{
		now: now, limit: link.NewLimit(perSecond),
		offers: map[ticketKey]*offer{}, byVolume: map[string]*offer{}, awaited: map[ticketKey]*arrival{},
	}
}

func (t *transfers) count() TransferStats {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.stats
}

// newTicket makes what nobody can guess.
func newTicket() []byte {
	b := make([]byte, link.TicketSize)
	_, _ = rand.Read(b) // never fails
	return b
}

// offer makes an offer, or finds the one for the same that was not used yet.
func (t *transfers) offer(volume string, to *session, request transfer.Request) (ticket []byte, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := t.now()
	if have := t.byVolume[volume]; have != nil {
		if have.to == to && fmt.Sprint(have.request) == fmt.Sprint(request) && now.Before(have.expires) {
			have.expires = now.Add(offerAge)
			return have.ticket, nil
		}
		t.drop(have)
	}
	if len(t.offers) >= maxOffers {
		t.sweepLocked()
	}
	if len(t.offers) >= maxOffers {
		return nil, status.Errorf(codes.Aborted, "%d copies between nodes are waiting to begin", len(t.offers))
	}
	o := &offer{ticket: newTicket(), volume: volume, to: to, request: request, expires: now.Add(offerAge)}
	t.offers[keyOf(o.ticket)], t.byVolume[volume] = o, o
	return o.ticket, nil
}

// sweep drops the offers that nobody can use any more: each keeps the session of a link.
func (t *transfers) sweep() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.sweepLocked()
}

// Precondition: t.mu is held.
func (t *transfers) sweepLocked() {
	now := t.now()
	for _, o := range t.offers {
		if !now.Before(o.expires) || o.to.ended.Err() != nil {
			t.drop(o)
		}
	}
}

// drop ends an offer. Precondition: t.mu is held.
func (t *transfers) drop(o *offer) {
	delete(t.offers, keyOf(o.ticket))
	if t.byVolume[o.volume] == o {
		delete(t.byVolume, o.volume)
	}
}

// take uses up an offer, if the ticket is one of an offer that is still good.
func (t *transfers) take(ticket []byte) *offer {
	t.mu.Lock()
	defer t.mu.Unlock()
	o := t.offers[keyOf(ticket)]
	if o == nil {
		return nil
	}
	t.drop(o)
	if !t.now().Before(o.expires) || o.to.ended.Err() != nil {
		return nil
	}
	return o
}

// await makes a ticket that a node is to come with.
func (t *transfers) await(from *session) (ticket []byte, a *arrival, cancel func()) {
	a = &arrival{from: from, conn: make(chan net.Conn, 1), done: make(chan struct{})}
	ticket = newTicket()
	t.mu.Lock()
	defer t.mu.Unlock()
	t.awaited[keyOf(ticket)] = a
	return ticket, a, func() {
		t.mu.Lock()
		delete(t.awaited, keyOf(ticket))
		t.mu.Unlock()
		close(a.done)
	}
}

// arrived finds who waits for a ticket; it is good once.
func (t *transfers) arrived(ticket []byte) *arrival {
	t.mu.Lock()
	defer t.mu.Unlock()
	a := t.awaited[keyOf(ticket)]
	delete(t.awaited, keyOf(ticket))
	if a != nil && a.from.ended.Err() != nil {
		return nil
	}
	return a
}

// begin counts a transfer, unless there are too many.
func (t *transfers) begin() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.stats.Running >= maxTransfers {
		return false
	}
	t.stats.Running++
	return true
}

func (t *transfers) end(err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.stats.Running--
	if err == nil {
		t.stats.Done++
	} else {
		t.stats.Failed++
	}
}

func (t *transfers) passed(n int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.stats.Bytes += int64(n)
}

// bulk is a connection of one transfer. What it may be used for was decided when its
// ticket was made; the ticket was told to one node, on its link, and is good once.
type bulk struct {
	r    *Router
	conn net.Conn
	to   *offer   // its node receives
	from *arrival // its node sends
}

// redeem finds out what a connection with a ticket is for.
func (r *Router) redeem(conn net.Conn, hello link.NodeHello) (*bulk, error) {
	b := &bulk{r: r, conn: conn, to: r.transfers.take(hello.Ticket)}
	if b.to == nil {
		b.from = r.transfers.arrived(hello.Ticket)
	}
	if b.to == nil && b.from == nil {
		return nil, errors.New("the ticket is not good, or no more: nothing is sent on this connection")
	}
	return b, nil
}

func (b *bulk) about() []any {
	if b.to != nil {
		return []any{"node", b.to.to.id.Node, "volume", b.to.volume, "source", b.to.request.ID()}
	}
	return []any{"node", b.from.from.id.Node}
}

// run is the life of the connection.
func (b *bulk) run(ctx context.Context) error {
	if b.from != nil {
		b.from.conn <- b.conn // the only one
		select {
		case <-b.from.done:
		case <-ctx.Done():
			_ = b.conn.Close() // which ends the relay
			<-b.from.done
		}
		return nil
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(b.to.to.ended, cancel)() //nolint:contextcheck // a link that ends takes its transfers with it
	out := link.NewBulk(ctx, b.conn, b.r.transfers.limit)
	defer func() { _ = out.Close() }()
	if !b.r.transfers.begin() {
		return refuse(out, status.Errorf(codes.Aborted, "%d copies between nodes go through this controller", maxTransfers))
	}
	err := b.relay(ctx, cancel, out)
	b.r.transfers.end(err)
	return err
}

// relay has the node with the source connect, and passes on what it sends.
func (b *bulk) relay(ctx context.Context, cancel context.CancelFunc, out *link.Bulk) error {
	kind := "volume"
	if b.to.request.Snapshot != "" {
		kind = "snapshot"
	}
	s, ok, err := b.r.owner(kind, b.to.request.ID())
	switch {
	case err != nil:
		return refuse(out, err)
	case !ok || s == b.to.to:
		return refuse(out, status.Errorf(codes.Aborted, "the source of volume %q is somewhere else now", b.to.volume))
	}
	ticket, a, done := b.r.transfers.await(s)
	defer done()
	defer context.AfterFunc(s.ended, cancel)() //nolint:contextcheck // as above
	asking, stop := context.WithTimeout(ctx, arriveTime)
	defer stop()
	if err := askTransfer(asking, s, func(ctx context.Context, opts ...grpc.CallOption) error {
		return link.Send(ctx, s.grpc, b.to.request, ticket, b.r.cfg.Self, opts...)
	}); err != nil {
		return refuse(out, err)
	}
	select {
	case conn := <-a.conn:
		in := link.NewBulk(ctx, conn, nil)
		defer func() { _ = in.Close() }()
		klog.FromContext(ctx).Info("Passing on a copy between nodes", "from", s.id.Node)
		return b.pass(out, in)
	case <-asking.Done():
		return refuse(out, unavailablef("node %q did not connect to send %v", s.id.Node, b.to.request))
	}
}

// pass passes on what comes until the sender closes. Nothing of it is judged: the two
// nodes check it from end to end. Whether it came to its end is for the count.
func (b *bulk) pass(out, in *link.Bulk) error {
	buf, seen := make([]byte, relayBuffer), transfer.NewFollower()
	for {
		n, err := in.Read(buf)
		if n > 0 {
			if _, err := out.Write(buf[:n]); err != nil {
				return fmt.Errorf("the receiver: %w", err)
			}
			_, _ = seen.Write(buf[:n])
			b.r.transfers.passed(n)
		}
		switch {
		case errors.Is(err, io.EOF) && !seen.Ended():
			return errors.New("the sender closed before the end of the copy")
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return fmt.Errorf("the sender: %w", err)
		}
	}
}

// refuse tells the receiver why nothing comes.
func refuse(out *link.Bulk, err error) error {
	st := status.Convert(err)
	return errors.Join(err, transfer.NewWriter(out).Fail(transfer.SenderError{Code: uint32(st.Code()), Message: st.Message()}))
}

// askTransfer calls a method of a node's Transfer service.
func askTransfer(ctx context.Context, s *session, do func(ctx context.Context, opts ...grpc.CallOption) error) error {
	if !s.transfers() {
		return s.cannotTransfer()
	}
	_, err := callService(ctx, s, "/"+link.TransferService+"/", transferProbe, func(ctx context.Context, opts ...grpc.CallOption) (struct{}, error) {
		return struct{}{}, do(ctx, opts...)
	})
	return err
}

// transferProbe is the method by which a node is known to send and to receive.
const transferProbe = "Send"

// transfers says whether the node knows copies between nodes.
func (s *session) transfers() bool {
	_, ok := s.methods["/"+link.TransferService+"/"+transferProbe]
	return ok
}

func (s *session) cannotTransfer() error {
	return unavailablef("csi-loop %s on node %q does not know copies from one node to another: upgrade it", s.hello.Version, s.id.Node)
}
