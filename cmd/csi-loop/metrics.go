package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"k8s.io/klog/v2"

	"github.com/csi-loop/csi-loop/pkg/report"
)

const (
	// httpConnections is how many connections may be open at a time. The kubelet and
	// whoever scrapes need a few, and each for a moment.
	httpConnections = 256
	// httpAtOnce is how many requests for the metrics, and for the report, are answered
	// at a time. Each is made in memory before it is sent.
	httpAtOnce = 3

	httpReadHeader = 5 * time.Second
	httpWrite      = 30 * time.Second
	// httpRead bounds bodies, which nobody reads. It is longer than an answer may take: the
	// request would be taken for gone.
	httpRead = httpReadHeader + httpWrite + 5*time.Second
)

// metrics is what --http-endpoint shows. What is not known yet is not shown.
type metrics struct {
	registry *prometheus.Registry
	calls    *prometheus.HistogramVec

	mu    sync.Mutex
	check func() error // guarded by mu; nil until ready was called
	// report is what /report shows; nil where there is none. Guarded by mu.
	report func(context.Context) (report.Cluster, error)
}

func newMetrics(b build) *metrics {
	m := &metrics{
		registry: prometheus.NewRegistry(),
		calls: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: callSeconds.name, Help: callSeconds.help,
			Buckets: []float64{.001, .005, .01, .05, .1, .5, 1, 5, 10, 60},
		}, callSeconds.labels),
	}
	info := prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: buildInfo.name, Help: buildInfo.help}, buildInfo.labels)
	info.WithLabelValues(b.Version, b.Commit, b.Go, b.CSI).Set(1)
	m.registry.MustRegister(m.calls, info, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// observe counts a CSI call.
func (m *metrics) observe(method, code string, took time.Duration) {
	m.calls.WithLabelValues(method, code).Observe(took.Seconds())
}

// ready gives what /readyz asks.
func (m *metrics) ready(check func() error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.check = check
}

func (m *metrics) readiness() error {
	m.mu.Lock()
	check := m.check
	m.mu.Unlock()
	if check == nil {
		return errors.New("starting")
	}
	return check()
}

// serve answers on address until ctx ends; "" is no address.
func (m *metrics) serve(ctx context.Context, address string) (stop func(), err error) {
	if address == "" {
		return func() {}, nil
	}
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", address)
	if err != nil {
		return nil, fmt.Errorf("--http-endpoint: %w", err)
	}
	srv := newHTTPServer(m.handler(), httpConnections)
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			klog.FromContext(ctx).Error(err, "The HTTP endpoint is gone")
		}
	})
	return func() {
		_ = srv.Close()
		wg.Wait()
	}, nil
}

// newHTTPServer makes the server of a port that every pod of the cluster may reach: what
// it keeps for them is bounded. No connection stays for another request, since who asks
// does so seconds apart. Nor does one wait for another to end, or whoever has most would
// keep the kubelet from its probes, and have it end the pod: the oldest is closed.
func newHTTPServer(h http.Handler, most int) *http.Server {
	srv := &http.Server{
		Handler: h, ReadHeaderTimeout: httpReadHeader, ReadTimeout: httpRead, WriteTimeout: httpWrite,
		ConnState: (&crowd{most: most}).changed,
	}
	srv.SetKeepAlivesEnabled(false)
	return srv
}

// crowd closes the oldest connection when there are too many.
type crowd struct {
	most int

	mu   sync.Mutex
	open []net.Conn // guarded by mu; the oldest first
}

// changed is told by the server of a new connection before it takes the next.
func (c *crowd) changed(conn net.Conn, state http.ConnState) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch state {
	case http.StateNew:
		c.open = append(c.open, conn)
		if len(c.open) > c.most {
			_ = c.open[0].Close() // and the server tells of it, by and by
			c.open = slices.Delete(c.open, 0, 1)
		}
	case http.StateClosed, http.StateHijacked:
		if i := slices.Index(c.open, conn); i >= 0 {
			c.open = slices.Delete(c.open, i, i+1)
		}
	case http.StateActive, http.StateIdle:
	}
}

// atOnce answers 503 while n requests are being answered.
func atOnce(n int, h http.HandlerFunc) http.HandlerFunc {
	busy := make(chan struct{}, n)
	return func(w http.ResponseWriter, r *http.Request) {
		select {
		case busy <- struct{}{}:
			defer func() { <-busy }()
			h(w, r)
		default:
			http.Error(w, fmt.Sprintf("%d others ask for it now: try again", n), http.StatusServiceUnavailable)
		}
	}
}

func (m *metrics) handler() http.Handler {
	mux := http.NewServeMux()
	answer := func(err error) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			if err != nil {
				http.Error(w, err.Error(), http.StatusServiceUnavailable)
				return
			}
			fmt.Fprintln(w, "ok")
		}
	}
	mux.Handle("GET /healthz", answer(nil))
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) { answer(m.readiness())(w, r) })
	mux.HandleFunc("GET /report", atOnce(httpAtOnce, m.showReport))
	mux.Handle("GET /metrics", promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{MaxRequestsInFlight: httpAtOnce}))
	return mux
}

// reports gives what /report shows.
func (m *metrics) reports(look func(context.Context) (report.Cluster, error)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.report = look
}

// showReport answers with what is on all nodes, which kubectl csi-loop reads through the
// API server. Whoever reaches the port may read it, as the metrics.
func (m *metrics) showReport(w http.ResponseWriter, r *http.Request) {
	m.mu.Lock()
	look := m.report
	m.mu.Unlock()
	if look == nil {
		http.Error(w, "only csi-loop in --mode=controller has a report", http.StatusNotFound)
		return
	}
	c, err := look(r.Context())
	if err != nil {
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	if err := json.NewEncoder(w).Encode(c); err != nil && r.Context().Err() == nil {
		klog.FromContext(r.Context()).Error(err, "Cannot answer with a report")
	}
}
