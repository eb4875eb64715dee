package main

import (
	"context"
	"encoding/hex"
	"net"
	"strings"
	"sync"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/google/go-cmp/cmp"
	collectorpb "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/encoding/prototext"

	"github.com/csi-loop/csi-loop/internal/roottest"
	"github.com/csi-loop/csi-loop/pkg/driver"
)

// spanCollector keeps the spans that are sent to it over OTLP.
type spanCollector struct {
	collectorpb.UnimplementedTraceServiceServer

	address string
	mu      sync.Mutex
	all     []*tracepb.ResourceSpans // guarded by mu
}

func newSpanCollector(t *testing.T) *spanCollector {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c := &spanCollector{address: l.Addr().String()}
	srv := grpc.NewServer()
	collectorpb.RegisterTraceServiceServer(srv, c)
	var wg sync.WaitGroup
	wg.Go(func() { _ = srv.Serve(l) })
	t.Cleanup(func() {
		srv.Stop()
		wg.Wait()
	})
	return c
}

func (c *spanCollector) Export(_ context.Context, req *collectorpb.ExportTraceServiceRequest) (*collectorpb.ExportTraceServiceResponse, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.all = append(c.all, req.GetResourceSpans()...)
	return &collectorpb.ExportTraceServiceResponse{}, nil
}

// text is all that came.
func (c *spanCollector) text() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var b strings.Builder
	for _, r := range c.all {
		b.WriteString(prototext.Format(r) + "\n")
	}
	return b.String()
}

// tree shows the spans of a trace below the one with the ID, by indentation, with what
// csi-loop says about them.
func (c *spanCollector) tree(trace, parent string) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var spans []*tracepb.Span
	for _, r := range c.all {
		for _, s := range r.GetScopeSpans() {
			for _, x := range s.GetSpans() {
				if hex.EncodeToString(x.GetTraceId()) == trace {
					spans = append(spans, x)
				}
			}
		}
	}
	var b strings.Builder
	var below func(parent, indent string)
	below = func(parent, indent string) {
		for _, x := range spans {
			if hex.EncodeToString(x.GetParentSpanId()) != parent {
				continue
			}
			kind := map[tracepb.Span_SpanKind]string{tracepb.Span_SPAN_KIND_SERVER: "server", tracepb.Span_SPAN_KIND_CLIENT: "client"}[x.GetKind()]
			words := []string{strings.TrimSpace(kind + " " + x.GetName())}
			for _, a := range x.GetAttributes() {
				if strings.HasPrefix(a.GetKey(), "csi.") || strings.Contains(a.GetKey(), "status_code") {
					words = append(words, a.GetKey()+"="+a.GetValue().GetStringValue())
				}
			}
			b.WriteString(indent + strings.Join(words, " ") + "\n")
			below(hex.EncodeToString(x.GetSpanId()), indent+"  ")
		}
	}
	below(parent, "")
	return b.String()
}

// traced is a plan whose calls are traced to c.
func traced(t *testing.T, c *spanCollector, p plan) (*tracing, plan) {
	t.Helper()
	p.tracing = tracingPlan{on: true, endpoint: "http://" + c.address}
	tr, err := startTracing(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	tr.into(&p)
	return tr, p
}

// One trace has both halves of a call: what the controller was asked, what it asked the
// node, and what the node did. No secret is in it.
func TestTraceOverTheLink(t *testing.T) {
	roottest.Require(t)
	c := newSpanCollector(t)
	tr, p := traced(t, c, plan{mode: modeAll, driver: driver.Config{Version: "v1", NodeID: "n1"}})
	h := newHalves(t, p)
	const trace, parent, secret = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331", "hunter2"
	ctx := metadata.AppendToOutgoingContext(t.Context(), "traceparent", "00-"+trace+"-"+parent+"-01")
	client := csi.NewControllerClient(dial(t, h.socket))
	request := &csi.CreateVolumeRequest{
		Name: "pvc-1", CapacityRange: &csi.CapacityRange{RequiredBytes: 16 << 20}, Secrets: map[string]string{"key": secret},
		VolumeCapabilities: []*csi.VolumeCapability{{
			AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{FsType: "ext4"}},
			AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
		}},
	}
	var id string
	eventually(t, "the node is linked", func() error {
		made, err := client.CreateVolume(t.Context(), request) // in a trace of its own
		id = made.GetVolume().GetVolumeId()
		return err
	})
	if _, err := client.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: id}); err != nil {
		t.Fatal(err)
	}
	if _, err := client.CreateVolume(ctx, request); err != nil {
		t.Fatal(err)
	}
	wrong := &csi.CreateVolumeRequest{Name: "pvc-2", VolumeCapabilities: request.GetVolumeCapabilities(), Parameters: map[string]string{"alocation": "thin"}}
	if _, err := client.CreateVolume(ctx, wrong); err == nil {
		t.Error("a misspelt parameter was taken")
	}
	tr.stop(t.Context()) // sends what is left
	const call = "csi.v1.Controller/CreateVolume csi.name=pvc-1"
	about := " csi.volume.id=" + id
	want := "server " + call + about + " rpc.response.status_code=OK\n" +
		"  client " + call + about + " rpc.response.status_code=OK\n" +
		"    server " + call + about + " rpc.response.status_code=OK\n" +
		"      create image\n" +
		"        format image\n" +
		"server csi.v1.Controller/CreateVolume csi.name=pvc-2 rpc.response.status_code=INVALID_ARGUMENT\n" +
		"  client csi.v1.Controller/CreateVolume csi.name=pvc-2 rpc.response.status_code=INVALID_ARGUMENT\n" +
		"    server csi.v1.Controller/CreateVolume csi.name=pvc-2 rpc.response.status_code=INVALID_ARGUMENT\n"
	if diff := cmp.Diff(want, c.tree(trace, parent)); diff != "" {
		t.Errorf("%s\n%s", diff, c.text())
	}
	text := c.text()
	if strings.Contains(text, secret) {
		t.Error("a secret was sent")
	}
	for _, never := range []string{"csi.v1.Identity/Probe", "csi_loop.link"} {
		if strings.Contains(text, never) {
			t.Errorf("%s is traced", never)
		}
	}
	for _, resource := range []string{`"service.name"`, `"csi-loop"`, `"k8s.node.name"`, `"n1"`} {
		if !strings.Contains(text, resource) {
			t.Errorf("%s is not in it", resource)
		}
	}
}
