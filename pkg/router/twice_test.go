package router

import (
	"context"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/csi-loop/csi-loop/pkg/image"
)

// amid is a request that may be met on any of some nodes, as allowedTopologies make it.
func amid(name string, nodes ...*fakeNode) *csi.CreateVolumeRequest {
	req := create(name, 1, nil)
	req.AccessibilityRequirements = &csi.TopologyRequirement{}
	for _, n := range nodes {
		req.AccessibilityRequirements.Requisite = append(req.AccessibilityRequirements.Requisite, n.topology()...)
	}
	req.AccessibilityRequirements.Preferred = req.GetAccessibilityRequirements().GetRequisite()
	return req
}

// A controller that was started anew does not know which of several nodes an earlier
// call went to: it waits for them all, for a while.
func TestRestartAmongTopologies(t *testing.T) {
	c := newCluster(t)
	a, b := c.node("a", newDisk(t, "default", gib)), c.node("b", newDisk(t, "default", gib)).up()
	a.pools[0].volumes["x"] = 1 // made, and the answer lost with the controller
	c.linked(b)
	ctx := t.Context()
	_, err := c.csi.CreateVolume(ctx, amid("x", b, a))
	code(t, err, codes.Unavailable, "a")
	if b.pools[0].has("x") {
		t.Fatal("a second volume")
	}
	_, err = c.csi.CreateVolume(ctx, amid("y", b)) // nobody else can have it
	must(t, err)
	a.up()
	c.linked(a, b)
	resp, err := c.csi.CreateVolume(ctx, amid("x", b, a))
	must(t, err)
	if want := image.VolumeID(a.pools[0].id, "x"); resp.GetVolume().GetVolumeId() != want {
		t.Errorf("got %q, want %q", resp.GetVolume().GetVolumeId(), want)
	}
	a.stop()
	c.linked(b)
	c.clock.advance(Grace)
	_, err = c.csi.CreateVolume(ctx, amid("z", a, b)) // no restart lately: the other node will do
	must(t, err)
}

// While the nodes of the cluster are not known, nobody can say whether one is missing.
func TestAnywhereWithoutRoster(t *testing.T) {
	c := newCluster(t)
	a := c.node("a", newDisk(t, "default", gib)).up()
	c.roster.mu.Lock()
	c.roster.registered, c.roster.unknown = map[string]bool{}, true
	c.roster.mu.Unlock()
	c.linked(a)
	ctx := t.Context()
	_, err := c.csi.CreateVolume(ctx, create("x", 1, nil))
	code(t, err, codes.Unavailable, "not known")
	_, err = c.csi.CreateVolume(ctx, amid("x", a, c.node("b")))
	code(t, err, codes.Unavailable, "not known")
	_, err = c.csi.CreateVolume(ctx, create("y", 1, a))
	must(t, err)
}

// pinned answers as a node's driver does: a volume that exists where the request does
// not point is another one.
type pinned struct{ *fakeNode }

func (n pinned) CreateVolume(ctx context.Context, req *csi.CreateVolumeRequest) (*csi.CreateVolumeResponse, error) {
	if n.poolNamed("").has(req.GetName()) && req.GetAccessibilityRequirements().GetRequisite()[0].GetSegments()["topology."+driver+"/node"] != n.name {
		return nil, status.Error(codes.AlreadyExists, "it is here")
	}
	return n.fakeNode.CreateVolume(ctx, req)
}

// A node was away for so long that the scheduler chose another, and is back with the
// volume before that one was asked.
func TestBackWithTheVolume(t *testing.T) {
	c := newCluster(t)
	a, b := c.node("a", newDisk(t, "default", gib)), c.node("b", newDisk(t, "default", gib)).up()
	a.handler = pinned{a}
	a.pools[0].volumes["x"] = 1
	a.up()
	c.linked(a, b)
	resp, err := c.csi.CreateVolume(t.Context(), create("x", 1, b))
	must(t, err)
	if want := image.VolumeID(b.pools[0].id, "x"); resp.GetVolume().GetVolumeId() != want {
		t.Errorf("got %q, want %q", resp.GetVolume().GetVolumeId(), want)
	}
}

// No volume is made in a copy of a pool that is refused: it would be in no list, and no
// call would find it.
func TestNoVolumeInARefusedCopy(t *testing.T) {
	c := newCluster(t)
	p := newDisk(t, "default", 10*gib)
	clone := &fakePool{id: p.id, name: p.name, key: p.key, volumes: map[string]int64{}, size: 20 * gib}
	a := c.node("a", p).up()
	c.linked(a)
	b := c.node("b", clone).up()
	c.linked(a, b)
	for name, req := range map[string]*csi.CreateVolumeRequest{"x": create("x", 1, b), "y": amid("y", b)} {
		_, err := c.csi.CreateVolume(t.Context(), req)
		code(t, err, codes.ResourceExhausted, `"a"`, `"b"`)
		if clone.has(name) {
			t.Errorf("%s was made in the copy", name)
		}
	}
}
