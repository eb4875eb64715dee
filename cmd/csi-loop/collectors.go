package main

import (
	"cmp"
	"context"
	"slices"
	"strings"

	"github.com/csi-loop/csi-loop/pkg/driver"
	"github.com/csi-loop/csi-loop/pkg/image"
	"github.com/csi-loop/csi-loop/pkg/loop"
	"github.com/csi-loop/csi-loop/pkg/report"
	"github.com/csi-loop/csi-loop/pkg/router"
)

// node shows pools and loop devices.
func (m *metrics) node(images *image.Store, loops *loop.Manager) {
	m.registry.MustRegister(collector{ofNode, func(ctx context.Context, send sender) {
		for _, p := range images.Absent() {
			send(poolAbsent, 1, p.Name)
		}
		for _, p := range images.Pools() {
			poolMetrics(p, send)
		}
		send(loopDevicesLimit, float64(loops.Limit()))
		send(loopDevicesAttached, float64(loops.Attached()))
		states, err := loops.States(ctx)
		if err != nil {
			return // the rest is worth showing
		}
		for state, n := range states {
			send(loopDevices, float64(n), strings.ToLower(state.String()))
		}
	}})
}

func poolMetrics(p *image.Pool, send sender) {
	u, name := p.Usage(), p.Name()
	send(poolAbsent, 0, name)
	send(poolSize, float64(u.Size), name)
	send(poolUsed, float64(u.Size-u.Free), name)
	send(poolReserved, float64(u.Reserved), name)
	send(poolAvailable, float64(p.Capacity(image.Thick)), name)
	send(poolVolumes, float64(u.Volumes), name)
	templates := p.Templates()
	send(poolTemplates, float64(len(templates)), name)
	for _, t := range templates {
		send(templateSize, float64(t.Size), name, t.Name)
	}
	fragments(p, send)
	c := p.Copies()
	send(poolCopies, float64(c.Running), name)
	send(poolCopiesRemaining, float64(c.Remaining), name)
	send(poolCopied, float64(c.Copied), name)
	send(poolDamaged, float64(len(p.Damaged())), name)
}

// mostFragmented is how many images of a pool are shown one by one.
const mostFragmented = 10

// fragments shows in how many extents a pool's images are, and those with most of them
// one by one.
func fragments(p *image.Pool, send sender) {
	kinds := map[bool]string{false: "volume", true: "snapshot"}
	sum := map[bool]int64{false: 0, true: 0}
	for i, f := range p.Fragments() {
		sum[f.Snapshot] += f.Extents
		if i < mostFragmented {
			send(imageExtents, float64(f.Extents), p.Name(), kinds[f.Snapshot], f.ID)
		}
	}
	for snapshot, n := range sum {
		send(poolExtents, float64(n), p.Name(), kinds[snapshot])
	}
}

// machine reports what is on this node; *driver.Driver does.
type machine interface {
	Report(ctx context.Context) (report.Machine, error)
}

// problems shows what is wrong with the node and its pools.
func (m *metrics) problems(d machine) {
	m.registry.MustRegister(collector{ofHealth, func(ctx context.Context, send sender) {
		r, err := d.Report(ctx)
		if err != nil {
			return // the rest is worth showing
		}
		for _, p := range r.Problems {
			send(nodeProblem, 1, p.Kind, p.Reason)
		}
		for _, pool := range r.Pools {
			told := map[[2]string]bool{}
			for _, p := range pool.Problems { // each refused volume is one
				if key := [2]string{p.Kind, p.Reason}; !told[key] {
					told[key] = true
					send(poolProblem, 1, pool.Name, p.Kind, p.Reason)
				}
			}
		}
	}})
}

// volumes shows the volumes of this node, at most that many: those with the most
// blocks, since they are who fills a pool. No program is run for it.
func (m *metrics) volumes(d machine, most int) {
	if most == 0 {
		return
	}
	m.registry.MustRegister(collector{ofVolumes, func(ctx context.Context, send sender) {
		r, err := d.Report(ctx)
		if err != nil {
			return // the rest is worth showing
		}
		all := slices.Clone(r.Volumes)
		slices.SortStableFunc(all, func(a, b report.Volume) int { return cmp.Compare(b.Allocated, a.Allocated) })
		shown := all[:min(most, len(all))]
		send(volumesNotShown, float64(len(all)-len(shown)))
		for _, v := range shown {
			volumeMetrics(v, send)
		}
	}})
}

func volumeMetrics(v report.Volume, send sender) {
	one := func(x *metric, value float64, labels ...string) {
		send(x, value, append([]string{v.Pool, v.ID, v.Name}, labels...)...)
	}
	one(volumeSize, float64(v.Size))
	one(volumeAllocated, float64(v.Allocated))
	one(volumeStaged, map[bool]float64{true: 1}[v.Device != ""])
	if v.Used != nil {
		one(volumeUsed, float64(*v.Used))
	}
	for _, p := range v.Problems {
		one(volumeProblem, 1, p.Kind, p.Reason)
	}
	if v.IO == nil {
		return
	}
	one(volumeReads, float64(v.IO.Reads))
	one(volumeReadBytes, float64(v.IO.ReadBytes))
	one(volumeReadSeconds, v.IO.ReadSeconds)
	one(volumeWrites, float64(v.IO.Writes))
	one(volumeWritten, float64(v.IO.WriteBytes))
	one(volumeWriteSeconds, v.IO.WriteSeconds)
	one(volumeBusySeconds, v.IO.BusySeconds)
}

// flows shows the copies from and to other nodes.
func (m *metrics) flows(count func() (sent, received driver.FlowStats)) {
	m.registry.MustRegister(collector{ofFlows, func(_ context.Context, send sender) {
		sent, received := count()
		for direction, s := range map[string]driver.FlowStats{"send": sent, "receive": received} {
			send(nodeCopies, float64(s.Done), direction, "done")
			send(nodeCopies, float64(s.Failed), direction, "failed")
			send(nodeCopyData, float64(s.Bytes), direction)
			for _, p := range s.Running {
				send(nodeCopyDone, float64(p.Done), direction, p.Name)
				send(nodeCopyTotal, float64(p.Total), direction, p.Name)
			}
		}
	}})
}

// trims shows what the trimming of thin volumes did.
func (m *metrics) trims(stats func() driver.TrimStats) {
	m.registry.MustRegister(collector{ofTrims, func(_ context.Context, send sender) {
		s := stats()
		for result, n := range map[string]int64{"done": s.Done, "deferred": s.Deferred, "failed": s.Failed} {
			send(trimRuns, float64(n), result)
		}
		send(trimmedBytes, float64(s.Bytes))
	}})
}

// links shows the node's links.
func (m *metrics) links(count func() (up, wanted int)) {
	m.registry.MustRegister(collector{ofLinks, func(_ context.Context, send sender) {
		up, wanted := count()
		send(linkStates, float64(up), "up")
		send(linkStates, float64(max(0, wanted-up)), "down")
	}})
}

// router shows the controller's links, and what was found over them.
func (m *metrics) router(r *router.Router) {
	m.registry.MustRegister(collector{ofRouter, func(_ context.Context, send sender) {
		s := r.Stats()
		send(linkNodes, float64(s.Linked), "linked")
		send(linkNodes, float64(s.Away), "away")
		send(linkDuplicatePools, float64(s.DuplicatePools))
		for reason, n := range s.Refused {
			send(linkRefused, float64(n), reason)
		}
		send(transfersRunning, float64(s.Transfers.Running))
		send(transferBytes, float64(s.Transfers.Bytes))
		send(transfersEnded, float64(s.Transfers.Done), "done")
		send(transfersEnded, float64(s.Transfers.Failed), "failed")
		for _, n := range r.Nodes() {
			if n.State != router.NodeLinked {
				send(linkNodeAway, 1, n.Name)
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
			send(orphanVolumes, float64(n), reason)
		}
		send(orphanBytes, float64(bytes))
		send(orphanLook, float64(s.Orphans.Time.Unix()))
		send(orphanLookNodes, float64(len(s.Orphans.Unseen)))
	}})
}
