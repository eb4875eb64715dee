package router

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/csi-loop/csi-loop/pkg/image"
	"github.com/csi-loop/csi-loop/pkg/router/link"
)

func TestVolumeLife(t *testing.T) {
	c := newCluster(t)
	a, b := c.node("a", newDisk(t, "default", 10*gib)).up(), c.node("b", newDisk(t, "default", 20*gib)).up()
	c.linked(a, b)
	ctx := t.Context()
	if resp, err := c.ident.Probe(ctx, &csi.ProbeRequest{}); err != nil || !resp.GetReady().GetValue() {
		t.Fatal(resp, err)
	}
	resp, err := c.csi.CreateVolume(ctx, create("pvc-1", gib, a))
	must(t, err)
	id := resp.GetVolume().GetVolumeId()
	if !a.pools[0].has("pvc-1") || resp.GetVolume().GetAccessibleTopology()[0].GetSegments()["topology."+driver+"/node"] != "a" {
		t.Fatalf("not on node a: %v", resp)
	}
	again, err := c.csi.CreateVolume(ctx, create("pvc-1", gib, a))
	must(t, err)
	if again.GetVolume().GetVolumeId() != id {
		t.Fatalf("a second volume: %v", again)
	}
	grown, err := c.csi.ControllerExpandVolume(ctx, &csi.ControllerExpandVolumeRequest{VolumeId: id, CapacityRange: &csi.CapacityRange{RequiredBytes: 2 * gib}})
	must(t, err)
	if grown.GetCapacityBytes() != 2*gib {
		t.Fatal(grown)
	}
	_, err = c.csi.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: id})
	must(t, err)
	if a.pools[0].has("pvc-1") {
		t.Fatal("not deleted")
	}
	eventually(t, "the name is free", func() bool { return len(c.router.table.volume("pvc-1")) == 0 })
}

// Without a topology the roomiest node that has the pool gets the volume, and a full
// one leaves it to the next.
func TestImmediate(t *testing.T) {
	c := newCluster(t)
	a := c.node("a", newDisk(t, "default", 10*gib)).up()
	b := c.node("b", newDisk(t, "default", 20*gib), newDisk(t, "fast", gib)).up()
	c.linked(a, b)
	ctx := t.Context()
	_, err := c.csi.CreateVolume(ctx, create("x", gib, nil))
	must(t, err)
	if !b.pools[0].has("x") {
		t.Fatal("not on the roomiest node")
	}
	fast := create("y", gib, nil)
	fast.Parameters = map[string]string{"pool": "fast"}
	_, err = c.csi.CreateVolume(ctx, fast)
	must(t, err)
	if !b.pools[1].has("y") {
		t.Fatal("not in the pool asked for")
	}
	fast.Name = "z"
	_, err = c.csi.CreateVolume(ctx, fast)
	code(t, err, codes.ResourceExhausted)
	none := create("n", gib, nil)
	none.Parameters = map[string]string{"pool": "none"}
	_, err = c.csi.CreateVolume(ctx, none)
	code(t, err, codes.InvalidArgument, `"none"`)
	// What the router believes of b's space is out of date: it falls back on a.
	b.hook = func(context.Context, string) error { return status.Error(codes.ResourceExhausted, "full after all") }
	_, err = c.csi.CreateVolume(ctx, create("w", gib, nil))
	must(t, err)
	if !a.pools[0].has("w") {
		t.Fatal("not on the other node")
	}
}

// The topology's order is kept, and a list of nodes is tried to its end.
func TestTopologies(t *testing.T) {
	c := newCluster(t)
	a, b := c.node("a", newDisk(t, "default", gib)).up(), c.node("b", newDisk(t, "default", 20*gib)).up()
	c.linked(a, b)
	both := create("x", gib, nil)
	both.AccessibilityRequirements = &csi.TopologyRequirement{Requisite: slices.Concat(b.topology(), a.topology()), Preferred: a.topology()}
	_, err := c.csi.CreateVolume(t.Context(), both)
	must(t, err)
	if !a.pools[0].has("x") {
		t.Fatal("not on the preferred node")
	}
	both.Name = "y"
	_, err = c.csi.CreateVolume(t.Context(), both)
	must(t, err)
	if !b.pools[0].has("y") {
		t.Fatal("not on the other node")
	}
	foreign := create("z", gib, nil)
	foreign.AccessibilityRequirements = &csi.TopologyRequirement{Requisite: []*csi.Topology{{Segments: map[string]string{"zone": "z"}}}}
	_, err = c.csi.CreateVolume(t.Context(), foreign)
	code(t, err, codes.ResourceExhausted)
}

// The table of design section 6: what is answered while a node is away.
func TestAway(t *testing.T) {
	c := newCluster(t)
	a, b := c.node("a", newDisk(t, "default", 10*gib)).up(), c.node("b", newDisk(t, "default", 10*gib)).up()
	c.linked(a, b)
	ctx := t.Context()
	resp, err := c.csi.CreateVolume(ctx, create("pvc-1", gib, a))
	must(t, err)
	id := resp.GetVolume().GetVolumeId()
	eventually(t, "free space is pushed", func() bool {
		room, _ := c.router.table.roomAt("a", "", false)
		return room.free == 9*gib
	})
	a.stop()
	c.linked(b)

	capability := []*csi.VolumeCapability{{}}
	never := strings.Repeat("a", 20) + ".pvc-9" // a pool that was never seen
	calls := map[string]func(id string) error{
		"DeleteVolume": func(id string) error {
			_, err := c.csi.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: id})
			return err
		},
		"ControllerExpandVolume": func(id string) error {
			_, err := c.csi.ControllerExpandVolume(ctx, &csi.ControllerExpandVolumeRequest{VolumeId: id, CapacityRange: &csi.CapacityRange{}})
			return err
		},
		"ControllerGetVolume": func(id string) error {
			_, err := c.csi.ControllerGetVolume(ctx, &csi.ControllerGetVolumeRequest{VolumeId: id})
			return err
		},
		"ControllerModifyVolume": func(id string) error {
			_, err := c.csi.ControllerModifyVolume(ctx, &csi.ControllerModifyVolumeRequest{VolumeId: id})
			return err
		},
		"ControllerGetVolumeHealth": func(id string) error {
			_, err := c.csi.ControllerGetVolumeHealth(ctx, &csi.ControllerGetVolumeHealthRequest{VolumeId: id})
			return err
		},
		"ValidateVolumeCapabilities": func(id string) error {
			_, err := c.csi.ValidateVolumeCapabilities(ctx, &csi.ValidateVolumeCapabilitiesRequest{VolumeId: id, VolumeCapabilities: capability})
			return err
		},
		"CreateSnapshot": func(id string) error {
			_, err := c.csi.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: "s", SourceVolumeId: id})
			return err
		},
		"DeleteSnapshot": func(id string) error {
			_, err := c.csi.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: id})
			return err
		},
		"GetSnapshot": func(id string) error {
			_, err := c.csi.GetSnapshot(ctx, &csi.GetSnapshotRequest{SnapshotId: id})
			return err
		},
		"ListSnapshots by ID": func(id string) error {
			_, err := c.csi.ListSnapshots(ctx, &csi.ListSnapshotsRequest{SnapshotId: id})
			return err
		},
		"ListSnapshots by volume": func(id string) error {
			_, err := c.csi.ListSnapshots(ctx, &csi.ListSnapshotsRequest{SourceVolumeId: id})
			return err
		},
		"CreateVolume from it": func(id string) error {
			req := create("clone", gib, b)
			req.VolumeContentSource = &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Volume{Volume: &csi.VolumeContentSource_VolumeSource{VolumeId: id}}}
			_, err := c.csi.CreateVolume(ctx, req)
			return err
		},
	}
	unknown := map[string]codes.Code{
		"DeleteVolume": codes.OK, "DeleteSnapshot": codes.OK, "ListSnapshots by ID": codes.OK, "ListSnapshots by volume": codes.OK,
	}
	for name, do := range calls {
		t.Run(name, func(t *testing.T) {
			code(t, do(id), codes.Unavailable, `"a"`)
			code(t, do(never), codes.Unavailable)
			want, ok := unknown[name]
			if !ok {
				want = codes.NotFound
			}
			for _, malformed := range []string{"nonsense", "x.y", strings.Repeat("a", 20), strings.Repeat("a", 20) + ".", "../../etc", id + strings.Repeat("x", 128)} {
				code(t, do(malformed), want)
			}
			if err := do(""); want != codes.OK || strings.Contains(name, "Delete") {
				if got := status.Code(err); got != codes.InvalidArgument {
					t.Errorf("no ID: %v", err)
				}
			}
		})
	}

	capacityOf := func() int64 {
		resp, err := c.csi.GetCapacity(ctx, &csi.GetCapacityRequest{AccessibleTopology: a.topology()[0]})
		must(t, err)
		return resp.GetAvailableCapacity()
	}
	if got := capacityOf(); got != 9*gib {
		t.Errorf("capacity just after: %d", got)
	}
	_, err = c.csi.CreateVolume(ctx, create("pvc-2", gib, a))
	code(t, err, codes.Unavailable, `"a"`)
	_, err = c.csi.CreateVolume(ctx, create("pvc-1", gib, nil))
	code(t, err, codes.Unavailable, `"a"`)
	_, err = c.csi.CreateVolume(ctx, create("pvc-1", gib, b))
	code(t, err, codes.Unavailable, `"a"`)
	_, err = c.csi.ListVolumes(ctx, &csi.ListVolumesRequest{})
	code(t, err, codes.Unavailable, "a")
	_, err = c.csi.ControllerListVolumeHealth(ctx, &csi.ControllerListVolumeHealthRequest{})
	code(t, err, codes.Unavailable, "a")
	_, err = c.csi.ListSnapshots(ctx, &csi.ListSnapshotsRequest{})
	code(t, err, codes.Unavailable, "a")

	c.clock.advance(Grace)
	if got := capacityOf(); got != 0 {
		t.Errorf("capacity a minute after: %d", got)
	}
	_, err = c.csi.CreateVolume(ctx, create("pvc-2", gib, a))
	code(t, err, codes.ResourceExhausted, `"a"`)
	_, err = c.csi.CreateVolume(ctx, create("pvc-1", gib, a))
	code(t, err, codes.ResourceExhausted, `"a"`)
	_, err = c.csi.CreateVolume(ctx, create("pvc-1", gib, nil))
	code(t, err, codes.Unavailable, `"a"`) // nobody chose another node
	_, err = c.csi.CreateVolume(ctx, create("pvc-1", gib, b))
	must(t, err) // the scheduler did
	code(t, calls["DeleteVolume"](id), codes.Unavailable)
	_, err = c.csi.CreateVolume(ctx, create("pvc-3", gib, nil))
	must(t, err)
	if !b.pools[0].has("pvc-3") {
		t.Error("not on the node that is left")
	}

	// The node left the cluster: it is not waited for any more.
	c.roster.set("a", false)
	c.router.forget()
	_, err = c.csi.ListVolumes(ctx, &csi.ListVolumesRequest{})
	must(t, err)
	code(t, calls["DeleteVolume"](id), codes.Unavailable)
}

// A node that is registered and has never linked counts as away since the start.
func TestAwaySinceStart(t *testing.T) {
	c := newCluster(t)
	b := c.node("b", newDisk(t, "default", 10*gib)).up()
	a := c.node("a", newDisk(t, "default", 10*gib))
	c.linked(b)
	ctx := t.Context()
	_, err := c.csi.CreateVolume(ctx, create("x", gib, a))
	code(t, err, codes.Unavailable)
	_, err = c.csi.CreateVolume(ctx, create("x", gib, nil))
	code(t, err, codes.Unavailable, "a")
	_, err = c.csi.ListVolumes(ctx, &csi.ListVolumesRequest{})
	code(t, err, codes.Unavailable, "a")
	_, err = c.csi.GetCapacity(ctx, &csi.GetCapacityRequest{AccessibleTopology: a.topology()[0]})
	code(t, err, codes.Unavailable)
	c.clock.advance(Grace)
	_, err = c.csi.CreateVolume(ctx, create("x", gib, a))
	code(t, err, codes.ResourceExhausted)
	_, err = c.csi.CreateVolume(ctx, create("x", gib, nil))
	must(t, err)
	got, err := c.csi.GetCapacity(ctx, &csi.GetCapacityRequest{AccessibleTopology: a.topology()[0]})
	if err != nil || got.GetAvailableCapacity() != 0 {
		t.Fatal(got, err)
	}
}

func TestCapacity(t *testing.T) {
	c := newCluster(t)
	a, b := c.node("a", newDisk(t, "default", 10*gib)).up(), c.node("b", newDisk(t, "default", 5*gib)).up()
	c.linked(a, b)
	for name, tt := range map[string]struct {
		req  *csi.GetCapacityRequest
		want int64
	}{
		"a node":         {&csi.GetCapacityRequest{AccessibleTopology: a.topology()[0]}, 10 * gib},
		"another node":   {&csi.GetCapacityRequest{AccessibleTopology: b.topology()[0]}, 5 * gib},
		"the cluster":    {&csi.GetCapacityRequest{}, 15 * gib},
		"thin":           {&csi.GetCapacityRequest{Parameters: map[string]string{"allocation": "thin"}}, 30 * gib},
		"no such pool":   {&csi.GetCapacityRequest{AccessibleTopology: a.topology()[0], Parameters: map[string]string{"pool": "p"}}, 0},
		"other topology": {&csi.GetCapacityRequest{AccessibleTopology: &csi.Topology{Segments: map[string]string{"zone": "z"}}}, 0},
	} {
		got, err := c.csi.GetCapacity(t.Context(), tt.req)
		if err != nil || got.GetAvailableCapacity() != tt.want {
			t.Errorf("%s: %v, %v; want %d", name, got, err, tt.want)
		}
	}
}

func TestListPages(t *testing.T) {
	c := newCluster(t)
	var nodes []*fakeNode
	var want []string
	for i := range 3 {
		p := newDisk(t, "default", 10*gib)
		for v := range i * 4 {
			p.volumes[fmt.Sprintf("v%d", v)] = 1
			want = append(want, image.VolumeID(p.id, fmt.Sprintf("v%d", v)))
		}
		nodes = append(nodes, c.node(fmt.Sprintf("n%d", i), p).up())
	}
	c.linked(nodes...)
	slices.Sort(want)
	for _, limit := range []int32{0, 1, 3, 4, 5, 12, 100} {
		var got []string
		token := ""
		for {
			resp, err := c.csi.ListVolumes(t.Context(), &csi.ListVolumesRequest{StartingToken: token, MaxEntries: limit})
			must(t, err)
			if limit > 0 && len(resp.GetEntries()) > int(limit) {
				t.Fatalf("%d entries on a page of %d", len(resp.GetEntries()), limit)
			}
			for _, e := range resp.GetEntries() {
				got = append(got, e.GetVolume().GetVolumeId())
			}
			if token = resp.GetNextToken(); token == "" {
				break
			}
		}
		slices.Sort(got)
		if !slices.Equal(got, want) {
			t.Errorf("pages of %d: %d entries, want %d", limit, len(got), len(want))
		}
	}
	// A volume that goes between two pages hides no other.
	first, err := c.csi.ListVolumes(t.Context(), &csi.ListVolumesRequest{MaxEntries: 2})
	must(t, err)
	_, err = c.csi.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: first.GetEntries()[1].GetVolume().GetVolumeId()})
	must(t, err)
	second, err := c.csi.ListVolumes(t.Context(), &csi.ListVolumesRequest{StartingToken: first.GetNextToken()})
	if err != nil || len(second.GetEntries()) != len(want)-2 {
		t.Errorf("%d entries behind the first two of %d: %v", len(second.GetEntries()), len(want), err)
	}
	for _, token := range []string{"x", "!!!", position{"", "x"}.encode()} {
		_, err = c.csi.ListVolumes(t.Context(), &csi.ListVolumesRequest{StartingToken: token})
		code(t, err, codes.Aborted)
	}
	_, err = c.csi.ListVolumes(t.Context(), &csi.ListVolumesRequest{MaxEntries: -1})
	code(t, err, codes.InvalidArgument)
}

// An older node lacks a method: it has to be upgraded, nothing is "unimplemented".
func TestOlderNode(t *testing.T) {
	c := newCluster(t)
	a := c.node("a", newDisk(t, "default", gib)).up()
	b := c.node("b", newDisk(t, "default", gib))
	b.register = func(r grpc.ServiceRegistrar) {
		desc := csi.Controller_ServiceDesc
		desc.Methods = slices.DeleteFunc(slices.Clone(desc.Methods), func(m grpc.MethodDesc) bool { return m.MethodName == "ControllerGetVolume" })
		r.RegisterService(&desc, b)
	}
	b.up()
	c.linked(a, b)
	_, err := c.csi.ControllerGetVolume(t.Context(), &csi.ControllerGetVolumeRequest{VolumeId: b.pools[0].id + ".v"})
	code(t, err, codes.Unavailable, `"b"`, "upgrade")
	// Known, and not implemented.
	_, err = c.csi.ControllerModifyVolume(t.Context(), &csi.ControllerModifyVolumeRequest{VolumeId: a.pools[0].id + ".v"})
	code(t, err, codes.Unavailable, `"a"`, "upgrade")
	// What the controller does not offer is no matter of nodes.
	c.router.cfg.Controller = nil
	_, err = c.csi.ControllerModifyVolume(t.Context(), &csi.ControllerModifyVolumeRequest{VolumeId: a.pools[0].id + ".v"})
	code(t, err, codes.Unimplemented)
}

// Codes that the link makes are not the node's.
func TestLinkCodes(t *testing.T) {
	c := newCluster(t)
	a := c.node("a", newDisk(t, "default", gib)).up()
	c.linked(a)
	place, _ := c.router.table.node("a")
	for _, size := range []int{link.MaxMessage + 1, link.MaxAnswer + 1} { // too large to ask, and to answer
		huge := &csi.ControllerGetVolumeRequest{VolumeId: strings.Repeat("x", size)}
		_, err := call(t.Context(), place.session, "ControllerGetVolume", huge, csi.ControllerClient.ControllerGetVolume)
		code(t, err, codes.Unavailable, `"a"`)
	}
	// The node's own word stays.
	for _, want := range []codes.Code{codes.ResourceExhausted, codes.NotFound, codes.Internal, codes.Aborted, codes.Unavailable} {
		a.hook = func(context.Context, string) error { return status.Error(want, "its own word") }
		_, err := c.csi.ControllerGetVolume(t.Context(), &csi.ControllerGetVolumeRequest{VolumeId: a.pools[0].id + ".v"})
		code(t, err, want, "its own word")
	}
}

// The caller's deadline reaches the node, and a node that is slow holds up nobody.
func TestSlowNode(t *testing.T) {
	c := newCluster(t)
	a, b := c.node("a", newDisk(t, "default", 10*gib)).up(), c.node("b", newDisk(t, "default", 10*gib)).up()
	c.linked(a, b)
	deadlines := make(chan time.Duration, 100)
	a.hook = func(ctx context.Context, _ string) error {
		d, _ := ctx.Deadline()
		deadlines <- time.Until(d)
		<-ctx.Done()
		return status.FromContextError(ctx.Err()).Err()
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	slow := make(chan error, 50)
	for i := range cap(slow) {
		go func() {
			_, err := c.csi.CreateVolume(ctx, create(fmt.Sprintf("slow-%d", i), 1, a))
			slow <- err
		}()
	}
	for range cap(slow) {
		if d := <-deadlines; d < 50*time.Second || d > time.Minute {
			t.Fatalf("deadline in %s", d)
		}
	}
	start := time.Now()
	for i := range 50 {
		_, err := c.csi.CreateVolume(t.Context(), create(fmt.Sprintf("quick-%d", i), 1, b))
		must(t, err)
	}
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("50 calls to another node took %s", took)
	}
	// The same name, while its call runs.
	_, err := c.csi.CreateVolume(t.Context(), create("slow-1", 1, a))
	code(t, err, codes.Aborted)
	cancel()
	for range cap(slow) {
		code(t, <-slow, codes.Canceled)
	}
}
