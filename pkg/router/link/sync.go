package link

import (
	"context"
	"encoding/json"
	"fmt"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// Update is what a node sends on the stream. Before the first with Complete the
// controller knows only a part.
type Update struct {
	// Complete says that everything there is has been sent.
	Complete bool `json:"complete,omitempty"`
	// Proofs are of pools that came in after the hello, and come before or with the
	// first word about them. After Complete, that word is everything a pool has.
	Proofs []PoolProof  `json:"proofs,omitempty"`
	Pools  []PoolUpdate `json:"pools,omitempty"`
	// Token replaces the token of the hello.
	Token string `json:"token,omitempty"`
}

// PoolUpdate is what changed in a pool. The pool with ID "" stands for the node
// itself: its volumes are those that are being made, in whichever pool.
type PoolUpdate struct {
	ID string `json:"id,omitempty"`
	// Added and Removed are volumes, by the part of their IDs behind the pool's.
	Added   []string `json:"added,omitempty"`
	Removed []string `json:"removed,omitempty"`
	Free    *Free    `json:"free,omitempty"`
}

// Free is how large one more volume may be, in bytes.
type Free struct {
	Thick int64 `json:"thick"`
	Thin  int64 `json:"thin"`
}

// Order is what a controller sends on the stream.
type Order struct {
	// Replicas, when there are any, replace those of the hello.
	Replicas []string `json:"replicas,omitempty"`
	// Notice is for the node's log.
	Notice string `json:"notice,omitempty"`
	// Ping asks for an empty Update.
	Ping bool `json:"ping,omitempty"`
}

// The stream's messages are JSON in a BytesValue, so that they grow as the hellos
// do, and need no generated code.
const (
	serviceName = "csiloop.link.v1.Link"
	syncMethod  = "Sync"
)

func encode(v any) (*wrapperspb.BytesValue, error) {
	b, err := json.Marshal(v)
	return wrapperspb.Bytes(b), err
}

// Stream is the controller's end of Sync.
type Stream struct{ grpc.ClientStream }

// OpenStream opens the stream on a fresh link. It ends with ctx.
func OpenStream(ctx context.Context, conn *grpc.ClientConn) (Stream, error) {
	s, err := conn.NewStream(ctx, &grpc.StreamDesc{StreamName: syncMethod, ServerStreams: true, ClientStreams: true}, "/"+serviceName+"/"+syncMethod,
		grpc.MaxCallRecvMsgSize(MaxMessage))
	return Stream{s}, err
}

// Send sends an order. One goroutine at a time may.
func (s Stream) Send(o Order) error {
	m, err := encode(o)
	if err != nil {
		return err
	}
	return s.SendMsg(m)
}

// maxUpdateItems bounds the items of an update: more than names of volumes that can
// come and go between two.
const maxUpdateItems = 4 * MaxVolumes

// Recv waits for the next update, and returns how many bytes it came in.
func (s Stream) Recv() (u Update, size int, err error) {
	var m wrapperspb.BytesValue
	if err := s.RecvMsg(&m); err != nil {
		return Update{}, 0, err
	}
	if err := decode(m.GetValue(), &u, maxUpdateItems); err != nil {
		return Update{}, 0, fmt.Errorf("not an update: %w", err)
	}
	return u, len(m.GetValue()), nil
}

// syncer answers the stream on the node.
type syncer interface {
	sync(stream grpc.ServerStream) error
}

// registerSync adds the stream to a node's server.
func registerSync(r grpc.ServiceRegistrar, s syncer) {
	r.RegisterService(&grpc.ServiceDesc{
		ServiceName: serviceName,
		HandlerType: (*syncer)(nil),
		Streams: []grpc.StreamDesc{{
			StreamName: syncMethod, ServerStreams: true, ClientStreams: true,
			Handler: func(_ any, stream grpc.ServerStream) error { return s.sync(stream) },
		}},
	}, s)
}
