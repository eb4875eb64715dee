package link

import (
	"context"
	"crypto/x509"
	"maps"
	"slices"
	"sync"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	"google.golang.org/grpc/stats"

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

// Run keeps the links until ctx ends, and returns after the last call on them has. A pool
// whose disk hangs does not keep it: one goroutine for each such pool stays behind.
func (a *Agent) Run(ctx context.Context) {
	inventory, stop := openInventory(a.cfg.Pools, a.cfg.Observe)
	defer stop()
	defer inventory.settle(lastAnswers)
	a.inventory = inventory
	if a.cfg.Making != nil {
		defer a.cfg.Making(inventory.note())()
	}
	a.wg.Go(func() { a.renew(ctx) })
	a.wg.Go(func() { a.refresh(ctx) })
	a.wg.Go(func() { a.bootstrap(ctx) })
	a.wg.Wait()
}

// renew looks for fresh tokens. Nothing else holds it up: a link ends with its token.
func (a *Agent) renew(ctx context.Context) {
	for {
		if token, err := a.cfg.Token(); err == nil { // an error shows at the next connection
			a.inventory.setToken(token)
		}
		if pause(ctx, a.cfg.Refresh) != nil {
			return
		}
	}
}

// refresh looks at what else changes by itself.
func (a *Agent) refresh(ctx context.Context) {
	for pause(ctx, a.cfg.Refresh) == nil {
		a.inventory.discover(0)
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
