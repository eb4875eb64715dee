package link

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	"google.golang.org/grpc/stats"
	"k8s.io/klog/v2"

	"github.com/csi-loop/csi-loop/pkg/image"
	"github.com/csi-loop/csi-loop/pkg/report"
)

// Config is what an Agent must be told. Without a comment a field is required.
type Config struct {
	Driver, Version, NodeID string
	// Addresses are dialled, in turn, while there is no link.
	Addresses []string
	// ServerName is the name in the controller's certificate; default DefaultName.
	ServerName string
	// CA and Token are asked for anew at each connection.
	CA    func() (*x509.CertPool, error)
	Token func() (string, error)

	// Pools lists the pools that are there now. It is asked again at each Refresh: a
	// pool that comes in later is announced over the links that are up.
	Pools       func() []Pool
	DefaultPool string
	// Observe may be nil; then only what the pools hold at the start is known.
	Observe Observe

	// Register adds the node's services to the server of a link.
	Register func(grpc.ServiceRegistrar)
	// Report tells what is on the node; nil: the node does not say.
	Report func(context.Context) (report.Machine, error)
	// Intercept is called around each of their calls; it may be nil.
	Intercept grpc.UnaryServerInterceptor
	// Stats sees the calls of the links; it may be nil.
	Stats stats.Handler
	// Sources is what this node can send to others. Without it, it neither sends nor
	// receives.
	Sources Sources
	// Making tells of volumes that are being made also when no call waits for them,
	// until stop; it may be nil.
	Making func(f func(volume string, making bool)) (stop func())
	// SendRate bounds what is sent to other nodes, in bytes a second; 0 is no bound.
	SendRate int64

	// RetryMin and RetryMax bound the pause between two attempts; default 500 ms
	// and 15 s. Half of each pause is random.
	RetryMin, RetryMax time.Duration
	// StopTime is how long calls may take to finish at a stop; default 30 s.
	StopTime time.Duration
	// Refresh is how often pools, free space and token are looked at; default 10 s.
	Refresh time.Duration
}

// Agent keeps a link to every replica of the controller.
type Agent struct {
	cfg       Config
	inventory *inventory
	methods   []string
	limit     *rate.Limiter // of what is sent to other nodes

	mu       sync.Mutex
	links    map[string]bool               // guarded by mu; by replica: true when up, false while dialling
	keepers  map[string]context.CancelFunc // guarded by mu; by replica
	replicas []string                      // guarded by mu; as told last
	changed  chan struct{}                 // guarded by mu; closed and replaced at each change
	wg       sync.WaitGroup
}

// NewAgent makes an agent; Run starts it.
func NewAgent(cfg Config) *Agent {
	if cfg.ServerName == "" {
		cfg.ServerName = DefaultName
	}
	if cfg.RetryMin == 0 {
		cfg.RetryMin = 500 * time.Millisecond
	}
	if cfg.RetryMax == 0 {
		cfg.RetryMax = 15 * time.Second
	}
	if cfg.StopTime == 0 {
		cfg.StopTime = 30 * time.Second
	}
	if cfg.Refresh == 0 {
		cfg.Refresh = 10 * time.Second
	}
	if services, tell := cfg.Register, cfg.Report; tell != nil {
		cfg.Register = func(r grpc.ServiceRegistrar) {
			services(r)
			registerReport(r, reporterFunc(tell))
		}
	}
	return &Agent{
		cfg: cfg, limit: NewLimit(cfg.SendRate), methods: methodsOf(func(r grpc.ServiceRegistrar) {
			cfg.Register(r)
			if cfg.Sources != nil {
				registerTransfer(r, nil)
			}
		}),
		links: map[string]bool{}, keepers: map[string]context.CancelFunc{}, changed: make(chan struct{}),
	}
}

// methodsOf lists what would be registered.
func methodsOf(register func(grpc.ServiceRegistrar)) []string {
	srv := grpc.NewServer()
	register(srv)
	srv.Stop()
	var methods []string
	for name, service := range srv.GetServiceInfo() {
		for _, m := range service.Methods {
			methods = append(methods, "/"+name+"/"+m.Name)
		}
	}
	slices.Sort(methods)
	return methods
}

// Links counts the links that are up, and the replicas there should be one to.
func (a *Agent) Links() (up, wanted int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, isUp := range a.links {
		if isUp {
			up++
		}
	}
	return up, max(len(a.replicas), 1)
}

// Run keeps the links until ctx ends, and returns after the last call on them has.
func (a *Agent) Run(ctx context.Context) {
	inventory, stop := openInventory(a.cfg.Pools, a.cfg.Observe)
	defer stop()
	a.inventory = inventory
	if a.cfg.Making != nil {
		defer a.cfg.Making(inventory.note())()
	}
	a.wg.Go(func() { a.refresh(ctx) })
	a.wg.Go(func() { a.bootstrap(ctx) })
	a.wg.Wait()
}

// refresh looks at what changes by itself.
func (a *Agent) refresh(ctx context.Context) {
	for {
		if token, err := a.cfg.Token(); err == nil { // an error shows at the next connection
			a.inventory.setToken(token)
		}
		if pause(ctx, a.cfg.Refresh) != nil {
			return
		}
		a.inventory.discover()
		a.inventory.refresh()
	}
}

// note tells whoever waits that links or replicas changed.
// Precondition: a.mu is held.
func (a *Agent) note() {
	close(a.changed)
	a.changed = make(chan struct{})
}

// claim makes this goroutine the one that links to the replica.
func (a *Agent) claim(replica string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if _, taken := a.links[replica]; taken {
		return false
	}
	a.links[replica] = false
	return true
}

func (a *Agent) up(replica string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.links[replica] = true
	a.note()
}

func (a *Agent) release(replica string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.links, replica)
	a.note()
}

// await waits until ok, which is called with a.mu held, or for ctx.
func (a *Agent) await(ctx context.Context, ok func() bool) error {
	for {
		a.mu.Lock()
		done, changed := ok(), a.changed
		a.mu.Unlock()
		if done {
			return ctx.Err()
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// setReplicas starts a keeper for each replica that has none, and ends those of
// replicas that are gone. A link that is up is left alone: it ends by itself when
// its replica does.
func (a *Agent) setReplicas(ctx context.Context, replicas []string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	replicas = slices.DeleteFunc(slices.Clone(replicas), func(r string) bool { return r == "" })
	if len(replicas) == 0 || slices.Equal(a.replicas, replicas) {
		return
	}
	a.replicas = replicas
	for _, replica := range replicas {
		if a.keepers[replica] != nil {
			continue
		}
		keep, cancel := context.WithCancel(ctx)
		a.keepers[replica] = cancel
		a.wg.Go(func() { a.keep(keep, ctx, replica) })
	}
	for replica, cancel := range maps.Clone(a.keepers) {
		if !slices.Contains(replicas, replica) {
			delete(a.keepers, replica)
			cancel()
		}
	}
	a.note()
}

// bootstrap dials the addresses that the node was told while there is no link at
// all. What it reaches names the replicas.
func (a *Agent) bootstrap(ctx context.Context) {
	back := a.backoff()
	for n := 0; ; n++ {
		if a.await(ctx, func() bool { return len(a.links) == 0 }) != nil {
			return
		}
		address := a.cfg.Addresses[n%len(a.cfg.Addresses)]
		lasted, err := a.link(ctx, ctx, address, "")
		if ctx.Err() != nil || back.wait(ctx, lasted, address, err) != nil {
			return
		}
	}
}

// keep holds a link to one replica until wanted ends. A link that is up lasts
// until ctx does.
func (a *Agent) keep(wanted, ctx context.Context, replica string) {
	back := a.backoff()
	for {
		free := func() bool { _, taken := a.links[replica]; return !taken }
		if a.await(wanted, free) != nil {
			return
		}
		if !a.claim(replica) {
			continue
		}
		lasted, err := a.link(wanted, ctx, replica, replica)
		a.release(replica)
		if wanted.Err() != nil || back.wait(wanted, lasted, replica, err) != nil {
			return
		}
	}
}

// errTaken: the address leads to a replica that there is a link to.
var errTaken = errors.New("the address leads to a replica that has a link already")

// link makes one link and stays until it ends. With claimed, that replica must be
// behind the address, and the caller has claimed it. lasted says that the link was
// up.
func (a *Agent) link(dialling, ctx context.Context, address, claimed string) (lasted bool, err error) {
	conn, hello, err := a.dial(dialling, address)
	if err != nil {
		return false, err
	}
	defer func() { _ = conn.Close() }()
	// The hellos end with dialling, whatever they are waiting for.
	stop := context.AfterFunc(dialling, func() { _ = conn.Close() })
	defer stop()
	switch {
	case claimed == "" && !a.claim(hello.Self):
		return false, errTaken
	case claimed == "":
		defer a.release(hello.Self)
	case hello.Self != claimed:
		return false, fmt.Errorf("the replica there calls itself %q", hello.Self)
	}
	session, err := a.introduce(ctx, conn, hello)
	if err != nil {
		return false, err
	}
	if !stop() {
		return false, context.Cause(dialling)
	}
	klog.FromContext(ctx).Info("Linked to the controller", "address", address, "replica", hello.Self, "version", hello.Version)
	a.setReplicas(ctx, hello.Replicas)
	a.up(hello.Self)
	return true, a.serve(ctx, conn, session)
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

// wait pauses after an attempt, or a link, that ended with err. What is said again
// and again is logged once.
func (b *backoff) wait(ctx context.Context, lasted bool, address string, err error) error {
	logger := klog.FromContext(ctx)
	if lasted {
		b.next, b.said = b.min, nil
	}
	switch text := fmt.Append(nil, err); {
	case errors.Is(err, errTaken):
	case lasted:
		logger.Info("Lost the link to the controller", "address", address, "err", string(text))
	case !bytes.Equal(text, b.said):
		logger.Error(err, "No link to the controller; trying again", "address", address)
		b.said = text
	}
	d := b.next/2 + rand.N(b.next/2+1) //nolint:gosec // jitter
	b.next = min(2*b.next, b.max)
	return pause(ctx, d)
}
