package router

import (
	"context"
	"crypto/ed25519"
	"encoding/json"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/csi-loop/csi-loop/pkg/router/link"
)

// rawNode is a node that says what it is told to, without link.Agent: one that lies,
// or one of another version.
type rawNode struct {
	conn   net.Conn
	server *grpc.Server
	stream chan grpc.ServerStream // capacity 1
	ended  chan struct{}
}

// oneConn is a listener with one connection.
type oneConn struct {
	net.Conn

	once sync.Once
	give chan net.Conn
}

func (o *oneConn) Accept() (net.Conn, error) {
	c, ok := <-o.give
	if !ok {
		return nil, net.ErrClosed
	}
	return c, nil
}

func (o *oneConn) Close() error   { o.once.Do(func() { close(o.give) }); return nil }
func (o *oneConn) Addr() net.Addr { return o.LocalAddr() }

// raw links a node with a hello that change may spoil.
func (c *cluster) raw(t *testing.T, node string, service csi.ControllerServer, change func(*link.NodeHello), pools ...*fakePool) *rawNode {
	t.Helper()
	conn, controller := c.dialRaw(t)
	binding, err := link.Binding(conn.ConnectionState())
	must(t, err)
	hello := link.NodeHello{
		Protocol: link.ProtocolMax, Driver: driver, Version: "v-raw", NodeID: node, Token: c.auth.issue(node, "pod-"+node, time.Hour),
		Methods: []string{"/csi.v1.Controller/CreateVolume", "/csi.v1.Controller/ListVolumes", "/csi.v1.Controller/DeleteVolume"}, DefaultPool: "default",
	}
	for _, p := range pools {
		hello.Pools = append(hello.Pools, p.prove(controller.Nonce, binding, node))
	}
	if change != nil {
		change(&hello)
	}
	must(t, link.WriteFrame(conn, hello))
	var verdict link.Verdict
	must(t, link.ReadFrame(conn, &verdict))
	if !verdict.Welcome {
		t.Fatal(verdict.Message)
	}
	c.roster.set(node, true)
	n := &rawNode{conn: conn, server: grpc.NewServer(), stream: make(chan grpc.ServerStream, 1), ended: make(chan struct{})}
	if service != nil {
		csi.RegisterControllerServer(n.server, service)
	}
	n.server.RegisterService(&grpc.ServiceDesc{
		ServiceName: "csiloop.link.v1.Link", HandlerType: (*any)(nil),
		Streams: []grpc.StreamDesc{{StreamName: "Sync", ServerStreams: true, ClientStreams: true, Handler: func(_ any, s grpc.ServerStream) error {
			n.stream <- s
			<-s.Context().Done()
			close(n.ended)
			return nil
		}}},
	}, n)
	l := &oneConn{Conn: conn, give: make(chan net.Conn, 1)}
	l.give <- conn
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = n.server.Serve(l)
	}()
	t.Cleanup(func() {
		n.server.Stop()
		<-done
	})
	return n
}

func (p *fakePool) prove(nonce, binding []byte, node string) link.PoolProof {
	return link.Prove(link.Pool{
		ID: p.id, Name: p.name, Key: p.key.Public().(ed25519.PublicKey), Sign: func(b []byte) []byte { return ed25519.Sign(p.key, b) },
	}, nonce, binding, node)
}

// say sends updates in the words of the wire.
func (n *rawNode) say(t *testing.T, updates ...string) {
	t.Helper()
	s := <-n.stream
	defer func() { n.stream <- s }()
	for _, u := range updates {
		if err := s.SendMsg(wrapperspb.Bytes([]byte(u))); err != nil {
			return // the controller has had enough
		}
	}
}

// hungUp waits until the controller has ended the link.
func (n *rawNode) hungUp(t *testing.T) {
	t.Helper()
	select {
	case <-n.ended:
	case <-time.After(20 * time.Second):
		t.Fatal("the link is still there")
	}
}

// A node that says more than a node can have, or speaks of what is not its own, loses
// its link; the others do not notice.
func TestLyingNode(t *testing.T) {
	many := func(prefix string, n int) string {
		names := make([]string, n)
		for i := range names {
			names[i] = fmt.Sprintf("%s-%d", prefix, i)
		}
		b, err := json.Marshal(link.Update{Pools: []link.PoolUpdate{{Added: names}}})
		must(t, err)
		return string(b)
	}
	for name, words := range map[string][]string{
		"a pool of another node":       {`{"complete":true}`, `{"pools":[{"id":"OTHER","added":["x"]}]}`},
		"the same, before it ends":     {`{"pools":[{"id":"OTHER","added":["x"]}]}`},
		"a proof of nothing":           {`{"complete":true}`, `{"proofs":[{"id":"OTHER","name":"default","key":"","signature":""}]}`},
		"no JSON":                      {`{"complete":true}`, `{`},
		"an empty name":                {`{"complete":true}`, `{"pools":[{"added":[""]}]}`},
		"a name with a line break":     {`{"complete":true}`, `{"pools":[{"added":["a\nb"]}]}`},
		"a name without end":           {`{"complete":true}`, `{"pools":[{"added":["` + strings.Repeat("x", 129) + `"]}]}`},
		"names without end":            {`{"complete":true}`, many("a", link.MaxVolumes/2), many("b", link.MaxVolumes/2), many("c", link.MaxVolumes/2)},
		"the same, before it ends (2)": {many("a", link.MaxVolumes), many("b", link.MaxVolumes)},
		"names without end, at once":   {`{"complete":true}`, many("a", 3*link.MaxVolumes)},
		"items without end":            {`{"complete":true}`, `{"pools":[{}` + strings.Repeat(",{}", 4*link.MaxVolumes) + `]}`},
		"a message without end":        {`{"complete":true,"x":"` + strings.Repeat("x", link.MaxMessage) + `"}`},
	} {
		t.Run(name, func(t *testing.T) {
			c := newCluster(t)
			honest := c.node("honest", newDisk(t, "default", gib)).up()
			c.linked(honest)
			n := c.raw(t, "evil", nil, nil, newDisk(t, "default", gib))
			for i := range words {
				words[i] = strings.ReplaceAll(words[i], "OTHER", honest.pools[0].id)
			}
			n.say(t, words...)
			n.hungUp(t)
			c.linked(honest)
			c.router.table.mu.RLock()
			kept := len(c.router.table.names)
			c.router.table.mu.RUnlock()
			if kept > 2*link.MaxVolumes {
				t.Errorf("%d names are kept", kept)
			}
			if p, ok := c.router.table.pool(honest.pools[0].id); !ok || p.node != "honest" {
				t.Fatalf("%+v, %t", p, ok)
			}
			_, err := c.csi.CreateVolume(t.Context(), create("y", 1, honest))
			must(t, err)
		})
	}
}

// A node hears why its link ends.
func TestFarewell(t *testing.T) {
	c := newCluster(t)
	n := c.raw(t, "n", nil, nil)
	n.say(t, `{"pools":[{"added":["a b"]}]}`)
	s := <-n.stream
	var order wrapperspb.BytesValue
	must(t, s.RecvMsg(&order))
	if got := string(order.GetValue()); !strings.Contains(got, `\"a b\" is not the name of a volume`) {
		t.Errorf("the node hears %s", got)
	}
	n.hungUp(t)
	if got := c.router.Stats().Refused[reasonInventory]; got != 1 {
		t.Errorf("refused %d times", got)
	}
}

// A code that does not exist is UNKNOWN: there is a metric for each code.
func TestCodeThatDoesNotExist(t *testing.T) {
	c := newCluster(t)
	a := c.node("a", newDisk(t, "default", gib))
	a.handler = refuser{a}
	a.up()
	c.linked(a)
	_, err := c.csi.CreateVolume(t.Context(), create("x", 1, a))
	if status.Code(err) != codes.Unknown || !strings.Contains(err.Error(), "no such code") {
		t.Error(err)
	}
}

type refuser struct{ *fakeNode }

func (refuser) CreateVolume(context.Context, *csi.CreateVolumeRequest) (*csi.CreateVolumeResponse, error) {
	return nil, status.Error(codes.Code(99), "no such code")
}

// liar answers with what is not its own.
type liar struct {
	csi.UnimplementedControllerServer
	volume *csi.Volume
	next   string
}

func (l *liar) CreateVolume(context.Context, *csi.CreateVolumeRequest) (*csi.CreateVolumeResponse, error) {
	return &csi.CreateVolumeResponse{Volume: l.volume}, nil
}

func (l *liar) ListVolumes(context.Context, *csi.ListVolumesRequest) (*csi.ListVolumesResponse, error) {
	return &csi.ListVolumesResponse{Entries: []*csi.ListVolumesResponse_Entry{{Volume: l.volume}}, NextToken: l.next}, nil
}

// A node cannot hand out another node's volume, nor place a volume on another node,
// nor hold a list up for ever.
func TestForeignAnswers(t *testing.T) {
	c := newCluster(t)
	victim := c.node("victim", newDisk(t, "default", gib)).up()
	c.linked(victim)
	precious, err := c.csi.CreateVolume(t.Context(), create("precious", 1, victim))
	must(t, err)
	own := newDisk(t, "default", gib)
	evil := &fakeNode{name: "evil"}
	l := &liar{}
	n := c.raw(t, "evil", l, nil, own)
	n.say(t, `{"complete":true}`)
	c.linked(victim, evil)
	for name, v := range map[string]*csi.Volume{
		"another node's volume": precious.GetVolume(),
		"the same, placed here": {VolumeId: precious.GetVolume().GetVolumeId(), AccessibleTopology: evil.topology()},
		"placed elsewhere":      {VolumeId: own.id + ".x", AccessibleTopology: victim.topology()},
		"placed nowhere":        {VolumeId: own.id + ".x"},
		"no volume":             nil,
		"no ID":                 {AccessibleTopology: evil.topology()},
	} {
		l.volume = v
		_, err := c.csi.CreateVolume(t.Context(), create("bait "+name, 1, evil))
		code(t, err, codes.Unavailable, `"evil"`)
	}
	l.volume = &csi.Volume{VolumeId: own.id + ".x", AccessibleTopology: evil.topology()}
	_, err = c.csi.CreateVolume(t.Context(), create("x", 1, evil))
	must(t, err)
	l.volume, l.next = precious.GetVolume(), "again"
	_, err = c.csi.ListVolumes(t.Context(), &csi.ListVolumesRequest{})
	code(t, err, codes.Unavailable, "pages")
	l.next = ""
	list, err := c.csi.ListVolumes(t.Context(), &csi.ListVolumesRequest{})
	if err != nil || len(list.GetEntries()) != 1 {
		t.Fatalf("%v, %v", list, err)
	}
}

// A node that says more than this controller understands is understood as far as that.
func TestNewerNode(t *testing.T) {
	c := newCluster(t)
	p := newDisk(t, "default", gib)
	a := &fakeNode{name: "a"}
	l := &liar{volume: &csi.Volume{VolumeId: p.id + ".x", AccessibleTopology: a.topology()}}
	n := c.raw(t, "a", l, func(h *link.NodeHello) { h.Methods = append(h.Methods, "/csi.v9.Controller/Levitate") }, p)
	n.say(t, `{"pools":[{"id":"`+p.id+`","added":["x"],"colour":"blue","free":{"thick":1,"thin":2,"medium":3}}],"new":{"a":[1]}}`, `{"complete":true,"new":1}`)
	c.linked(a)
	if places := c.router.table.volume("x"); len(places) != 1 {
		t.Fatalf("%+v", places)
	}
	_, err := c.csi.CreateVolume(t.Context(), create("x", 1, a))
	must(t, err)
}

// Who connects and says nothing is in nobody's way but its own.
func TestGate(t *testing.T) {
	g := gate{most: 32, from: map[string]int{}}
	addr := func(host string) net.Addr { return &net.TCPAddr{IP: net.ParseIP(host), Port: 1} }
	var leave []func()
	for range 32 {
		if l, ok := g.enter(addr("10.0.0.1")); ok {
			leave = append(leave, l)
		}
	}
	if len(leave) != 16 {
		t.Fatalf("one address got %d of 32", len(leave))
	}
	for i := range 16 {
		if _, ok := g.enter(addr(fmt.Sprintf("10.0.1.%d", i))); !ok {
			t.Fatalf("others are shut out after %d", i)
		}
	}
	if _, ok := g.enter(addr("10.0.2.1")); ok {
		t.Fatal("no bound")
	}
	for _, l := range leave {
		l()
		l() // again is harmless
	}
	if _, ok := g.enter(addr("10.0.0.1")); !ok || g.total != 17 || g.from["10.0.0.1"] != 1 {
		t.Fatalf("%d, %v", g.total, g.from)
	}
}

// The same over TCP: idle connections do not keep a node out.
func TestIdleConnections(t *testing.T) {
	if testing.Short() {
		t.Skip("waits for a deadline of 10 s")
	}
	t.Parallel()
	c := newCluster(t)
	for range maxHellos / 2 {
		conn, err := net.Dial("tcp", c.address)
		must(t, err)
		defer conn.Close()
	}
	eventually(t, "crowded", func() bool {
		conn, err := net.Dial("tcp", c.address)
		must(t, err)
		defer conn.Close()
		return c.router.Stats().Refused[reasonCrowd] > 0
	})
	// The test's nodes have the address of the crowd: they get in when it has to leave.
	a := c.node("a", newDisk(t, "default", gib)).up()
	c.linked(a)
}

// The rate at which fresh tokens are looked at is bounded: each is a request to the API server.
func TestTokenFlood(t *testing.T) {
	c := newCluster(t)
	n := c.raw(t, "a", nil, nil)
	n.say(t, `{"complete":true}`)
	eventually(t, "linked", func() bool { return c.router.Stats().Linked == 1 })
	before := c.auth.asked()
	for i := range 200 {
		n.say(t, fmt.Sprintf(`{"token":"nonsense-%d"}`, i))
	}
	eventually(t, "one is looked at", func() bool { return c.auth.asked() > before })
	if n := c.auth.asked() - before; n > 2 {
		t.Errorf("%d requests", n)
	}
	if c.router.Stats().Linked != 1 {
		t.Error("a token that is no good ends a link whose token is good")
	}
}
