package router

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/csi-loop/csi-loop/pkg/report"
	"github.com/csi-loop/csi-loop/pkg/router/link"
)

// A node that proves a pool over and over keeps the controller busy with signatures,
// until it has proven as many as a node can have.
func TestProofsWithoutEnd(t *testing.T) {
	c := newCluster(t)
	var proof []byte
	n := c.raw(t, "evil", nil, func(h *link.NodeHello) {
		b, err := json.Marshal(h.Pools[0])
		must(t, err)
		proof = b
	}, newDisk(t, "default", gib))
	n.say(t, `{"complete":true}`)
	eventually(t, "linked", func() bool { return c.router.Stats().Linked == 1 })
	for range link.MaxPools + 1 {
		n.say(t, fmt.Sprintf(`{"proofs":[%s]}`, proof))
	}
	n.hungUp(t)
}

// page is a node's answer to who asks for a report, whatever it is.
type page string

func (p page) Invoke(_ context.Context, _ string, _, reply any, _ ...grpc.CallOption) error {
	m, ok := reply.(*wrapperspb.BytesValue)
	if !ok {
		return fmt.Errorf("%T", reply)
	}
	proto.Merge(m, wrapperspb.Bytes([]byte(p)))
	return nil
}

func (p page) NewStream(context.Context, *grpc.StreamDesc, string, ...grpc.CallOption) (grpc.ClientStream, error) {
	return nil, context.Canceled
}

// Of a page, what it has is bounded, and not only its bytes: an empty volume has two.
func TestPagesWithoutEnd(t *testing.T) {
	for name, entries := range map[string]int{"volumes": report.PageSize + 1, "snapshots": report.PageSize + 1, "pools": 1 << 20, "copies": 1 << 20} {
		_, _, err := link.FetchReport(t.Context(), page(`{"`+name+`":[{}`+strings.Repeat(",{}", entries-1)+`]}`), "")
		if err == nil {
			t.Errorf("%d %s were taken", entries, name)
		}
	}
	if _, _, err := link.FetchReport(t.Context(), page(`{"volumes":[{}`+strings.Repeat(",{}", report.PageSize-1)+`]}`), ""); err != nil {
		t.Error(err)
	}
}

// Pages that are each as large as allowed end before they fill the memory.
func TestReportWithoutEnd(t *testing.T) {
	c := newCluster(t)
	a, b := c.node("a", newDisk(t, "default", gib)), c.node("b", newDisk(t, "default", gib))
	var m report.Machine
	// What these are takes long to send under the race detector.
	c.router.reports.most = 2 * link.MaxAnswer
	c.router.reports.patience = time.Minute
	text := strings.Repeat("x", link.MaxAnswer/report.PageSize*3/4)
	for i := range c.router.reports.most / len(text) {
		m.Volumes = append(m.Volumes, report.Volume{ID: fmt.Sprintf("%s.%06d", a.pools[0].id, i), Name: text})
	}
	a.says.Store(&m)
	c.linked(a.up(), b.up())
	got, err := c.router.Report(t.Context())
	must(t, err)
	if !strings.Contains(got.Nodes[0].Error, "more than") {
		t.Errorf("%d volumes, error %q", len(got.Nodes[0].Volumes), got.Nodes[0].Error)
	}
	if got.Nodes[1].Error != "" || len(got.Nodes[1].Volumes) == 0 {
		t.Errorf("the other node: %d volumes, error %q", len(got.Nodes[1].Volumes), got.Nodes[1].Error)
	}
}

// What a peer without a token says of itself does not fill the log.
func TestRefusalsAreShort(t *testing.T) {
	c := newCluster(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer l.Close()
	for name, hello := range map[string]link.NodeHello{
		"no token": {},
		"a ticket": {Ticket: []byte("none")},
		"a token":  {Protocol: link.ProtocolMax, Driver: driver, Token: c.auth.issue("a", "pod-a", time.Hour)},
	} {
		hello.NodeID = strings.Repeat("x", 60_000)
		refused := make(chan error, 1)
		go func() {
			conn, err := l.Accept()
			if err == nil {
				defer conn.Close()
				_, _, err = c.router.greet(t.Context(), tls.Server(conn, &tls.Config{Certificates: []tls.Certificate{*c.cert.Load()}, NextProtos: []string{link.ALPN}}))
			}
			refused <- err
		}()
		conn, err := tls.Dial("tcp", l.Addr().String(), &tls.Config{RootCAs: c.ca.pool(), ServerName: link.DefaultName, NextProtos: []string{link.ALPN}})
		must(t, err)
		defer conn.Close()
		var greeting link.ControllerHello
		must(t, link.ReadFrame(conn, &greeting))
		must(t, link.WriteFrame(conn, hello))
		if err := <-refused; err == nil || len(err.Error()) > 2000 {
			t.Errorf("%s: %d bytes: %.100v", name, len(err.Error()), err)
		}
	}
}
