package main

import (
	"cmp"
	"context"
	"errors"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"go.opentelemetry.io/contrib/instrumentation/google.golang.org/grpc/otelgrpc"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc/stats"
	"k8s.io/klog/v2"
)

// tracingPlan says whether calls are traced, and how.
type tracingPlan struct {
	on       bool
	endpoint string   // a URL; "": the environment has it
	sampling *float64 // nil: the environment has it, or all calls
}

// The standard's variables that switch tracing on by themselves.
var tracingVariables = []string{"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"}

// resolveTracing checks the settings of tracing. lookup is os.LookupEnv.
func (c *config) resolveTracing(lookup func(string) (string, bool)) (tracingPlan, error) {
	t := tracingPlan{on: c.TracingEndpoint != "", endpoint: c.TracingEndpoint}
	for _, name := range tracingVariables {
		value, _ := lookup(name)
		t.on = t.on || value != ""
	}
	if disabled, _ := lookup("OTEL_SDK_DISABLED"); disabled == "true" {
		t.on = false
	}
	if t.endpoint != "" {
		u, err := url.Parse(t.endpoint)
		if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.User != nil || (u.Path != "" && u.Path != "/") {
			return t, usagef("--tracing-endpoint %q: is not http://HOST:PORT or https://HOST:PORT", t.endpoint)
		}
	}
	if c.TracingSampling != "" {
		n, err := strconv.ParseFloat(string(c.TracingSampling), 64)
		if err != nil || !(n >= 0 && n <= 1) {
			return t, usagef("--tracing-sampling %q: is not a number from 0 to 1", c.TracingSampling)
		}
		t.sampling = &n
	}
	return t, nil
}

// tracing makes spans of calls. A nil one makes none, and is in nobody's way.
type tracing struct {
	provider *sdktrace.TracerProvider
	tracer   trace.Tracer
}

// scope names who makes the spans.
const scope = "github.com/csi-loop/csi-loop"

// startTracing begins to send traces, if the plan says so; else it returns nil. An
// endpoint that does not answer is no error: spans are thrown away while there is none.
func startTracing(ctx context.Context, p plan) (*tracing, error) {
	if !p.tracing.on {
		return nil, nil //nolint:nilnil // a nil one is of use
	}
	var options []otlptracegrpc.Option
	if p.tracing.endpoint != "" {
		options = append(options, otlptracegrpc.WithEndpointURL(p.tracing.endpoint))
	}
	exporter, err := otlptracegrpc.New(ctx, options...)
	if err != nil {
		return nil, usagef("--tracing-endpoint: %w", err)
	}
	about := []attribute.KeyValue{attribute.String("service.name", "csi-loop"), attribute.String("service.version", p.driver.Version), attribute.String("csi_loop.mode", p.mode)}
	if p.driver.NodeID != "" {
		about = append(about, attribute.String("k8s.node.name", p.driver.NodeID))
	}
	described, err := resource.New(ctx, resource.WithTelemetrySDK(), resource.WithAttributes(about...), resource.WithFromEnv())
	if err != nil {
		return nil, errors.Join(usagef("OTEL_RESOURCE_ATTRIBUTES: %w", err), exporter.Shutdown(ctx))
	}
	settings := []sdktrace.TracerProviderOption{sdktrace.WithBatcher(exporter), sdktrace.WithResource(described)}
	if p.tracing.sampling != nil {
		settings = append(settings, sdktrace.WithSampler(sdktrace.ParentBased(sdktrace.TraceIDRatioBased(*p.tracing.sampling))))
	}
	tellOfFailures(klog.FromContext(ctx))
	t := &tracing{provider: sdktrace.NewTracerProvider(settings...)}
	t.tracer = t.provider.Tracer(scope)
	klog.FromContext(ctx).Info("Tracing calls", "endpoint", redacted(cmp.Or(p.tracing.endpoint, os.Getenv(tracingVariables[0]), os.Getenv(tracingVariables[1]))))
	return t, nil
}

// redacted is an endpoint as it may be logged: a password that the environment has in it
// is left out, and so is what cannot be read, whatever it has.
func redacted(endpoint string) string {
	u, err := url.Parse(endpoint)
	if err != nil {
		return ""
	}
	return u.Redacted()
}

// tellEvery is how often the log is told that traces cannot be sent.
const tellEvery = time.Minute

func tellOfFailures(logger klog.Logger) {
	var last atomic.Int64
	otel.SetErrorHandler(otel.ErrorHandlerFunc(func(err error) {
		now := time.Now().Unix()
		if before := last.Load(); now-before >= int64(tellEvery/time.Second) && last.CompareAndSwap(before, now) {
			logger.Error(err, "Traces cannot be sent")
		}
	}))
}

// stop sends what is left, for some seconds at most.
func (t *tracing) stop(ctx context.Context) {
	if t == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	if err := t.provider.Shutdown(ctx); err != nil {
		klog.FromContext(ctx).Error(err, "Not all traces were sent")
	}
}

// into has the plan's calls traced.
func (t *tracing) into(p *plan) {
	if t == nil {
		return
	}
	options := []otelgrpc.Option{
		otelgrpc.WithTracerProvider(t.provider), otelgrpc.WithPropagators(propagation.TraceContext{}),
		otelgrpc.WithFilter(func(i *stats.RPCTagInfo) bool { return tracedMethods(i.FullMethodName) }),
	}
	p.driver.Stats, p.linkStats = aboutCalls{otelgrpc.NewServerHandler(options...)}, aboutCalls{otelgrpc.NewClientHandler(options...)}
	p.driver.Step = t.step
}

// tracedMethods are CSI calls, but for the liveness probe, which comes every second;
// not what nodes and controller say to each other all the time.
func tracedMethods(full string) bool {
	switch {
	case full == csi.Identity_Probe_FullMethodName:
		return false
	case len(full) < 5:
		return false
	}
	return full[:5] == "/csi."
}

// step makes a span of a part of a call. Work in the background belongs to no call, and
// has none.
func (t *tracing) step(ctx context.Context, name string) (inside context.Context, end func(error)) {
	if !trace.SpanContextFromContext(ctx).IsValid() {
		return ctx, func(error) {}
	}
	ctx, span := t.tracer.Start(ctx, name)
	return ctx, func(err error) {
		if err != nil {
			span.SetStatus(codes.Error, strings.ToValidUTF8(err.Error(), ""))
		}
		span.End()
	}
}

// aboutCalls adds to the spans of calls what they are about: IDs and names, and nothing
// else of a request, which may have secrets.
type aboutCalls struct{ stats.Handler }

// HandleRPC sees each message of a call.
func (h aboutCalls) HandleRPC(ctx context.Context, s stats.RPCStats) {
	switch p := s.(type) {
	case *stats.InPayload:
		describe(trace.SpanFromContext(ctx), p.Payload)
	case *stats.OutPayload:
		describe(trace.SpanFromContext(ctx), p.Payload)
	}
	h.Handler.HandleRPC(ctx, s)
}

func describe(span trace.Span, message any) {
	if !span.IsRecording() {
		return
	}
	add := func(key, value string) {
		if value != "" {
			// A cut may be within a character, which OTLP does not take.
			span.SetAttributes(attribute.String(key, strings.ToValidUTF8(value[:min(len(value), 256)], "")))
		}
	}
	if m, ok := message.(interface{ GetVolumeId() string }); ok {
		add("csi.volume.id", m.GetVolumeId())
	}
	if m, ok := message.(interface{ GetSourceVolumeId() string }); ok {
		add("csi.volume.id", m.GetSourceVolumeId())
	}
	if m, ok := message.(interface{ GetSnapshotId() string }); ok {
		add("csi.snapshot.id", m.GetSnapshotId())
	}
	if m, ok := message.(interface{ GetName() string }); ok {
		add("csi.name", m.GetName())
	}
	switch m := message.(type) {
	case *csi.CreateVolumeResponse:
		add("csi.volume.id", m.GetVolume().GetVolumeId())
	case *csi.CreateSnapshotResponse:
		add("csi.snapshot.id", m.GetSnapshot().GetSnapshotId())
	}
}
