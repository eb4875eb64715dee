package main

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"
	"k8s.io/client-go/kubernetes/scheme"
	clienttesting "k8s.io/client-go/testing"

	"github.com/csi-loop/csi-loop/internal/kubeapi/kubeapitest"
	"github.com/csi-loop/csi-loop/pkg/driver"
)

// lossy is a cluster without the node "a", with volumes of it that have a claim, lost
// it, and whose claim's name another one has; and volumes of others.
func lossy(more ...runtime.Object) *fake.Clientset {
	bound := persistent("bound", movedPool, "a", corev1.PersistentVolumeReclaimDelete)
	released := persistent("released", movedPool, "a", corev1.PersistentVolumeReclaimDelete)
	reused := persistent("reused", movedPool, "a", corev1.PersistentVolumeReclaimDelete)
	foreign := persistent("foreign", movedPool, "a", corev1.PersistentVolumeReclaimDelete)
	foreign.Spec.CSI.Driver = "other.io"
	objects := []runtime.Object{
		bound, released, reused, foreign, persistent("elsewhere", movedPool, "b", corev1.PersistentVolumeReclaimDelete),
		claimFor("bound", "claim-1", "bound"), claimFor("reused", "claim-2", "somewhere"), claimFor("elsewhere", "claim-1", "elsewhere"),
	}
	return fake.NewClientset(append(objects, more...)...)
}

func claimFor(name, uid, volume string) *corev1.PersistentVolumeClaim {
	return &corev1.PersistentVolumeClaim{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name, UID: types.UID(uid)}, Spec: corev1.PersistentVolumeClaimSpec{VolumeName: volume},
	}
}

func forgets(t *testing.T) forgetting {
	t.Helper()
	return forgetting{node: "a", driver: driver.DefaultName, save: filepath.Join(t.TempDir(), "saved.yaml"), dynamic: snapshots(t, "")}
}

// left lists what the cluster still has.
func left(t *testing.T, client *fake.Clientset) (volumes, claims []string) {
	t.Helper()
	pvs, err := client.CoreV1().PersistentVolumes().List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, pv := range pvs.Items {
		volumes = append(volumes, pv.Name)
	}
	pvcs, err := client.CoreV1().PersistentVolumeClaims("shop").List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range pvcs.Items {
		claims = append(claims, c.Name)
	}
	slices.Sort(volumes)
	slices.Sort(claims)
	return volumes, claims
}

func wantLeft(t *testing.T, client *fake.Clientset, wantVolumes, wantClaims string) {
	t.Helper()
	volumes, claims := left(t, client)
	if v, c := strings.Join(volumes, " "), strings.Join(claims, " "); v != wantVolumes || c != wantClaims {
		t.Errorf("left: volumes %s, claims %s; want %s and %s", v, c, wantVolumes, wantClaims)
	}
}

const (
	everyVolume = "bound elsewhere foreign released reused"
	everyClaim  = "bound elsewhere reused"
)

func TestForgetSaysWhatItWouldDo(t *testing.T) {
	client, f := lossy(), forgets(t)
	var out bytes.Buffer
	if err := f.run(t.Context(), kubeapitest.Of(client), &out); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"bound\t" + movedPool + "\tclaim shop/bound\tpassed over", "released\t" + movedPool + "\tno claim\n", "reused\t" + movedPool + "\tno claim\n", "2 PersistentVolumes would be deleted"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is not in\n%s", want, out.String())
		}
	}
	for _, a := range client.Actions() {
		if !slices.Contains([]string{"get", "list"}, a.GetVerb()) {
			t.Errorf("it did %s", a.GetVerb())
		}
	}
	if _, err := os.Stat(f.save); !os.IsNotExist(err) {
		t.Error("it saved something", err)
	}
}

func TestForgetDeletesWhatHasNoClaim(t *testing.T) {
	client, f := lossy(), forgets(t)
	f.apply = true
	if err := f.run(t.Context(), kubeapitest.Of(client), &bytes.Buffer{}); err != nil {
		t.Fatal(err)
	}
	wantLeft(t, client, "bound elsewhere foreign", everyClaim)
	b, err := os.ReadFile(f.save)
	if err != nil || !strings.Contains(string(b), "name: released") || strings.Contains(string(b), "name: bound") || !strings.Contains(string(b), "persistentVolumeReclaimPolicy: Retain") {
		t.Errorf("saved: %s, %v", b, err)
	}
	// The policy is Retain before anything is deleted.
	var retained bool
	for _, a := range client.Actions() {
		switch p, is := a.(clienttesting.PatchAction); {
		case is && strings.Contains(string(p.GetPatch()), "Retain"):
			retained = true
		case a.GetVerb() == "delete" && !retained:
			t.Error("deleted before the policy is Retain")
		}
	}
	again := f
	if err := again.run(t.Context(), kubeapitest.Of(client), &bytes.Buffer{}); err != nil {
		t.Errorf("nothing is left to do: %v", err)
	}
}

func TestForgetWithClaims(t *testing.T) {
	client, f := lossy(), forgets(t)
	f.apply, f.claims = true, true
	if err := f.run(t.Context(), kubeapitest.Of(client), &bytes.Buffer{}); err != nil {
		t.Fatal(err)
	}
	wantLeft(t, client, "elsewhere foreign", "elsewhere reused")
}

// What forget saves can be created again: volume and claim are bound to each other, and
// nothing is in it that only the API server sets, or that makes Kubernetes think that
// they were bound before.
func TestForgottenCanBeCreatedAgain(t *testing.T) {
	client, f := lossy(), forgets(t)
	asKubernetesKeepsThem(t, client)
	f.apply, f.claims = true, true
	if err := f.run(t.Context(), kubeapitest.Of(client), &bytes.Buffer{}); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(f.save)
	if err != nil {
		t.Fatal(err)
	}
	for _, bad := range []string{
		"status:", "resourceVersion:", "creationTimestamp:", "finalizers:", "managedFields:", "generation:", "ownerReferences:", "uid: uid-",
		"bind-completed", "bound-by-controller", "selected-node", "persistentVolumeReclaimPolicy: Delete",
	} {
		if strings.Contains(string(text), bad) {
			t.Errorf("it has %s", bad)
		}
	}
	again, made := fake.NewClientset(), []string{}
	for doc := range strings.SplitSeq(string(text), "\n---\n") {
		object, _, err := scheme.Codecs.UniversalDeserializer().Decode([]byte(doc), nil, nil)
		if err != nil {
			t.Fatalf("%v\n%s", err, doc)
		}
		switch o := object.(type) {
		case *corev1.PersistentVolume:
			ref := o.Spec.ClaimRef
			made = append(made, o.Name+" for "+ref.Namespace+"/"+ref.Name+" "+string(ref.UID)+" "+o.Labels["tier"]+" "+o.Annotations["pv.kubernetes.io/provisioned-by"])
			_, err = again.CoreV1().PersistentVolumes().Create(t.Context(), o, metav1.CreateOptions{})
		case *corev1.PersistentVolumeClaim:
			made = append(made, "claim "+o.Name+" of "+o.Spec.VolumeName+" "+o.Annotations["note"])
			_, err = again.CoreV1().PersistentVolumeClaims(o.Namespace).Create(t.Context(), o, metav1.CreateOptions{})
		}
		if err != nil {
			t.Error(err)
		}
	}
	want := []string{
		"bound for shop/bound  db csi-loop.io", "claim bound of bound kept",
		// Whoever has the name of their claim now does not get their content.
		"released for shop/released claim-1 db csi-loop.io", "reused for shop/reused claim-1 db csi-loop.io",
	}
	if diff := cmp.Diff(want, made); diff != "" {
		t.Error(diff)
	}
	wantLeft(t, again, "bound released reused", "bound")
}

// asKubernetesKeepsThem fills in what the API server and the controllers set.
func asKubernetesKeepsThem(t *testing.T, client *fake.Clientset) {
	t.Helper()
	volumes, claims := client.CoreV1().PersistentVolumes(), client.CoreV1().PersistentVolumeClaims("shop")
	meta := func(o metav1.Object) {
		o.SetCreationTimestamp(metav1.Now())
		o.SetGeneration(3)
		o.SetFinalizers([]string{"kubernetes.io/protection"})
		o.SetOwnerReferences([]metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "StatefulSet", Name: "s", UID: "uid-s"}})
		o.SetManagedFields([]metav1.ManagedFieldsEntry{{Manager: "m"}})
	}
	pv, err := volumes.Get(t.Context(), "bound", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	meta(pv)
	pv.Annotations["pv.kubernetes.io/bound-by-controller"], pv.Status.Phase = "yes", corev1.VolumeBound
	if _, err := volumes.Update(t.Context(), pv, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	c, err := claims.Get(t.Context(), "bound", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	meta(c)
	c.ResourceVersion, c.Status.Phase = "9", corev1.ClaimBound
	c.Annotations = map[string]string{
		"pv.kubernetes.io/bind-completed": "yes", "pv.kubernetes.io/bound-by-controller": "yes", "volume.kubernetes.io/selected-node": "a", "note": "kept",
	}
	if _, err := claims.Update(t.Context(), c, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
}

// Without --save each run has a file of its own: the first of names that is free.
func TestForgetTakesTheNextFreeName(t *testing.T) {
	t.Chdir(t.TempDir())
	client, f := lossy(), forgets(t)
	f.apply, f.save = true, ""
	fails := true
	client.PrependReactor("delete", "persistentvolumes", func(clienttesting.Action) (bool, runtime.Object, error) {
		return fails, nil, os.ErrDeadlineExceeded
	})
	run := func() error { return f.run(t.Context(), kubeapitest.Of(client), &bytes.Buffer{}) }
	if err := run(); err == nil || !strings.Contains(err.Error(), "csi-loop-forget-a.yaml") {
		t.Fatalf("%v does not say where things are", err)
	}
	first, err := os.ReadFile("csi-loop-forget-a.yaml")
	if err != nil {
		t.Fatal(err)
	}
	fails = false
	if err := run(); err != nil {
		t.Fatal("goes on after an error:", err)
	}
	f.claims = true
	if err := run(); err != nil {
		t.Fatal("goes on with claims:", err)
	}
	wantLeft(t, client, "elsewhere foreign", "elsewhere reused")
	for name, want := range map[string]string{"csi-loop-forget-a-2.yaml": "name: released", "csi-loop-forget-a-3.yaml": "name: bound"} {
		if b, err := os.ReadFile(name); err != nil || !strings.Contains(string(b), want) {
			t.Errorf("%s: %s, %v", name, b, err)
		}
	}
	if b, err := os.ReadFile("csi-loop-forget-a.yaml"); err != nil || !bytes.Equal(b, first) {
		t.Error("the first file was changed", err)
	}
}

// Nothing is done while the node may come back, also when it does in the middle; nor
// over an earlier file.
func TestForgetRefuses(t *testing.T) {
	for name, tt := range map[string]struct {
		more   []runtime.Object
		change func(client *fake.Clientset, f *forgetting)
		want   string
	}{
		"the node is there":    {[]runtime.Object{&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "a"}}}, nil, "kubectl delete node a"},
		"its CSINode is there": {[]runtime.Object{&storagev1.CSINode{ObjectMeta: metav1.ObjectMeta{Name: "a"}}}, nil, "CSINode a"},
		"it cannot be known": {nil, func(client *fake.Clientset, _ *forgetting) {
			client.PrependReactor("get", "nodes", func(clienttesting.Action) (bool, runtime.Object, error) { return true, nil, os.ErrPermission })
		}, "permission"},
		"the file is there": {nil, func(_ *fake.Clientset, f *forgetting) {
			if err := os.WriteFile(f.save, []byte("earlier"), 0o600); err != nil {
				panic(err)
			}
		}, "--save"},
		"a volume changes meanwhile": {nil, func(client *fake.Clientset, _ *forgetting) {
			client.PrependReactor("patch", "persistentvolumes", func(a clienttesting.Action) (bool, runtime.Object, error) {
				patch, is := a.(clienttesting.PatchAction)
				if is && strings.Contains(string(patch.GetPatch()), `"resourceVersion":`) {
					return true, nil, apierrors.NewConflict(corev1.Resource("persistentvolumes"), patch.GetName(), errors.New("it was modified"))
				}
				return false, nil, nil
			})
		}, "it was modified"},
		"the node comes back": {nil, func(client *fake.Clientset, _ *forgetting) {
			asked := 0
			client.PrependReactor("get", "nodes", func(clienttesting.Action) (bool, runtime.Object, error) {
				if asked++; asked > 1 {
					return true, &corev1.Node{}, nil
				}
				return false, nil, nil
			})
		}, "node a is in the cluster"},
	} {
		t.Run(name, func(t *testing.T) {
			client, f := lossy(tt.more...), forgets(t)
			f.apply, f.claims = true, true
			if tt.change != nil {
				tt.change(client, &f)
			}
			err := f.run(t.Context(), kubeapitest.Of(client), &bytes.Buffer{})
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v does not say %q", err, tt.want)
			}
			wantLeft(t, client, everyVolume, everyClaim)
		})
	}
}
