package router

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/csi-loop/csi-loop/pkg/report"
	"github.com/csi-loop/csi-loop/pkg/router/link"
)

const (
	// reportAge is how long a report is handed out again: whoever asks over and over
	// makes no more work for the nodes.
	reportAge = 3 * time.Second
	// reportTime is how long one node may take to answer.
	reportTime = 10 * time.Second
	// maxReport bounds what one node's report may take, in bytes: what link.MaxVolumes
	// volumes and as many snapshots have to say.
	maxReport = 64 << 20
)

// reports makes one report at a time.
type reports struct {
	most     int            // bytes of one node's; maxReport but in tests
	patience time.Duration  // with one node; reportTime but in tests
	busy     chan struct{}  // capacity 1; full while somebody makes one
	last     report.Cluster // guarded by busy
}

func newReports() reports {
	return reports{most: maxReport, patience: reportTime, busy: make(chan struct{}, 1)}
}

// Report asks all linked nodes what is on them. It is at most 3 s old. A node that
// does not answer is in it with the reason; the error is ctx's. The lists are shared,
// and not to be changed.
func (r *Router) Report(ctx context.Context) (report.Cluster, error) {
	select {
	case r.reports.busy <- struct{}{}:
	case <-ctx.Done():
		return report.Cluster{}, ctx.Err()
	}
	defer func() { <-r.reports.busy }()
	if now := r.cfg.Now(); r.reports.last.Nodes == nil || now.Sub(r.reports.last.Time) >= reportAge {
		c := r.look(ctx)
		if err := ctx.Err(); err != nil {
			return report.Cluster{}, err
		}
		c.Time = now
		r.reports.last = c
	}
	return r.reports.last, nil
}

func (r *Router) look(ctx context.Context) report.Cluster {
	c := report.Cluster{Driver: r.cfg.Driver, Version: r.cfg.Version, Nodes: []report.Node{}}
	sessions := map[string]*session{}
	for _, p := range r.table.all() {
		if p.session != nil {
			sessions[p.node] = p.session
		}
	}
	for _, n := range r.Nodes() {
		c.Nodes = append(c.Nodes, report.Node{Name: n.Name, State: n.State, Since: n.Since, Version: n.Version, Pod: n.Pod})
	}
	var group errgroup.Group
	group.SetLimit(orphanAsk)
	for i := range c.Nodes {
		n := &c.Nodes[i]
		s := sessions[n.Name]
		if s == nil {
			if n.State == report.Linked { // it came or went between the two lists
				n.Error = "its link is new or has just ended: ask again"
			}
			continue
		}
		group.Go(func() error {
			ctx, cancel := context.WithTimeout(ctx, r.reports.patience)
			defer cancel()
			var err error
			if n.Machine, err = r.reportOf(ctx, s); err != nil {
				n.Error = err.Error()
			}
			return nil
		})
	}
	_ = group.Wait()
	slices.SortFunc(c.Nodes, func(a, b report.Node) int { return cmp.Compare(a.Name, b.Name) })
	return c
}

// reportOf asks one node, page by page. What it says of others' pools is left out.
func (r *Router) reportOf(ctx context.Context, s *session) (m report.Machine, err error) {
	total := 0
	for next := ""; ; {
		p, err := callService(ctx, s, link.ReportService, link.ReportMethod, func(ctx context.Context, opts ...grpc.CallOption) (report.Page, error) {
			p, size, err := link.FetchReport(ctx, s.grpc, next, opts...)
			total += size
			return p, err
		})
		if err != nil {
			return m, err
		}
		if total > r.reports.most {
			return m, fmt.Errorf("it says more than %d bytes", r.reports.most)
		}
		p = r.ownPage(s, p)
		if err := r.still(s); err != nil {
			return m, err
		}
		m.Add(p)
		switch {
		case p.Next == "":
			return m, nil
		case p.Next == next, len(m.Pools) > 2*link.MaxPools, len(m.Volumes)+len(m.Snapshots) > 2*link.MaxVolumes,
			len(m.Templates)+len(m.Copies) > 2*report.MaxTemplates:
			return m, errors.New("it does not keep to pages")
		}
		next = p.Next
	}
}

// ownPage is what a node says, without what it says of others' pools.
func (r *Router) ownPage(s *session, p report.Page) report.Page {
	p.Pools = slices.DeleteFunc(p.Pools, func(p report.Pool) bool { return p.ID != "" && !r.table.owns(s, p.ID) })
	p.Volumes = slices.DeleteFunc(p.Volumes, func(v report.Volume) bool { return r.foreign(s, v.ID) })
	p.Snapshots = slices.DeleteFunc(p.Snapshots, func(v report.Snapshot) bool { return r.foreign(s, v.ID) })
	p.Templates = slices.DeleteFunc(p.Templates, func(v report.Template) bool { return r.foreign(s, v.ID) })
	return p
}

// foreign says whether an ID is of a pool that another node has. IDs of mapped volumes
// are of no pool.
func (r *Router) foreign(s *session, id string) bool {
	poolID, is := poolOf(id)
	if !is {
		return strings.TrimSpace(id) == ""
	}
	place, known := r.table.pool(poolID)
	return known && place.node != s.id.Node
}
