package main

import (
	"bytes"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	dynamicfake "k8s.io/client-go/dynamic/fake"
	"k8s.io/client-go/rest"
	clienttesting "k8s.io/client-go/testing"
	"sigs.k8s.io/yaml"

	"github.com/csi-loop/csi-loop/internal/kubeapi/kubeapitest"
)

// lostPool is a pool of the node "a" alone.
const lostPool = "cccccccccccccccccccc"

// snapshots is a cluster's other half: that of kinds which not every cluster has.
func snapshots(t *testing.T, manifests string) *dynamicfake.FakeDynamicClient {
	t.Helper()
	lists, objects := map[schema.GroupVersionResource]string{}, []runtime.Object{}
	for _, k := range snapshotKinds {
		for _, v := range k.versions {
			for _, r := range []string{k.contents, k.requests} {
				lists[schema.GroupVersionResource{Group: k.group, Version: v, Resource: r}] = "List"
			}
		}
	}
	for text := range strings.SplitSeq(manifests, "---\n") {
		o := &unstructured.Unstructured{}
		if err := yaml.Unmarshal([]byte(text), &o.Object); err != nil {
			t.Fatal(err)
		}
		if len(o.Object) > 0 {
			objects = append(objects, o)
		}
	}
	return dynamicfake.NewSimpleDynamicClientWithCustomListKinds(runtime.NewScheme(), lists, objects...)
}

// everySnapshot has one of each kind: one that is bound, one that is not any more, one
// that is a member of a group, one that was never taken, one that another snapshot has
// the name of, and those of others.
const everySnapshot = `
apiVersion: snapshot.storage.k8s.io/v1
kind: VolumeSnapshotContent
metadata:
  name: bound
  uid: content-bound
  resourceVersion: "7"
  finalizers: [snapshot.storage.kubernetes.io/volumesnapshotcontent-bound-protection]
  annotations: {snapshot.storage.kubernetes.io/volumesnapshot-being-deleted: "yes", note: kept}
spec:
  driver: csi-loop.io
  deletionPolicy: Delete
  source: {volumeHandle: cccccccccccccccccccc.pvc-1}
  sourceVolumeMode: Filesystem
  volumeSnapshotRef: {apiVersion: snapshot.storage.k8s.io/v1, kind: VolumeSnapshot, namespace: shop, name: nightly, uid: nightly-1, resourceVersion: "5"}
status: {snapshotHandle: cccccccccccccccccccc.snapshot-1, readyToUse: true}
---
apiVersion: snapshot.storage.k8s.io/v1
kind: VolumeSnapshot
metadata: {name: nightly, namespace: shop, uid: nightly-1, labels: {tier: db}, finalizers: [x/y]}
spec: {volumeSnapshotClassName: s, source: {persistentVolumeClaimName: db}}
status: {readyToUse: true}
---
apiVersion: snapshot.storage.k8s.io/v1
kind: VolumeSnapshotContent
metadata: {name: retained, uid: content-retained}
spec:
  driver: csi-loop.io
  deletionPolicy: Retain
  source: {snapshotHandle: cccccccccccccccccccc.snapshot-2}
  volumeSnapshotRef: {namespace: shop, name: nightly, uid: nightly-0}
---
apiVersion: snapshot.storage.k8s.io/v1
kind: VolumeSnapshotContent
metadata: {name: never, uid: content-never}
spec:
  driver: csi-loop.io
  deletionPolicy: Delete
  source: {volumeHandle: cccccccccccccccccccc.pvc-1}
  volumeSnapshotRef: {namespace: shop, name: untaken, uid: untaken-1}
---
apiVersion: snapshot.storage.k8s.io/v1
kind: VolumeSnapshot
metadata: {name: untaken, namespace: shop, uid: untaken-1}
spec: {source: {persistentVolumeClaimName: db}}
---
apiVersion: snapshot.storage.k8s.io/v1
kind: VolumeSnapshotContent
metadata: {name: elsewhere}
spec:
  driver: csi-loop.io
  deletionPolicy: Delete
  source: {volumeHandle: bbbbbbbbbbbbbbbbbbbb.pvc-1}
  volumeSnapshotRef: {namespace: shop, name: nightly, uid: nightly-1}
status: {snapshotHandle: bbbbbbbbbbbbbbbbbbbb.snapshot-1}
---
apiVersion: snapshot.storage.k8s.io/v1
kind: VolumeSnapshotContent
metadata: {name: moved}
spec:
  driver: csi-loop.io
  deletionPolicy: Delete
  source: {snapshotHandle: aaaaaaaaaaaaaaaaaaaa.snapshot-1}
  volumeSnapshotRef: {namespace: shop, name: gone}
---
apiVersion: snapshot.storage.k8s.io/v1
kind: VolumeSnapshotContent
metadata: {name: foreign}
spec:
  driver: other.io
  deletionPolicy: Delete
  source: {snapshotHandle: cccccccccccccccccccc.snapshot-1}
  volumeSnapshotRef: {namespace: shop, name: gone}
---
apiVersion: groupsnapshot.storage.k8s.io/v1
kind: VolumeGroupSnapshotContent
metadata: {name: pair, uid: content-group}
spec:
  driver: csi-loop.io
  deletionPolicy: Delete
  source: {volumeHandles: [cccccccccccccccccccc.pvc-1]}
  volumeGroupSnapshotRef: {namespace: shop, name: both, uid: both-1}
status: {volumeGroupSnapshotHandle: cccccccccccccccccccc.group-1}
---
apiVersion: groupsnapshot.storage.k8s.io/v1
kind: VolumeGroupSnapshot
metadata: {name: both, namespace: shop, uid: both-1}
spec: {source: {selector: {}}}
`

// leftOf lists contents and requests that are there.
func leftOf(t *testing.T, client *dynamicfake.FakeDynamicClient) string {
	t.Helper()
	var names []string
	for _, k := range snapshotKinds {
		for _, r := range []string{k.contents, k.requests} {
			list, err := client.Resource(schema.GroupVersionResource{Group: k.group, Version: "v1", Resource: r}).List(t.Context(), metav1.ListOptions{})
			if err != nil {
				t.Fatal(err)
			}
			for _, o := range list.Items {
				names = append(names, o.GetName())
			}
		}
	}
	return strings.Join(names, " ")
}

const (
	allSnapshots = "bound elsewhere foreign moved never retained nightly untaken pair both"
	othersOnly   = "elsewhere foreign moved"
)

func ofLostPool() *corev1.PersistentVolume {
	return persistent("snapped", lostPool, "a", corev1.PersistentVolumeReclaimDelete)
}

func TestForgetSaysWhichSnapshotsItWouldEnd(t *testing.T) {
	client, f, s := lossy(ofLostPool()), forgets(t), snapshots(t, everySnapshot)
	f.dynamic = s
	var out bytes.Buffer
	if err := f.run(t.Context(), kubeapitest.Of(client), &out); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"bound\t" + lostPool + "\tsnapshot shop/nightly\tpassed over: --claims", "retained\t" + lostPool + "\tno snapshot\n",
		"never\t" + lostPool + "\tsnapshot shop/untaken\tpassed over", "pair\t" + lostPool + "\tgroup snapshot shop/both\tpassed over",
		"pool aaaaaaaaaaaaaaaaaaaa\tits snapshots are passed over: PersistentVolume elsewhere", "3 PersistentVolumes and 1 contents of snapshots would be deleted",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is not in\n%s", want, out.String())
		}
	}
	for _, a := range s.Actions() {
		if !slices.Contains([]string{"get", "list"}, a.GetVerb()) {
			t.Errorf("it did %s", a.GetVerb())
		}
	}
	if _, err := os.Stat(f.save); !os.IsNotExist(err) {
		t.Error("it saved something", err)
	}
}

// Without --claims only what no VolumeSnapshot has goes.
func TestForgetEndsContentsWithoutSnapshots(t *testing.T) {
	client, f, s := lossy(ofLostPool()), forgets(t), snapshots(t, everySnapshot)
	f.dynamic, f.apply, f.pools = s, true, []string{movedPool, lostPool}
	if err := f.run(t.Context(), kubeapitest.Of(client), &bytes.Buffer{}); err != nil {
		t.Fatal(err)
	}
	if got, want := leftOf(t, s), strings.Replace(allSnapshots, "retained ", "", 1); got != want {
		t.Errorf("left: %s; want %s", got, want)
	}
}

// Nothing asks csi-loop to delete a snapshot, nothing waits for a finalizer, and what was
// there can be made again.
func TestForgetEndsSnapshots(t *testing.T) {
	client, f, s := lossy(ofLostPool()), forgets(t), snapshots(t, everySnapshot)
	f.dynamic, f.apply, f.claims, f.pools = s, true, true, []string{movedPool, lostPool}
	if err := f.run(t.Context(), kubeapitest.Of(client), &bytes.Buffer{}); err != nil {
		t.Fatal(err)
	}
	if got := leftOf(t, s); got != othersOnly {
		t.Errorf("left: %s; want %s", got, othersOnly)
	}
	var did []string
	for _, a := range s.Actions() {
		switch x := a.(type) {
		case clienttesting.PatchAction:
			did = append(did, "patch "+x.GetName()+" "+string(x.GetPatch()))
		case clienttesting.DeleteAction:
			did = append(did, "delete "+x.GetName())
		}
	}
	want := []string{
		`patch bound {"spec":{"deletionPolicy":"Retain"},"metadata":{"uid":"content-bound","resourceVersion":"7"}}`,
		"delete nightly", "delete bound", `patch bound {"metadata":{"finalizers":null,"uid":"content-bound"}}`,
	}
	if diff := cmp.Diff(want, did[:min(4, len(did))]); diff != "" {
		t.Error(diff)
	}
	if last := did[len(did)-1]; !strings.HasPrefix(last, "patch pair ") {
		t.Errorf("the last was %s, which changes what others have listed", last)
	}

	text, err := os.ReadFile(f.save)
	if err != nil {
		t.Fatal(err)
	}
	var made []string
	for doc := range strings.SplitSeq(string(text), "\n---\n") {
		var o unstructured.Unstructured
		if err := yaml.UnmarshalStrict([]byte(doc), &o.Object); err != nil {
			t.Fatalf("%v\n%s", err, doc)
		}
		if group := o.GroupVersionKind().Group; group == "" {
			continue // a volume or a claim
		}
		b, err := o.MarshalJSON()
		if err != nil {
			t.Fatal(err)
		}
		made = append(made, strings.TrimSpace(string(b)))
	}
	want = []string{
		`{"apiVersion":"snapshot.storage.k8s.io/v1","kind":"VolumeSnapshotContent","metadata":{"annotations":{"note":"kept"},"name":"bound"},"spec":{"deletionPolicy":"Retain","driver":"csi-loop.io","source":{"snapshotHandle":"cccccccccccccccccccc.snapshot-1"},"sourceVolumeMode":"Filesystem","volumeSnapshotRef":{"apiVersion":"snapshot.storage.k8s.io/v1","kind":"VolumeSnapshot","name":"nightly","namespace":"shop"}}}`,
		`{"apiVersion":"snapshot.storage.k8s.io/v1","kind":"VolumeSnapshot","metadata":{"labels":{"tier":"db"},"name":"nightly","namespace":"shop"},"spec":{"source":{"volumeSnapshotContentName":"bound"},"volumeSnapshotClassName":"s"}}`,
		// It was never taken: it is asked for again.
		`{"apiVersion":"snapshot.storage.k8s.io/v1","kind":"VolumeSnapshot","metadata":{"name":"untaken","namespace":"shop"},"spec":{"source":{"persistentVolumeClaimName":"db"}}}`,
		// Whoever has the name of its snapshot now does not get it.
		`{"apiVersion":"snapshot.storage.k8s.io/v1","kind":"VolumeSnapshotContent","metadata":{"name":"retained"},"spec":{"deletionPolicy":"Retain","driver":"csi-loop.io","source":{"snapshotHandle":"cccccccccccccccccccc.snapshot-2"},"volumeSnapshotRef":{"name":"nightly","namespace":"shop","uid":"nightly-0"}}}`,
	}
	if diff := cmp.Diff(want, made); diff != "" {
		t.Error(diff)
	}
	for _, line := range []string{"# kind: VolumeGroupSnapshotContent", "#   volumeGroupSnapshotHandle: cccccccccccccccccccc.group-1", "# kind: VolumeGroupSnapshot"} {
		if !strings.Contains(string(text), "\n"+line+"\n") {
			t.Errorf("no line %s in\n%s", line, text)
		}
	}
}

// A pool of which no volume is left is named, but not one that is on another node. What is
// in pools that are not named stays.
func TestForgetNamedPools(t *testing.T) {
	const another = "bbbbbbbbbbbbbbbbbbbb"
	moved := persistent("moved", another, "b", corev1.PersistentVolumeReclaimDelete)
	client, f, s := lossy(moved), forgets(t), snapshots(t, everySnapshot)
	f.dynamic, f.apply, f.claims = s, true, true
	for id, want := range map[string]string{another: "the pool is not lost: PersistentVolume moved", "c": "is not the ID of a pool"} {
		f.pools = []string{id}
		if err := f.run(t.Context(), kubeapitest.Of(client), &bytes.Buffer{}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v does not say %q", id, err, want)
		}
	}
	volumes := strings.Replace(everyVolume, "foreign ", "foreign moved ", 1)
	wantLeft(t, client, volumes, everyClaim)
	if got := leftOf(t, s); got != allSnapshots {
		t.Errorf("left: %s", got)
	}
	f.pools = []string{lostPool}
	var out bytes.Buffer
	if err := f.run(t.Context(), kubeapitest.Of(client), &out); err != nil {
		t.Fatal(err)
	}
	if want := "bound\t" + movedPool + "\tpassed over: of another pool\n"; !strings.Contains(out.String(), want) {
		t.Errorf("%q is not in\n%s", want, out.String())
	}
	wantLeft(t, client, volumes, everyClaim)
	if got := leftOf(t, s); got != othersOnly {
		t.Errorf("left: %s; want %s", got, othersOnly)
	}
}

// A node that was made anew under its name has volumes that live beside those that are
// lost: which pool is lost, only who asks can know.
func TestForgetOfSeveralPools(t *testing.T) {
	alive := persistent("alive", lostPool, "a", corev1.PersistentVolumeReclaimDelete)
	mapped := persistent("mapped", movedPool, "a", corev1.PersistentVolumeReclaimRetain)
	mapped.Spec.CSI.VolumeHandle = "golden"
	client, f, s := lossy(alive, mapped), forgets(t), snapshots(t, everySnapshot)
	f.dynamic, f.claims = s, true
	var out bytes.Buffer
	if err := f.run(t.Context(), kubeapitest.Of(client), &out); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"alive\t" + lostPool + "\tno claim\n", "once --pool-id names those of the pools that are lost: " + movedPool + ", " + lostPool + ", none"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is not in\n%s", want, out.String())
		}
	}
	f.apply = true
	if err := f.run(t.Context(), kubeapitest.Of(client), &bytes.Buffer{}); !errors.As(err, new(*usageError)) || !strings.Contains(err.Error(), "3 pools") {
		t.Error(err)
	}
	wantLeft(t, client, "alive "+strings.Replace(everyVolume, "foreign", "foreign mapped", 1), everyClaim)
	if _, err := os.Stat(f.save); !os.IsNotExist(err) {
		t.Error("it saved something", err)
	}
	f.pools = []string{movedPool}
	if err := f.run(t.Context(), kubeapitest.Of(client), &bytes.Buffer{}); err != nil {
		t.Fatal(err)
	}
	wantLeft(t, client, "alive elsewhere foreign mapped", "elsewhere reused")
	// What is left is of a pool, and of none.
	f.pools, f.save = nil, f.save+"-2"
	if err := f.run(t.Context(), kubeapitest.Of(client), &bytes.Buffer{}); err == nil || !strings.Contains(err.Error(), lostPool+", none") {
		t.Error(err)
	}
	f.pools = []string{"none"}
	if err := f.run(t.Context(), kubeapitest.Of(client), &bytes.Buffer{}); err != nil {
		t.Fatal(err)
	}
	wantLeft(t, client, "alive elsewhere foreign", "elsewhere reused")
	if got := leftOf(t, s); got != allSnapshots {
		t.Errorf("left: %s", got)
	}
}

// A cluster without the CRDs has no snapshots, and one with older ones has older groups.
func TestForgetWithoutSnapshotCRDs(t *testing.T) {
	missing := func(groups ...string) clienttesting.ReactionFunc {
		return func(a clienttesting.Action) (bool, runtime.Object, error) {
			r := a.GetResource()
			return slices.Contains(groups, r.GroupVersion().String()), nil, apierrors.NewNotFound(r.GroupResource(), "")
		}
	}
	client, f, s := lossy(), forgets(t), snapshots(t, "")
	f.dynamic, f.apply, f.claims = s, true, true
	s.PrependReactor("list", "*", missing("snapshot.storage.k8s.io/v1", "groupsnapshot.storage.k8s.io/v1", "groupsnapshot.storage.k8s.io/v1beta2", "groupsnapshot.storage.k8s.io/v1beta1"))
	if err := f.run(t.Context(), kubeapitest.Of(client), &bytes.Buffer{}); err != nil {
		t.Fatal(err)
	}
	wantLeft(t, client, "elsewhere foreign", "elsewhere reused")

	// As an API server says it, of a path that it does not know.
	server := httptest.NewServer(http.NotFoundHandler())
	defer server.Close()
	served, err := dynamic.NewForConfig(&rest.Config{Host: server.URL})
	if err != nil {
		t.Fatal(err)
	}
	f.dynamic = served
	if all, err := f.lostSnapshots(t.Context(), []string{lostPool}); err != nil || len(all) != 0 {
		t.Errorf("%v, %v", all, err)
	}

	client, f = lossy(ofLostPool()), forgets(t)
	s = snapshots(t, strings.ReplaceAll(everySnapshot, "groupsnapshot.storage.k8s.io/v1", "groupsnapshot.storage.k8s.io/v1beta2"))
	f.dynamic = s
	s.PrependReactor("list", "*", missing("groupsnapshot.storage.k8s.io/v1"))
	var out bytes.Buffer
	if err := f.run(t.Context(), kubeapitest.Of(client), &out); err != nil || !strings.Contains(out.String(), "pair\t"+lostPool+"\tgroup snapshot shop/both") {
		t.Errorf("%v, %s", err, out.String())
	}
}

// When snapshots cannot be ended, the volumes that tell whose they are stay.
func TestForgetKeepsVolumesWhoseSnapshotsStay(t *testing.T) {
	for verb, changed := range map[string]string{"list": "", "patch": "Retain"} {
		client, f, s := lossy(ofLostPool()), forgets(t), snapshots(t, everySnapshot)
		f.dynamic, f.apply, f.claims, f.pools = s, true, true, []string{movedPool, lostPool}
		s.PrependReactor(verb, "volumesnapshotcontents", func(a clienttesting.Action) (bool, runtime.Object, error) {
			p, is := a.(clienttesting.PatchAction)
			return !is || strings.Contains(string(p.GetPatch()), changed), nil, errors.New("it was modified")
		})
		if err := f.run(t.Context(), kubeapitest.Of(client), &bytes.Buffer{}); err == nil || !strings.Contains(err.Error(), "it was modified") {
			t.Errorf("%s: %v", verb, err)
		}
		volumes, _ := left(t, client)
		if got := strings.Join(volumes, " "); got != everyVolume+" snapped" {
			t.Errorf("%s: left: %s", verb, got)
		}
	}
}
