package main

import (
	"context"
	"encoding/hex"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/google/go-cmp/cmp"
	collectorpb "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
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
			if kind == "" && x.GetStatus().GetCode() == tracepb.Status_STATUS_CODE_ERROR {
				words = append(words, "failed")
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
	// A server's span ends a moment after its client has the answer; what ends after the
	// stop is not sent.
	eventually(t, "all spans are sent", func() error {
		if err := tr.provider.ForceFlush(t.Context()); err != nil {
			return err
		}
		if diff := cmp.Diff(want, c.tree(trace, parent)); diff != "" {
			return fmt.Errorf("%s\n%s", diff, c.text())
		}
		return nil
	})
	tr.stop(t.Context())
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

// The steps of a node's calls are spans below them: those of the loop device, the mounts,
// the freeze and the copy. A step that fails says so, and why.
func TestTraceOfTheSteps(t *testing.T) {
	roottest.Require(t)
	c := newSpanCollector(t)
	p := newPlace(t)
	pool := roottest.Pool(t, "ext4", 1<<30) // no reflinks: what is copied is copied
	s := spawn(t, nil, replace(p.args("--tracing-endpoint=http://"+c.address), "--pool", "default="+pool)...)
	s.waitFor("Serving")
	conn := dial(t, p.socket)
	controller, node := csi.NewControllerClient(conn), csi.NewNodeClient(conn)
	capability := capabilityOf("ext4")
	staging, target := filepath.Join(p.dir, "staging"), filepath.Join(p.dir, "target")
	if err := os.Mkdir(staging, 0o750); err != nil {
		t.Fatal(err)
	}
	const parent = "b7ad6b7169203331"
	var want []traceOfSteps
	// call makes a call in a trace of its own, and says what that shall have. While its answer
	// is ABORTED it is made again, as by a CO: the traces have it together.
	call := func(name string, code codes.Code, steps string, f func(context.Context) error) {
		t.Helper()
		n, tries := len(want)+1, 0
		eventually(t, name, func() error {
			trace := fmt.Sprintf("%016x%016x", n, tries)
			tries++
			err := f(metadata.AppendToOutgoingContext(t.Context(), "traceparent", "00-"+trace+"-"+parent+"-01"))
			if c := status.Code(err); c != code && c != codes.Aborted {
				t.Fatalf("%s: %v", name, err)
			} else if c == codes.Aborted {
				return err
			}
			return nil
		})
		want = append(want, traceOfSteps{tries, name + "\n" + steps})
	}
	var id, snapshot, restored string
	call("Controller/CreateVolume", codes.OK, "  create image\n    format image\n", func(ctx context.Context) error {
		made, err := controller.CreateVolume(ctx, &csi.CreateVolumeRequest{Name: "pvc-1", CapacityRange: &csi.CapacityRange{RequiredBytes: 16 << 20}, VolumeCapabilities: []*csi.VolumeCapability{capability}})
		id = made.GetVolume().GetVolumeId()
		return err
	})
	call("Node/NodeStageVolume", codes.OK, "  attach\n  mount\n", func(ctx context.Context) error {
		_, err := node.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{VolumeId: id, StagingTargetPath: staging, VolumeCapability: capability})
		return err
	})
	call("Node/NodePublishVolume", codes.OK, "  bind mount\n", func(ctx context.Context) error {
		_, err := node.NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{VolumeId: id, StagingTargetPath: staging, TargetPath: target, VolumeCapability: capability})
		return err
	})
	call("Controller/CreateSnapshot", codes.OK, "  copy data\n  freeze\n", func(ctx context.Context) error {
		made, err := controller.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: "s", SourceVolumeId: id, Parameters: map[string]string{"copyInUse": "true", "freezeTimeout": "1m"}})
		snapshot = made.GetSnapshot().GetSnapshotId()
		return err
	})
	call("Controller/CreateVolume", codes.OK, "  create image\n    copy data\n", func(ctx context.Context) error {
		made, err := controller.CreateVolume(ctx, &csi.CreateVolumeRequest{
			Name: "pvc-2", CapacityRange: &csi.CapacityRange{RequiredBytes: 16 << 20}, VolumeCapabilities: []*csi.VolumeCapability{capability}, VolumeContentSource: source(snapshot, ""),
		})
		restored = made.GetVolume().GetVolumeId()
		return err
	})
	call("Node/NodeUnpublishVolume", codes.OK, "  unmount\n", func(ctx context.Context) error {
		_, err := node.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: id, TargetPath: target})
		return err
	})
	call("Node/NodeUnstageVolume", codes.OK, "  unmount\n  wait for detach\n", func(ctx context.Context) error {
		_, err := node.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: id, StagingTargetPath: staging})
		return err
	})
	call("Node/NodeStageVolume", codes.InvalidArgument, "  attach\n  mount failed\n  wait for detach\n", func(ctx context.Context) error {
		refused := capabilityOf("ext4")
		refused.GetMount().MountFlags = []string{"inode_readahead_blks=3"} // no power of two
		_, err := node.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{VolumeId: id, StagingTargetPath: staging, VolumeCapability: refused})
		return err
	})
	for _, id := range []string{id, restored} {
		if _, err := controller.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: id}); err != nil {
			t.Error(err)
		}
	}
	if _, err := controller.DeleteSnapshot(t.Context(), &csi.DeleteSnapshotRequest{SnapshotId: snapshot}); err != nil {
		t.Error(err)
	}
	s.stop() // sends what is left
	for i, w := range want {
		var method string
		var steps []string
		for try := range w.tries {
			// Of the call's own span only the name is looked at here.
			first, below, _ := strings.Cut(c.tree(fmt.Sprintf("%016x%016x", i+1, try), parent), "\n")
			_, method, _ = strings.Cut(first, "csi.v1.")
			method, _, _ = strings.Cut(method, " ")
			for step := range strings.Lines(below) {
				if try < w.tries-1 {
					step = strings.Replace(step, " failed", "", 1)
				}
				if w.tries == 1 || !slices.Contains(steps, step) {
					steps = append(steps, step)
				}
			}
		}
		if diff := cmp.Diff(w.want, method+"\n"+strings.Join(steps, "")); diff != "" {
			t.Error(diff)
		}
	}
}

// traceOfSteps is a call that was made so often, and what its traces shall have.
type traceOfSteps struct {
	tries int
	want  string
}
