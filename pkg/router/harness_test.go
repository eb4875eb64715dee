package router

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"k8s.io/klog/v2"

	"github.com/csi-loop/csi-loop/internal/roottest"
	"github.com/csi-loop/csi-loop/pkg/image"
	"github.com/csi-loop/csi-loop/pkg/report"
	"github.com/csi-loop/csi-loop/pkg/router/link"
)

const (
	gib    = int64(1) << 30
	driver = "csi-loop.io"
)

func TestMain(m *testing.M) {
	quiet := flag.NewFlagSet("klog", flag.PanicOnError)
	klog.InitFlags(quiet)
	_ = quiet.Parse([]string{"-logtostderr=false", "-stderrthreshold=FATAL"})
	klog.SetOutput(io.Discard)
	roottest.Main(m)
}

// authority is a CA for tests.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(tb testing.TB) *authority {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(tb, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "ca"}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	must(tb, err)
	cert, err := x509.ParseCertificate(der)
	must(tb, err)
	return &authority{cert, key}
}

func (a *authority) pool() *x509.CertPool {
	p := x509.NewCertPool()
	p.AddCert(a.cert)
	return p
}

func (a *authority) issue(tb testing.TB, name string) *tls.Certificate {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(tb, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(2), DNSNames: []string{name}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, &key.PublicKey, a.key)
	must(tb, err)
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func must(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}

// fakeAuth knows the tokens it issued.
type fakeAuth struct {
	mu     sync.Mutex
	tokens map[string]Identity
	down   bool
	hangs  bool // no answer comes
	looked int
	looks  func(token string) // if set, called at each look
}

func (a *fakeAuth) asked() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.looked
}

func (a *fakeAuth) issue(node, pod string, ttl time.Duration) string {
	a.mu.Lock()
	defer a.mu.Unlock()
	token := fmt.Sprintf("token-%d", len(a.tokens))
	a.tokens[token] = Identity{Node: node, NodeUID: "uid-of-" + node, Pod: pod, PodUID: "uid-of-" + pod, Expires: time.Now().Add(ttl)}
	return token
}

func (a *fakeAuth) Authenticate(ctx context.Context, token string) (Identity, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.looked++
	if a.looks != nil {
		a.looks(token)
	}
	if a.hangs {
		a.mu.Unlock()
		<-ctx.Done()
		a.mu.Lock()
		return Identity{}, ctx.Err()
	}
	if a.down {
		return Identity{}, errors.New("the API server is away")
	}
	id, ok := a.tokens[token]
	if !ok {
		return id, fmt.Errorf("%w: never issued", ErrToken)
	}
	return id, nil
}

// fakeRoster is the cluster.
type fakeRoster struct {
	mu         sync.Mutex
	registered map[string]bool
	unknown    bool
}

func (r *fakeRoster) Registered() ([]string, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Collect(maps.Keys(r.registered)), !r.unknown
}

func (r *fakeRoster) Exists(node string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.registered[node]
}

func (r *fakeRoster) set(node string, there bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if there {
		r.registered[node] = true
	} else {
		delete(r.registered, node)
	}
}

// fakeClaims is what Kubernetes knows of volumes.
type fakeClaims struct {
	mu   sync.Mutex
	refs References
	err  error
}

func (f *fakeClaims) References(context.Context) (References, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return References{PVs: maps.Clone(f.refs.PVs), Claims: maps.Clone(f.refs.Claims)}, f.err
}

func (f *fakeClaims) set(change func(*References)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change(&f.refs)
}

// clock is the real one, moved.
type clock struct {
	mu    sync.Mutex
	ahead time.Duration
}

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return time.Now().Add(c.ahead)
}

func (c *clock) advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ahead += d
}

// cluster is a controller and what it stands on.
type cluster struct {
	tb     testing.TB
	ca     *authority
	cert   atomic.Pointer[tls.Certificate] // handshakes read it whenever they come
	auth   *fakeAuth
	roster *fakeRoster
	claims *fakeClaims
	told   *fakeNotices
	clock  *clock
	dir    string
	conn   *grpc.ClientConn // of the sidecars

	router  *Router
	address string
	csi     csi.ControllerClient
	ident   csi.IdentityClient

	groups   csi.GroupControllerClient
	metadata csi.SnapshotMetadataClient

	stop   func()
	halted bool
}

func newCluster(tb testing.TB) *cluster {
	tb.Helper()
	// A UNIX socket's path is short, a test's name may be long.
	dir, err := os.MkdirTemp("", "r") //nolint:usetesting // see above
	must(tb, err)
	tb.Cleanup(func() { os.RemoveAll(dir) })
	c := &cluster{
		tb: tb, ca: newAuthority(tb), dir: dir, clock: &clock{},
		claims: &fakeClaims{refs: References{PVs: map[string]string{}, Claims: map[string]string{}}},
		told:   &fakeNotices{},
		auth:   &fakeAuth{tokens: map[string]Identity{}}, roster: &fakeRoster{registered: map[string]bool{}},
	}
	c.cert.Store(c.ca.issue(tb, link.DefaultName))
	c.address = "127.0.0.1:0"
	c.start()
	tb.Cleanup(c.halt)
	return c
}

// replica is another controller of the same cluster.
func (c *cluster) replica() *cluster {
	c.tb.Helper()
	r := newCluster(c.tb)
	r.halt()
	r.ca, r.auth, r.roster = c.ca, c.auth, c.roster
	r.cert.Store(c.cert.Load())
	r.address = "127.0.0.1:0"
	r.start()
	return r
}

var every = []csi.ControllerServiceCapability_RPC_Type{
	csi.ControllerServiceCapability_RPC_CREATE_DELETE_VOLUME, csi.ControllerServiceCapability_RPC_LIST_VOLUMES,
	csi.ControllerServiceCapability_RPC_GET_CAPACITY, csi.ControllerServiceCapability_RPC_CREATE_DELETE_SNAPSHOT,
	csi.ControllerServiceCapability_RPC_LIST_SNAPSHOTS, csi.ControllerServiceCapability_RPC_EXPAND_VOLUME,
	csi.ControllerServiceCapability_RPC_GET_VOLUME, csi.ControllerServiceCapability_RPC_MODIFY_VOLUME,
	csi.ControllerServiceCapability_RPC_GET_SNAPSHOT, csi.ControllerServiceCapability_RPC_GET_VOLUME_HEALTH,
	csi.ControllerServiceCapability_RPC_LIST_VOLUME_HEALTH,
}

// start starts the controller, at the address it had before.
func (c *cluster) start() {
	c.tb.Helper()
	var nodes net.Listener
	eventually(c.tb, "nobody has the port meanwhile", func() (ok bool) {
		var err error
		nodes, err = net.Listen("tcp", c.address)
		return err == nil
	})
	c.address = nodes.Addr().String()
	socket := filepath.Join(c.dir, fmt.Sprintf("%d.sock", time.Now().UnixNano()))
	sidecars, err := net.Listen("unix", socket)
	must(c.tb, err)
	c.router = New(Config{
		Driver: driver, Version: "v-controller", Controller: every,
		Auth: c.auth, Roster: c.roster, Claims: c.claims, Notices: c.told, Self: c.address, Now: c.clock.now,
		Certificate: func() (*tls.Certificate, error) { return c.cert.Load(), nil },
	})
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := c.router.ServeLinks(ctx, nodes); err != nil {
			c.tb.Error(err)
		}
	})
	wg.Go(func() {
		if err := c.router.ServeCSI(ctx, sidecars, time.Second); err != nil {
			c.tb.Error(err)
		}
	})
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(c.tb, err)
	c.conn = conn
	c.csi, c.ident = csi.NewControllerClient(conn), csi.NewIdentityClient(conn)
	c.groups, c.metadata = csi.NewGroupControllerClient(conn), csi.NewSnapshotMetadataClient(conn)
	c.halted = false
	c.stop = func() {
		must(c.tb, conn.Close())
		cancel()
		wg.Wait()
	}
}

func (c *cluster) halt() {
	if !c.halted {
		c.halted = true
		c.stop()
	}
}

// linked waits until exactly these nodes are.
func (c *cluster) linked(nodes ...*fakeNode) {
	c.tb.Helper()
	var want []string
	for _, n := range nodes {
		want = append(want, n.name)
	}
	slices.Sort(want)
	eventually(c.tb, "nodes are linked: "+strings.Join(want, " "), func() bool {
		var have []string
		for _, p := range c.router.table.all() {
			if p.session != nil {
				have = append(have, p.node)
			}
		}
		return slices.Equal(have, want)
	})
}

// eventually waits for what happens by itself.
func eventually(tb testing.TB, what string, ok func() bool) {
	tb.Helper()
	within(tb, 20*time.Second, what, ok)
}

func within(tb testing.TB, d time.Duration, what string, ok func() bool) {
	tb.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(d)
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			tb.Fatalf("not in %s: %s", d, what)
		}
	}
}

// holdBack holds something up until it is opened, or the test ends: one that fails
// before must not wait for what it holds itself.
func holdBack(tb testing.TB) (open func(), opened <-chan struct{}) {
	held := make(chan struct{})
	open = sync.OnceFunc(func() { close(held) })
	context.AfterFunc(tb.Context(), open) // before any Cleanup
	return open, held
}

// fakePool is a disk: it outlives the node's process.
type fakePool struct {
	id, name string
	key      ed25519.PrivateKey

	mu      sync.Mutex
	volumes map[string]int64
	size    int64
}

func newDisk(tb testing.TB, name string, size int64) *fakePool {
	tb.Helper()
	public, private, err := ed25519.GenerateKey(rand.Reader)
	must(tb, err)
	return &fakePool{id: image.PoolID(public), name: name, key: private, volumes: map[string]int64{}, size: size}
}

func (p *fakePool) free() link.Free {
	p.mu.Lock()
	defer p.mu.Unlock()
	left := p.size
	for _, size := range p.volumes {
		left -= size
	}
	return link.Free{Thick: left, Thin: 2 * left}
}

func (p *fakePool) list() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Sorted(maps.Keys(p.volumes))
}

func (p *fakePool) has(name string) bool { return slices.Contains(p.list(), image.DirName(name)) }

// fakeNode is a node: an Agent over fake pools.
type fakeNode struct {
	csi.UnimplementedControllerServer
	c       *cluster
	name    string
	pools   []*fakePool
	address string
	ca      func() (*x509.CertPool, error)

	// hook is called in CreateVolume, before and after the volume is made.
	hook func(ctx context.Context, step string) error
	// slow makes the pauses between attempts those of a real node.
	slow     bool
	register func(grpc.ServiceRegistrar)
	handler  csi.ControllerServer // of calls, unless it is the node itself
	sources  link.Sources         // nil: a node that knows no copies between nodes
	proofs   func(p *link.Pool)
	lies     string // ID of a pool that it speaks of and does not have
	says     atomic.Pointer[report.Machine]

	mu    sync.Mutex
	token string
	obs   []func(string, string, bool)
	calls []string
	locks nameLocks

	agent *link.Agent
	stop  func()
}

func (c *cluster) node(name string, pools ...*fakePool) *fakeNode {
	n := &fakeNode{c: c, name: name, pools: pools, address: c.address, token: c.auth.issue(name, "pod-"+name, time.Hour)}
	n.ca = func() (*x509.CertPool, error) { return c.ca.pool(), nil }
	n.handler = n
	n.register = func(r grpc.ServiceRegistrar) { csi.RegisterControllerServer(r, n.handler) }
	c.roster.set(name, true)
	return n
}

// up starts the node's process.
func (n *fakeNode) up() *fakeNode {
	find := func() []link.Pool {
		var pools []link.Pool
		n.mu.Lock()
		defer n.mu.Unlock()
		for _, p := range n.pools {
			pool := link.Pool{
				ID: p.id, Name: p.name, Key: p.key.Public().(ed25519.PublicKey),
				Sign: func(b []byte) []byte { return ed25519.Sign(p.key, b) }, Volumes: p.list, Free: p.free,
			}
			if n.proofs != nil {
				n.proofs(&pool)
			}
			pools = append(pools, pool)
		}
		return pools
	}
	cfg := link.Config{
		Driver: driver, Version: "v-node", NodeID: n.name, Addresses: []string{n.address},
		CA: n.ca, Token: n.currentToken, Pools: find, DefaultPool: "default",
		Observe: func(f func(string, string, bool)) func() {
			n.mu.Lock()
			defer n.mu.Unlock()
			n.obs = []func(string, string, bool){f}
			return func() {}
		},
		Register: n.register, Sources: n.sources, Report: n.report,
		RetryMin: 2 * time.Millisecond, RetryMax: 20 * time.Millisecond, Refresh: 5 * time.Millisecond, StopTime: 100 * time.Millisecond,
	}
	if n.slow {
		cfg.RetryMin, cfg.RetryMax, cfg.Refresh = 0, 0, 0
	}
	n.agent = link.NewAgent(cfg)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		n.agent.Run(ctx)
	}()
	n.stop = sync.OnceFunc(func() {
		cancel()
		<-done
	})
	n.c.tb.Cleanup(n.stop)
	return n
}

func (n *fakeNode) currentToken() (string, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.token, nil
}

func (n *fakeNode) setToken(token string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.token = token
}

func (n *fakeNode) called(method string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.calls = append(n.calls, method)
}

func (n *fakeNode) count(method string) (count int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, c := range n.calls {
		if c == method {
			count++
		}
	}
	return count
}

func (n *fakeNode) tell(p *fakePool, volume string, exists bool) {
	n.mu.Lock()
	obs := n.obs
	n.mu.Unlock()
	for _, f := range obs {
		f(p.id, volume, exists)
	}
}

func (n *fakeNode) poolNamed(name string) *fakePool {
	if name == "" {
		name = "default"
	}
	for _, p := range n.pools {
		if p.name == name {
			return p
		}
	}
	return nil
}

func (n *fakeNode) topology() []*csi.Topology {
	return []*csi.Topology{{Segments: map[string]string{"topology." + driver + "/node": n.name}}}
}

func (n *fakeNode) requirement() *csi.TopologyRequirement {
	return &csi.TopologyRequirement{Requisite: n.topology(), Preferred: n.topology()}
}

func (n *fakeNode) step(ctx context.Context, step string) error {
	if n.hook == nil {
		return nil
	}
	return n.hook(ctx, step)
}

func (n *fakeNode) CreateVolume(ctx context.Context, req *csi.CreateVolumeRequest) (*csi.CreateVolumeResponse, error) {
	n.called("CreateVolume")
	dir, size := image.DirName(req.GetName()), req.GetCapacityRange().GetRequiredBytes()
	unlock, err := n.locks.lock(dir)
	if err != nil {
		return nil, err
	}
	defer unlock()
	answer := func(p *fakePool) (*csi.CreateVolumeResponse, error) {
		return &csi.CreateVolumeResponse{Volume: &csi.Volume{VolumeId: image.VolumeID(p.id, dir), CapacityBytes: size, AccessibleTopology: n.topology()}}, nil
	}
	for _, p := range n.pools {
		if p.has(req.GetName()) {
			return answer(p)
		}
	}
	if t := req.GetAccessibilityRequirements(); t != nil && !slices.ContainsFunc(t.GetRequisite(), func(t *csi.Topology) bool {
		return t.GetSegments()["topology."+driver+"/node"] == n.name
	}) {
		return nil, status.Error(codes.ResourceExhausted, "not here")
	}
	p := n.poolNamed(req.GetParameters()["pool"])
	if p == nil {
		return nil, status.Error(codes.InvalidArgument, "no such pool")
	}
	if err := n.step(ctx, "before"); err != nil {
		return nil, err
	}
	if p.free().Thick < size {
		return nil, status.Error(codes.ResourceExhausted, "full")
	}
	p.mu.Lock()
	p.volumes[dir] = size
	p.mu.Unlock()
	n.tell(p, dir, true)
	if err := n.step(ctx, "after"); err != nil {
		return nil, err
	}
	return answer(p)
}

func (n *fakeNode) find(id string) (*fakePool, string) {
	poolID, dir, _ := strings.Cut(id, ".")
	for _, p := range n.pools {
		if p.id == poolID && slices.Contains(p.list(), dir) {
			return p, dir
		}
	}
	return nil, ""
}

func (n *fakeNode) sizeOf(id string) int64 {
	p, dir := n.find(id)
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.volumes[dir]
}

func (n *fakeNode) DeleteVolume(_ context.Context, req *csi.DeleteVolumeRequest) (*csi.DeleteVolumeResponse, error) {
	n.called("DeleteVolume")
	if p, dir := n.find(req.GetVolumeId()); p != nil {
		p.mu.Lock()
		delete(p.volumes, dir)
		p.mu.Unlock()
		n.tell(p, dir, false)
	}
	return &csi.DeleteVolumeResponse{}, nil
}

func (n *fakeNode) ControllerExpandVolume(_ context.Context, req *csi.ControllerExpandVolumeRequest) (*csi.ControllerExpandVolumeResponse, error) {
	if p, _ := n.find(req.GetVolumeId()); p == nil {
		return nil, status.Error(codes.NotFound, "no such volume")
	}
	return &csi.ControllerExpandVolumeResponse{CapacityBytes: req.GetCapacityRange().GetRequiredBytes()}, nil
}

func (n *fakeNode) ControllerGetVolume(ctx context.Context, req *csi.ControllerGetVolumeRequest) (*csi.ControllerGetVolumeResponse, error) {
	if err := n.step(ctx, "get"); err != nil {
		return nil, err
	}
	return &csi.ControllerGetVolumeResponse{Volume: &csi.Volume{VolumeId: req.GetVolumeId()}}, nil
}

func (n *fakeNode) ValidateVolumeCapabilities(context.Context, *csi.ValidateVolumeCapabilitiesRequest) (*csi.ValidateVolumeCapabilitiesResponse, error) {
	return &csi.ValidateVolumeCapabilitiesResponse{}, nil
}

func (n *fakeNode) GetCapacity(_ context.Context, req *csi.GetCapacityRequest) (*csi.GetCapacityResponse, error) {
	n.called("GetCapacity")
	return &csi.GetCapacityResponse{AvailableCapacity: n.poolNamed(req.GetParameters()["pool"]).free().Thick}, nil
}

func (n *fakeNode) ListVolumes(_ context.Context, req *csi.ListVolumesRequest) (*csi.ListVolumesResponse, error) {
	var ids []string
	for _, p := range n.pools {
		for _, v := range p.list() {
			ids = append(ids, image.VolumeID(p.id, v))
		}
	}
	slices.Sort(ids)
	resp := &csi.ListVolumesResponse{}
	for _, id := range ids {
		if id <= req.GetStartingToken() {
			continue
		}
		if req.GetMaxEntries() > 0 && len(resp.GetEntries()) == int(req.GetMaxEntries()) {
			resp.NextToken = resp.GetEntries()[len(resp.GetEntries())-1].GetVolume().GetVolumeId()
			break
		}
		resp.Entries = append(resp.Entries, &csi.ListVolumesResponse_Entry{Volume: &csi.Volume{VolumeId: id, CapacityBytes: n.sizeOf(id)}})
	}
	return resp, nil
}

// code asserts the gRPC code of an error, and words of its message.
func code(tb testing.TB, err error, want codes.Code, words ...string) {
	tb.Helper()
	if got := status.Code(err); got != want {
		tb.Fatalf("got %s (%v), want %s", got, err, want)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			tb.Fatalf("%q is not in %q", w, err)
		}
	}
}

func create(name string, size int64, at *fakeNode) *csi.CreateVolumeRequest {
	req := &csi.CreateVolumeRequest{Name: name, CapacityRange: &csi.CapacityRange{RequiredBytes: size}}
	if at != nil {
		req.AccessibilityRequirements = at.requirement()
	}
	return req
}
