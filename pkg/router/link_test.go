package router

import (
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/csi-loop/csi-loop/pkg/router/link"
)

// relay is a TCP proxy that can cut, and swallow without a word.
type relay struct {
	l      net.Listener
	target string
	wg     sync.WaitGroup

	mu    sync.Mutex
	conns []net.Conn
	black atomic.Bool
}

func newRelay(t *testing.T, target string) *relay {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	r := &relay{l: l, target: target}
	r.wg.Go(func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", target)
			if err != nil {
				in.Close()
				continue
			}
			r.mu.Lock()
			r.conns = append(r.conns, in, out)
			r.mu.Unlock()
			r.wg.Go(func() { r.copy(in, out) })
			r.wg.Go(func() { r.copy(out, in) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		r.cut()
		r.wg.Wait()
	})
	return r
}

func (r *relay) address() string { return r.l.Addr().String() }

func (r *relay) copy(from, to net.Conn) {
	b := make([]byte, 32<<10)
	for {
		n, err := from.Read(b)
		if r.black.Load() {
			if err != nil {
				return // the other side must not notice
			}
			continue
		}
		if err == nil {
			_, err = to.Write(b[:n])
		}
		if err != nil {
			from.Close()
			to.Close()
			return
		}
	}
}

// cut ends all connections.
func (r *relay) cut() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, c := range r.conns {
		c.Close()
	}
	r.conns = nil
}

// A node that creates, and dies before it answers, has the one volume there is.
func TestLostAnswer(t *testing.T) {
	c := newCluster(t)
	a, b := c.node("a", newDisk(t, "default", 10*gib)).up(), c.node("b", newDisk(t, "default", gib)).up()
	c.linked(a, b)
	made := make(chan struct{})
	a.hook = func(ctx context.Context, step string) error {
		if step == "after" {
			close(made)
			<-ctx.Done()
		}
		return ctx.Err()
	}
	answer := make(chan error)
	go func() {
		_, err := c.csi.CreateVolume(t.Context(), create("x", 1, nil))
		answer <- err
	}()
	<-made
	a.stop()
	code(t, <-answer, codes.Unavailable)
	c.linked(b)
	// Nobody knows whether it was made: it is not made again.
	_, err := c.csi.CreateVolume(t.Context(), create("x", 1, nil))
	code(t, err, codes.Unavailable, `"a"`)
	a.hook = nil
	a.up()
	c.linked(a, b)
	_, err = c.csi.CreateVolume(t.Context(), create("x", 1, nil))
	must(t, err)
	if b.pools[0].has("x") || !a.pools[0].has("x") {
		t.Fatal("a second volume")
	}
}

// The same when the connection is cut in the middle, and the node goes on. The
// request reaches the node again before it has finished.
func TestCutInCreate(t *testing.T) {
	c := newCluster(t)
	r := newRelay(t, c.address)
	c.router.cfg.Self = r.address() // so that the nodes keep to the relay
	a, b := c.node("a", newDisk(t, "default", 10*gib)), c.node("b", newDisk(t, "default", gib))
	a.address, b.address = r.address(), r.address()
	begun := make(chan struct{}, 2)
	finish, finished := holdBack(t)
	a.hook = func(_ context.Context, step string) error {
		if step == "before" {
			begun <- struct{}{}
			<-finished // deaf to its context, as mkfs is
		}
		return nil
	}
	a.up()
	b.up()
	c.linked(a, b)
	answer := make(chan error)
	go func() {
		_, err := c.csi.CreateVolume(t.Context(), create("x", 1, nil))
		answer <- err
	}()
	<-begun
	// Every replica knows that it is being made.
	eventually(t, "the name is known", func() bool {
		c.router.table.mu.RLock()
		defer c.router.table.mu.RUnlock()
		return len(c.router.table.names["x"]) == 1
	})
	r.cut()
	code(t, <-answer, codes.Unavailable)
	// The node does not wait for its call to end before it dials again.
	eventually(t, "the call meets the one that goes on", func() bool {
		_, err := c.csi.CreateVolume(t.Context(), create("x", 1, nil))
		if status.Code(err) == codes.Unavailable {
			return false // the first link still counts, or none does
		}
		code(t, err, codes.Aborted)
		return true
	})
	c.linked(a, b)
	finish()
	eventually(t, "the call is answered", func() bool {
		_, err := c.csi.CreateVolume(t.Context(), create("x", 1, nil))
		if err != nil {
			code(t, err, codes.Aborted)
		}
		return err == nil
	})
	if b.pools[0].has("x") || !a.pools[0].has("x") {
		t.Fatal("a second volume")
	}
}

// The same when the controller is restarted in the middle.
func TestControllerRestartInCreate(t *testing.T) {
	c := newCluster(t)
	a, b := c.node("a", newDisk(t, "default", 10*gib)), c.node("b", newDisk(t, "default", gib)).up()
	begun := make(chan struct{}, 1)
	finish, finished := holdBack(t)
	a.hook = func(_ context.Context, step string) error {
		if step == "before" {
			begun <- struct{}{}
			<-finished // deaf to its context
		}
		return nil
	}
	a.up()
	c.linked(a, b)
	answer := make(chan error)
	go func() {
		_, err := c.csi.CreateVolume(t.Context(), create("x", 1, nil))
		answer <- err
	}()
	<-begun
	stopped := make(chan struct{})
	go func(stop func()) {
		defer close(stopped)
		stop() // waits for the call
	}(c.stop)
	if err := <-answer; err == nil {
		t.Fatal("answered")
	}
	eventually(t, "the address is free", func() bool {
		l, err := net.Listen("tcp", c.address)
		if err == nil {
			l.Close()
		}
		return err == nil
	})
	c.start()
	c.linked(a, b)
	_, err := c.csi.CreateVolume(t.Context(), create("x", 1, nil))
	code(t, err, codes.Aborted)
	finish()
	<-stopped
	eventually(t, "it is made", func() bool {
		_, err := c.csi.CreateVolume(t.Context(), create("x", 1, nil))
		return err == nil
	})
	if b.pools[0].has("x") || !a.pools[0].has("x") {
		t.Fatal("a second volume")
	}
}

// What a node was asked for and did not answer is forgotten once it must have told.
func TestLostCallsAreForgotten(t *testing.T) {
	c := newCluster(t)
	a := c.node("a", newDisk(t, "default", gib)).up()
	c.linked(a)
	a.hook = func(context.Context, string) error { return status.Error(codes.Aborted, "later") }
	_, err := c.csi.CreateVolume(t.Context(), create("x", 1, nil))
	code(t, err, codes.Aborted)
	lost := func() int {
		c.router.forget()
		c.router.table.mu.RLock()
		defer c.router.table.mu.RUnlock()
		return len(c.router.table.lost)
	}
	if n := lost(); n != 1 {
		t.Fatalf("%d calls are open", n)
	}
	c.clock.advance(lostAge + time.Second)
	if n := lost(); n != 0 {
		t.Fatalf("%d calls are open", n)
	}
	a.hook = func(context.Context, string) error { return status.Error(codes.Aborted, "later") }
	_, err = c.csi.CreateVolume(t.Context(), create("x", 1, nil))
	code(t, err, codes.Aborted)
	a.stop()
	c.linked()
	c.clock.advance(lostAge + time.Second)
	if n := lost(); n != 1 {
		t.Fatalf("%d calls are open on a node that is away", n)
	}
	c.roster.set("a", false)
	if n := lost(); n != 0 {
		t.Fatalf("%d calls are open on a node that is gone", n)
	}
}

// A controller that starts anew learns everything from its nodes, and makes no
// volume a second time before it has.
func TestControllerRestart(t *testing.T) {
	c := newCluster(t)
	a, b := c.node("a", newDisk(t, "default", 10*gib)).up(), c.node("b", newDisk(t, "default", 20*gib)).up()
	c.linked(a, b)
	resp, err := c.csi.CreateVolume(t.Context(), create("x", 1, a))
	must(t, err)
	c.halt()
	a.stop()
	c.start()
	c.linked(b)
	_, err = c.csi.CreateVolume(t.Context(), create("x", 1, nil))
	code(t, err, codes.Unavailable, "a")
	_, err = c.csi.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: resp.GetVolume().GetVolumeId()})
	code(t, err, codes.Unavailable)
	a.up()
	c.linked(a, b)
	again, err := c.csi.CreateVolume(t.Context(), create("x", 1, nil))
	must(t, err)
	if again.GetVolume().GetVolumeId() != resp.GetVolume().GetVolumeId() || b.pools[0].has("x") {
		t.Fatal("a second volume")
	}
}

// A connection that swallows everything is found out by both ends.
func TestHalfOpen(t *testing.T) {
	if testing.Short() {
		t.Skip("takes 15 s")
	}
	t.Parallel()
	c := newCluster(t)
	r := newRelay(t, c.address)
	c.router.cfg.Self = r.address()
	a := c.node("a", newDisk(t, "default", gib))
	a.address = r.address()
	a.up()
	c.linked(a)
	start := time.Now()
	r.black.Store(true)
	eventually(t, "the node finds out", func() bool { up, _ := a.agent.Links(); return up == 0 })
	c.linked()
	if took := time.Since(start); took > 15*time.Second {
		t.Errorf("found after %s", took)
	}
	r.cut() // else the relay would swallow what comes now
	r.black.Store(false)
	c.linked(a)
}

// A node that finds the link dead first, and dials again, does not wait for the
// controller to find it too.
func TestSecondLinkWhileFirstIsDead(t *testing.T) {
	t.Parallel()
	c := newCluster(t)
	r := newRelay(t, c.address)
	c.router.cfg.Self = r.address()
	a := c.node("a", newDisk(t, "default", gib))
	a.address = r.address()
	a.up()
	c.linked(a)
	first, _ := c.router.table.node("a")
	r.black.Store(true)
	a.address = c.address // past the relay
	go a.stop()           // the relay swallows its farewell
	again := c.node("a", a.pools...)
	again.token = a.token
	again.address = c.address
	again.up()
	eventually(t, "the new link counts", func() bool {
		p, _ := c.router.table.node("a")
		return p.session != nil && p.session != first.session
	})
}

// Another pod takes the place of the first; the first does not take it back, and the
// same pod does not replace itself.
func TestSecondClaimant(t *testing.T) {
	c := newCluster(t)
	a := c.node("a", newDisk(t, "default", gib)).up()
	c.linked(a)
	first, _ := c.router.table.node("a")

	same := c.node("a", newDisk(t, "default", gib))
	same.token = a.token
	same.up()
	eventually(t, "the same pod is refused", func() bool { return c.router.Stats().Refused[reasonSecond] > 0 })
	if p, _ := c.router.table.node("a"); p.session != first.session {
		t.Fatal("the same pod replaced itself")
	}
	same.stop()

	other := c.node("a", newDisk(t, "default", 2*gib))
	other.token = c.auth.issue("a", "pod-2", time.Hour)
	other.up()
	eventually(t, "the other pod's link counts", func() bool {
		p, _ := c.router.table.node("a")
		return p.session != nil && p.session.id.Pod == "pod-2"
	})
	before := c.router.Stats().Refused[reasonSecond]
	eventually(t, "the first is refused", func() bool { return c.router.Stats().Refused[reasonSecond] > before })
	if p, _ := c.router.table.node("a"); p.session == nil || p.session.id.Pod != "pod-2" {
		t.Fatal("the first took it back")
	}
	other.stop()
	c.linked(a) // nobody else is there now
}

// A copy of a pool is refused as long as the first is known, also while that is away for
// a moment, and gets its turn when the first is forgotten.
func TestDuplicatePool(t *testing.T) {
	c := newCluster(t)
	p := newDisk(t, "default", 10*gib)
	p.volumes["x"] = 1
	clone := &fakePool{id: p.id, name: p.name, key: p.key, volumes: map[string]int64{"x": 1, "y": 1}, size: 20 * gib}
	a, b := c.node("a", p).up(), c.node("b", clone, newDisk(t, "fast", gib))
	c.linked(a)
	b.up()
	c.linked(a, b)
	if n := c.router.Stats().DuplicatePools; n != 1 {
		t.Fatalf("%d duplicate pools", n)
	}
	ctx := t.Context()
	_, err := c.csi.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: p.id + ".x"})
	must(t, err)
	if p.has("x") || !clone.has("x") {
		t.Fatal("the copy was changed")
	}
	list, err := c.csi.ListVolumes(ctx, &csi.ListVolumesRequest{})
	if err != nil || len(list.GetEntries()) != 0 {
		t.Fatalf("the copy is listed: %v, %v", list, err)
	}
	got, err := c.csi.GetCapacity(ctx, &csi.GetCapacityRequest{AccessibleTopology: b.topology()[0]})
	if err != nil || got.GetAvailableCapacity() != 0 {
		t.Fatalf("the copy has room: %v, %v", got, err)
	}
	fast := create("z", 1, b)
	fast.Parameters = map[string]string{"pool": "fast"}
	_, err = c.csi.CreateVolume(ctx, fast) // the node's other pool is served
	must(t, err)
	del := func(volume string) codes.Code {
		_, err := c.csi.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: p.id + "." + volume})
		return status.Code(err)
	}
	for _, pool := range []*fakePool{p, clone} {
		pool.mu.Lock()
		pool.volumes["w"] = 1
		pool.mu.Unlock()
	}
	a.stop()
	c.linked(b)
	c.router.forget()
	if code := del("y"); code != codes.Unavailable {
		t.Fatalf("while the first is away, the copy answers %s", code)
	}
	b.stop()
	c.linked()
	b.up()
	c.linked(b)
	if code := del("y"); code != codes.Unavailable {
		t.Fatalf("while the first is away, the copy that came back answers %s", code)
	}
	a.up()
	c.linked(a, b)
	if code := del("w"); code != codes.OK || p.has("w") || !clone.has("w") {
		t.Fatalf("%s; the first has it: %t, the copy: %t", code, p.has("w"), clone.has("w"))
	}
	b.stop()
	c.linked(a)
	if n := c.router.Stats().DuplicatePools; n != 0 {
		t.Fatalf("%d duplicate pools though the copy is away", n)
	}
	// The first comes and goes while the copy is away.
	a.stop()
	c.linked()
	a.up()
	c.linked(a)
	a.stop()
	c.linked()
	b.up()
	c.linked(b)
	if code := del("y"); code != codes.Unavailable {
		t.Fatalf("the copy that came back to nobody answers %s", code)
	}
	a.up()
	c.linked(a, b)
	a.stop()
	c.roster.set("a", false)
	c.linked(b)
	c.router.forget()
	if code := del("y"); code != codes.OK || clone.has("y") {
		t.Fatalf("not deleted: %s", code)
	}
}

// A disk that was moved takes the place that it had, in front of a copy.
func TestMovedDiskBesideACopy(t *testing.T) {
	c := newCluster(t)
	p := newDisk(t, "default", gib)
	clone := &fakePool{id: p.id, name: p.name, key: p.key, volumes: map[string]int64{"y": 1}, size: gib}
	a := c.node("a", p).up()
	c.linked(a)
	b := c.node("b", clone).up()
	c.linked(a, b)
	a.stop()
	c.linked(b)
	to := c.node("c", p).up()
	c.linked(b, to)
	if at, _ := c.router.table.pool(p.id); at.node != "c" || len(c.router.table.volume("y")) != 0 {
		t.Errorf("it is at %+v", at)
	}
}

// A disk that moves while its node is away takes its volumes along.
func TestMovedDisk(t *testing.T) {
	c := newCluster(t)
	p := newDisk(t, "default", 10*gib)
	p.volumes["x"] = 1
	a := c.node("a", p).up()
	c.linked(a)
	a.stop()
	c.linked()
	b := c.node("b", p).up()
	c.linked(b)
	if n := c.router.Stats().DuplicatePools; n != 0 {
		t.Fatalf("%d duplicate pools", n)
	}
	_, err := c.csi.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: p.id + ".x"})
	must(t, err)
	if b.count("DeleteVolume") != 1 {
		t.Fatal("not on the new node")
	}
}

func TestTokenExpiresOnLiveLink(t *testing.T) {
	c := newCluster(t)
	a := c.node("a", newDisk(t, "default", gib))
	old, fresh := c.auth.issue("a", "pod-a", time.Minute), c.auth.issue("a", "pod-a", 3*time.Minute)
	a.token = old
	a.up()
	c.linked(a)
	first, _ := c.router.table.node("a")
	asked := c.auth.asked()
	a.setToken(fresh)
	eventually(t, "the fresh token is looked at", func() bool { return c.auth.asked() > asked })
	// Tokens expire as the test says. The fresh one keeps the very link: by the next look,
	// renewPause later, the link knows that the first has expired.
	c.clock.advance(2 * time.Minute)
	var kept, looked atomic.Bool
	c.auth.mu.Lock()
	c.auth.looks = func(string) {
		if !looked.Swap(true) {
			kept.Store(first.session.ended.Err() == nil)
			c.clock.advance(2 * time.Minute)
		}
	}
	c.auth.mu.Unlock()
	a.setToken(old)
	// No other one comes: it ends.
	eventually(t, "the link ends", func() bool {
		p, _ := c.router.table.node("a")
		return looked.Load() && p.session == nil
	})
	if !kept.Load() {
		t.Fatal("the link ended with the first token")
	}
	eventually(t, "it is refused", func() bool { return c.router.Stats().Refused[reasonToken] > 0 })
	a.setToken(c.auth.issue("a", "pod-a", time.Hour))
	c.linked(a)
	// A token of somebody else ends it at once.
	a.setToken(c.auth.issue("a", "pod-b", time.Hour))
	eventually(t, "a link of the other pod", func() bool {
		p, _ := c.router.table.node("a")
		return p.session != nil && p.session.id.Pod == "pod-b"
	})
}

// While tokens cannot be looked at, links live and none is made.
func TestReviewDown(t *testing.T) {
	c := newCluster(t)
	a, b := c.node("a", newDisk(t, "default", gib)).up(), c.node("b", newDisk(t, "default", gib))
	c.linked(a)
	c.auth.mu.Lock()
	c.auth.down = true
	c.auth.mu.Unlock()
	b.up()
	eventually(t, "b is refused", func() bool { return c.router.Stats().Refused[reasonReview] > 0 })
	c.linked(a)
	c.auth.mu.Lock()
	c.auth.down = false
	c.auth.mu.Unlock()
	c.linked(a, b)
}

// A review of the fresh token that never ends does not keep the link beyond its time.
func TestReviewHangs(t *testing.T) {
	c := newCluster(t)
	a := c.node("a", newDisk(t, "default", gib))
	a.token = c.auth.issue("a", "pod-a", 5*time.Second) // a busy machine links in that
	a.up()
	c.linked(a)
	c.auth.mu.Lock()
	c.auth.hangs = true
	c.auth.mu.Unlock()
	asked := c.auth.asked()
	a.setToken(c.auth.issue("a", "pod-a", time.Hour))
	eventually(t, "the fresh token is looked at", func() bool { return c.auth.asked() > asked })
	c.linked()
}

// The node says nothing to a controller that cannot prove who it is.
func TestBadCertificate(t *testing.T) {
	c := newCluster(t)
	other := newAuthority(t)
	stranger := c.node("a", newDisk(t, "default", gib))
	stranger.ca = func() (*x509.CertPool, error) { return other.pool(), nil }
	c.auth.mu.Lock()
	c.auth.tokens = map[string]Identity{}
	c.auth.mu.Unlock()
	stranger.up()
	eventually(t, "the handshake fails", func() bool { return c.router.Stats().Refused[reasonHello] > 1 })
	if c.router.Stats().Refused[reasonToken] > 0 {
		t.Fatal("the token was sent")
	}
	c.cert.Store(c.ca.issue(t, "somebody-else"))
	stranger.stop()
	before := c.router.Stats().Refused[reasonHello]
	named := c.node("b", newDisk(t, "default", gib)).up()
	eventually(t, "the handshake fails", func() bool { return c.router.Stats().Refused[reasonHello] > before+1 })
	c.linked()
	named.stop()
	// A second CA in the bundle: the certificate may come from either.
	c.cert.Store(other.issue(t, link.DefaultName))
	rotating := c.node("c", newDisk(t, "default", gib))
	rotating.ca = func() (*x509.CertPool, error) {
		p := c.ca.pool()
		p.AddCert(other.cert)
		return p, nil
	}
	rotating.up()
	c.linked(rotating)
}

// Proofs that fail: another key, another pool's ID.
func TestBadProof(t *testing.T) {
	for name, spoil := range map[string]func(t *testing.T, p *link.Pool){
		"signature of another key": func(t *testing.T, p *link.Pool) {
			_, other, err := ed25519.GenerateKey(nil)
			must(t, err)
			p.Sign = func(b []byte) []byte { return ed25519.Sign(other, b) }
		},
		"ID of another pool": func(_ *testing.T, p *link.Pool) { p.ID = strings.Repeat("a", 20) },
		"no signature":       func(_ *testing.T, p *link.Pool) { p.Sign = func([]byte) []byte { return nil } },
		"no key":             func(_ *testing.T, p *link.Pool) { p.Key = nil },
	} {
		t.Run(name, func(t *testing.T) {
			c := newCluster(t)
			a := c.node("a", newDisk(t, "default", gib))
			a.proofs = func(p *link.Pool) { spoil(t, p) }
			a.up()
			eventually(t, "it is refused", func() bool { return c.router.Stats().Refused[reasonIdentity] > 0 })
			c.linked()
		})
	}
}

// A token of another node's pod does not open a link for this one.
func TestForeignToken(t *testing.T) {
	c := newCluster(t)
	a := c.node("a", newDisk(t, "default", gib))
	a.token = c.auth.issue("b", "pod-b", time.Hour)
	a.up()
	eventually(t, "it is refused", func() bool { return c.router.Stats().Refused[reasonIdentity] > 0 })
	c.linked()
}

// dialRaw makes a TLS connection to the controller and reads its hello.
func (c *cluster) dialRaw(t *testing.T) (*tls.Conn, link.ControllerHello) {
	t.Helper()
	conn, err := tls.Dial("tcp", c.address, &tls.Config{RootCAs: c.ca.pool(), ServerName: link.DefaultName, NextProtos: []string{link.ALPN}})
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	var hello link.ControllerHello
	must(t, link.ReadFrame(conn, &hello))
	return conn, hello
}

// A hello that was overheard is worth nothing on another connection: its signatures
// are bound to the first one.
func TestReplayedSignature(t *testing.T) {
	c := newCluster(t)
	p := newDisk(t, "default", gib)
	token := c.auth.issue("a", "pod-a", time.Hour)
	c.node("a", p)
	first, hello := c.dialRaw(t)
	binding, err := link.Binding(first.ConnectionState())
	must(t, err)
	genuine := link.NodeHello{
		Protocol: link.ProtocolMax, Driver: driver, Version: "v", NodeID: "a", Token: token,
		Pools: []link.PoolProof{link.Prove(link.Pool{
			ID: p.id, Name: p.name, Key: p.key.Public().(ed25519.PublicKey), Sign: func(b []byte) []byte { return ed25519.Sign(p.key, b) },
		}, hello.Nonce, binding, "a")},
	}
	must(t, genuine.Check(driver, hello.Nonce, binding))
	second, _ := c.dialRaw(t)
	must(t, link.WriteFrame(second, genuine))
	var verdict link.Verdict
	must(t, link.ReadFrame(second, &verdict))
	if verdict.Welcome || !strings.Contains(verdict.Message, "signature") {
		t.Fatalf("%+v", verdict)
	}
	must(t, link.WriteFrame(first, genuine))
	must(t, link.ReadFrame(first, &verdict))
	if !verdict.Welcome {
		t.Fatalf("%+v", verdict)
	}
}

// What is no hello is dropped without much ado.
func TestGarbageHellos(t *testing.T) {
	c := newCluster(t)
	token := c.auth.issue("a", "pod-a", time.Hour)
	good := link.NodeHello{Protocol: link.ProtocolMax, Driver: driver, NodeID: "a", Token: token}
	with := func(change func(*link.NodeHello)) func(io.Writer) error {
		return func(w io.Writer) error {
			h := good
			change(&h)
			return link.WriteFrame(w, h)
		}
	}
	frame := func(n uint32, body string) func(io.Writer) error {
		return func(w io.Writer) error {
			_, err := w.Write(append(binary.BigEndian.AppendUint32(nil, n), body...))
			return err
		}
	}
	for name, tt := range map[string]struct {
		send func(io.Writer) error
		want string // of the verdict; "" when there is none
	}{
		"too large":      {frame(link.MaxHello+1, ""), ""},
		"huge":           {frame(1<<32-1, ""), ""},
		"empty":          {frame(0, ""), ""},
		"not JSON":       {frame(4, "\x00\x01\x02\x03"), ""},
		"HTTP":           {func(w io.Writer) error { _, err := io.WriteString(w, "GET / HTTP/1.1\r\n\r\n"); return err }, ""},
		"other version":  {with(func(h *link.NodeHello) { h.Protocol = 99 }), "version"},
		"other driver":   {with(func(h *link.NodeHello) { h.Driver = "other.io" }), "other.io"},
		"no node":        {with(func(h *link.NodeHello) { h.NodeID = "" }), "ID"},
		"other node":     {with(func(h *link.NodeHello) { h.NodeID = "b" }), `"b"`},
		"no token":       {with(func(h *link.NodeHello) { h.Token = "" }), "token"},
		"unknown token":  {with(func(h *link.NodeHello) { h.Token = "x" }), "token"},
		"too many pools": {with(func(h *link.NodeHello) { h.Pools = make([]link.PoolProof, 65) }), "pools"},
		"a pool twice":   {with(func(h *link.NodeHello) { h.Pools = twice(t, c, good) }), ""},
		"cut in the head": {func(w io.Writer) error {
			_, err := w.Write([]byte{0})
			return errors.Join(err, w.(*tls.Conn).CloseWrite())
		}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			conn, _ := c.dialRaw(t)
			must(t, tt.send(conn))
			var verdict link.Verdict
			err := link.ReadFrame(conn, &verdict)
			if verdict.Welcome || (err == nil) != (tt.want != "" || name == "a pool twice") || !strings.Contains(verdict.Message, tt.want) {
				t.Errorf("%+v, %v", verdict, err)
			}
		})
	}
	// Without TLS.
	conn, err := net.Dial("tcp", c.address)
	must(t, err)
	defer conn.Close()
	_, err = conn.Write([]byte("hello\n"))
	must(t, err)
	_, _ = io.Copy(io.Discard, conn) // ends: the controller closes it
	c.linked()
}

func twice(t *testing.T, _ *cluster, _ link.NodeHello) []link.PoolProof {
	t.Helper()
	p := newDisk(t, "default", gib)
	proof := link.PoolProof{ID: p.id, Name: p.name, Key: p.key.Public().(ed25519.PublicKey)}
	return []link.PoolProof{proof, proof}
}

// A node that is welcome and then says nothing does not take part.
func TestSilentNode(t *testing.T) {
	c := newCluster(t)
	conn, _ := c.dialRaw(t)
	must(t, link.WriteFrame(conn, link.NodeHello{
		Protocol: link.ProtocolMax, Driver: driver, NodeID: "a", Token: c.auth.issue("a", "pod-a", time.Hour),
	}))
	var verdict link.Verdict
	must(t, link.ReadFrame(conn, &verdict))
	_, err := c.csi.CreateVolume(t.Context(), create("x", 1, c.node("a")))
	code(t, err, codes.Unavailable, `"a"`)
}

// A node finds all replicas over the first, and links to each; one that is new is
// found over the others.
func TestReplicas(t *testing.T) {
	first := newCluster(t)
	second := first.replica()
	first.router.SetReplicas([]string{first.address, second.address})
	second.router.SetReplicas([]string{first.address, second.address})
	a := first.node("a", newDisk(t, "default", gib)).up()
	first.linked(a)
	second.linked(a)
	third := first.replica()
	for _, c := range []*cluster{first, second, third} {
		c.router.SetReplicas([]string{first.address, second.address, third.address})
	}
	third.linked(a)
	if up, wanted := a.agent.Links(); up != 3 || wanted != 3 {
		t.Errorf("%d of %d links", up, wanted)
	}
	// What one replica does, the others learn.
	_, err := first.csi.CreateVolume(t.Context(), create("x", 1, a))
	must(t, err)
	eventually(t, "the third knows", func() bool { return len(third.router.table.volume("x")) == 1 })
	second.halt()
	for _, c := range []*cluster{first, third} {
		c.router.SetReplicas([]string{first.address, third.address})
	}
	eventually(t, "two are left", func() bool { up, wanted := a.agent.Links(); return up == 2 && wanted == 2 })
	// The one whose address the node was told goes: the others suffice.
	first.halt()
	third.linked(a)
}

// A node that stops lets calls finish, and answers them.
func TestOrderlyStop(t *testing.T) {
	c := newCluster(t)
	a := c.node("a", newDisk(t, "default", gib))
	begun := make(chan struct{})
	finish, finished := holdBack(t)
	a.hook = func(_ context.Context, step string) error {
		if step == "before" {
			close(begun)
			<-finished
		}
		return nil
	}
	a.up()
	c.linked(a)
	answer := make(chan error)
	go func() {
		_, err := c.csi.CreateVolume(t.Context(), create("x", 1, a))
		answer <- err
	}()
	<-begun
	stopped := make(chan struct{})
	go func() {
		a.stop()
		close(stopped)
	}()
	c.linked()
	finish()
	if err := <-answer; err != nil && status.Code(err) != codes.Unavailable {
		t.Error(err)
	}
	<-stopped
	if !a.pools[0].has("x") {
		t.Error("the call was broken off")
	}
}
