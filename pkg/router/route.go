package router

import (
	"context"
	"regexp"
	"strings"
	"sync"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/csi-loop/csi-loop/pkg/router/link"
)

const (
	controllerService = "/" + "csi.v1.Controller" + "/"
	// maxID is CSI's limit for strings.
	maxID = 128
	// maxText bounds what a node can put into an event, in runes.
	maxText = 4096
)

var poolIDs = regexp.MustCompile(`^[a-z2-7]{20}$`)

// poolOf takes the pool's ID out of the ID of a volume or a snapshot. Without ok
// csi-loop never made this ID, and nothing has it. What follows the pool's ID is
// for its node to judge, whose csi-loop may be newer.
func poolOf(id string) (poolID string, ok bool) {
	poolID, rest, ok := strings.Cut(id, ".")
	return poolID, ok && rest != "" && len(id) <= maxID && poolIDs.MatchString(poolID)
}

func unavailablef(format string, args ...any) error {
	return status.Errorf(codes.Unavailable, format, args...)
}

func invalidf(format string, args ...any) error {
	return status.Errorf(codes.InvalidArgument, format, args...)
}

// owner finds the link to the node that has what the ID names. The error is final:
// UNAVAILABLE, because what is on a node that is away may well exist. Without ok
// nothing can have the ID.
func (r *Router) owner(kind, id string) (s *session, ok bool, err error) {
	poolID, ok := poolOf(id)
	if !ok {
		return nil, false, nil
	}
	switch p, known := r.table.pool(poolID); {
	case !known:
		return nil, true, unavailablef("%s %q: no node with the pool %s has been seen since this controller started; is the node down, or its disk gone?", kind, id, poolID)
	case p.session == nil:
		return nil, true, unavailablef("%s %q: node %q, which has it, %s", kind, id, p.node, p.state())
	default:
		return p.session, true, nil
	}
}

// caller is one method of the CSI client.
type caller[Req, Resp any] func(csi.ControllerClient, context.Context, Req, ...grpc.CallOption) (Resp, error)

// call sends a request to the node's Controller service. The answer is the node's, or
// UNAVAILABLE.
func call[Req, Resp any](ctx context.Context, s *session, method string, req Req, do caller[Req, Resp]) (Resp, error) {
	return callService(ctx, s, controllerService, method, func(ctx context.Context, opts ...grpc.CallOption) (Resp, error) {
		return do(s.client, ctx, req, opts...)
	})
}

// callService sends a request down a link.
func callService[Resp any](ctx context.Context, s *session, service, method string, do func(ctx context.Context, opts ...grpc.CallOption) (Resp, error)) (Resp, error) {
	var none Resp
	if _, ok := s.methods[service+method]; !ok {
		return none, s.tooOld(method)
	}
	leave, ok := s.enter()
	if !ok {
		return none, unavailablef("%s: node %q is stopping", method, s.id.Node)
	}
	defer leave()
	var trailer metadata.MD
	resp, err := do(ctx, grpc.Trailer(&trailer))
	if err != nil {
		return none, s.translate(ctx, method, err, len(trailer.Get(link.AnswerKey)) > 0)
	}
	return resp, nil
}

// tooOld is the answer for a method that the node's csi-loop does not have.
func (s *session) tooOld(method string) error {
	return unavailablef("csi-loop %s on node %q does not know %s: upgrade it", s.hello.Version, s.id.Node, method)
}

// translate keeps the codes that the node meant, and makes the link's own say
// nothing about the call: that a message is too large, for one, is
// RESOURCE_EXHAUSTED for gRPC, and for Kubernetes "choose another node".
func (s *session) translate(ctx context.Context, method string, err error, answered bool) error {
	st := status.Convert(err)
	switch {
	case st.Code() == codes.Unimplemented:
		return s.tooOld(method)
	case answered:
		return status.Errorf(meant(st.Code()), "%.*s", maxText, st.Message()) // without details, which CSI wants empty
	case ctx.Err() != nil:
		return status.FromContextError(ctx.Err()).Err()
	case (st.Code() == codes.Canceled || st.Code() == codes.DeadlineExceeded) && expires(ctx):
		return status.FromContextError(context.DeadlineExceeded).Err()
	}
	return unavailablef("%s: link to node %q: %.*s", method, s.id.Node, maxText, st.Message())
}

// meant is a code that a node answered, if there is such a code: gRPC hands any number on.
func meant(c codes.Code) codes.Code {
	if c > codes.Unauthenticated {
		return codes.Unknown
	}
	return c
}

// expires says whether the deadline of a call is a moment away: the node, which is told
// of it, may notice first, and ends the call's stream. When that arrives behind the
// deadline, gRPC calls it DEADLINE_EXCEEDED, though the timer of ctx may still be late.
func expires(ctx context.Context) bool {
	deadline, has := ctx.Deadline()
	return has && time.Until(deadline) < 50*time.Millisecond
}

// Node says whether the answer leaves open what the node did.
func uncertain(err error) bool {
	switch status.Code(err) {
	case codes.Canceled, codes.DeadlineExceeded, codes.Unavailable, codes.Aborted, codes.Unknown:
		return true
	default:
		return false
	}
}

// nameLocks is one try-lock per volume name.
type nameLocks struct {
	mu   sync.Mutex
	held map[string]struct{} // guarded by mu
}

func (l *nameLocks) lock(name string) (unlock func(), err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, busy := l.held[name]; busy {
		return nil, status.Errorf(codes.Aborted, "a volume %q is being made", name)
	}
	if l.held == nil {
		l.held = map[string]struct{}{}
	}
	l.held[name] = struct{}{}
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		delete(l.held, name)
	}, nil
}
