package router

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/stats"
)

// Grace is how long a node may be away before the scheduler is told to choose
// another one, and how long its last word on free space counts.
const Grace = time.Minute

// Identity is who a token belongs to.
type Identity struct {
	Node, NodeUID string
	Pod, PodUID   string
	// Expires is when the token does.
	Expires time.Time
}

// ErrToken marks a token that is no good, as opposed to one that could not be
// looked at now.
var ErrToken = errors.New("the token is not accepted")

// Authenticator finds out whose a token is: a node's pod's, or ErrToken.
type Authenticator interface {
	Authenticate(ctx context.Context, token string) (Identity, error)
}

// Roster knows the nodes of the cluster.
type Roster interface {
	// Registered lists the nodes where the driver is registered, which should
	// have a link. Without ok it is not known yet.
	Registered() (nodes []string, ok bool)
	// Exists says whether there is such a node, with the driver or without.
	Exists(node string) bool
}

// Config is what a Router must be told. Without a comment a field is required.
type Config struct {
	Driver, Version string
	// Controller, Group and Plugin are the capabilities to report. Calls of the Controller
	// service that belong to none of them are UNIMPLEMENTED.
	Controller []csi.ControllerServiceCapability_RPC_Type
	Group      []*csi.GroupControllerServiceCapability
	Plugin     []*csi.PluginCapability

	Auth   Authenticator
	Roster Roster
	Claims Claims
	// Notices is for WatchProblems only.
	Notices Notices
	// Certificate is asked for at each connection.
	Certificate func() (*tls.Certificate, error)

	// Self is the address of this replica, for nodes.
	Self string
	// Observe is told of each CSI call that was answered; it may be nil.
	Observe func(method, code string, took time.Duration)
	// Stats sees the calls of ServeCSI, and LinkStats those that go on to the nodes; they
	// may be nil.
	Stats, LinkStats stats.Handler
	// TransferRate bounds what is passed on from node to node, in bytes a second; 0 is
	// no bound.
	TransferRate int64
	// Now is the clock; default time.Now.
	Now func() time.Time
}

// Router is the controller.
type Router struct {
	cfg     Config
	table   *table
	started time.Time
	names   nameLocks
	orphans orphans
	reports reports

	transfers *transfers

	mu       sync.Mutex
	replicas []string              // guarded by mu
	sessions map[*session]struct{} // guarded by mu
	refused  map[string]uint64     // guarded by mu; by reason
	serving  bool                  // guarded by mu
}

// New makes a router. ServeLinks and ServeCSI start it.
func New(cfg Config) *Router {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &Router{
		cfg: cfg, table: newTable(cfg.Now), started: cfg.Now(), transfers: newTransfers(cfg.Now, cfg.TransferRate),
		reports: newReports(), orphans: newOrphans(), replicas: []string{cfg.Self}, sessions: map[*session]struct{}{}, refused: map[string]uint64{},
	}
}

// SetReplicas says where nodes find the controller's replicas, this one among
// them, and tells it to all nodes.
func (r *Router) SetReplicas(addresses []string) {
	addresses = slices.Compact(slices.Sorted(slices.Values(append(slices.Clone(addresses), r.cfg.Self))))
	r.mu.Lock()
	defer r.mu.Unlock()
	if slices.Equal(addresses, r.replicas) {
		return
	}
	r.replicas = addresses
	for s := range r.sessions {
		s.tell(r.replicas, "")
	}
}

// Stats is the state of the links, and what was found over them.
type Stats struct {
	Linked         int
	Away           int // have been linked, or should be
	DuplicatePools int
	Refused        map[string]uint64 // links, by reason
	Orphans        OrphanReport      // the last one, without the youngest
	Transfers      TransferStats
}

// Stats counts.
func (r *Router) Stats() Stats {
	s := r.table.stats()
	s.Away, s.Orphans = len(r.missing()), r.orphans.known()
	s.Transfers = r.transfers.count()
	r.mu.Lock()
	defer r.mu.Unlock()
	s.Refused = make(map[string]uint64, len(reasons))
	for _, reason := range reasons {
		s.Refused[reason] = r.refused[reason]
	}
	return s
}

// Ready says whether calls can be answered: links are accepted, and the nodes of
// the cluster are known.
func (r *Router) Ready() error {
	r.mu.Lock()
	serving := r.serving
	r.mu.Unlock()
	if !serving {
		return errors.New("not listening for nodes yet")
	}
	if _, ok := r.cfg.Roster.Registered(); !ok {
		return errors.New("the nodes of the cluster are not known yet")
	}
	if _, err := r.cfg.Certificate(); err != nil {
		return fmt.Errorf("no certificate for the links: %w", err)
	}
	return nil
}

// refuse counts a link that was refused.
func (r *Router) refuse(reason string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.refused[reason]++
}

// Reasons for refusing a link.
const (
	reasonHello     = "hello"     // no TLS, no hello in time, or not one
	reasonToken     = "token"     // the token is not accepted
	reasonReview    = "review"    // the token could not be looked at
	reasonIdentity  = "identity"  // the hello contradicts the token, or a proof fails
	reasonSecond    = "second"    // the node has a link already
	reasonInventory = "inventory" // the node did not say what it has
	reasonCrowd     = "crowd"     // too many connections that say nothing
	reasonTicket    = "ticket"    // a transfer's connection whose ticket is not good
)

var reasons = []string{reasonCrowd, reasonHello, reasonToken, reasonReview, reasonIdentity, reasonSecond, reasonInventory, reasonTicket}
