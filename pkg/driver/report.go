package driver

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/csi-loop/csi-loop/pkg/image"
	"github.com/csi-loop/csi-loop/pkg/report"
)

const (
	// reportAge is how long a report is handed out again: metrics, controllers and
	// people ask at the same time.
	reportAge = 3 * time.Second
	// maxMessage bounds what is told of one problem, in bytes.
	maxMessage = 500
)

// reporter makes one report at a time.
type reporter struct {
	busy chan struct{}  // capacity 1; full while somebody makes one
	last report.Machine // guarded by busy
}

func newReporter() reporter { return reporter{busy: make(chan struct{}, 1)} }

// Report tells what is on this node: pools, volumes, snapshots, and what is wrong with
// them. It starts no program and reads no data: some system calls for each volume.
// What is told is at most 3 s old. The lists are shared, and not to be changed. The
// error is ctx's: somebody else is making a report, and a disk may not answer.
func (d *Driver) Report(ctx context.Context) (report.Machine, error) {
	select {
	case d.reports.busy <- struct{}{}:
	case <-ctx.Done():
		return report.Machine{}, ctx.Err()
	}
	defer func() { <-d.reports.busy }()
	if now := time.Now(); now.Sub(d.reports.last.Time) >= reportAge {
		m := d.look(ctx)
		if err := ctx.Err(); err != nil {
			return report.Machine{}, err
		}
		m.Time = now
		d.reports.last = m
	}
	return d.reports.last, nil
}

// look makes a report.
func (d *Driver) look(ctx context.Context) report.Machine {
	m := report.Machine{Problems: d.shortages()}
	for _, p := range d.images.Absent() {
		m.Pools = append(m.Pools, report.Pool{
			Name: p.Name, Problems: []report.Problem{{Kind: report.Inaccessible, Reason: reasonTable[reasonPoolAbsent].word, Message: absentMessage(p)}},
		})
	}
	for _, p := range d.images.Pools() {
		m.Pools = append(m.Pools, poolReport(p))
		for dir, err := range p.Damaged() {
			m.Volumes = append(m.Volumes, report.Volume{
				ID: image.VolumeID(p.ID(), dir), Pool: p.Name(), State: report.Refused,
				Problems: []report.Problem{problem(image.RecordProblem(err))},
			})
		}
	}
	staged := map[string]stageRecord{}
	for _, r := range d.state.list() {
		staged[r.VolumeID] = r
	}
	d.counts.keep(staged)
	for _, v := range d.images.List() {
		if ctx.Err() != nil {
			return m
		}
		id := v.ID
		if v.Ephemeral != nil {
			id = v.Name // what the kubelet calls it
		}
		r, is := staged[id]
		delete(staged, id)
		m.Volumes = append(m.Volumes, d.volumeReport(ctx, v, r, is))
	}
	for _, r := range staged { // mapped images, and volumes whose pool is absent
		m.Volumes = append(m.Volumes, d.stagedReport(ctx, r))
	}
	slices.SortFunc(m.Volumes, func(a, b report.Volume) int { return strings.Compare(a.ID, b.ID) })
	for _, s := range d.images.ListSnapshots() {
		m.Snapshots = append(m.Snapshots, d.snapshotReport(s))
	}
	m.Templates, m.Copies = d.templateReports(), d.copyReports()
	return m
}

// templateReports is of the templates of all pools.
func (d *Driver) templateReports() []report.Template {
	made := map[string]int{}
	for _, v := range d.images.List() {
		if v.Source != nil && v.Source.Template != "" {
			made[v.Source.Template]++
		}
	}
	var all []report.Template
	for _, p := range d.images.Pools() {
		for _, t := range p.Templates() {
			all = append(all, report.Template{
				ID: t.ID, Name: t.Name, Pool: t.Pool, Size: t.Size, Filesystem: t.Filesystem, Volumes: made[t.ID], Created: t.Created,
			})
		}
	}
	slices.SortFunc(all, func(a, b report.Template) int { return strings.Compare(a.ID, b.ID) })
	return all[:min(len(all), report.MaxTemplates)]
}

// copyReports is of the copies that go on: in the pools, and from and to other nodes.
func (d *Driver) copyReports() []report.Copy {
	var all []report.Copy
	for _, p := range d.images.Pools() {
		for _, c := range p.CopiesNow() {
			all = append(all, report.Copy{Name: c.Name, Pool: p.Name(), Kind: report.Copying, Done: c.Done, Total: c.Total})
		}
	}
	sent, received := d.Flows()
	for kind, s := range map[string]FlowStats{report.Sending: sent, report.Receiving: received} {
		for _, c := range s.Running {
			all = append(all, report.Copy{Name: c.Name, Kind: kind, Done: c.Done, Total: c.Total})
		}
	}
	slices.SortFunc(all, func(a, b report.Copy) int {
		return cmp.Or(cmp.Compare(a.Pool, b.Pool), cmp.Compare(a.Name, b.Name), cmp.Compare(a.Kind, b.Kind))
	})
	return all
}

func poolReport(p *image.Pool) report.Pool {
	u := p.Usage()
	r := report.Pool{
		Name: p.Name(), ID: p.ID(), Filesystem: p.Filesystem(), Size: u.Size, Used: u.Size - u.Free, Reserved: u.Reserved,
		Available: p.Capacity(image.Thick), Volumes: u.Volumes, Snapshots: u.Snapshots,
	}
	for _, found := range p.Health() {
		r.Problems = append(r.Problems, problem(found))
	}
	return r
}

func problem(p image.Problem) report.Problem {
	return report.Problem{Kind: p.Kind.String(), Reason: p.Reason, Message: withAction(p.Message, p.Action)}
}

// absentMessage is why a pool is absent, and what to do.
func absentMessage(p image.AbsentPool) string {
	return withAction(p.Err.Error(), reasonTable[reasonPoolAbsent].action)
}

func (d *Driver) snapshotReport(s image.Snapshot) report.Snapshot {
	r := report.Snapshot{
		ID: s.ID, Name: s.Name, Source: s.Source, Pool: s.Pool, Group: s.Group, Size: s.Volume.Content(), Reflinked: s.Reflinked, Created: s.Created,
	}
	if p, ok := d.images.Pool(s.Pool); ok {
		r.Allocated = p.SnapshotBlocks(s.ID)
	}
	return r
}

// volumeReport is of a volume of a pool, which may be staged.
func (d *Driver) volumeReport(ctx context.Context, v image.Volume, r stageRecord, staged bool) report.Volume {
	out := report.Volume{
		ID: v.ID, Name: v.Name, Pool: v.Pool, Size: v.Content(), Allocation: string(v.Allocation), Filesystem: v.Filesystem,
		Encryption: v.Encryption.Type,
		Ephemeral:  v.Ephemeral != nil, State: report.Available, Created: v.Created,
	}
	if p, ok := d.images.Pool(v.Pool); ok {
		if look, ok := p.LookAt(v.ID); ok {
			out.Allocated = look.Allocated
			for _, found := range look.Problems {
				out.Problems = append(out.Problems, problem(found))
			}
		}
	}
	if staged {
		d.addStaging(ctx, &out, r, v)
	}
	return out
}

// stagedReport is of what is staged and is no volume of an open pool.
func (d *Driver) stagedReport(ctx context.Context, r stageRecord) report.Volume {
	out := report.Volume{ID: r.VolumeID, Filesystem: r.FSType, Ephemeral: r.Ephemeral}
	if r.Mapped != nil {
		out.Name, out.Size = r.Mapped.Image, r.Mapped.SizeLimit
	} else {
		r := reasonTable[reasonPoolAbsent]
		out.Problems = append(out.Problems, report.Problem{
			Kind: report.Inaccessible, Reason: r.word, Message: withAction("its pool cannot be used now, or is not configured any more", r.action),
		})
	}
	d.addStaging(ctx, &out, r, image.Volume{})
	return out
}

// addStaging adds what the node does with a volume. While a call works on it nothing
// is judged.
func (d *Driver) addStaging(ctx context.Context, out *report.Volume, r stageRecord, v image.Volume) {
	out.State = report.Staged
	if len(r.Targets) > 0 || r.Ephemeral {
		out.State = report.Published
	}
	if r.Device.none() {
		return
	}
	out.Device = fmt.Sprintf("/dev/loop%d", r.Device.Number)
	var p problems
	d.stagingProblems(ctx, r, v, &p)
	if now, ok := d.state.get(r.VolumeID); !ok || now.Device != r.Device || d.locks.busy(lockKey(r.VolumeID)) {
		return
	}
	if text := d.tuning.problem(r.VolumeID); text != "" {
		p.addf(csi.VolumeHealthErrorType_DEGRADED, reasonNotTuned, "mutable parameters are recorded, and not in force: %s", text)
	}
	for _, found := range p {
		out.Problems = append(out.Problems, report.Problem{Kind: kindOf(found.GetStatus()), Reason: found.GetReason(), Message: found.GetMessage()})
	}
	if c, err := d.table.Counters(r.Device.ref()); err == nil {
		sum := d.counts.note(r.VolumeID, r.Device.ref(), c)
		out.IO = &sum
	}
	if r.Block || slices.ContainsFunc(p, func(e *csi.VolumeHealth_VolumeHealthEntry) bool {
		return e.GetStatus() == csi.VolumeHealthErrorType_INACCESSIBLE
	}) {
		return
	}
	st, err := d.mtab.Stats(r.StagingPath)
	// Whose numbers these are counts only if the volume is mounted there.
	if m, mounted, at := d.mtab.At(r.StagingPath); err == nil && at == nil && mounted && r.Device.shownBy(m) {
		out.Used = &st.Used
		if r.Mapped != nil && out.Size == 0 {
			out.Size = st.Total
		}
	}
}

// kindOf turns CSI's word into that of reports.
func kindOf(s csi.VolumeHealthErrorType) string {
	switch s { //nolint:exhaustive // what is not known is taken for harmless
	case csi.VolumeHealthErrorType_INACCESSIBLE:
		return report.Inaccessible
	case csi.VolumeHealthErrorType_DATA_LOSS:
		return report.DataLoss
	default:
		return report.Degraded
	}
}
