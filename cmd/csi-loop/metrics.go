package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"k8s.io/klog/v2"

	"github.com/csi-loop/csi-loop/pkg/report"
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
	srv := &http.Server{Handler: m.handler(), ReadHeaderTimeout: 5 * time.Second, WriteTimeout: 30 * time.Second}
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
	mux.HandleFunc("GET /report", m.showReport)
	mux.Handle("GET /metrics", promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{}))
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
