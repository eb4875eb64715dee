package router

import (
	"context"
	"fmt"
	"regexp"
	"strings"
	"time"

	"k8s.io/klog/v2"

	"github.com/csi-loop/csi-loop/pkg/report"
)

// Notices tells the users of volumes what a person must act on.
type Notices interface {
	// Bound lists the driver's volumes that are bound to claims.
	Bound(ctx context.Context) ([]Bound, error)
	// Tell says something of a claim's volume. It does not wait.
	Tell(b Bound, n Notice)
}

// Bound is a volume and the claim that is bound to it.
type Bound struct {
	Volume               string // ID
	Node                 string // where it is, by its PersistentVolume; may be ""
	Namespace, Name, UID string // of the claim
}

// Notice is what there is to say.
type Notice struct {
	// Solved is good news.
	Solved bool
	// Reason is one word of a report's problem, Message at most maxNotice bytes.
	Reason, Message string
}

// Reasons of notices beside those of reports.
const (
	noticeNodeGone  = "NodeGone"
	noticeAbsent    = "PoolAbsent"
	noticePool      = "PoolMissing"
	noticeVolume    = "VolumeMissing"
	noticeOther     = "Unhealthy" // a node's word that is none
	noticeRecovered = "VolumeRecovered"
)

const (
	// noticeConfirm is how long after its first sight a problem is told, if it is still
	// there: many are over by then, such as those of a pod that starts.
	noticeConfirm = 15 * time.Second
	// noticeAgain is how often it is told again while it lasts. Kubernetes forgets an
	// event after an hour.
	noticeAgain = 30 * time.Minute
	// maxNotice is a little less than events may have.
	maxNotice = 1000
)

// noticeKey is one problem of one claim.
type noticeKey struct{ uid, reason string }

// noticeState is what is known of it.
type noticeState struct {
	told time.Time // when it was told last, or zero
}

// notices are the problems that were seen. One goroutine uses it.
type notices struct {
	seen map[noticeKey]*noticeState
}

// WatchProblems looks every so often for what is wrong with volumes, and tells their
// claims, until ctx ends. Of several replicas the first by address does.
func (r *Router) WatchProblems(ctx context.Context, every time.Duration) {
	var n notices
	for wait := every; sleep(ctx, wait) == nil; {
		wait = every
		if !r.first() {
			n.seen = nil
			continue
		}
		switch fresh, err := r.tellProblems(ctx, &n); {
		case err != nil && ctx.Err() == nil:
			klog.FromContext(ctx).Error(err, "Cannot look for problems of volumes; trying again", "in", every.String())
		case fresh:
			wait = min(every, noticeConfirm)
		}
	}
}

// first says whether this replica is the one that speaks for all.
func (r *Router) first() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.replicas) > 0 && r.replicas[0] == r.cfg.Self
}

// tellProblems looks once. It says whether there is something to confirm soon.
func (r *Router) tellProblems(ctx context.Context, n *notices) (fresh bool, err error) {
	c, err := r.Report(ctx)
	if err != nil {
		return false, err
	}
	// After the report: a volume has its PersistentVolume when it was made.
	bound, err := r.cfg.Notices.Bound(ctx)
	if err != nil {
		return false, fmt.Errorf("read the volumes of Kubernetes: %w", err)
	}
	view, before := r.viewOf(c), n.seen
	n.seen = make(map[noticeKey]*noticeState, len(before))
	healthy := map[string]Bound{} // by the claim's UID
	for _, b := range bound {
		problems, known := view.problems(b)
		switch {
		case !known: // what was is as far as anybody knows
			n.keep(b, before)
		case len(problems) == 0:
			healthy[b.UID] = b
		}
		fresh = r.tellOf(n, b, problems, before) || fresh
	}
	for key, s := range before {
		if b, is := healthy[key.uid]; is && !s.told.IsZero() {
			delete(healthy, key.uid) // once
			r.cfg.Notices.Tell(b, Notice{Solved: true, Reason: noticeRecovered, Message: "nothing is wrong any more with volume " + b.Volume})
		}
	}
	return fresh, nil
}

// keep takes over what was known of a claim.
func (n *notices) keep(b Bound, before map[noticeKey]*noticeState) {
	for key, s := range before {
		if key.uid == b.UID {
			n.seen[key] = s
		}
	}
}

// tellOf tells the problems of one claim that are due, and says whether one is new.
func (r *Router) tellOf(n *notices, b Bound, problems []report.Problem, before map[noticeKey]*noticeState) (fresh bool) {
	now := r.cfg.Now()
	for _, p := range problems {
		key := noticeKey{b.UID, p.Reason}
		if n.seen[key] != nil {
			continue // of two with one reason, one is told
		}
		s := before[key]
		switch {
		case s == nil:
			s, fresh = &noticeState{}, true
		case s.told.IsZero() || now.Sub(s.told) >= noticeAgain:
			s.told = now
			r.cfg.Notices.Tell(b, Notice{Reason: p.Reason, Message: p.Message})
		}
		n.seen[key] = s
	}
	return fresh
}

// clusterView is a report by what a volume's claim knows of it.
type clusterView struct {
	router  *Router
	volumes map[string]seenVolume
	nodes   map[string]report.Node
}

type seenVolume struct {
	node   string
	volume report.Volume
	pool   report.Pool
}

func (r *Router) viewOf(c report.Cluster) clusterView {
	v := clusterView{router: r, volumes: map[string]seenVolume{}, nodes: map[string]report.Node{}}
	for _, n := range c.Nodes {
		v.nodes[n.Name] = n
		pools := map[string]report.Pool{}
		for _, p := range n.Pools {
			pools[p.Name] = p
		}
		for _, volume := range n.Volumes {
			v.volumes[volume.ID] = seenVolume{n.Name, volume, pools[volume.Pool]}
		}
	}
	return v
}

// problems are those of a volume, each with a word and a text that are fit for an event.
// Without known nobody can say now.
func (v clusterView) problems(b Bound) (all []report.Problem, known bool) {
	if seen, is := v.volumes[b.Volume]; is {
		for _, p := range seen.volume.Problems {
			all = append(all, fit(p, seen.node, b.Volume))
		}
		for _, p := range seen.pool.Problems {
			// What only keeps new volumes from being made is not this one's.
			if p.Kind != report.Degraded {
				all = append(all, fit(p, seen.node, b.Volume))
			}
		}
		return all, true
	}
	poolID, is := poolOf(b.Volume)
	if !is {
		return nil, true // a mapped image that is not in use
	}
	name := b.Node
	if p, known := v.router.table.pool(poolID); known && p.session != nil {
		name = p.node
	}
	node, linked := v.nodes[name]
	linked = linked && node.State == report.Linked
	switch {
	case name == "" || linked && node.Error != "":
		return nil, false
	case !linked && v.router.cfg.Roster.Exists(name):
		return nil, false // what is wrong with the node is told of the node
	case !linked:
		return []report.Problem{fit(report.Problem{
			Reason: noticeNodeGone, Message: "the node is not in the cluster any more; its volumes are on its disks: see \"A node is lost\" in csi-loop's operations guide",
		}, name, b.Volume)}, true
	}
	return []report.Problem{fit(missing(node, poolID), name, b.Volume)}, true
}

// missing says why a linked node does not have a volume that it should have.
func missing(n report.Node, poolID string) report.Problem {
	for _, p := range n.Pools {
		if p.ID == poolID {
			return report.Problem{Reason: noticeVolume, Message: fmt.Sprintf("pool %q has no such volume: was it deleted by hand, or the pool restored from a backup? Restore its directory, or delete the claim and its PersistentVolume", p.Name)}
		}
	}
	for _, p := range n.Pools {
		if p.ID == "" {
			why := "it cannot be used; csi-loop's log on the node says why"
			if len(p.Problems) > 0 {
				why = p.Problems[0].Message
			}
			return report.Problem{Reason: noticeAbsent, Message: fmt.Sprintf("its pool is not there. Pool %q is absent: %s", p.Name, why)}
		}
	}
	return report.Problem{Reason: noticePool, Message: fmt.Sprintf("the node has no pool with the ID %s: is its disk gone, or not configured any more? Mount it and configure the pool again, or see \"A node is lost\" in csi-loop's operations guide", poolID)}
}

var noticeWord = regexp.MustCompile(`^[A-Z][A-Za-z]{2,63}$`)

// fit makes a problem fit for an event. What a node says may be anything.
func fit(p report.Problem, node, volume string) report.Problem {
	if !noticeWord.MatchString(p.Reason) {
		p.Reason = noticeOther
	}
	where := fmt.Sprintf(" (node %.200s, volume %.200s)", node, volume) // the ID of a mapped volume may be anything
	if most := maxNotice - len(where); len(p.Message) > most {
		p.Message = p.Message[:most-3] + "..."
	}
	p.Message = strings.ToValidUTF8(p.Message, "") + where
	return p
}
