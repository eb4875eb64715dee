package router

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	"k8s.io/klog/v2"

	"github.com/csi-loop/csi-loop/pkg/router/link"
)

// session is the controller's end of one link.
type session struct {
	router  *Router
	id      Identity
	hello   link.NodeHello
	methods map[string]struct{}
	// nonce and binding are what proofs on this connection are about.
	nonce, binding []byte
	conn           net.Conn

	// These are set before the session joins the table.
	client   csi.ControllerClient
	group    csi.GroupControllerClient
	metadata csi.SnapshotMetadataClient
	grpc     *grpc.ClientConn

	calls sync.WaitGroup // Add only while draining is false
	wake  chan struct{}  // capacity 1; there is an order to send
	fresh chan string    // capacity 1; the last token that came
	pong  chan struct{}  // capacity 1; the node said something
	talk  *rate.Limiter  // of what it may say, in bytes
	// proofs counts those of late pools; one goroutine listens.
	proofs int

	ended context.Context
	end   context.CancelCauseFunc

	mu       sync.Mutex
	order    link.Order // guarded by mu; what is to be sent
	draining bool       // guarded by mu; no new calls
}

func newSession(r *Router, id Identity, hello link.NodeHello, nonce, binding []byte) *session {
	s := &session{
		router: r, id: id, hello: hello, nonce: nonce, binding: binding, methods: make(map[string]struct{}, len(hello.Methods)),
		wake: make(chan struct{}, 1), fresh: make(chan string, 1), pong: make(chan struct{}, 1),
		// A node that does nothing but send must not keep this process busy.
		talk: rate.NewLimiter(talkRate, talkBurst),
	}
	for _, m := range hello.Methods {
		s.methods[m] = struct{}{}
	}
	s.hello.Methods, s.hello.Token = nil, ""
	s.ended, s.end = context.WithCancelCause(context.Background())
	return s
}

// What a node may say on the stream, in bytes a second and at once. A message counts
// messageCost more than it has.
const (
	talkRate    = 4 << 20
	talkBurst   = 2 * link.MaxMessage
	messageCost = 1 << 10
)

func (s *session) about() []any { return []any{"node", s.id.Node, "pod", s.id.Pod} }

// drainTime is how long calls may go on after the node began to stop.
const drainTime = time.Minute

// run is the life of the link. It returns why it ended.
func (s *session) run(ctx context.Context) error {
	r := s.router
	defer r.table.leave(s)
	stop := context.AfterFunc(ctx, func() { s.end(context.Cause(ctx)) })
	defer stop()
	defer s.end(nil)

	conn, err := link.NewClient(s.conn, r.cfg.LinkStats)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	s.grpc = conn
	s.client, s.group, s.metadata = csi.NewControllerClient(conn), csi.NewGroupControllerClient(conn), csi.NewSnapshotMetadataClient(conn)
	stream, err := link.OpenStream(s.ended, conn) //nolint:contextcheck // ended follows ctx, and other reasons to end
	if err != nil {
		return err
	}
	pools, err := s.inventory(stream)
	if err != nil {
		r.refuse(reasonInventory)
		s.farewell(stream, err)
		return err
	}
	for _, d := range r.table.join(s, pools) {
		tellDuplicate(ctx, d)
	}
	klog.FromContext(ctx).Info("Linked to a node", "version", s.hello.Version, "pools", len(s.hello.Pools))

	r.mu.Lock()
	r.sessions[s] = struct{}{}
	s.tell(r.replicas, "")
	r.mu.Unlock()
	defer func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		delete(r.sessions, s)
	}()
	var wg sync.WaitGroup
	wg.Go(func() { s.sendOrders(stream) })
	wg.Go(func() { s.renew(ctx) })
	err = s.receive(ctx, stream)
	s.tell(nil, lastWords(err))
	r.table.leave(s)
	s.drain(conn)
	s.end(err)
	wg.Wait()
	return context.Cause(s.ended) //nolint:contextcheck // it is no call
}

// inventory reads what the node has.
func (s *session) inventory(stream link.Stream) (map[string]*pool, error) {
	timer := time.AfterFunc(inventoryTime, func() { s.end(errors.New("the node did not say in time what it has")) })
	defer timer.Stop()
	pools := map[string]*pool{"": newPool("", "", false)}
	for _, p := range s.hello.Pools {
		pools[p.ID] = newPool(p.ID, p.Name, p.Name == s.hello.DefaultPool)
	}
	for {
		u, late, err := s.listen(stream)
		if err != nil {
			return nil, err
		}
		for _, p := range late {
			if pools[p.id] == nil {
				pools[p.id] = p
			}
		}
		for _, change := range u.Pools {
			p := pools[change.ID]
			if p == nil {
				return nil, fmt.Errorf("the node speaks of pool %q, which it did not prove to have", change.ID)
			}
			p.change(change, func(string) {}, func(string) {})
		}
		if err := bounded(pools); err != nil {
			return nil, err
		}
		s.take(u)
		if u.Complete {
			return pools, nil
		}
	}
}

// farewellTime is how long a refused node has to hear why.
const farewellTime = time.Second

// farewell tells the node why its link ends, for its log, and waits until it knows.
// Precondition: sendOrders does not run.
func (s *session) farewell(stream link.Stream, why error) {
	if s.ended.Err() != nil || stream.Send(link.Order{Notice: lastWords(why)}) != nil {
		return
	}
	timer := time.AfterFunc(farewellTime, func() { s.end(why) })
	defer timer.Stop()
	for err := stream.CloseSend(); err == nil; {
		var size int
		if _, size, err = stream.Recv(); err == nil {
			err = s.talk.WaitN(s.ended, size+messageCost)
		}
	}
}

func lastWords(why error) string {
	return fmt.Sprintf("this link ends: %.*s", maxText, fmt.Sprint(why))
}

// receive takes what the node sends until the stream ends.
func (s *session) receive(ctx context.Context, stream link.Stream) error {
	for {
		u, late, err := s.listen(stream)
		if err != nil {
			return err
		}
		duplicates, err := s.router.table.update(s, late, u)
		if err != nil {
			return err
		}
		for _, d := range duplicates {
			tellDuplicate(ctx, d)
		}
		s.take(u)
	}
}

// listen waits for the node's next word, and looks at what can be judged by itself:
// the names in it, and the proofs of pools that came in late.
func (s *session) listen(stream link.Stream) (link.Update, []*pool, error) {
	u, size, err := stream.Recv()
	if err == nil {
		err = s.talk.WaitN(s.ended, size+messageCost)
	}
	if err != nil {
		return u, nil, errors.Join(context.Cause(s.ended), err)
	}
	added := 0
	for _, change := range u.Pools {
		// Looked at before any of it is kept.
		if added += len(change.Added); added > link.MaxVolumes {
			return u, nil, fmt.Errorf("%d volumes at once; a node can have %d", added, link.MaxVolumes)
		}
		for _, v := range change.Added {
			if !sound(v) {
				return u, nil, fmt.Errorf("%.200q is not the name of a volume", v)
			}
		}
	}
	// A node proves each pool once.
	if s.proofs += len(u.Proofs); s.proofs > link.MaxPools {
		return u, nil, fmt.Errorf("%d proofs of pools; a node can have %d", s.proofs, link.MaxPools)
	}
	var late []*pool
	for _, p := range u.Proofs {
		if err := p.Check(s.id.Node, s.nonce, s.binding); err != nil {
			s.router.refuse(reasonIdentity)
			return u, nil, err
		}
		late = append(late, newPool(p.ID, p.Name, p.Name == s.hello.DefaultPool))
	}
	return u, late, nil
}

// sound says whether a volume may have that name: some newer csi-loop's, perhaps.
func sound(volume string) bool {
	return volume != "" && len(volume) <= maxID && !strings.ContainsFunc(volume, func(r rune) bool { return r <= ' ' || r > '~' })
}

// take hands on what is not about pools.
func (s *session) take(u link.Update) {
	select {
	case s.pong <- struct{}{}: // any word is a sign of life
	default:
	}
	if u.Token == "" {
		return
	}
	select {
	case <-s.fresh:
	default:
	}
	s.fresh <- u.Token // the only sender
}

// drain lets the calls under way finish. On a broken connection they have failed
// already.
func (s *session) drain(conn *grpc.ClientConn) {
	s.mu.Lock()
	s.draining = true
	s.mu.Unlock()
	timer := time.AfterFunc(drainTime, func() { _ = conn.Close() })
	defer timer.Stop()
	if s.ended.Err() != nil {
		_ = conn.Close() // the link was ended from here
	}
	s.calls.Wait()
}

// enter counts a call, unless the link is about to end.
func (s *session) enter() (leave func(), ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.draining {
		return nil, false
	}
	s.calls.Add(1)
	return s.calls.Done, true
}

// tell has the node told of replicas, and of a notice for its log.
func (s *session) tell(replicas []string, notice string) {
	s.post(func(o *link.Order) {
		if replicas != nil {
			o.Replicas = replicas
		}
		if notice != "" {
			o.Notice = notice
		}
	})
}

func (s *session) post(change func(*link.Order)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change(&s.order)
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

func (s *session) sendOrders(stream link.Stream) {
	for {
		select {
		case <-s.ended.Done():
			return
		case <-s.wake:
		}
		s.mu.Lock()
		o := s.order
		s.order = link.Order{}
		s.mu.Unlock()
		if stream.Send(o) != nil {
			return // receive sees why
		}
	}
}

// alive asks the node for a word.
func (s *session) alive(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, probeTime)
	defer cancel()
	select {
	case <-s.pong:
	default:
	}
	s.post(func(o *link.Order) { o.Ping = true })
	select {
	case <-s.pong:
		return true
	case <-s.ended.Done():
	case <-ctx.Done():
	}
	return false
}

// tellDuplicate tells everybody of a pool that two nodes have.
func tellDuplicate(ctx context.Context, d duplicate) {
	msg := fmt.Sprintf("pool %q (ID %s) is on node %q and on node %q: one is a copy of the other (a cloned disk or machine image?). "+
		"The one on %q is served, the one on %q is not", d.name, d.id, d.first, d.second, d.first, d.second)
	klog.FromContext(ctx).Error(nil, "Refused a pool", "pool", d.id, "first", d.first, "second", d.second, "reason", msg)
	for _, s := range d.sessions {
		s.tell(nil, msg)
	}
}

// renewPause is the pause between two looks at fresh tokens: each is a request to the
// API server, and a node can send them without end.
const renewPause = 5 * time.Second

// renew ends the link when its token expires, unless a fresh one came.
func (s *session) renew(ctx context.Context) {
	expires := s.id.Expires
	var fresh <-chan string // nil during a pause
	var token string        // fresh, not looked at yet
	pause := time.NewTimer(0)
	defer pause.Stop()
	for {
		wait := expires.Sub(s.router.cfg.Now())
		if wait <= 0 {
			s.end(errors.New("its token expired, and no fresh one came"))
			return
		}
		expiry := time.NewTimer(wait)
		select {
		case <-s.ended.Done():
			expiry.Stop()
			return
		case <-expiry.C:
			continue
		case <-pause.C:
			fresh = s.fresh
		case token = <-fresh:
		}
		expiry.Stop()
		if fresh == nil || token == "" {
			continue
		}
		var ok bool
		if expires, ok = s.prolong(ctx, token, expires); ok {
			token = ""
		}
		fresh = nil
		pause.Reset(renewPause)
	}
}

// prolong looks at a fresh token, and returns when the link expires. Without ok the
// token has to be looked at again. An API server that does not answer keeps no link
// beyond its time.
func (s *session) prolong(ctx context.Context, token string, expires time.Time) (_ time.Time, ok bool) {
	logger := klog.FromContext(ctx)
	looking, cancel := context.WithTimeout(s.ended, min(link.HelloTime, expires.Sub(s.router.cfg.Now())))
	defer cancel()
	id, err := s.router.authenticate(looking, token) //nolint:contextcheck // ended follows ctx
	switch {
	case errors.Is(err, ErrToken):
		logger.Error(err, "A node sent a fresh token that is no good")
		return expires, true
	case err != nil:
		logger.Error(err, "Cannot look at a node's fresh token; trying again")
		return expires, false
	case id.Node != s.id.Node || id.NodeUID != s.id.NodeUID || id.PodUID != s.id.PodUID:
		s.end(fmt.Errorf("it sent the token of pod %q on node %q", id.Pod, id.Node))
		return expires, true
	}
	return id.Expires, true
}
