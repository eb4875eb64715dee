package main

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"github.com/csi-loop/csi-loop/internal/kubeapi/kubeapitest"
	"github.com/csi-loop/csi-loop/pkg/driver"
)

const movedPool = "aaaaaaaaaaaaaaaaaaaa"

// persistent is a bound PersistentVolume of a pool on a node.
func persistent(name, pool, node string, policy corev1.PersistentVolumeReclaimPolicy) *corev1.PersistentVolume {
	f := importFlags{name: name, reclaim: string(policy)}
	pv := f.volume(&driver.TakenIn{
		ID: pool + "." + name, Size: 1 << 20, Filesystem: "ext4", Driver: driver.DefaultName, Topology: "topology.csi-loop.io/node", Node: node,
	}, "shop", name)
	pv.UID, pv.ResourceVersion, pv.Finalizers = types.UID("uid-"+name), "7", []string{"kubernetes.io/pv-protection"}
	pv.Labels = map[string]string{"tier": "db"}
	pv.Spec.ClaimRef.UID, pv.Spec.ClaimRef.ResourceVersion = "claim-1", "5"
	return pv
}

func newAdoption(t *testing.T) adoption {
	t.Helper()
	return adoption{node: "b", poolID: movedPool, driver: driver.DefaultName, save: filepath.Join(t.TempDir(), "saved.yaml")}
}

// cluster has one volume of each policy that is to move, one of another pool, and one
// that was moved before; and the claims of the first two.
func cluster() *fake.Clientset {
	return fake.NewClientset(
		claimFor("one", "claim-1", "one"), claimFor("two", "claim-1", "two"),
		persistent("one", movedPool, "a", corev1.PersistentVolumeReclaimDelete), persistent("two", movedPool, "a", corev1.PersistentVolumeReclaimRetain),
		persistent("other", "bbbbbbbbbbbbbbbbbbbb", "a", corev1.PersistentVolumeReclaimDelete), persistent("done", movedPool, "b", corev1.PersistentVolumeReclaimDelete),
	)
}

func wantMoved(t *testing.T, client *fake.Clientset) {
	t.Helper()
	list, err := client.CoreV1().PersistentVolumes().List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for _, pv := range list.Items {
		got[pv.Name] = pv.Spec.NodeAffinity.Required.NodeSelectorTerms[0].MatchExpressions[0].Values[0] + " " + string(pv.Spec.PersistentVolumeReclaimPolicy) + " " +
			string(pv.Spec.ClaimRef.UID) + " " + pv.Labels["tier"] + " " + pv.Annotations["pv.kubernetes.io/provisioned-by"]
	}
	want := map[string]string{
		"one": "b Delete claim-1 db csi-loop.io", "two": "b Retain claim-1 db csi-loop.io",
		"other": "a Delete claim-1 db csi-loop.io", "done": "b Delete claim-1 db csi-loop.io",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestAdoptIsDryByDefault(t *testing.T) {
	client, a := cluster(), newAdoption(t)
	var out bytes.Buffer
	if err := a.run(t.Context(), kubeapitest.Of(client), &out); err != nil {
		t.Fatal(err)
	}
	if s := out.String(); !strings.Contains(s, "one\t") || !strings.Contains(s, "two\t") || strings.Contains(s, "other") || strings.Contains(s, "done\t") {
		t.Errorf("it says %q", s)
	}
	for _, action := range client.Actions() {
		if action.GetVerb() != "list" {
			t.Errorf("it did %v", action)
		}
	}
	if _, err := os.Stat(a.save); err == nil {
		t.Error("it wrote a file")
	}
}

func TestAdopt(t *testing.T) {
	client, a := cluster(), newAdoption(t)
	a.apply = true
	for range 2 { // the second time there is nothing to do
		if err := a.run(t.Context(), kubeapitest.Of(client), &bytes.Buffer{}); err != nil {
			t.Fatal(err)
		}
		wantMoved(t, client)
	}
	var verbs []string
	for _, action := range client.Actions() {
		if action.GetVerb() != "list" && len(verbs) < 4 {
			verbs = append(verbs, action.GetVerb())
		}
	}
	if diff := cmp.Diff([]string{"patch", "delete", "patch", "create"}, verbs); diff != "" {
		t.Error(diff)
	}
}

// TestAdoptGoesOn fails at each request in turn; the same command completes it.
func TestAdoptGoesOn(t *testing.T) {
	failure := errors.New("the API server is gone")
	for at := 1; ; at++ {
		client, a := cluster(), newAdoption(t)
		a.apply = true
		count, failed, over := 0, false, false
		client.PrependReactor("*", "*", func(clienttesting.Action) (bool, runtime.Object, error) {
			if count++; !over && count == at {
				failed = true
				return true, nil, failure
			}
			return false, nil, nil
		})
		err := a.run(t.Context(), kubeapitest.Of(client), &bytes.Buffer{})
		over = true
		if (err != nil) != failed || err != nil && !errors.Is(err, failure) {
			t.Fatalf("request %d: %v", at, err)
		}
		if err := a.run(context.WithoutCancel(t.Context()), kubeapitest.Of(client), &bytes.Buffer{}); err != nil {
			t.Fatalf("request %d, once more: %v", at, err)
		}
		wantMoved(t, client)
		if !failed {
			if at < 8 {
				t.Errorf("only %d requests", at)
			}
			return
		}
	}
}

func TestAdoptFromAFile(t *testing.T) {
	a := newAdoption(t)
	a.file = filepath.Join(t.TempDir(), "pv.yaml")
	var in bytes.Buffer
	list := &corev1.PersistentVolumeList{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "List"},
		Items:    []corev1.PersistentVolume{*persistent("one", movedPool, "a", corev1.PersistentVolumeReclaimDelete), *persistent("other", "bbbbbbbbbbbbbbbbbbbb", "a", "Delete")},
	}
	if err := printManifests(&in, list, persistent("two", movedPool, "a", corev1.PersistentVolumeReclaimRetain)); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(a.file, in.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := a.print(nil, &out); err != nil {
		t.Fatal(err)
	}
	all, err := readVolumes(&out)
	if err != nil || len(all) != 2 {
		t.Fatalf("%d volumes, %v", len(all), err)
	}
	for i := range all {
		if !a.there(&all[i]) || !a.mine(&all[i]) || all[i].UID != "" || all[i].ResourceVersion != "" || all[i].Spec.ClaimRef.UID != "claim-1" {
			t.Errorf("%+v", all[i])
		}
	}
}

func TestAdoptMistakes(t *testing.T) {
	t.Setenv("KUBECONFIG", filepath.Join(t.TempDir(), "none"))
	for _, args := range [][]string{
		{"adopt", "--node=b", "--file=x"},
		{"adopt", "--pool-id=short", "--node=b", "--file=x"},
		{"adopt", "--pool-id=" + movedPool, "--file=x"},
		{"adopt", "--pool-id=" + movedPool, "--node=b"},
		{"adopt", "--pool-id=" + movedPool, "--node=b", "--file=x", "--kubeconfig=y"},
		{"adopt", "--pool-id=" + movedPool, "--node=b", "--file=x", "--context=y"},
		{"adopt", "--pool-id=" + movedPool, "--node=b", "--file=x", "--apply"},
	} {
		c := newCommand(&bytes.Buffer{}, &bytes.Buffer{})
		c.SetArgs(args)
		if err := c.ExecuteContext(t.Context()); err == nil || exitCode(err) != exitUsage {
			t.Errorf("%q: %v", args, err)
		}
	}
}
