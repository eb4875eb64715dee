package router

import (
	"context"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/csi-loop/csi-loop/pkg/report"
)

// lister lets something happen while it makes a list.
type lister struct {
	*fakeNode
	amid func()
}

func (n lister) ListVolumes(ctx context.Context, req *csi.ListVolumesRequest) (*csi.ListVolumesResponse, error) {
	n.amid()
	return n.fakeNode.ListVolumes(ctx, req)
}

func (n lister) ListSnapshots(context.Context, *csi.ListSnapshotsRequest) (*csi.ListSnapshotsResponse, error) {
	n.amid()
	return &csi.ListSnapshotsResponse{Entries: []*csi.ListSnapshotsResponse_Entry{{Snapshot: &csi.Snapshot{SnapshotId: n.pools[0].id + ".s"}}}}, nil
}

func (n lister) ControllerListVolumeHealth(context.Context, *csi.ControllerListVolumeHealthRequest) (*csi.ControllerListVolumeHealthResponse, error) {
	n.amid()
	return &csi.ControllerListVolumeHealthResponse{Entries: []*csi.VolumeHealth{{VolumeId: n.pools[0].id + ".x"}}}, nil
}

// A link that ends while its node answers does not make a list short: what is on the node
// is not gone.
func TestListOverALinkThatEnds(t *testing.T) {
	for name, list := range map[string]func(c *cluster, id string) error{
		"volumes": func(c *cluster, _ string) error {
			_, err := c.csi.ListVolumes(c.tb.Context(), &csi.ListVolumesRequest{})
			return err
		},
		"health": func(c *cluster, _ string) error {
			_, err := c.csi.ControllerListVolumeHealth(c.tb.Context(), &csi.ControllerListVolumeHealthRequest{})
			return err
		},
		"snapshots": func(c *cluster, _ string) error {
			_, err := c.csi.ListSnapshots(c.tb.Context(), &csi.ListSnapshotsRequest{})
			return err
		},
		"a snapshot": func(c *cluster, id string) error {
			_, err := c.csi.ListSnapshots(c.tb.Context(), &csi.ListSnapshotsRequest{SnapshotId: id})
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := newCluster(t)
			a := c.node("a", newDisk(t, "default", gib))
			a.pools[0].volumes["x"] = 1
			n := lister{a, func() {}}
			a.register = func(r grpc.ServiceRegistrar) { csi.RegisterControllerServer(r, &n) }
			a.up()
			c.linked(a)
			must(t, list(c, a.pools[0].id+".s"))
			p, _ := c.router.table.node("a")
			n.amid = func() { c.router.table.leave(p.session) }
			code(t, list(c, a.pools[0].id+".s"), codes.Unavailable, `"a"`)
		})
	}
}

// The same for the search for orphans, and for the report: both say that the node was not
// seen.
func TestSightOverALinkThatEnds(t *testing.T) {
	c := newCluster(t)
	a := c.node("a", newDisk(t, "default", gib))
	a.pools[0].volumes["x"] = 1
	n := lister{a, func() {}}
	a.register = func(r grpc.ServiceRegistrar) { csi.RegisterControllerServer(r, &n) }
	leaves := false
	a.hook = func(_ context.Context, step string) error {
		if p, _ := c.router.table.node("a"); step == "report" && leaves {
			c.router.table.leave(p.session)
		}
		return nil
	}
	c.linked(a.up())
	p, _ := c.router.table.node("a")
	n.amid = func() { c.router.table.leave(p.session) }
	orphans, err := c.router.Orphans(t.Context())
	if err != nil || len(orphans.Unseen) != 1 || orphans.Unseen[0] != "a" {
		t.Errorf("orphans: %+v, %v", orphans, err)
	}
	p.session.end(nil)
	c.linked(a)
	leaves = true
	r, err := c.router.Report(t.Context())
	if err != nil || len(r.Nodes) != 1 || r.Nodes[0].State != report.Linked || r.Nodes[0].Error == "" {
		t.Errorf("report: %+v, %v", r.Nodes, err)
	}
}

// Two volumes of one node are not on two because its link was replaced between two looks.
func TestGroupWhileALinkIsReplaced(t *testing.T) {
	c := newCluster(t)
	one, two := newDisk(t, "default", gib), newDisk(t, "data", gib)
	a := c.node("a", one, two).up()
	c.linked(a)
	tab := c.router.table
	tab.mu.Lock()
	before, n := tab.pools[two.id], *tab.nodes["a"]
	n.session = &session{id: n.session.id}
	tab.pools[two.id] = []*pool{{id: two.id, node: &n}}
	tab.mu.Unlock()
	_, err := c.groups.CreateVolumeGroupSnapshot(t.Context(), &csi.CreateVolumeGroupSnapshotRequest{Name: "g", SourceVolumeIds: []string{one.id + ".x", two.id + ".x"}})
	code(t, err, codes.Unavailable, "replaced")
	tab.mu.Lock()
	tab.pools[two.id] = before
	tab.mu.Unlock()
}
