package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"k8s.io/klog/v2"

	"github.com/csi-loop/csi-loop/pkg/driver"
	"github.com/csi-loop/csi-loop/pkg/image"
	"github.com/csi-loop/csi-loop/pkg/loop"
	"github.com/csi-loop/csi-loop/pkg/report"
	"github.com/csi-loop/csi-loop/pkg/router"
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
		const absent = "1 while a pool is configured and cannot be used, else 0."
		for _, p := range images.Absent() {
			gauge("pool_absent", absent, 1, "pool", p.Name)
		}
		for _, p := range images.Pools() {
			u := p.Usage()
			gauge("pool_absent", absent, 0, "pool", p.Name())
			gauge("pool_size_bytes", "Size of the file system that the pool is on; 0 when it does not answer.", u.Size, "pool", p.Name())
			gauge("pool_used_bytes", "What is used of it, by csi-loop and others.", u.Size-u.Free, "pool", p.Name())
			gauge("pool_reserved_bytes", "What is kept free for others, by configuration.", u.Reserved, "pool", p.Name())
			gauge("pool_available_bytes", "The largest thick volume that could be made.", p.Capacity(image.Thick), "pool", p.Name())
			gauge("pool_volumes", "Volumes in the pool.", int64(u.Volumes), "pool", p.Name())
			templates := p.Templates()
			gauge("pool_templates", "Templates in the pool.", int64(len(templates)), "pool", p.Name())
			for _, t := range templates {
				gauge("template_size_bytes", "Size of a template.", t.Size, "pool", p.Name(), "template", t.Name)
			}
			fragments(p, gauge)
			c := p.Copies()
			gauge("pool_copies", "Copies of data that are under way in the pool.", int64(c.Running), "pool", p.Name())
			gauge("pool_copies_remaining_bytes", "What they have still to copy, all together.", c.Remaining, "pool", p.Name())
			send("csi_loop_pool_copied_bytes_total", "What was copied in the pool.", prometheus.CounterValue, float64(c.Copied), "pool", p.Name())
			gauge("pool_damaged_volumes", "Volumes that are refused because their record cannot be read.", int64(len(p.Damaged())), "pool", p.Name())
		}
		gauge("loop_devices_limit", "Loop devices that csi-loop attaches at most.", int64(loops.Limit()))
		gauge("loop_devices_attached", "Loop devices that csi-loop attached.", int64(loops.Attached()))
		states, err := loops.States(ctx)
		if err != nil {
			return // the rest is worth showing
		}
		for state, n := range states {
			gauge("loop_devices", "Loop devices of the machine, others' included. Those of others are unbound or bound.", int64(n), "state", strings.ToLower(state.String()))
		}
	}))
}

// mostFragmented is how many images of a pool are shown one by one.
const mostFragmented = 10

// fragments shows in how many extents a pool's images are, and those with most of them
// one by one.
func fragments(p *image.Pool, gauge func(name, help string, value int64, labels ...string)) {
	kinds := map[bool]string{false: "volume", true: "snapshot"}
	sum := map[bool]int64{false: 0, true: 0}
	for i, f := range p.Fragments() {
		sum[f.Snapshot] += f.Extents
		if i < mostFragmented {
			gauge("image_extents", "Extents of the images with most of them in each pool.", f.Extents, "pool", p.Name(), "kind", kinds[f.Snapshot], "id", f.ID)
		}
	}
	for snapshot, n := range sum {
		gauge("pool_extents", "Extents of all images in the pool.", n, "pool", p.Name(), "kind", kinds[snapshot])
	}
}

// machine reports what is on this node; *driver.Driver does.
type machine interface {
	Report(ctx context.Context) (report.Machine, error)
}

// volumes shows the volumes of this node, at most that many: those with the most
// blocks, since they are who fills a pool. No program is run for it.
func (m *metrics) volumes(d machine, most int) {
	if most == 0 {
		return
	}
	m.registry.MustRegister(collector(func(ctx context.Context, send func(string, string, prometheus.ValueType, float64, ...string)) {
		r, err := d.Report(ctx)
		if err != nil {
			return // the rest is worth showing
		}
		all := slices.Clone(r.Volumes)
		slices.SortStableFunc(all, func(a, b report.Volume) int { return cmp.Compare(b.Allocated, a.Allocated) })
		shown := all[:min(most, len(all))]
		send("csi_loop_volumes_not_shown", "Volumes that have no metrics of their own, because there are more than --volume-metrics.", prometheus.GaugeValue, float64(len(all)-len(shown)))
		for _, v := range shown {
			volumeMetrics(v, send)
		}
	}))
}

func volumeMetrics(v report.Volume, send func(string, string, prometheus.ValueType, float64, ...string)) {
	gauge := func(name, help string, value float64, labels ...string) {
		send("csi_loop_volume_"+name, help, prometheus.GaugeValue, value, append([]string{"pool", v.Pool, "volume", v.ID, "name", v.Name}, labels...)...)
	}
	counter := func(name, help string, value float64) {
		send("csi_loop_volume_"+name, help, prometheus.CounterValue, value, "pool", v.Pool, "volume", v.ID, "name", v.Name)
	}
	gauge("size_bytes", "Size of the volume.", float64(v.Size))
	gauge("allocated_bytes", "Blocks of its image, shared ones too.", float64(v.Allocated))
	gauge("staged", "1 while the volume is attached and mounted, else 0.", map[bool]float64{true: 1}[v.Device != ""])
	if v.Used != nil {
		gauge("used_bytes", "What is used of its filesystem, while it is mounted.", float64(*v.Used))
	}
	for _, p := range v.Problems {
		gauge("problem", "1 for each thing that is wrong with the volume.", 1, "kind", p.Kind, "reason", p.Reason)
	}
	if v.IO == nil {
		return
	}
	counter("reads_total", "Reads that its loop device has completed since csi-loop was started.", float64(v.IO.Reads))
	counter("read_bytes_total", "Bytes that they read.", float64(v.IO.ReadBytes))
	counter("read_seconds_total", "How long they took, all together.", v.IO.ReadSeconds)
	counter("writes_total", "Writes that its loop device has completed since csi-loop was started.", float64(v.IO.Writes))
	counter("written_bytes_total", "Bytes that they wrote.", float64(v.IO.WriteBytes))
	counter("write_seconds_total", "How long they took, all together.", v.IO.WriteSeconds)
	counter("busy_seconds_total", "How long there was a read or a write under way.", v.IO.BusySeconds)
}

// flows shows the copies from and to other nodes.
func (m *metrics) flows(count func() (sent, received driver.FlowStats)) {
	m.registry.MustRegister(collector(func(_ context.Context, send func(string, string, prometheus.ValueType, float64, ...string)) {
		sent, received := count()
		for direction, s := range map[string]driver.FlowStats{"send": sent, "receive": received} {
			copies := func(n uint64, result string) {
				send("csi_loop_node_copies_total", "Copies from one node to another that ended, at this end.", prometheus.CounterValue, float64(n), "direction", direction, "result", result)
			}
			copies(s.Done, "done")
			copies(s.Failed, "failed")
			send("csi_loop_node_copy_data_bytes_total", "Data of copies from one node to another, before compression.", prometheus.CounterValue, float64(s.Bytes), "direction", direction)
			for _, p := range s.Running {
				labels := []string{"direction", direction, "name", p.Name}
				send("csi_loop_node_copy_done_bytes", "How far a copy from one node to another is: data that was sent or received.", prometheus.GaugeValue, float64(p.Done), labels...)
				send("csi_loop_node_copy_size_bytes", "How much data there is to send or receive; 0 until it is known.", prometheus.GaugeValue, float64(p.Total), labels...)
			}
		}
	}))
}

// trims shows what the trimming of thin volumes did.
func (m *metrics) trims(stats func() driver.TrimStats) {
	m.registry.MustRegister(collector(func(_ context.Context, send func(string, string, prometheus.ValueType, float64, ...string)) {
		s := stats()
		const help = "Trims of thin volumes in the background; one that was deferred because of load is tried again soon."
		for result, n := range map[string]int64{"done": s.Done, "deferred": s.Deferred, "failed": s.Failed} {
			send("csi_loop_trims_total", help, prometheus.CounterValue, float64(n), "result", result)
		}
		send("csi_loop_trimmed_bytes_total", "What the filesystems said they do not use; their images may have given it back before.", prometheus.CounterValue, float64(s.Bytes))
	}))
}

// links shows the node's links.
func (m *metrics) links(count func() (up, wanted int)) {
	m.registry.MustRegister(collector(func(_ context.Context, send func(string, string, prometheus.ValueType, float64, ...string)) {
		up, wanted := count()
		send("csi_loop_links", "Links of this node to replicas of the controller.", prometheus.GaugeValue, float64(up), "state", "up")
		send("csi_loop_links", "Links of this node to replicas of the controller.", prometheus.GaugeValue, float64(max(0, wanted-up)), "state", "down")
	}))
}

// router shows the controller's links, and what was found over them.
func (m *metrics) router(r *router.Router) {
	m.registry.MustRegister(collector(func(_ context.Context, send func(string, string, prometheus.ValueType, float64, ...string)) {
		gauge := func(name, help string, value float64, labels ...string) {
			send("csi_loop_"+name, help, prometheus.GaugeValue, value, labels...)
		}
		s := r.Stats()
		const nodes = "Nodes that have a link, and that should have one."
		gauge("link_nodes", nodes, float64(s.Linked), "state", "linked")
		gauge("link_nodes", nodes, float64(s.Away), "state", "away")
		gauge("link_duplicate_pools", "Pools that are refused because another node has one with the same ID.", float64(s.DuplicatePools))
		for reason, n := range s.Refused {
			send("csi_loop_link_refused_total", "Links that were refused.", prometheus.CounterValue, float64(n), "reason", reason)
		}
		gauge("transfers", "Copies from one node to another that go through this controller now.", float64(s.Transfers.Running))
		send("csi_loop_transfer_bytes_total", "What they took, as sent.", prometheus.CounterValue, float64(s.Transfers.Bytes))
		const ended = "Copies from one node to another that ended."
		send("csi_loop_transfers_total", ended, prometheus.CounterValue, float64(s.Transfers.Done), "result", "done")
		send("csi_loop_transfers_total", ended, prometheus.CounterValue, float64(s.Transfers.Failed), "result", "failed")
		for _, n := range r.Nodes() {
			if n.State != router.NodeLinked {
				gauge("link_node_away", "1 for each node that should have a link and has none.", 1, "name", n.Name)
			}
		}
		if s.Orphans.Time.IsZero() {
			return // not looked for yet
		}
		volumes, bytes := map[string]int{router.OrphanUnclaimed: 0, router.OrphanElsewhere: 0}, int64(0)
		for _, v := range s.Orphans.Orphans {
			volumes[v.Reason]++
			bytes += v.Size
		}
		for reason, n := range volumes {
			gauge("orphan_volumes", "Volumes that Kubernetes has no use for.", float64(n), "reason", reason)
		}
		gauge("orphan_volumes_size_bytes", "Their size, all together.", float64(bytes))
		gauge("orphan_look_timestamp_seconds", "When orphans were last looked for.", float64(s.Orphans.Time.Unix()))
		gauge("orphan_look_unseen_nodes", "Nodes that were not looked at then.", float64(len(s.Orphans.Unseen)))
	}))
}
