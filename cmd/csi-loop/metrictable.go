package main

import (
	"context"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// metric is one family of metrics.
type metric struct {
	name   string
	kind   string // gauge, counter or histogram
	help   string
	labels []string
	desc   *prometheus.Desc
}

// metricGroup is metrics that are collected together. It is all that is known of them:
// what is shown is described by it, and docs/reference/metrics.md is written from it.
type metricGroup struct {
	where   string // which processes have them
	metrics []*metric
}

// metricGroups are those of this process, in the order of the reference.
var metricGroups = []*metricGroup{everywhere, ofNode, ofHealth, ofVolumes, ofTrims, ofFlows, ofLinks, ofRouter}

var (
	everywhere = &metricGroup{where: "all"}
	ofNode     = &metricGroup{where: "node"}
	ofHealth   = &metricGroup{where: "node"}
	ofVolumes  = &metricGroup{where: "node"}
	ofTrims    = &metricGroup{where: "node"}
	ofFlows    = &metricGroup{where: "node"}
	ofLinks    = &metricGroup{where: "node"}
	ofRouter   = &metricGroup{where: "controller"}
)

// make adds a metric to the group.
func (g *metricGroup) make(kind, name, help string, labels ...string) *metric {
	x := &metric{name: "csi_loop_" + name, kind: kind, help: help, labels: labels}
	x.desc = prometheus.NewDesc(x.name, help, labels, nil)
	g.metrics = append(g.metrics, x)
	return x
}

func (g *metricGroup) gauge(name, help string, labels ...string) *metric {
	return g.make("gauge", name, help, labels...)
}

func (g *metricGroup) counter(name, help string, labels ...string) *metric {
	return g.make("counter", name, help, labels...)
}

// sender takes a value of a metric, with the values of its labels.
type sender func(x *metric, value float64, labels ...string)

// collector makes the metrics of a group when they are asked for.
type collector struct {
	group   *metricGroup
	collect func(ctx context.Context, send sender)
}

// Describe sends what the group may have.
func (c collector) Describe(ch chan<- *prometheus.Desc) {
	for _, x := range c.group.metrics {
		ch <- x.desc
	}
}

// Collect calls the function.
func (c collector) Collect(ch chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	c.collect(ctx, func(x *metric, value float64, labels ...string) {
		if !slices.Contains(c.group.metrics, x) {
			panic("BUG: " + x.name + " belongs to another group of metrics")
		}
		kind := prometheus.GaugeValue
		if x.kind == "counter" {
			kind = prometheus.CounterValue
		}
		ch <- prometheus.MustNewConstMetric(x.desc, kind, value, labels...)
	})
}

var (
	buildInfo   = everywhere.gauge("build_info", "Always 1; the labels say what was built.", "version", "commit", "go", "csi")
	callSeconds = everywhere.make("histogram", "csi_calls_seconds",
		"CSI calls that were answered, by method and gRPC code; on a node those of the kubelet and those that came over the links.", "method", "code")
)

var (
	poolAbsent    = ofNode.gauge("pool_absent", "1 while a pool is configured and cannot be used, else 0.", "pool")
	poolSize      = ofNode.gauge("pool_size_bytes", "Size of the file system that the pool is on; 0 when it does not answer.", "pool")
	poolUsed      = ofNode.gauge("pool_used_bytes", "What is used of it, by csi-loop and others.", "pool")
	poolReserved  = ofNode.gauge("pool_reserved_bytes", "What is kept free for others, by configuration.", "pool")
	poolAvailable = ofNode.gauge("pool_available_bytes", "The largest thick volume that could be made.", "pool")
	poolVolumes   = ofNode.gauge("pool_volumes", "Volumes in the pool.", "pool")
	poolTemplates = ofNode.gauge("pool_templates", "Templates in the pool.", "pool")
	templateSize  = ofNode.gauge("template_size_bytes", "Size of a template.", "pool", "template")
	poolDamaged   = ofNode.gauge("pool_damaged_volumes", "Volumes that are refused because their record cannot be read.", "pool")
	poolExtents   = ofNode.gauge("pool_extents", "Extents of all images in the pool, of kind volume or snapshot; each is looked at every ten minutes at most.", "pool", "kind")
	imageExtents  = ofNode.gauge("image_extents",
		"Extents of one volume or snapshot, for the ten with most of them in each pool. A snapshot of 100,000 takes a second, while writers wait.", "pool", "kind", "id")
	poolCopies          = ofNode.gauge("pool_copies", "Copies of data that are under way in the pool.", "pool")
	poolCopiesRemaining = ofNode.gauge("pool_copies_remaining_bytes", "What they have still to copy, all together.", "pool")
	poolCopied          = ofNode.counter("pool_copied_bytes_total", "What was copied in the pool since the start.", "pool")
	loopDevices         = ofNode.gauge("loop_devices", "Loop devices of the machine, others' included: unbound, bound, rundown or deleting. Those of others are unbound or bound.", "state")
	loopDevicesAttached = ofNode.gauge("loop_devices_attached", "Loop devices that csi-loop attached.")
	loopDevicesLimit    = ofNode.gauge("loop_devices_limit", "Loop devices that csi-loop attaches at most.")
)

var (
	nodeProblem = ofHealth.gauge("node_problem", "1 for each thing that the node has too little of, for whatever pool or volume.", "kind", "reason")
	poolProblem = ofHealth.gauge("pool_problem", "1 for each thing that is wrong with the pool. Its kind is Degraded or Inaccessible.", "pool", "kind", "reason")
)

// ofVolume are the labels of all metrics of a volume. "volume" is its ID, "name" what
// CreateVolume was called with.
var ofVolume = []string{"pool", "volume", "name"}

var (
	volumeSize = ofVolumes.gauge("volume_size_bytes",
		"Size of a volume. The label volume is its ID; name is what CreateVolume was called with, in Kubernetes the name of the PersistentVolume.", ofVolume...)
	volumeAllocated = ofVolumes.gauge("volume_allocated_bytes", "Blocks of its image, those that it shares with snapshots too.", ofVolume...)
	volumeUsed      = ofVolumes.gauge("volume_used_bytes", "What is used of its filesystem, while it is mounted.", ofVolume...)
	volumeStaged    = ofVolumes.gauge("volume_staged", "1 while the volume is attached, else 0.", ofVolume...)
	volumeProblem   = ofVolumes.gauge("volume_problem",
		"1 for each thing that is wrong with the volume. Its kind is Degraded, Inaccessible or DataLoss.", append(slices.Clone(ofVolume), "kind", "reason")...)
	volumeReads = ofVolumes.counter("volume_reads_total",
		"Reads that its loop device has completed since csi-loop was started and the volume attached.", ofVolume...)
	volumeReadBytes    = ofVolumes.counter("volume_read_bytes_total", "Bytes that they read.", ofVolume...)
	volumeReadSeconds  = ofVolumes.counter("volume_read_seconds_total", "How long they took, all together.", ofVolume...)
	volumeWrites       = ofVolumes.counter("volume_writes_total", "Writes that its loop device has completed since then.", ofVolume...)
	volumeWritten      = ofVolumes.counter("volume_written_bytes_total", "Bytes that they wrote.", ofVolume...)
	volumeWriteSeconds = ofVolumes.counter("volume_write_seconds_total", "How long they took, all together.", ofVolume...)
	volumeBusySeconds  = ofVolumes.counter("volume_busy_seconds_total", "How long there was a read or a write under way.", ofVolume...)
	volumesNotShown    = ofVolumes.gauge("volumes_not_shown", "Volumes that have no metrics of their own, because there are more than --volume-metrics.")
)

var (
	trimRuns = ofTrims.counter("trims_total",
		"Trims of thin volumes in the background: done, failed, or deferred because of load and tried again soon.", "result")
	trimmedBytes = ofTrims.counter("trimmed_bytes_total", "What the filesystems said they do not use; their images may have given it back before.")
)

var (
	nodeCopies    = ofFlows.counter("node_copies_total", "Copies from (receive) and to (send) other nodes that ended at this end: done or failed.", "direction", "result")
	nodeCopyData  = ofFlows.counter("node_copy_data_bytes_total", "Data of copies from one node to another, before compression.", "direction")
	nodeCopyDone  = ofFlows.gauge("node_copy_done_bytes", "How far a copy from one node to another is: data that was sent or received. Its name is the new volume's, or the source's ID.", "direction", "name")
	nodeCopyTotal = ofFlows.gauge("node_copy_size_bytes", "How much data there is to send or receive at most; 0 until it is known.", "direction", "name")
)

var linkStates = ofLinks.gauge("links", "Links of this node to replicas of the controller: up or down.", "state")

var (
	linkNodes          = ofRouter.gauge("link_nodes", "Nodes that have a link (linked), and that should have one and have none (away).", "state")
	linkNodeAway       = ofRouter.gauge("link_node_away", "1 for each node that should have a link and has none.", "name")
	linkDuplicatePools = ofRouter.gauge("link_duplicate_pools", "Pools that are refused because another node has one with the same ID.")
	linkRefused        = ofRouter.counter("link_refused_total",
		"Links that were refused: crowd, hello, token, review, identity, second or inventory; and connections for a copy: ticket.", "reason")
	transfersRunning = ofRouter.gauge("transfers", "Copies from one node to another that go through this controller now.")
	transfersEnded   = ofRouter.counter("transfers_total", "Copies from one node to another that ended: done or failed.", "result")
	transferBytes    = ofRouter.counter("transfer_bytes_total", "What copies from one node to another took, as sent.")
	orphanVolumes    = ofRouter.gauge("orphan_volumes", "Volumes that Kubernetes has no use for: unclaimed or elsewhere.", "reason")
	orphanBytes      = ofRouter.gauge("orphan_volumes_size_bytes", "Their size, all together.")
	orphanLook       = ofRouter.gauge("orphan_look_timestamp_seconds", "When orphans were last looked for.")
	orphanLookNodes  = ofRouter.gauge("orphan_look_unseen_nodes", "Nodes that were not looked at then.")
)
