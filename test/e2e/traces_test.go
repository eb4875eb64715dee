package e2e

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/url"
	"strings"
	"sync"

	collectorpb "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	"google.golang.org/grpc"
)

// collector takes the traces of csi-loop, over OTLP.
type collector struct {
	collectorpb.UnimplementedTraceServiceServer

	address string // as pods reach it
	mu      sync.Mutex
	spans   []span // guarded by mu
}

// span is what matters of one here.
type span struct {
	trace, id, parent, kind, name string
	volume                        string // csi.name
	node                          string // of who sent it
}

// collects starts one in the test's process. ok is false where pods may not reach it, since
// the API server is reached over the loopback interface.
func (e *env) collects() (c *collector, ok bool) {
	e.Helper()
	host := must[*url.URL](e)(url.Parse(e.config.Host)).Host
	toAPI := must[net.Conn](e)(new(net.Dialer).DialContext(e.Context(), "tcp", host))
	ours := toAPI.LocalAddr().(*net.TCPAddr).IP
	_ = toAPI.Close()
	l := must[net.Listener](e)(new(net.ListenConfig).Listen(e.Context(), "tcp", net.JoinHostPort(ours.String(), "0")))
	c = &collector{address: l.Addr().String()}
	server := grpc.NewServer()
	collectorpb.RegisterTraceServiceServer(server, c)
	var wg sync.WaitGroup
	wg.Go(func() { _ = server.Serve(l) })
	e.Cleanup(func() {
		server.Stop()
		wg.Wait()
	})
	return c, !ours.IsLoopback()
}

// Export is what csi-loop calls.
func (c *collector) Export(_ context.Context, r *collectorpb.ExportTraceServiceRequest) (*collectorpb.ExportTraceServiceResponse, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, resource := range r.GetResourceSpans() {
		node := attribute(resource.GetResource().GetAttributes(), "k8s.node.name")
		for _, scope := range resource.GetScopeSpans() {
			for _, s := range scope.GetSpans() {
				c.spans = append(c.spans, span{
					trace: hex.EncodeToString(s.GetTraceId()), id: hex.EncodeToString(s.GetSpanId()), parent: hex.EncodeToString(s.GetParentSpanId()),
					kind: strings.TrimPrefix(s.GetKind().String(), "SPAN_KIND_"), name: s.GetName(),
					volume: attribute(s.GetAttributes(), "csi.name"), node: node,
				})
			}
		}
	}
	return &collectorpb.ExportTraceServiceResponse{}, nil
}

func attribute(all []*commonpb.KeyValue, key string) string {
	for _, a := range all {
		if a.GetKey() == key {
			return a.GetValue().GetStringValue()
		}
	}
	return ""
}

// path is that from a span to the first of its trace, which comes first.
func (c *collector) path(s span) []span {
	all := []span{s}
	for i := 0; i < len(c.spans); i++ {
		if p := c.spans[i]; p.trace == s.trace && p.id == all[0].parent {
			all, i = append([]span{p}, all...), -1
		}
	}
	return all
}

// saw waits for a trace of the volume's creation that goes from the controller over the
// link to the node, and to what the node did.
func (e *env) saw(c *collector, volume, node string) {
	e.Helper()
	const (
		call   = "csi.v1.Controller/CreateVolume"
		server = "SERVER"
	)
	want := []string{server + " " + call, "CLIENT " + call, server + " " + call, "INTERNAL create image"}
	e.eventually("a trace of the creation of "+volume, patience, func(context.Context) error {
		c.mu.Lock()
		defer c.mu.Unlock()
		seen := []error{fmt.Errorf("there are %d spans", len(c.spans))}
		for _, s := range c.spans {
			if s.name != "create image" {
				continue
			}
			path := c.path(s)
			var names []string
			for _, p := range path {
				names = append(names, p.kind+" "+p.name)
			}
			if strings.Join(names, ", ") == strings.Join(want, ", ") && path[0].volume == volume && path[0].node != node && path[2].node == node {
				return nil
			}
			seen = append(seen, fmt.Errorf("%+v", path))
		}
		return errors.Join(seen...)
	})
}
