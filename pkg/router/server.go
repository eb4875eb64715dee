package router

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"time"

	"k8s.io/klog/v2"

	"github.com/csi-loop/csi-loop/pkg/router/link"
)

const (
	// maxHellos bounds the connections that have not said who they are.
	maxHellos = 512
	// retryAccept is the pause after a failing accept (no descriptor is free).
	retryAccept = 100 * time.Millisecond
	// probeTime is how long an old link may take to prove that it is alive.
	probeTime = link.PingWait
	// inventoryTime is how long a node may take to say what it has.
	inventoryTime = 30 * time.Second
	// forgetEvery is how often nodes that left the cluster are forgotten.
	forgetEvery = 15 * time.Second
	// forgetAfter is how long a node without the driver is remembered: its
	// registration lapses for moments.
	forgetAfter = 10 * time.Minute
)

// ServeLinks accepts nodes on l until ctx ends, and closes l. It returns after the
// last link has ended.
func (r *Router) ServeLinks(ctx context.Context, l net.Listener) error {
	r.setServing(true)
	defer r.setServing(false)
	stop := context.AfterFunc(ctx, func() { _ = l.Close() })
	defer stop()
	config := &tls.Config{
		MinVersion: tls.VersionTLS13, NextProtos: []string{link.ALPN},
		GetCertificate:         func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return r.cfg.Certificate() },
		SessionTicketsDisabled: true, // each connection proves everything anew
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { r.forgetting(ctx) })
	door := gate{most: maxHellos, from: map[string]int{}}
	for {
		conn, err := l.Accept()
		switch {
		case ctx.Err() != nil:
			if err == nil {
				_ = conn.Close()
			}
			return nil
		case errors.Is(err, net.ErrClosed):
			return fmt.Errorf("accept nodes: %w", err)
		case err != nil:
			klog.FromContext(ctx).Error(err, "Cannot accept a node")
			if sleep(ctx, retryAccept) != nil {
				return nil
			}
			continue
		}
		leave, ok := door.enter(conn.RemoteAddr())
		if !ok {
			r.refuse(reasonCrowd)
			_ = conn.Close()
			continue
		}
		wg.Go(func() { r.accept(ctx, tls.Server(conn, config), leave) })
	}
}

// gate bounds the connections that have not said who they are. A connection beyond
// the bound is refused at once, and while half of it is used, one address has no more
// than an eighth: whoever opens many and says nothing shuts out itself.
type gate struct {
	most int

	mu    sync.Mutex
	total int            // guarded by mu
	from  map[string]int // guarded by mu; by address
}

// enter lets a connection in until leave is called.
func (g *gate) enter(addr net.Addr) (leave func(), ok bool) {
	host, _, err := net.SplitHostPort(addr.String())
	if err != nil {
		host = addr.String()
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.total >= g.most || g.total >= g.most/2 && g.from[host] >= g.most/8 {
		return nil, false
	}
	g.total++
	g.from[host]++
	return sync.OnceFunc(func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.total--
		if g.from[host]--; g.from[host] == 0 {
			delete(g.from, host)
		}
	}), true
}

func (r *Router) setServing(on bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.serving = on
}

// forgetting drops nodes that left the cluster, and offers that are good no more.
func (r *Router) forgetting(ctx context.Context) {
	for sleep(ctx, forgetEvery) == nil {
		r.forget()
	}
}

func (r *Router) forget() {
	r.transfers.sweep()
	registered, ok := r.cfg.Roster.Registered()
	if !ok {
		return
	}
	r.table.forget(func(name string, away time.Duration) bool {
		return !r.cfg.Roster.Exists(name) || away > forgetAfter && !slices.Contains(registered, name)
	})
}

// accept takes one connection from its first byte to its last.
func (r *Router) accept(ctx context.Context, conn *tls.Conn, known func()) {
	defer func() { _ = conn.Close() }()
	logger := klog.FromContext(ctx).WithValues("remote", conn.RemoteAddr().String())
	g, reason, err := r.greet(ctx, conn)
	known()
	if err != nil {
		r.refuse(reason)
		if !errors.Is(err, context.Canceled) {
			logger.Info("Refused a link", "reason", reason, "err", fmt.Sprintf("%.*s", maxText, err.Error()))
		}
		return
	}
	logger = logger.WithValues(g.about()...)
	err = g.run(klog.NewContext(ctx, logger))
	logger.Info("Connection ended", "err", fmt.Sprint(err))
}

// guest is a connection that was let in: a link, or one of a transfer.
type guest interface {
	// run is its life; it returns why it ended.
	run(ctx context.Context) error
	// about is for the log.
	about() []any
}

// greet exchanges hellos and admits the node, or says why not.
func (r *Router) greet(ctx context.Context, conn *tls.Conn) (guest, string, error) {
	ctx, cancel := context.WithTimeout(ctx, link.HelloTime)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	hello, binding, nonce, err := r.exchange(ctx, conn)
	if err != nil {
		return nil, reasonHello, err
	}
	if len(hello.Ticket) > 0 {
		return r.greetBulk(conn, hello, stop)
	}
	s, reason, err := r.admit(ctx, hello, nonce, binding)
	verdict := link.Verdict{Welcome: err == nil}
	if err != nil {
		verdict.Message = err.Error()
		return nil, reason, errors.Join(fmt.Errorf("node %.253q: %w", hello.NodeID, err), link.WriteFrame(conn, verdict))
	}
	s.conn = conn
	if err := link.WriteFrame(conn, verdict); err == nil && stop() {
		return s, "", nil
	}
	r.table.leave(s)
	return nil, reasonHello, errors.New("the node went away during the hellos")
}

// greetBulk is greet for the connection of a transfer. stop keeps the end of the
// hellos' time from closing it.
func (r *Router) greetBulk(conn *tls.Conn, hello link.NodeHello, stop func() bool) (guest, string, error) {
	b, err := r.redeem(conn, hello)
	verdict := link.Verdict{Welcome: err == nil}
	if err != nil {
		verdict.Message = err.Error()
		return nil, reasonTicket, errors.Join(fmt.Errorf("node %.253q: %w", hello.NodeID, err), link.WriteFrame(conn, verdict))
	}
	if err := link.WriteFrame(conn, verdict); err != nil || !stop() {
		return nil, reasonHello, errors.New("the node went away during the hellos")
	}
	return b, "", nil
}

func (r *Router) exchange(ctx context.Context, conn *tls.Conn) (hello link.NodeHello, binding, nonce []byte, err error) {
	if err = conn.HandshakeContext(ctx); err != nil {
		return hello, nil, nil, fmt.Errorf("TLS: %w", err)
	}
	if binding, err = link.Binding(conn.ConnectionState()); err != nil {
		return hello, nil, nil, err
	}
	nonce = make([]byte, link.NonceSize)
	if _, err = rand.Read(nonce); err != nil {
		return hello, nil, nil, err
	}
	r.mu.Lock()
	replicas := r.replicas
	r.mu.Unlock()
	err = link.WriteFrame(conn, link.ControllerHello{
		ProtocolMin: link.ProtocolMin, ProtocolMax: link.ProtocolMax,
		Driver: r.cfg.Driver, Version: r.cfg.Version, Nonce: nonce, Self: r.cfg.Self, Replicas: replicas,
	})
	if err == nil {
		err = link.ReadFrame(conn, &hello)
	}
	return hello, binding, nonce, err
}

// admit decides about a node.
func (r *Router) admit(ctx context.Context, hello link.NodeHello, nonce, binding []byte) (*session, string, error) {
	id, err := r.authenticate(ctx, hello.Token)
	switch {
	case errors.Is(err, ErrToken):
		return nil, reasonToken, err
	case err != nil:
		return nil, reasonReview, fmt.Errorf("the token cannot be looked at: %w", err)
	}
	if err := hello.Check(r.cfg.Driver, nonce, binding); err != nil {
		return nil, reasonIdentity, err
	}
	if id.Node != hello.NodeID {
		return nil, reasonIdentity, fmt.Errorf("the node calls itself %.253q, its token belongs to a pod on node %q", hello.NodeID, id.Node)
	}
	s := newSession(r, id, hello, nonce, binding)
	old, err := r.table.admit(s)
	if second, ok := errors.AsType[*secondError](err); ok && second.old != nil && !second.old.alive(ctx) {
		// The node found the link dead before this end did.
		second.old.end(errors.New("it did not answer when its node dialled again"))
		r.table.leave(second.old)
		old, err = r.table.admit(s)
	}
	if err != nil {
		return nil, reasonSecond, err
	}
	if old != nil {
		old.end(fmt.Errorf("pod %q took its place", id.Pod))
	}
	return s, "", nil
}

// authenticate is the Authenticator's answer, if the token has not expired.
func (r *Router) authenticate(ctx context.Context, token string) (Identity, error) {
	id, err := r.cfg.Auth.Authenticate(ctx, token)
	if err == nil && !id.Expires.After(r.cfg.Now()) {
		err = fmt.Errorf("%w: it has expired", ErrToken)
	}
	return id, err
}

// sleep waits for d, or for ctx.
func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
