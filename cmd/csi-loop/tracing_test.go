package main

import (
	"context"
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestResolveTracing(t *testing.T) {
	half := 0.5
	for name, tc := range map[string]struct {
		endpoint, sampling string
		environment        map[string]string
		want               tracingPlan
		wrong              bool
	}{
		"off by default":          {},
		"a collector":             {endpoint: "http://collector:4317", want: tracingPlan{on: true, endpoint: "http://collector:4317"}},
		"with TLS, and a part":    {endpoint: "https://collector:4317/", sampling: "0.5", want: tracingPlan{on: true, endpoint: "https://collector:4317/", sampling: &half}},
		"the standard's variable": {environment: map[string]string{"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x:4317"}, want: tracingPlan{on: true}},
		"that for traces":         {environment: map[string]string{"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://x:4317"}, want: tracingPlan{on: true}},
		"an empty variable":       {environment: map[string]string{"OTEL_EXPORTER_OTLP_ENDPOINT": ""}},
		"switched off":            {endpoint: "http://x:4317", environment: map[string]string{"OTEL_SDK_DISABLED": "true"}, want: tracingPlan{endpoint: "http://x:4317"}},
		"no scheme":               {endpoint: "collector:4317", wrong: true},
		"another scheme":          {endpoint: "unix:///x", wrong: true},
		"a password in it":        {endpoint: "http://me:secret@collector:4317", wrong: true},
		"a path":                  {endpoint: "http://collector:4318/v1/traces", wrong: true},
		"more than all":           {endpoint: "http://x:4317", sampling: "1.5", wrong: true},
		"no number":               {endpoint: "http://x:4317", sampling: "NaN", wrong: true},
	} {
		c := config{TracingEndpoint: tc.endpoint, TracingSampling: scalar(tc.sampling)}
		got, err := c.resolveTracing(func(name string) (string, bool) { v, ok := tc.environment[name]; return v, ok })
		if tc.wrong {
			if !errors.As(err, new(*usageError)) {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		if diff := cmp.Diff(tc.want, got, cmp.AllowUnexported(tracingPlan{})); err != nil || diff != "" {
			t.Errorf("%s: %v %s", name, err, diff)
		}
	}
}

// Switched off it costs nothing: no handler sees a call, and no step is told of.
func TestTracingOff(t *testing.T) {
	p := plan{}
	tr, err := startTracing(t.Context(), p)
	if err != nil || tr != nil {
		t.Fatal(tr, err)
	}
	tr.into(&p)
	tr.stop(t.Context())
	if p.driver.Stats != nil || p.linkStats != nil || p.driver.Step != nil {
		t.Error("somebody looks on")
	}
}

// Work in the background belongs to no call, and an endpoint that nobody answers on
// stops nothing.
func TestTracingWithoutCollector(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	tr, err := startTracing(ctx, plan{tracing: tracingPlan{on: true, endpoint: "http://127.0.0.1:1"}})
	if err != nil {
		t.Fatal(err)
	}
	inside, end := tr.step(ctx, "trim")
	if inside != ctx {
		t.Error("a span without a call")
	}
	end(errors.New("it failed"))
	cancel()
	tr.stop(ctx)
}

func TestEndpointIsLoggedWithoutItsPassword(t *testing.T) {
	for endpoint, want := range map[string]string{
		"http://collector:4317":              "http://collector:4317",
		"http://somebody:secret@collector:1": "http://somebody:xxxxx@collector:1",
		"http://somebody:secret@%zz":         "",
	} {
		if got := redacted(endpoint); got != want {
			t.Errorf("%q: %q, want %q", endpoint, got, want)
		}
	}
}
