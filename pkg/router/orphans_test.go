package router

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/csi-loop/csi-loop/pkg/router/link"
)

const uid = "0b6ca5f0-7c1d-4f1e-9d1a-0123456789ab"

// What is an orphan, and what is not.
func TestJudge(t *testing.T) {
	pool := strings.Repeat("a", 20)
	for name, tt := range map[string]struct {
		volume string
		refs   References
		reason string
		pv     string
	}{
		"neither claim nor PV": {"pvc-" + uid, References{}, OrphanUnclaimed, ""},
		"being provided for":   {"pvc-" + uid, References{Claims: map[string]string{uid: ""}}, "", ""},
		"its PV was lost, and its claim waits for it": {
			"pvc-" + uid, References{Claims: map[string]string{uid: "pvc-" + uid}}, "", "",
		},
		"its claim has another volume": {
			"pvc-" + uid, References{Claims: map[string]string{uid: "pvc-" + uid}, PVs: map[string]string{"pvc-" + uid: pool + "b.pvc-" + uid}}, OrphanElsewhere, "pvc-" + uid,
		},
		"its claim has another PV": {
			"pvc-" + uid, References{Claims: map[string]string{uid: "by-hand"}, PVs: map[string]string{"by-hand": ""}}, OrphanElsewhere, "by-hand",
		},
		"its claim is gone, its PV means another volume": {
			"pvc-" + uid, References{PVs: map[string]string{"pvc-" + uid: "b.x"}}, OrphanElsewhere, "pvc-" + uid,
		},
		"another prefix":                {"data-" + uid, References{Claims: map[string]string{uid: ""}}, "", ""},
		"made by hand":                  {"scratch", References{Claims: map[string]string{uid: "", "": ""}}, OrphanUnclaimed, ""},
		"claims of others do not count": {"pvc-" + uid, References{Claims: map[string]string{strings.Replace(uid, "0", "1", 1): ""}}, OrphanUnclaimed, ""},
	} {
		t.Run(name, func(t *testing.T) {
			if reason, pv := tt.refs.judge(pool + "." + tt.volume); reason != tt.reason || pv != tt.pv {
				t.Errorf("%q, %q", reason, pv)
			}
		})
	}
}

func ids(report OrphanReport) []string {
	var all []string
	for _, v := range report.Orphans {
		all = append(all, v.ID)
	}
	slices.Sort(all)
	return all
}

// An orphan is reported, counts after a minute, and is removed when somebody asks:
// that one and no other.
func TestOrphans(t *testing.T) {
	c := newCluster(t)
	p, q := newDisk(t, "default", gib), newDisk(t, "default", gib)
	p.volumes["pvc-used"], p.volumes["pvc-"+uid], p.volumes["lost"] = 1, 1, 5
	q.volumes["other"] = 1
	a, b := c.node("a", p).up(), c.node("b", q)
	c.roster.set("b", true)
	c.linked(a)
	c.claims.set(func(r *References) {
		r.PVs["pv"], r.Claims[uid] = p.id+".pvc-used", ""
	})
	ctx, admin := t.Context(), Admin{Conn: c.conn}
	report, err := admin.Orphans(ctx)
	must(t, err)
	lost := p.id + ".lost"
	if !slices.Equal(ids(report), []string{lost}) || !slices.Equal(report.Unseen, []string{"b"}) {
		t.Fatalf("%+v", report)
	}
	if v := report.Orphans[0]; v.Node != "a" || v.Size != 5 || v.Reason != OrphanUnclaimed || time.Since(v.Since) > time.Minute {
		t.Errorf("%+v", v)
	}
	if n := len(c.router.Stats().Orphans.Orphans); n != 0 {
		t.Errorf("%d count at once", n)
	}
	refused := func(id string, words ...string) {
		t.Helper()
		err := admin.RemoveOrphan(ctx, id)
		for _, w := range words {
			if err == nil || !strings.Contains(err.Error(), w) {
				t.Errorf("%s: %v does not say %q", id, err, w)
			}
		}
	}
	refused(lost, "known", "only")
	c.clock.advance(orphanAge + time.Second)
	refused(p.id+".pvc-used", "not an orphan")
	refused(p.id+".pvc-"+uid, "not an orphan")
	refused(q.id+".other", "not an orphan", "b")
	refused("nonsense", "not an orphan")
	c.claims.set(func(*References) { c.claims.err = errors.New("the API server is away") })
	refused(lost, "API server is away")
	c.claims.set(func(*References) { c.claims.err = nil })
	// A PV was made for it meanwhile: from a backup, perhaps.
	c.claims.set(func(r *References) { r.PVs["again"] = lost })
	refused(lost, "not an orphan")
	c.claims.set(func(r *References) { delete(r.PVs, "again") })
	refused(lost, "known") // it is one anew
	c.clock.advance(orphanAge + time.Second)
	_, err = admin.Orphans(ctx)
	must(t, err)
	if n := len(c.router.Stats().Orphans.Orphans); n != 1 {
		t.Errorf("%d count", n)
	}
	must(t, admin.RemoveOrphan(ctx, lost))
	if p.has("lost") || !p.has("pvc-used") || !q.has("other") {
		t.Error("not that one, or not only that one")
	}
	b.up()
	c.linked(a, b)
	report, err = admin.Orphans(ctx)
	must(t, err)
	if !slices.Equal(ids(report), []string{q.id + ".other"}) || len(report.Unseen) > 0 {
		t.Fatalf("%+v", report)
	}
	// A node that is away for a moment does not make its orphans younger.
	first := report.Orphans[0].Since
	b.stop()
	c.linked(a)
	_, err = admin.Orphans(ctx)
	must(t, err)
	b.up()
	c.linked(a, b)
	if report, err = admin.Orphans(ctx); err != nil || !report.Orphans[0].Since.Equal(first) {
		t.Errorf("%+v, %v", report, err)
	}
}

// Nodes are listed with what they brought, those too that should be there.
func TestNodes(t *testing.T) {
	c := newCluster(t)
	p := newDisk(t, "default", gib)
	p.volumes["x"] = 1
	clone := &fakePool{id: p.id, name: "default", key: p.key, volumes: map[string]int64{}, size: gib}
	a, b := c.node("a", p).up(), c.node("b", clone)
	c.linked(a)
	b.up()
	c.linked(a, b)
	c.roster.set("z", true)
	admin := Admin{Conn: c.conn}
	nodes, err := admin.Nodes(t.Context())
	must(t, err)
	if len(nodes) != 3 || nodes[0].State != NodeLinked || nodes[0].Version != "v-node" || nodes[0].Pod != "pod-a" || nodes[2].State != NodeMissing {
		t.Fatalf("%+v", nodes)
	}
	if got, want := nodes[0].Pools[0], (NodePool{ID: p.id, Name: "default", Volumes: 1, Free: gib - 1}); got != want {
		t.Errorf("%+v", got)
	}
	if got := nodes[1].Pools[0]; got.ServedBy != "a" {
		t.Errorf("%+v", got)
	}
	a.stop()
	c.linked(b)
	if nodes, err = admin.Nodes(t.Context()); err != nil || nodes[0].State != NodeAway || nodes[0].Since.IsZero() {
		t.Errorf("%+v, %v", nodes, err)
	}
	if s := c.router.Stats(); s.Away != 2 || s.Linked != 1 {
		t.Errorf("%+v", s)
	}
	// Who asks something else that answers on a socket is told so.
	var none struct{}
	if err := admin.ask(t.Context(), "Nonsense", nil, &none); err == nil || !strings.Contains(err.Error(), "controller") {
		t.Error(err)
	}
	_, err = c.router.answer(t.Context(), "Nonsense", nil)
	code(t, err, codes.Unimplemented)
}

// deaf lists its volumes as answer says.
type deaf struct {
	*fakeNode

	answer func(ctx context.Context, req *csi.ListVolumesRequest) (*csi.ListVolumesResponse, error)
}

func (d deaf) ListVolumes(ctx context.Context, req *csi.ListVolumesRequest) (*csi.ListVolumesResponse, error) {
	return d.answer(ctx, req)
}

// A node that never answers is waited for no longer than orphanTime, and whoever asks
// meanwhile no longer than it wants to.
func TestOrphansOfADeafNode(t *testing.T) {
	c := newCluster(t)
	asked := make(chan context.Context, 1)
	a := c.node("a", newDisk(t, "default", gib))
	a.handler = deaf{a, func(ctx context.Context, _ *csi.ListVolumesRequest) (*csi.ListVolumesResponse, error) {
		asked <- ctx
		<-ctx.Done()
		return nil, ctx.Err()
	}}
	c.linked(a.up())
	ctx, cancel := context.WithCancel(t.Context())
	first := make(chan error, 1)
	go func() {
		_, err := c.router.Orphans(ctx)
		first <- err
	}()
	deadline, bounded := (<-asked).Deadline()
	if !bounded || time.Until(deadline) > orphanTime {
		t.Errorf("waits until %s (%t)", deadline, bounded)
	}
	impatient, end := context.WithTimeout(t.Context(), time.Millisecond)
	defer end()
	second := make(chan error, 1)
	go func() {
		_, err := c.router.Orphans(impatient)
		second <- err
	}()
	select {
	case err := <-second:
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Error("waits for the other")
	}
	cancel()
	if err := <-first; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// A node that has no end of volumes is not looked at, and not kept.
func TestOrphansWithoutEnd(t *testing.T) {
	c := newCluster(t)
	a := c.node("a", newDisk(t, "default", gib))
	pages := 0
	a.handler = deaf{a, func(_ context.Context, req *csi.ListVolumesRequest) (*csi.ListVolumesResponse, error) {
		pages++
		resp := &csi.ListVolumesResponse{NextToken: req.GetStartingToken() + "x"}
		for range pageMost {
			resp.Entries = append(resp.Entries, &csi.ListVolumesResponse_Entry{Volume: &csi.Volume{VolumeId: a.pools[0].id + ".x"}})
		}
		return resp, nil
	}}
	c.linked(a.up())
	report, err := c.router.Orphans(t.Context())
	must(t, err)
	if len(report.Unseen) != 1 || len(report.Orphans) != 0 || pages > link.MaxVolumes/pageMost+1 {
		t.Errorf("%d orphans after %d pages, not looked at: %q", len(report.Orphans), pages, report.Unseen)
	}
}
