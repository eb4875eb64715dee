package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"

	"github.com/csi-loop/csi-loop/internal/kubeapi/kubeapitest"
	"github.com/csi-loop/csi-loop/internal/roottest"
	"github.com/csi-loop/csi-loop/pkg/driver"
	"github.com/csi-loop/csi-loop/pkg/image"
	"github.com/csi-loop/csi-loop/pkg/report"
	"github.com/csi-loop/csi-loop/pkg/router"
	"github.com/csi-loop/csi-loop/pkg/router/kube"
	"github.com/csi-loop/csi-loop/pkg/router/link"
)

// oneToken is the API server for one pod of node n1.
type oneToken struct{}

func (oneToken) Authenticate(_ context.Context, token string) (router.Identity, error) {
	if token != "good" {
		return router.Identity{}, router.ErrToken
	}
	return router.Identity{Node: "n1", NodeUID: "u", Pod: "p", PodUID: "v", Expires: time.Now().Add(time.Hour)}, nil
}

// halves is a controller and a node as serve puts them together, over TLS, with real
// pools. The pool "late" is absent; moving late there brings it in. They are observed as told
// says.
type halves struct {
	socket, late, lateHome string
	volume                 string // in the pool late, bound to the claim shop/data
	metrics                *metrics
	client                 *fake.Clientset
}

func newHalves(t *testing.T, told plan) *halves {
	t.Helper()
	place := newPlace(t)
	h := &halves{socket: filepath.Join(place.dir, "csi.sock"), late: place.dir + "/away", lateHome: place.dir + "/late"}
	ctx := t.Context()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.Mkdir(h.late, 0o700))
	store, err := image.Open(ctx, []image.Config{{Name: "late", Path: h.late}}, image.WithRefresh(0))
	must(err)
	v, err := store.Pools()[0].Create(ctx, image.Spec{Name: "pvc-late", Size: image.MiB})
	must(err)
	h.volume = v.ID
	must(store.Close())

	node := openStack(t, []image.Config{{Name: "default", Path: place.pool}, {Name: "late", Path: h.lateHome}}, driver.Config{
		Name: driver.DefaultName, Version: "v1", NodeID: "n1", StateDir: place.state, DefaultPool: "default", Stats: told.driver.Stats, Step: told.driver.Step,
	}, image.WithRefresh(20*time.Millisecond), image.WithSteps(image.Step(told.driver.Step)))
	t.Cleanup(func() {
		if err := node.close(); err != nil {
			t.Error(err)
		}
	})
	h.client, h.metrics = fake.NewClientset(boundVolume(h.volume)), newMetrics(build{})
	certificates, ca := linkCertificates(t, h.client, place.dir)
	token, address := place.dir+"/token", freeAddress(t)
	must(os.WriteFile(token, []byte("good\n"), 0o600))
	p := plan{
		mode: modeController, endpoint: "unix://" + h.socket, stopTimeout: time.Second, eventInterval: 20 * time.Millisecond, driver: driver.Config{Name: driver.DefaultName, Version: "v1", NodeID: "n1", DefaultPool: "default", Stats: told.driver.Stats}, linkStats: told.linkStats,
		link: linkConfig{LinkListen: address, LinkAdvertise: address, ControllerAddress: []string{address}, ControllerCA: ca, LinkTokenFile: token, ControllerName: link.DefaultName},
	}
	settings := linkSettings(ctx, node.d, node.images, p)
	settings.Refresh = 20 * time.Millisecond
	agent := link.NewAgent(settings)
	notices := kube.NewNotices(ctx, kubeapitest.Of(h.client), driver.DefaultName)
	control(t, p, h.metrics, router.Config{
		Auth: oneToken{}, Roster: noRoster{}, Claims: noClaims{}, Notices: notices, Certificate: certificates.Get,
	}, func(ctx context.Context) error { agent.Run(ctx); return nil }, func(ctx context.Context) error { notices.Run(ctx); return nil })
	return h
}

// boundVolume is a PersistentVolume on n1 that the claim shop/data has.
func boundVolume(id string) *core.PersistentVolume {
	return &core.PersistentVolume{
		ObjectMeta: meta.ObjectMeta{Name: "pvc-late"},
		Spec: core.PersistentVolumeSpec{
			PersistentVolumeSource: core.PersistentVolumeSource{CSI: &core.CSIPersistentVolumeSource{Driver: driver.DefaultName, VolumeHandle: id}},
			ClaimRef:               &core.ObjectReference{Namespace: "shop", Name: "data", UID: "u"},
			NodeAffinity: &core.VolumeNodeAffinity{Required: &core.NodeSelector{NodeSelectorTerms: []core.NodeSelectorTerm{{
				MatchExpressions: []core.NodeSelectorRequirement{{Key: "topology." + driver.DefaultName + "/node", Operator: core.NodeSelectorOpIn, Values: []string{"n1"}}},
			}}}},
		},
		Status: core.PersistentVolumeStatus{Phase: core.VolumeBound},
	}
}

// What the nodes report comes to who asks the controller, and what is wrong to the
// claim: that its pool is absent, and that it is there again.
func TestReportsOverTheLink(t *testing.T) {
	roottest.Require(t)
	h := newHalves(t, plan{})
	event := func(reason string) func() error {
		return func() error {
			list, err := h.client.CoreV1().Events("shop").List(t.Context(), meta.ListOptions{})
			if err != nil {
				return err
			}
			for _, e := range list.Items {
				if e.Reason == reason && e.InvolvedObject.Name == "data" && e.InvolvedObject.Kind == "PersistentVolumeClaim" && strings.Contains(e.Message, h.volume) {
					return nil
				}
			}
			return fmt.Errorf("events: %+v", list.Items)
		}
	}
	eventually(t, "the claim has an event of its pool", event("PoolAbsent"))
	if err := os.Rename(h.late, h.lateHome); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the claim has an event of its recovery", event("VolumeRecovered"))
	w := httptest.NewRecorder()
	h.metrics.showReport(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/report", nil))
	var c report.Cluster
	if err := json.Unmarshal(w.Body.Bytes(), &c); err != nil || len(c.Nodes) != 1 {
		t.Fatal(w.Body, err)
	}
	n := c.Nodes[0]
	if n.Name != "n1" || n.State != report.Linked || n.Error != "" || len(n.Pools) != 2 || len(n.Volumes) != 1 || n.Volumes[0].ID != h.volume {
		t.Errorf("%+v", n)
	}
}

// The two halves together: a volume is made and removed over the link; a pool that
// comes in later is served without a new link; operators see nodes and orphans.
func TestHalves(t *testing.T) {
	roottest.Require(t)
	h := newHalves(t, plan{})
	c := csi.NewControllerClient(dial(t, h.socket))
	topology := &csi.Topology{Segments: map[string]string{"topology." + driver.DefaultName + "/node": "n1"}}
	var made *csi.CreateVolumeResponse
	eventually(t, "a volume is made", func() (err error) {
		made, err = c.CreateVolume(t.Context(), &csi.CreateVolumeRequest{
			Name: "pvc-x", CapacityRange: &csi.CapacityRange{RequiredBytes: image.MiB},
			VolumeCapabilities: []*csi.VolumeCapability{{
				AccessType: &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}},
				AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
			}},
			AccessibilityRequirements: &csi.TopologyRequirement{Requisite: []*csi.Topology{topology}, Preferred: []*csi.Topology{topology}},
		})
		return err
	})
	id := made.GetVolume().GetVolumeId()
	if got := made.GetVolume().GetAccessibleTopology(); len(got) != 1 || got[0].GetSegments()["topology.csi-loop.io/node"] != "n1" {
		t.Error(got)
	}
	if _, err := c.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: h.volume}); status.Code(err) != codes.Unavailable {
		t.Errorf("a volume of an absent pool: %v", err)
	}
	if err := os.Rename(h.late, h.lateHome); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the pool is served", func() error {
		_, err := c.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: h.volume})
		return err
	})
	if _, err := os.Stat(h.lateHome + "/volumes/pvc-late"); !os.IsNotExist(err) {
		t.Error("it was not deleted", err)
	}
	out, _, err := run(t, "", "nodes", "--endpoint="+h.socket)
	if err != nil || !strings.Contains(out, router.NodeLinked) || !strings.Contains(out, "late") {
		t.Error(out, err)
	}
	if out, _, err = run(t, "", "orphans", "--endpoint="+h.socket); err != nil || !strings.Contains(out, id) || !strings.Contains(out, "1Mi") {
		t.Error(out, err)
	}
	if _, _, err = run(t, "", "orphans", "remove", id, "--yes", "--endpoint="+h.socket); err == nil || !strings.Contains(err.Error(), "known") {
		t.Error("removed though it may be about to get a PV", err)
	}
	if _, err := c.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: id}); err != nil {
		t.Error(err)
	}
}

// eventually waits for what happens by itself.
func eventually(t *testing.T, what string, try func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute) // on a busy machine
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		err := try()
		if err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("%s: %v", what, err)
		}
	}
}

// freeAddress is where nobody listens.
func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}
