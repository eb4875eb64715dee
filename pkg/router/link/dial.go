package link

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"time"

	"google.golang.org/grpc"
	"k8s.io/klog/v2"

	"github.com/csi-loop/csi-loop/pkg/image"
)

// errTaken: the address leads to a replica that there is a link to.
var errTaken = errors.New("the address leads to a replica that has a link already")

// link makes one link and stays until it ends. With claimed, that replica must be
// behind the address, and the caller has claimed it. lasted is how long the link was
// up.
func (a *Agent) link(dialling, ctx context.Context, address, claimed string) (lasted time.Duration, err error) {
	conn, hello, err := a.dial(dialling, address)
	if err != nil {
		return 0, err
	}
	defer func() { _ = conn.Close() }()
	// The hellos end with dialling, whatever they are waiting for.
	stop := context.AfterFunc(dialling, func() { _ = conn.Close() })
	defer stop()
	switch {
	case claimed == "" && !a.claim(hello.Self):
		return 0, errTaken
	case claimed == "":
		defer a.release(hello.Self)
	case hello.Self != claimed:
		return 0, fmt.Errorf("the replica there calls itself %q", hello.Self)
	}
	session, err := a.introduce(ctx, conn, hello)
	if err != nil {
		return 0, err
	}
	if !stop() {
		return 0, context.Cause(dialling)
	}
	klog.FromContext(ctx).Info("Linked to the controller", "address", address, "replica", hello.Self, "version", hello.Version)
	a.setReplicas(ctx, hello.Replicas)
	a.up(hello.Self)
	since := time.Now()
	err = a.serve(ctx, conn, session)
	return max(time.Since(since), 1), err
}

// dial connects, makes sure who is there, and reads the controller's hello.
func (a *Agent) dial(ctx context.Context, address string) (*tls.Conn, ControllerHello, error) {
	var hello ControllerHello
	ctx, cancel := context.WithTimeout(ctx, HelloTime)
	defer cancel()
	roots, err := a.cfg.CA()
	if err != nil {
		return nil, hello, fmt.Errorf("certificates of the controller: %w", err)
	}
	raw, err := (&tls.Dialer{
		NetDialer: &net.Dialer{KeepAlive: -1}, // gRPC's own pings do that
		Config: &tls.Config{
			MinVersion: tls.VersionTLS13, RootCAs: roots, ServerName: a.cfg.ServerName, NextProtos: []string{ALPN},
		},
	}).DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, hello, err
	}
	conn, ok := raw.(*tls.Conn)
	if !ok {
		return nil, hello, errors.Join(errors.New("BUG: not a TLS connection"), raw.Close())
	}
	// Until here ctx broke it off; the hellos have the rest of its time.
	deadline, _ := ctx.Deadline()
	err = conn.SetDeadline(deadline)
	if err == nil {
		err = ReadFrame(conn, &hello)
	}
	if err == nil && hello.Driver != a.cfg.Driver {
		err = fmt.Errorf("the controller belongs to the driver %q, this node to %q", hello.Driver, a.cfg.Driver)
	}
	if err == nil && len(hello.Nonce) != NonceSize {
		err = fmt.Errorf("the controller's nonce has %d bytes instead of %d", len(hello.Nonce), NonceSize)
	}
	if err != nil {
		return nil, hello, errors.Join(fmt.Errorf("hello of the controller: %w", err), conn.Close())
	}
	return conn, hello, nil
}

// introduce says who this node is, and returns what the stream goes on from.
func (a *Agent) introduce(ctx context.Context, conn *tls.Conn, controller ControllerHello) (*session, error) {
	protocol, err := controller.choose()
	if err != nil {
		return nil, err
	}
	token, err := a.cfg.Token()
	if err != nil {
		return nil, fmt.Errorf("token: %w", err)
	}
	binding, err := Binding(conn.ConnectionState())
	if err != nil {
		return nil, err
	}
	s := &session{
		agent: a, ctx: ctx, sent: token, proven: map[string]bool{},
		prove: func(p Pool) PoolProof { return Prove(p, controller.Nonce, binding, a.cfg.NodeID) },
	}
	hello := NodeHello{
		Protocol: protocol, Driver: a.cfg.Driver, Version: a.cfg.Version, NodeID: a.cfg.NodeID,
		Token: token, Methods: a.methods, DefaultPool: a.cfg.DefaultPool,
	}
	for _, p := range a.inventory.known() {
		hello.Pools = append(hello.Pools, s.prove(p))
		s.proven[p.ID] = true
	}
	if err := WriteFrame(conn, hello); err != nil {
		return nil, fmt.Errorf("hello: %w", err)
	}
	var verdict Verdict
	if err := ReadFrame(conn, &verdict); err != nil {
		return nil, fmt.Errorf("answer to the hello: %w", err)
	}
	if !verdict.Welcome {
		return nil, fmt.Errorf("the controller refuses this node: %s", verdict.Message)
	}
	return s, conn.SetDeadline(time.Time{})
}

// serve answers the controller until the link ends, or, when ctx does, until the
// calls under way are answered.
func (a *Agent) serve(ctx context.Context, conn *tls.Conn, session *session) error {
	watched := watch(conn)
	options := []grpc.ServerOption{grpc.UnaryInterceptor(a.intercept), grpc.StreamInterceptor(markStream)}
	if a.cfg.Stats != nil {
		options = append(options, grpc.StatsHandler(a.cfg.Stats))
	}
	srv := newServer(options...)
	a.cfg.Register(srv)
	registerSync(srv, session)
	if a.cfg.Sources != nil {
		registerTransfer(srv, session)
	}
	stopping := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		timer := time.AfterFunc(a.cfg.StopTime, srv.Stop)
		srv.GracefulStop()
		timer.Stop()
		close(stopping)
	})
	err := srv.Serve(listenOne(watched))
	if !stop() {
		<-stopping
		return nil
	}
	// Waits for the handlers, whose contexts ended with the connection. The next link
	// does not: a call may be deaf for as long as mkfs runs.
	a.wg.Go(srv.Stop)
	if errors.Is(err, net.ErrClosed) {
		err = errors.New("the connection broke")
	}
	return err
}

// intercept marks answers, and tells the controllers what is being made.
func (a *Agent) intercept(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	if err := grpc.SetTrailer(ctx, answered); err != nil {
		return nil, err
	}
	if info.FullMethod == createVolume {
		if named, ok := req.(interface{ GetName() string }); ok && named.GetName() != "" {
			defer a.inventory.begin(image.DirName(named.GetName()))()
		}
		if a.cfg.Sources != nil {
			var err error
			if ctx, err = a.accept(ctx); err != nil {
				return nil, err
			}
		}
	}
	if a.cfg.Intercept != nil {
		return a.cfg.Intercept(ctx, req, info, handler)
	}
	return handler(ctx, req)
}

// markStream marks the end of a stream as that of its handler.
func markStream(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	stream.SetTrailer(answered)
	return handler(srv, stream)
}

// backoff is the pause between attempts.
type backoff struct {
	min, max, next time.Duration
	said           []byte
}

func (a *Agent) backoff() *backoff {
	return &backoff{min: a.cfg.RetryMin, max: a.cfg.RetryMax, next: a.cfg.RetryMin}
}

// wait pauses after an attempt, or a link that lasted some time, that ended with err.
// What is said again and again is logged once. A link that ends soon is no sign that the
// next one will not: the controller judges what the node has only when it has a link.
func (b *backoff) wait(ctx context.Context, lasted time.Duration, address string, err error) error {
	logger := klog.FromContext(ctx)
	if lasted > b.max {
		b.next, b.said = b.min, nil
	}
	switch text := fmt.Append(nil, err); {
	case errors.Is(err, errTaken) || bytes.Equal(text, b.said):
	case lasted > 0:
		logger.Info("Lost the link to the controller", "address", address, "err", string(text))
		b.said = text
	default:
		logger.Error(err, "No link to the controller; trying again", "address", address)
		b.said = text
	}
	d := b.next/2 + rand.N(b.next/2+1) //nolint:gosec // jitter
	b.next = min(2*b.next, b.max)
	return pause(ctx, d)
}
