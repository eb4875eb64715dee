package link

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"
	"k8s.io/klog/v2"

	"github.com/csi-loop/csi-loop/pkg/transfer"
)

// The service by which a controller has a node send content. A node that has it can
// receive content, too.
const (
	TransferService = "csiloop.link.v1.Transfer"
	describeMethod  = "Describe"
	sendMethod      = "Send"

	// OfferKey is the header of a CreateVolume whose source is on another node.
	OfferKey = "csi-loop-offer-bin"
	// TicketSize is the size of a ticket, in bytes.
	TicketSize = 32
	// maxOffer bounds an offer, in bytes.
	maxOffer = 16 << 10
)

// Sources is what a node can send to others. Errors are statuses.
type Sources interface {
	// Describe says what a source is.
	Describe(ctx context.Context, r transfer.Request) (transfer.Description, error)
	// Send writes the content of a source as a stream of package transfer, or why it
	// cannot. It returns when all is written, or w fails.
	Send(ctx context.Context, r transfer.Request, w io.Writer) error
}

// Offer is what a controller sends with a CreateVolume whose source is on another node.
type Offer struct {
	Source transfer.Description `json:"source"`
	// Ticket is good for one connection to Address, on which the content comes.
	Ticket  []byte `json:"ticket"`
	Address string `json:"address"`
}

// Order to a node to send content on a connection to Address, where Ticket is awaited.
type sendOrder struct {
	Request transfer.Request `json:"request"`
	Ticket  []byte           `json:"ticket"`
	Address string           `json:"address"`
}

// WithOffer adds an offer to an outgoing call.
func WithOffer(ctx context.Context, o Offer) (context.Context, error) {
	b, err := json.Marshal(o)
	if err == nil && len(b) > maxOffer {
		err = fmt.Errorf("an offer of %d bytes is larger than %d", len(b), maxOffer)
	}
	return metadata.AppendToOutgoingContext(ctx, OfferKey, string(b)), err
}

// offerOf reads the offer of an incoming call; nil if there is none.
func offerOf(ctx context.Context) (*Offer, error) {
	values := metadata.ValueFromIncomingContext(ctx, OfferKey)
	if len(values) == 0 {
		return nil, nil
	}
	var o Offer
	if len(values[0]) > maxOffer {
		return nil, errors.New("it is too large")
	}
	return &o, json.Unmarshal([]byte(values[0]), &o)
}

// accept turns the offer that came with a call into one that the handler can use.
func (a *Agent) accept(ctx context.Context) (context.Context, error) {
	o, err := offerOf(ctx)
	if err != nil {
		return ctx, status.Errorf(codes.Internal, "not an offer: %v", err)
	}
	if o == nil {
		return ctx, nil
	}
	return transfer.WithOffer(ctx, &transfer.Offer{Source: o.Source, Open: func(ctx context.Context) (io.ReadCloser, error) {
		conn, err := a.connect(ctx, o.Address, o.Ticket)
		if err != nil {
			return nil, err
		}
		return NewBulk(ctx, conn, nil), nil
	}}), nil
}

// connect makes a connection for one transfer, which the ticket stands for.
func (a *Agent) connect(ctx context.Context, address string, ticket []byte) (net.Conn, error) {
	conn, controller, err := a.dial(ctx, address)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	err = a.redeem(conn, controller, ticket)
	if !stop() && err == nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return conn, nil
}

func (a *Agent) redeem(conn *tls.Conn, controller ControllerHello, ticket []byte) error {
	protocol, err := controller.choose()
	if err != nil {
		return err
	}
	// Nothing else is needed: whoever has the ticket was told it on a link of its own.
	if err := WriteFrame(conn, NodeHello{Protocol: protocol, Driver: a.cfg.Driver, Version: a.cfg.Version, NodeID: a.cfg.NodeID, Ticket: ticket}); err != nil {
		return fmt.Errorf("hello: %w", err)
	}
	var verdict Verdict
	if err := ReadFrame(conn, &verdict); err != nil {
		return fmt.Errorf("answer to the hello: %w", err)
	}
	if !verdict.Welcome {
		return fmt.Errorf("the controller refuses the connection: %s", verdict.Message)
	}
	return conn.SetDeadline(time.Time{})
}

// dispatch answers a controller that wants content: the content goes on a connection of
// its own, after the answer.
func (s *session) dispatch(o sendOrder) error {
	a := s.agent
	if len(o.Ticket) != TicketSize || o.Address == "" {
		return status.Error(codes.InvalidArgument, "no ticket, or no address")
	}
	a.wg.Go(func() {
		logger := klog.FromContext(s.ctx).WithValues("source", o.Request.ID())
		ctx := klog.NewContext(s.ctx, logger)
		conn, err := a.connect(ctx, o.Address, o.Ticket)
		if err != nil {
			logger.Error(err, "Cannot send to another node", "address", o.Address)
			return
		}
		bulk := NewBulk(ctx, conn, a.limit)
		defer func() { _ = bulk.Close() }()
		// The source logs what becomes of it.
		_ = a.cfg.Sources.Send(ctx, o.Request, bulk)
	})
	return nil
}

// registerTransfer adds the service to a node's server.
func registerTransfer(r grpc.ServiceRegistrar, s *session) {
	desc := grpc.ServiceDesc{ServiceName: TransferService, HandlerType: (*any)(nil)}
	for method, answer := range map[string]func(ctx context.Context, req []byte) (any, error){
		describeMethod: func(ctx context.Context, req []byte) (any, error) {
			var q transfer.Request
			if err := json.Unmarshal(req, &q); err != nil {
				return nil, status.Errorf(codes.InvalidArgument, "not a request: %v", err)
			}
			return s.agent.cfg.Sources.Describe(ctx, q)
		},
		sendMethod: func(_ context.Context, req []byte) (any, error) {
			var o sendOrder
			if err := json.Unmarshal(req, &o); err != nil {
				return nil, status.Errorf(codes.InvalidArgument, "not a request: %v", err)
			}
			return struct{}{}, s.dispatch(o) //nolint:contextcheck // what is sent outlives the call
		},
	} {
		desc.Methods = append(desc.Methods, grpc.MethodDesc{MethodName: method, Handler: bytesHandler(TransferService, method, answer)})
	}
	r.RegisterService(&desc, s)
}

// bytesHandler answers a method whose messages are JSON in a BytesValue.
func bytesHandler(service, method string, answer func(ctx context.Context, req []byte) (any, error)) grpc.MethodHandler {
	handle := func(ctx context.Context, req any) (any, error) {
		m, ok := req.(*wrapperspb.BytesValue)
		if !ok {
			return nil, status.Error(codes.Internal, "BUG: not a BytesValue")
		}
		v, err := answer(ctx, m.GetValue())
		if err != nil {
			return nil, err
		}
		return encode(v)
	}
	return func(_ any, ctx context.Context, decode func(any) error, intercept grpc.UnaryServerInterceptor) (any, error) {
		var req wrapperspb.BytesValue
		if err := decode(&req); err != nil {
			return nil, err
		}
		return intercept(ctx, &req, &grpc.UnaryServerInfo{FullMethod: "/" + service + "/" + method}, handle)
	}
}

// Describe asks a node what a source is.
func Describe(ctx context.Context, conn *grpc.ClientConn, r transfer.Request, opts ...grpc.CallOption) (d transfer.Description, err error) {
	err = ask(ctx, conn, describeMethod, r, &d, opts)
	return d, err
}

// Send has a node send content on a connection to address, where the ticket is awaited.
func Send(ctx context.Context, conn *grpc.ClientConn, r transfer.Request, ticket []byte, address string, opts ...grpc.CallOption) error {
	return ask(ctx, conn, sendMethod, sendOrder{Request: r, Ticket: ticket, Address: address}, &struct{}{}, opts)
}

func ask(ctx context.Context, conn *grpc.ClientConn, method string, req, resp any, opts []grpc.CallOption) error {
	m, err := encode(req)
	if err != nil {
		return err
	}
	var answer wrapperspb.BytesValue
	if err := conn.Invoke(ctx, "/"+TransferService+"/"+method, m, &answer, opts...); err != nil {
		return err
	}
	if err := json.Unmarshal(answer.GetValue(), resp); err != nil {
		return status.Errorf(codes.Unavailable, "not an answer: %v", err)
	}
	return nil
}

// bulkPiece is how much of a transfer is read, written and counted at a time, in bytes.
const bulkPiece = 64 << 10

// NewLimit bounds all that is written with it, in bytes a second; 0 is no bound.
func NewLimit(perSecond int64) *rate.Limiter {
	if perSecond <= 0 {
		return nil
	}
	return rate.NewLimiter(rate.Limit(perSecond), bulkPiece)
}

// Bulk is a connection of one transfer. A peer that neither sends nor takes anything
// for transfer.IdleTime is gone.
type Bulk struct {
	conn  net.Conn
	ctx   context.Context
	limit *rate.Limiter
	stop  func() bool
}

// NewBulk makes a transfer's connection of one whose hellos are done. It ends with ctx.
// limit may be nil.
func NewBulk(ctx context.Context, conn net.Conn, limit *rate.Limiter) *Bulk {
	return &Bulk{conn: conn, ctx: ctx, limit: limit, stop: context.AfterFunc(ctx, func() { _ = conn.Close() })}
}

// Read reads what is there.
func (b *Bulk) Read(p []byte) (int, error) {
	if err := b.conn.SetReadDeadline(time.Now().Add(transfer.IdleTime)); err != nil {
		return 0, err
	}
	return b.conn.Read(p)
}

// Write writes no faster than the limit.
func (b *Bulk) Write(p []byte) (n int, err error) {
	for len(p) > n {
		piece := p[n:min(len(p), n+bulkPiece)]
		if b.limit != nil {
			if err := b.limit.WaitN(b.ctx, len(piece)); err != nil {
				return n, err
			}
		}
		if err := b.conn.SetWriteDeadline(time.Now().Add(transfer.IdleTime)); err != nil {
			return n, err
		}
		m, err := b.conn.Write(piece)
		n += m
		if err != nil {
			return n, err
		}
	}
	return n, nil
}

// Close ends the connection. Again is harmless.
func (b *Bulk) Close() error {
	b.stop()
	return b.conn.Close()
}
