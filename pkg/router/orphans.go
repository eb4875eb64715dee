package router

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"k8s.io/klog/v2"

	"github.com/csi-loop/csi-loop/pkg/router/link"
)

// Claims knows what Kubernetes still has a use for.
type Claims interface {
	// References reads everything anew: the claims first, since a volume has a PV
	// before its claim may go.
	References(ctx context.Context) (References, error)
}

// References is what Kubernetes knows of volumes.
type References struct {
	// PVs has the volume ID of each PersistentVolume, "" where it is not of the driver,
	// by the PV's name.
	PVs map[string]string
	// Claims has the name of the PV that a claim is bound to, or "", by the claim's UID.
	Claims map[string]string
}

// Why a volume is an orphan.
const (
	// OrphanUnclaimed: it has neither claim nor PV.
	OrphanUnclaimed = "unclaimed"
	// OrphanElsewhere: its claim has another volume.
	OrphanElsewhere = "elsewhere"
)

// Orphan is a volume that Kubernetes has no use for.
type Orphan struct {
	ID     string `json:"id"`
	Node   string `json:"node"`
	Size   int64  `json:"size"` // bytes
	Reason string `json:"reason"`
	// PV is the one that the volume's claim has instead.
	PV string `json:"pv,omitempty"`
	// Since is when this controller first saw that it is one.
	Since time.Time `json:"since"`
}

// OrphanReport is what one look at all linked nodes found.
type OrphanReport struct {
	Time    time.Time `json:"time"`
	Orphans []Orphan  `json:"orphans"`
	// Unseen are the nodes that were not looked at: they are away, or did not answer.
	Unseen []string `json:"unseen,omitempty"`
}

const (
	// orphanEvery is how often orphans are looked for.
	orphanEvery = 5 * time.Minute
	// orphanAge is how long a volume must have been an orphan to count as one, and to
	// be removed: the provisioner may be about to make its PV.
	orphanAge = time.Minute
	// orphanAsk is how many nodes are asked at a time.
	orphanAsk = 16
	// orphanTime is how long one may take to list its volumes.
	orphanTime = 30 * time.Second
)

// orphans is what was found so far.
type orphans struct {
	looking chan struct{} // capacity 1; full during a look, of which there is one at a time; before mu

	mu    sync.Mutex
	last  OrphanReport         // guarded by mu
	since map[string]time.Time // guarded by mu; by volume ID
}

func newOrphans() orphans { return orphans{looking: make(chan struct{}, 1)} }

// WatchOrphans looks for orphans until ctx ends.
func (r *Router) WatchOrphans(ctx context.Context) {
	for sleep(ctx, orphanEvery) == nil {
		if _, err := r.Orphans(ctx); err != nil && ctx.Err() == nil {
			klog.FromContext(ctx).Error(err, "Cannot look for orphaned volumes; trying again", "in", orphanEvery.String())
		}
	}
}

// Orphans looks for orphans on the nodes that are linked.
func (r *Router) Orphans(ctx context.Context) (OrphanReport, error) {
	select {
	case r.orphans.looking <- struct{}{}:
	case <-ctx.Done():
		return OrphanReport{}, ctx.Err()
	}
	defer func() { <-r.orphans.looking }()
	volumes, unseen, err := r.volumes(ctx)
	if err != nil {
		return OrphanReport{}, err
	}
	refs, err := r.cfg.Claims.References(ctx)
	if err != nil {
		return OrphanReport{}, fmt.Errorf("read claims and volumes of Kubernetes: %w", err)
	}
	used := make(map[string]bool, len(refs.PVs))
	for _, id := range refs.PVs {
		used[id] = true
	}
	report := OrphanReport{Time: r.cfg.Now(), Orphans: []Orphan{}, Unseen: unseen}
	for _, v := range volumes {
		if used[v.ID] {
			continue
		}
		if v.Reason, v.PV = refs.judge(v.ID); v.Reason != "" {
			report.Orphans = append(report.Orphans, v)
		}
	}
	slices.SortFunc(report.Orphans, func(a, b Orphan) int { return cmp.Or(cmp.Compare(a.Node, b.Node), cmp.Compare(a.ID, b.ID)) })
	r.orphans.note(&report)
	return report, nil
}

// claimUID ends the names that the provisioner gives to volumes and PVs.
var claimUID = regexp.MustCompile(`[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)

// judge says why a volume that no PV has is an orphan, or "".
func (refs References) judge(id string) (reason, pv string) {
	_, name, _ := strings.Cut(id, ".")
	uid := claimUID.FindString(name)
	bound, claimed := refs.Claims[uid]
	if !claimed || uid == "" {
		if _, there := refs.PVs[name]; there {
			return OrphanElsewhere, name
		}
		return OrphanUnclaimed, ""
	}
	// A claim without a PV is being provided for. One whose PV was deleted may get it
	// back from a backup.
	if _, there := refs.PVs[bound]; !there {
		return "", ""
	}
	return OrphanElsewhere, bound
}

// note keeps a report, and fills in since when the orphans are known.
func (o *orphans) note(report *OrphanReport) {
	o.mu.Lock()
	defer o.mu.Unlock()
	since := make(map[string]time.Time, len(report.Orphans))
	for i := range report.Orphans {
		v := &report.Orphans[i]
		v.Since = report.Time
		if first, known := o.since[v.ID]; known {
			v.Since = first
		}
		since[v.ID] = v.Since
	}
	// A node that is away for a moment does not make its orphans younger.
	for _, v := range o.last.Orphans {
		if _, known := since[v.ID]; !known && slices.Contains(report.Unseen, v.Node) {
			since[v.ID] = o.since[v.ID]
		}
	}
	o.last, o.since = *report, since
}

// known is the last report, without what may not be an orphan after all.
func (o *orphans) known() OrphanReport {
	o.mu.Lock()
	defer o.mu.Unlock()
	report := o.last
	report.Orphans = slices.DeleteFunc(slices.Clone(report.Orphans), func(v Orphan) bool { return report.Time.Sub(v.Since) < orphanAge })
	return report
}

// RemoveOrphan deletes a volume if it is an orphan now, and has been one for a
// minute. FAILED_PRECONDITION says why not.
func (r *Router) RemoveOrphan(ctx context.Context, id string) error {
	report, err := r.Orphans(ctx)
	if err != nil {
		return err
	}
	i := slices.IndexFunc(report.Orphans, func(v Orphan) bool { return v.ID == id })
	if i < 0 {
		return status.Errorf(codes.FailedPrecondition, "volume %q is not an orphan: it has a claim or a PV, or it is not on a linked node (not looked at: %s)", id, or(some(report.Unseen), "none"))
	}
	orphan := report.Orphans[i]
	if age := report.Time.Sub(orphan.Since); age < orphanAge {
		return status.Errorf(codes.FailedPrecondition, "volume %q is known as an orphan for %s only: ask again after %s", id, age.Round(time.Second), orphanAge)
	}
	klog.FromContext(ctx).Info("Removing an orphan, as asked", "volume", id, "node", orphan.Node, "size", orphan.Size, "reason", orphan.Reason, "since", orphan.Since)
	_, err = byID(ctx, r, "DeleteVolume", "volume", id, &csi.DeleteVolumeRequest{VolumeId: id}, csi.ControllerClient.DeleteVolume, gone(&csi.DeleteVolumeResponse{}))
	return err
}

// volumes lists the volumes of the nodes that are linked and answer.
func (r *Router) volumes(ctx context.Context) (volumes []Orphan, unseen []string, err error) {
	unseen = r.missing()
	var mu sync.Mutex
	var group errgroup.Group
	group.SetLimit(orphanAsk)
	for _, p := range r.table.all() {
		if p.session == nil {
			continue
		}
		group.Go(func() error {
			asking, cancel := context.WithTimeout(ctx, orphanTime)
			defer cancel()
			part, err := r.volumesOf(asking, p.session)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				unseen = append(unseen, p.node)
				return nil
			}
			volumes = append(volumes, part...)
			return nil
		})
	}
	_ = group.Wait()
	slices.Sort(unseen)
	return volumes, slices.Compact(unseen), ctx.Err()
}

func (r *Router) volumesOf(ctx context.Context, s *session) ([]Orphan, error) {
	var volumes []Orphan
	for token := ""; ; {
		resp, err := call(ctx, s, "ListVolumes", &csi.ListVolumesRequest{StartingToken: token, MaxEntries: pageMost}, csi.ControllerClient.ListVolumes)
		if err != nil {
			return nil, err
		}
		for _, e := range resp.GetEntries() {
			if id := e.GetVolume().GetVolumeId(); r.here(s, id) {
				volumes = append(volumes, Orphan{ID: id, Node: s.id.Node, Size: e.GetVolume().GetCapacityBytes()})
			}
		}
		if err := r.still(s); err != nil {
			return nil, err
		}
		next := resp.GetNextToken()
		if next == "" {
			return volumes, nil
		}
		if next == token || len(resp.GetEntries()) == 0 || len(volumes) > link.MaxVolumes {
			return nil, errors.New("it does not keep to pages")
		}
		token = next
	}
}

func or(s, instead string) string {
	if s == "" {
		return instead
	}
	return s
}
