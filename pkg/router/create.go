package router

import (
	"context"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/csi-loop/csi-loop/pkg/image"
	"github.com/csi-loop/csi-loop/pkg/router/link"
	"github.com/csi-loop/csi-loop/pkg/transfer"
)

// The StorageClass parameters that matter to routing.
const (
	paramPool       = "pool"       // name of a pool
	paramAllocation = "allocation" // thick or thin
	paramSourceNode = "sourceNode" // preferred or required
	// Of a source that is a volume in use; a node with the source judges them.
	paramFreezeTimeout = "freezeTimeout"
	paramCopyInUse     = "copyInUse"
)

// sourceNodeRequired is the value of paramSourceNode for copies that stay on the
// source's node.
const sourceNodeRequired = "required"

// CreateVolume goes where the volume is, or may be, already; else where its source
// is; else where the topology points; else to the node with most room.
func (s *controllerServer) CreateVolume(ctx context.Context, req *csi.CreateVolumeRequest) (*csi.CreateVolumeResponse, error) {
	name := req.GetName()
	if name == "" {
		return nil, invalidf("name is missing")
	}
	dir := image.DirName(name)
	unlock, err := s.r.names.lock(dir)
	if err != nil {
		return nil, err
	}
	defer unlock()
	c := creation{r: s.r, req: req, dir: dir}
	if req.GetAccessibilityRequirements() != nil {
		c.wanted = s.r.nodesOf(req.GetAccessibilityRequirements())
		c.bound = len(req.GetAccessibilityRequirements().GetRequisite())+len(req.GetAccessibilityRequirements().GetPreferred()) > 0
	}
	if resp, done, err := c.again(ctx); done {
		return resp, err
	}
	if req.GetVolumeContentSource() != nil {
		return c.fromSource(ctx)
	}
	if c.bound {
		return c.among(ctx, c.wanted)
	}
	return c.anywhere(ctx)
}

// creation is one CreateVolume.
type creation struct {
	r      *Router
	req    *csi.CreateVolumeRequest
	dir    string
	insist bool     // without an offer of its source a node cannot make the volume
	bound  bool     // the request names topologies
	wanted []string // the nodes they mean, preferred ones first
}

// at sends the request to a node, and remembers that it did until the answer
// settles whether there is a volume.
func (c *creation) at(ctx context.Context, s *session) (*csi.CreateVolumeResponse, error) {
	if first, is := c.r.table.refused(s.id.Node, c.pool()); is {
		// The node does not know that its pool is refused, and would make the volume.
		return nil, status.Errorf(codes.ResourceExhausted, "volume %q: the pool on node %q is a copy of the one on node %q, and is not served", c.req.GetName(), s.id.Node, first)
	}
	if first, is := c.misled(s); is {
		return nil, unavailablef("volume %q: its source is on node %q, and node %q has a copy of that one's pool, which is not served: it would be made of the copy", c.req.GetName(), first, s.id.Node)
	}
	ctx, without := c.offer(ctx, s)
	if without != nil && (c.insist || ctx.Err() != nil) {
		return nil, without
	}
	c.r.table.sent(c.dir, s.id.Node)
	resp, err := call(ctx, s, "CreateVolume", c.req, csi.ControllerClient.CreateVolume)
	if err == nil {
		err = c.r.credible(s, resp.GetVolume())
	}
	if err == nil {
		c.r.table.made(s, resp.GetVolume().GetVolumeId())
	}
	if !uncertain(err) {
		c.r.table.answered(c.dir)
	}
	switch {
	case status.Code(err) == codes.Unavailable && without != nil:
		return nil, unavailablef("%s; %s", status.Convert(without).Message(), status.Convert(err).Message())
	case err != nil:
		return nil, err
	}
	return resp, nil
}

// misled says that a node would make the volume of something else: it has a refused copy of
// the source's pool, and would read that, which is not what the source has become since on
// the node that is named. A node that has the volume already reads nothing.
func (c *creation) misled(s *session) (first string, is bool) {
	_, request := c.source()
	poolID, ok := poolOf(request.ID())
	if !ok || c.r.table.has(s.id.Node, c.dir) {
		return "", false
	}
	return c.r.table.copyOn(s.id.Node, poolID)
}

// credible refuses a volume that is not the node's to give: its claim would be bound
// to another node's volume, and that one deleted with it.
func (r *Router) credible(s *session, v *csi.Volume) error {
	if err := r.owned(s, "volume", v.GetVolumeId()); err != nil {
		return err
	}
	for _, t := range v.GetAccessibleTopology() {
		if name, ok := r.nodeOf(t); !ok || name != s.id.Node {
			return unavailablef("node %q answered that volume %q is in %v", s.id.Node, v.GetVolumeId(), t.GetSegments())
		}
	}
	if len(v.GetAccessibleTopology()) != 1 {
		return unavailablef("node %q answered that volume %q has %d topologies", s.id.Node, v.GetVolumeId(), len(v.GetAccessibleTopology()))
	}
	return nil
}

// owned refuses an ID in an answer that is not in one of the node's pools.
func (r *Router) owned(s *session, kind, id string) error {
	if !r.here(s, id) {
		return unavailablef("node %q answered with a %s %.200q, whose pool it does not have", s.id.Node, kind, id)
	}
	return r.still(s)
}

// pool is the name of the pool asked for; "" is the node's default.
func (c *creation) pool() string { return c.req.GetParameters()[paramPool] }

// again looks whether an earlier call has, or may have, made the volume. Not done
// means that it is nowhere, as far as can be known.
func (c *creation) again(ctx context.Context) (_ *csi.CreateVolumeResponse, done bool, _ error) {
	places := c.r.table.volume(c.dir)
	// Where the request points comes first, then nodes with a link.
	slices.SortStableFunc(places, func(a, b place) int { return c.rank(a) - c.rank(b) })
	for _, p := range places {
		if p.session != nil {
			// The node knows: it answers with the volume, or that it makes it now.
			resp, err := c.at(ctx, p.session)
			if c.bound && !slices.Contains(c.wanted, p.node) && elsewhere(err) {
				continue
			}
			return resp, true, err
		}
		// Kubernetes points elsewhere only after it was told that this node has
		// been away for too long.
		if p.away < Grace || !c.bound || slices.Contains(c.wanted, p.node) {
			return nil, true, c.away(p, "may have been made there")
		}
	}
	return nil, false, nil
}

// elsewhere says whether a node to which the request does not point has answered just
// that: it has no such volume, or one that the scheduler has given up, having been told
// that the node was away.
func elsewhere(err error) bool {
	return status.Code(err) == codes.ResourceExhausted || status.Code(err) == codes.AlreadyExists
}

func (c *creation) rank(p place) int {
	switch {
	case p.session != nil && slices.Contains(c.wanted, p.node):
		return 0
	case p.session != nil:
		return 1
	}
	return 2
}

// away is the answer for a node without a link: UNAVAILABLE, and after Grace, if
// the scheduler chose it, RESOURCE_EXHAUSTED so that it chooses again.
func (c *creation) away(p place, why string) error {
	if c.bound && p.away >= Grace && slices.Contains(c.wanted, p.node) {
		return status.Errorf(codes.ResourceExhausted, "volume %q: node %q has not been linked, or its pool not been there, for %s", c.req.GetName(), p.node, p.away.Round(time.Second))
	}
	return unavailablef("volume %q: node %q %s (for %s), and the volume %s", c.req.GetName(), p.node, p.state(), p.away.Round(time.Second), why)
}

// source is what the volume is to be a copy of.
func (c *creation) source() (kind string, r transfer.Request) {
	src := c.req.GetVolumeContentSource()
	if src.GetSnapshot() != nil {
		return "snapshot", transfer.Request{Snapshot: src.GetSnapshot().GetSnapshotId()}
	}
	r = transfer.Request{Volume: src.GetVolume().GetVolumeId()}
	for _, key := range []string{paramFreezeTimeout, paramCopyInUse} {
		if value, ok := c.req.GetParameters()[key]; ok {
			if r.Parameters == nil {
				r.Parameters = map[string]string{}
			}
			r.Parameters[key] = value
		}
	}
	return "volume", r
}

// offer adds to a call what lets the node read a source that is on another one. A node
// that may have the volume already, or is making it, needs none.
func (c *creation) offer(ctx context.Context, to *session) (context.Context, error) {
	kind, request := c.source()
	from, ok, err := c.r.owner(kind, request.ID())
	switch {
	case c.req.GetVolumeContentSource() == nil || !ok:
		return ctx, nil
	case err != nil:
		return ctx, err
	case from.id.Node == to.id.Node:
		return ctx, nil // it is there; with an offer the node would not read its own
	case !to.transfers():
		return ctx, to.cannotTransfer()
	}
	var source transfer.Description
	if err := askTransfer(ctx, from, func(ctx context.Context, opts ...grpc.CallOption) (err error) {
		source, err = link.Describe(ctx, from.grpc, request, opts...)
		return err
	}); err != nil {
		return ctx, err
	}
	ticket, err := c.r.transfers.offer(c.dir, to, request)
	if err != nil {
		return ctx, err
	}
	with, err := link.WithOffer(ctx, link.Offer{Source: source, Ticket: ticket, Address: c.r.cfg.Self})
	if err != nil {
		return ctx, unavailablef("what node %q says of %v: %v", from.id.Node, request, err)
	}
	return with, nil
}

// fromSource goes to the node that has the source, unless the request points elsewhere
// and the class does not insist on it. Among several nodes that of the source comes
// first.
func (c *creation) fromSource(ctx context.Context) (*csi.CreateVolumeResponse, error) {
	kind, request := c.source()
	s, ok, err := c.r.owner(kind, request.ID())
	here := ok && err == nil && slices.Contains(c.wanted, s.id.Node)
	switch {
	case request.ID() == "":
		return nil, invalidf("volume_content_source: %s_id is missing", kind)
	case err != nil:
		return nil, err
	case !ok:
		return nil, status.Errorf(codes.NotFound, "there is no %s %q: csi-loop does not make such IDs", kind, request.ID())
	case !c.bound:
		return c.at(ctx, s)
	case c.req.GetParameters()[paramSourceNode] != sourceNodeRequired:
	case !here:
		return nil, status.Errorf(codes.ResourceExhausted, "volume %q: its source is on node %q, where the request does not point, and parameter %q is %q",
			c.req.GetName(), s.id.Node, paramSourceNode, sourceNodeRequired)
	default:
		return c.at(ctx, s)
	}
	names := c.wanted
	if here {
		names = append([]string{s.id.Node}, slices.DeleteFunc(slices.Clone(names), func(n string) bool { return n == s.id.Node })...)
	}
	c.insist = true
	return c.among(ctx, names)
}

// among tries the nodes in order. A node that is full, or has no such pool, leaves
// it to the next.
func (c *creation) among(ctx context.Context, names []string) (*csi.CreateVolumeResponse, error) {
	if len(names) > 1 {
		if err := c.early(func(node string) bool { return slices.Contains(names, node) }); err != nil {
			return nil, err
		}
	}
	var full, missing error
	for _, name := range names {
		p, known := c.r.table.node(name)
		if !known {
			p = place{node: name, away: c.r.sinceStart()}
		}
		if p.session == nil {
			err := c.away(p, "should be made there")
			if missing == nil || status.Code(err) == codes.Unavailable {
				missing = err
			}
			continue
		}
		if _, copied := c.r.table.refused(name, c.pool()); len(names) > 1 && !copied && !c.r.table.hasPool(name, c.pool()) {
			continue
		}
		if first, is := c.misled(p.session); is {
			// Nothing was sent: the scheduler may choose again.
			full = status.Errorf(codes.ResourceExhausted, "volume %q: node %q has a copy of the pool of its source, which is on node %q, and would make it of the copy", c.req.GetName(), name, first)
			continue
		}
		resp, err := c.at(ctx, p.session)
		if err == nil || status.Code(err) != codes.ResourceExhausted {
			return resp, err
		}
		full = err
	}
	switch {
	case missing != nil && (full == nil || status.Code(missing) == codes.Unavailable):
		return nil, missing
	case full != nil:
		return nil, full
	}
	return nil, status.Errorf(codes.ResourceExhausted, "volume %q: none of the topologies asked for is a node with csi-loop", c.req.GetName())
}

// early is UNAVAILABLE while a node that is eligible may have made the volume when an
// earlier controller asked it: until it is linked, or for Grace after the start, as long
// as it is expected at all.
func (c *creation) early(eligible func(node string) bool) error {
	if _, ok := c.r.cfg.Roster.Registered(); !ok {
		return unavailablef("volume %q: the nodes of the cluster are not known yet", c.req.GetName())
	}
	missing := slices.DeleteFunc(c.r.missing(), func(node string) bool { return !eligible(node) })
	if len(missing) > 0 && c.r.sinceStart() < Grace {
		return unavailablef("volume %q: this controller started a moment ago and waits for nodes: %s", c.req.GetName(), some(missing))
	}
	return nil
}

// anywhere goes to the node with most room in the pool.
func (c *creation) anywhere(ctx context.Context) (*csi.CreateVolumeResponse, error) {
	if err := c.early(func(string) bool { return true }); err != nil {
		return nil, err
	}
	poolName, thin := c.pool(), c.req.GetParameters()[paramAllocation] == "thin"
	var full error
	for _, room := range c.r.table.rooms(poolName, thin) {
		// A node that seems full is asked only if none had more: its word on free
		// space is some seconds old.
		if room.session == nil || full != nil && room.free < c.req.GetCapacityRange().GetRequiredBytes() {
			continue
		}
		resp, err := c.at(ctx, room.session)
		if err == nil || status.Code(err) != codes.ResourceExhausted {
			return resp, err
		}
		full = err
	}
	switch {
	case full != nil:
		return nil, full
	case len(c.r.missing()) > 0:
		return nil, unavailablef("volume %q: no linked node has the pool %q, and these are not linked: %s", c.req.GetName(), poolName, some(c.r.missing()))
	}
	return nil, invalidf("parameter %q: no node has a pool %q", paramPool, poolName)
}

// topologyKey is the key of the one topology segment.
func (r *Router) topologyKey() string { return "topology." + r.cfg.Driver + "/node" }

// nodesOf lists the nodes that a requirement means, preferred ones first.
func (r *Router) nodesOf(t *csi.TopologyRequirement) []string {
	var names []string
	for _, topology := range slices.Concat(t.GetPreferred(), t.GetRequisite()) {
		if name, ok := r.nodeOf(topology); ok && !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	return names
}

// nodeOf is the node that a topology means.
func (r *Router) nodeOf(t *csi.Topology) (string, bool) {
	name, ok := t.GetSegments()[r.topologyKey()]
	return name, ok && len(t.GetSegments()) == 1
}

func (r *Router) sinceStart() time.Duration { return r.cfg.Now().Sub(r.started) }

// missing lists the nodes that should have a link and have none.
func (r *Router) missing() []string {
	missing := map[string]struct{}{}
	linked := map[string]bool{}
	for _, p := range r.table.all() {
		linked[p.node] = p.session != nil
		if p.session == nil {
			missing[p.node] = struct{}{}
		}
	}
	registered, _ := r.cfg.Roster.Registered()
	for _, name := range registered {
		if !linked[name] {
			missing[name] = struct{}{}
		}
	}
	return slices.Sorted(maps.Keys(missing))
}

// some is a list for people.
func some(names []string) string {
	if len(names) > 5 {
		return strings.Join(names[:5], ", ") + ", ..."
	}
	return strings.Join(names, ", ")
}
