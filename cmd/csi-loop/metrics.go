package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"k8s.io/klog/v2"

	"github.com/csi-loop/csi-loop/pkg/image"
	"github.com/csi-loop/csi-loop/pkg/loop"
	"github.com/csi-loop/csi-loop/pkg/router"
)

// metrics is what --http-endpoint shows. What is not known yet is not shown.
type metrics struct {
	registry *prometheus.Registry
	calls    *prometheus.HistogramVec

	mu    sync.Mutex
	check func() error // guarded by mu; nil until ready was called
}

func newMetrics(b build) *metrics {
	m := &metrics{
		registry: prometheus.NewRegistry(),
		calls: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "csi_loop_csi_calls_seconds", Help: "CSI calls that were answered, by method and gRPC code.",
			Buckets: []float64{.001, .005, .01, .05, .1, .5, 1, 5, 10, 60},
		}, []string{"method", "code"}),
	}
	info := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "csi_loop_build_info", Help: "Always 1; the labels say what was built.",
		ConstLabels: prometheus.Labels{"version": b.Version, "commit": b.Commit, "go": b.Go, "csi": b.CSI},
	})
	info.Set(1)
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
	mux.Handle("GET /metrics", promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{}))
	return mux
}

// collector makes metrics when they are asked for.
type collector func(ctx context.Context, send func(name, help string, kind prometheus.ValueType, value float64, labels ...string))

// Describe sends nothing: the metrics are checked when they are collected.
func (c collector) Describe(chan<- *prometheus.Desc) {}

// Collect calls the function. Labels come in pairs of name and value.
func (c collector) Collect(ch chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	c(ctx, func(name, help string, kind prometheus.ValueType, value float64, labels ...string) {
		var names, values []string
		for i := 0; i+1 < len(labels); i += 2 {
			names, values = append(names, labels[i]), append(values, labels[i+1])
		}
		ch <- prometheus.MustNewConstMetric(prometheus.NewDesc(name, help, names, nil), kind, value, values...)
	})
}

// node shows pools and loop devices.
func (m *metrics) node(images *image.Store, loops *loop.Manager) {
	m.registry.MustRegister(collector(func(ctx context.Context, send func(string, string, prometheus.ValueType, float64, ...string)) {
		gauge := func(name, help string, value int64, labels ...string) {
			send("csi_loop_"+name, help, prometheus.GaugeValue, float64(value), labels...)
		}
		for _, p := range images.Pools() {
			u := p.Usage()
			gauge("pool_size_bytes", "Size of the file system that the pool is on; 0 when it does not answer.", u.Size, "pool", p.Name())
			gauge("pool_used_bytes", "What is used of it, by csi-loop and others.", u.Size-u.Free, "pool", p.Name())
			gauge("pool_reserved_bytes", "What is kept free for others, by configuration.", u.Reserved, "pool", p.Name())
			gauge("pool_available_bytes", "The largest thick volume that could be made.", p.Capacity(image.Thick), "pool", p.Name())
			gauge("pool_volumes", "Volumes in the pool.", int64(u.Volumes), "pool", p.Name())
			gauge("pool_damaged_volumes", "Volumes that are refused because their record cannot be read.", int64(len(p.Damaged())), "pool", p.Name())
		}
		bound, err := loops.FindAll(ctx)
		if err != nil {
			return
		}
		gauge("loop_devices", "Loop devices of the machine, others' included; unbound ones include those that are running down.", int64(len(bound)), "state", "bound")
		gauge("loop_devices", "Loop devices of the machine, others' included; unbound ones include those that are running down.", int64(max(0, registered()-len(bound))), "state", "unbound")
		gauge("loop_devices_limit", "Loop devices that csi-loop attaches at most.", int64(loops.Limit()))
	}))
}

// registered counts the machine's loop devices.
func registered() int {
	entries, err := os.ReadDir("/sys/block")
	if err != nil {
		return 0
	}
	n := 0
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), "loop") {
			n++
		}
	}
	return n
}

// links shows the node's links.
func (m *metrics) links(count func() (up, wanted int)) {
	m.registry.MustRegister(collector(func(_ context.Context, send func(string, string, prometheus.ValueType, float64, ...string)) {
		up, wanted := count()
		send("csi_loop_links", "Links of this node to replicas of the controller.", prometheus.GaugeValue, float64(up), "state", "up")
		send("csi_loop_links", "Links of this node to replicas of the controller.", prometheus.GaugeValue, float64(max(0, wanted-up)), "state", "down")
	}))
}

// router shows the controller's links.
func (m *metrics) router(r *router.Router) {
	m.registry.MustRegister(collector(func(_ context.Context, send func(string, string, prometheus.ValueType, float64, ...string)) {
		s := r.Stats()
		const nodes = "Nodes that have linked since this controller started."
		send("csi_loop_link_nodes", nodes, prometheus.GaugeValue, float64(s.Linked), "state", "linked")
		send("csi_loop_link_nodes", nodes, prometheus.GaugeValue, float64(s.Away), "state", "away")
		send("csi_loop_link_duplicate_pools", "Pools that are refused because another node has one with the same ID.", prometheus.GaugeValue, float64(s.DuplicatePools))
		for reason, n := range s.Refused {
			send("csi_loop_link_refused_total", "Links that were refused.", prometheus.CounterValue, float64(n), "reason", reason)
		}
	}))
}
