package router

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/csi-loop/csi-loop/pkg/report"
)

// fakeNotices is Kubernetes' volumes, and who listens.
type fakeNotices struct {
	mu    sync.Mutex
	bound []Bound
	fail  error
	told  []string
}

func (f *fakeNotices) Bound(context.Context) ([]Bound, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.bound), f.fail
}

func (f *fakeNotices) Tell(b Bound, n Notice) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.told = append(f.told, fmt.Sprintf("%s/%s %t %s: %s", b.Namespace, b.Name, n.Solved, n.Reason, n.Message))
}

// take returns what was told since the last time.
func (f *fakeNotices) take() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	told := f.told
	f.told = nil
	return told
}

func claimOf(id, node string) Bound {
	_, name, _ := strings.Cut(id, ".")
	return Bound{Volume: id, Node: node, Namespace: "shop", Name: name, UID: "uid-" + name}
}

// troubled is a cluster with a look at it.
type troubled struct {
	*cluster
	t *testing.T
	n notices
}

// look looks a while later, and returns what was told.
func (w *troubled) look(after time.Duration, fresh bool) []string {
	w.t.Helper()
	w.clock.advance(max(after, reportAge))
	got, err := w.router.tellProblems(w.t.Context(), &w.n)
	must(w.t, err)
	if got != fresh {
		w.t.Errorf("there is something to confirm: %v", got)
	}
	return w.told.take()
}

func (w *troubled) wantTold(got []string, want ...string) {
	w.t.Helper()
	if len(got) != len(want) {
		w.t.Fatalf("told %q, want %q", got, want)
	}
	for i := range want {
		if !strings.HasPrefix(got[i], want[i]) {
			w.t.Errorf("told %q, want %q", got[i], want[i])
		}
	}
}

// A problem is told when it is there for a while, to its claim alone, again after half
// an hour, and its end is told once.
func TestProblemsAreTold(t *testing.T) {
	w := &troubled{cluster: newCluster(t), t: t}
	p := newDisk(t, "default", gib)
	a := w.node("n1", p)
	w.linked(a.up())
	sick, well := p.id+".sick", p.id+".well"
	w.told.bound = []Bound{claimOf(sick, "n1"), claimOf(well, "n1")}
	say := func(problems ...report.Problem) {
		a.says.Store(&report.Machine{Pools: []report.Pool{{Name: "default", ID: p.id}}, Volumes: []report.Volume{
			{ID: sick, Pool: "default", Problems: problems}, {ID: well, Pool: "default"},
		}})
	}
	lost := report.Problem{Kind: report.DataLoss, Reason: "ImageMissing", Message: "its image does not exist"}
	say()
	w.wantTold(w.look(0, false))
	say(lost)
	w.wantTold(w.look(0, true)) // it may be over in a moment
	say()
	w.wantTold(w.look(0, false)) // and was
	say(lost)
	w.wantTold(w.look(0, true))
	w.wantTold(w.look(noticeConfirm, false), "shop/sick false ImageMissing: its image does not exist (node n1, volume "+sick+")")
	w.wantTold(w.look(5*time.Minute, false))
	say(lost, report.Problem{Kind: report.Degraded, Reason: "NotFullyAllocated", Message: "m"})
	w.wantTold(w.look(0, true))
	w.wantTold(w.look(noticeConfirm, false), "shop/sick false NotFullyAllocated: m")
	w.wantTold(w.look(noticeAgain-time.Minute, false), "shop/sick false ImageMissing")

	// Nobody knows while the node is away.
	a.stop()
	w.linked()
	w.wantTold(w.look(0, false))
	w.linked(a.up())
	w.wantTold(w.look(0, false))
	say()
	w.wantTold(w.look(0, false), "shop/sick true VolumeRecovered")
	w.wantTold(w.look(0, false))
}

// What a node does not have is told with the reason.
func TestMissingVolumesAreTold(t *testing.T) {
	for name, c := range map[string]struct {
		pools []report.Pool
		node  string
		want  string
	}{
		"its pool is absent": {
			[]report.Pool{{Name: "disk2", Problems: []report.Problem{{Kind: report.Inaccessible, Reason: "PoolAbsent", Message: "/mnt/disk2 is not a mount point"}}}},
			"n1",
			`false PoolAbsent: its pool is not there. Pool "disk2" is absent: /mnt/disk2 is not a mount point (node n1`,
		},
		"nobody knows its pool": {nil, "n1", "false PoolMissing: the node has no pool with the ID"},
		"its node is gone":      {nil, "n2", "false NodeGone: the node is not in the cluster any more"},
		"its node is away":      {nil, "n3", ""},
		"nobody knows its node": {nil, "", ""},
		"its pool is sick": {
			[]report.Pool{{Name: "default", Problems: []report.Problem{{Kind: report.Inaccessible, Reason: "PoolFilesystem", Message: "read-only"}, {Kind: report.Degraded, Reason: "ReserveUsed"}}}},
			"known",
			"false PoolFilesystem: read-only (node n1",
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := &troubled{cluster: newCluster(t), t: t}
			p := newDisk(t, "default", gib)
			a := w.node("n1", p)
			w.linked(a.up())
			w.roster.set("n3", true)
			id := strings.Repeat("b", 20) + ".data"
			m := report.Machine{Pools: c.pools}
			if c.node == "known" {
				id = p.id + ".data"
				m.Volumes = []report.Volume{{ID: id, Pool: "default"}}
				m.Pools[0].ID = p.id
			}
			a.says.Store(&m)
			w.told.bound = []Bound{claimOf(id, c.node), claimOf("mapped-by-hand", "n1")}
			var want []string
			if c.want != "" {
				want = []string{"shop/data " + c.want}
			}
			w.look(0, c.want != "")
			w.wantTold(w.look(noticeConfirm, false), want...)
		})
	}
}

// A volume that its pool lacks, and nothing of the node's choosing in the words.
func TestNoticesAreFit(t *testing.T) {
	w := &troubled{cluster: newCluster(t), t: t}
	p := newDisk(t, "default", gib)
	a := w.node("n1", p)
	w.linked(a.up())
	a.says.Store(&report.Machine{Pools: []report.Pool{{Name: "default", ID: p.id}}, Volumes: []report.Volume{
		{ID: p.id + ".evil", Problems: []report.Problem{{Kind: report.Degraded, Reason: "Ignore this\n", Message: strings.Repeat("ä", 4000)}}},
	}})
	w.told.bound = []Bound{claimOf(p.id+".evil", "n1"), claimOf(p.id+".deleted", "n1")}
	w.look(0, true)
	got := w.look(noticeConfirm, false)
	w.wantTold(got, "shop/evil false Unhealthy: ä", "shop/deleted false VolumeMissing: pool \"default\" has no such volume")
	if n := len(got[0]); n > maxNotice+40 || !utf8.ValidString(got[0]) || !strings.HasSuffix(got[0], p.id+".evil)") {
		t.Errorf("%d bytes: %s", n, got[0])
	}
}

// The ID of a mapped volume may be longer than an event: it leaves room for the words.
func TestNoticeOfALongID(t *testing.T) {
	p := fit(report.Problem{Reason: "ImageMissing", Message: "its image does not exist"}, strings.Repeat("n", 1000), strings.Repeat("v", 2000))
	if !strings.HasPrefix(p.Message, "its image does not exist (node n") || len(p.Message) > maxNotice {
		t.Errorf("%d bytes: %s", len(p.Message), p.Message)
	}
}

// Of replicas one tells; and one that cannot read Kubernetes' volumes tries again.
func TestOneReplicaTells(t *testing.T) {
	c := newCluster(t)
	r := c.router
	r.SetReplicas([]string{"0.0.0.0:1"})
	if r.first() {
		t.Error("there is one before it")
	}
	r.SetReplicas(nil)
	if !r.first() {
		t.Error("it is the only one")
	}
	c.told.fail = errors.New("API server away")
	if _, err := r.tellProblems(t.Context(), &notices{}); !errors.Is(err, c.told.fail) {
		t.Error(err)
	}
}
