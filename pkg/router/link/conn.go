package link

import (
	"context"
	"errors"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/stats"
)

// watchedConn tells when it is closed.
type watchedConn struct {
	net.Conn

	once   sync.Once
	closed chan struct{}
}

func watch(c net.Conn) *watchedConn { return &watchedConn{Conn: c, closed: make(chan struct{})} }

func (c *watchedConn) Close() error {
	err := c.Conn.Close()
	c.once.Do(func() { close(c.closed) })
	return err
}

// oneListener hands out one connection, and ends when that does.
type oneListener struct {
	conn *watchedConn
	give chan net.Conn
	stop chan struct{}
	once sync.Once
}

func listenOne(c *watchedConn) *oneListener {
	l := &oneListener{conn: c, give: make(chan net.Conn, 1), stop: make(chan struct{})}
	l.give <- c
	return l
}

func (l *oneListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.give:
		return c, nil
	default:
	}
	select {
	case <-l.conn.closed:
	case <-l.stop:
	}
	return nil, net.ErrClosed
}

func (l *oneListener) Close() error {
	l.once.Do(func() { close(l.stop) })
	return nil
}

func (l *oneListener) Addr() net.Addr { return l.conn.LocalAddr() }

// newServer makes the node's gRPC server. Keepalive is on at both ends: each finds
// out for itself that the other is gone.
func newServer(options ...grpc.ServerOption) *grpc.Server {
	return grpc.NewServer(append([]grpc.ServerOption{
		// The controller pings, also without a call; the default would cut it off.
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: PingEvery / 2, PermitWithoutStream: true}),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: PingEvery, Timeout: PingWait}),
		grpc.MaxRecvMsgSize(MaxMessage),
		grpc.ConnectionTimeout(HelloTime),
		grpc.WaitForHandlers(true), // a call never outlives the link unseen
	}, options...)...)
}

// ErrUsed is a second dial: a link has one connection, and it is gone.
var ErrUsed = errors.New("the link is down")

// maxHeaders bounds what a node sends around an answer, its error's text included.
const maxHeaders = 64 << 10

// NewClient makes the controller's gRPC client over a connection whose hellos are
// done. The client never dials again: calls on a dead link fail at once. seen sees its
// calls; it may be nil.
func NewClient(conn net.Conn, seen stats.Handler) (*grpc.ClientConn, error) {
	once := make(chan net.Conn, 1)
	once <- conn
	options := []grpc.DialOption{
		grpc.WithTransportCredentials(insecure.NewCredentials()), // TLS is below
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
			select {
			case c := <-once:
				return c, nil
			default:
				return nil, ErrUsed
			}
		}),
		grpc.WithIdleTimeout(0), // going idle would close the link
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: PingEvery, Timeout: PingWait, PermitWithoutStream: true}),
		grpc.WithMaxHeaderListSize(maxHeaders),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(MaxAnswer), grpc.MaxCallSendMsgSize(MaxMessage)),
		grpc.WithDisableServiceConfig(),
		grpc.WithDisableRetry(),
		grpc.WithNoProxy(),
	}
	if seen != nil {
		options = append(options, grpc.WithStatsHandler(seen))
	}
	return grpc.NewClient("passthrough:///node", options...)
}

// pause waits for d, or for ctx.
func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
