package main

import (
	"bytes"
	"fmt"
	"os"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"github.com/csi-loop/csi-loop/internal/kubeapi/kubeapitest"
)

// mover is a cluster with the volume "one" of the pool on node a, bound and with the
// policy Delete, and an administrator who works in one directory.
type mover struct {
	*testing.T
	client *fake.Clientset
	fail   string // verb that fails
	out    bytes.Buffer
}

func newMover(t *testing.T) *mover {
	t.Helper()
	t.Chdir(t.TempDir())
	m := &mover{T: t, client: fake.NewClientset(persistent("one", movedPool, "a", corev1.PersistentVolumeReclaimDelete), claimFor("one", "claim-1", "one"))}
	// The API server gives out UIDs, which the fake does not.
	made := 0
	m.client.PrependReactor("create", "persistentvolumes", func(action clienttesting.Action) (bool, runtime.Object, error) {
		pv := action.(clienttesting.CreateAction).GetObject().(*corev1.PersistentVolume)
		made++
		pv.UID = types.UID(fmt.Sprintf("made-%d", made))
		return true, pv, m.client.Tracker().Create(action.GetResource(), pv, "")
	})
	m.client.PrependReactor("*", "persistentvolumes", func(action clienttesting.Action) (bool, runtime.Object, error) {
		return action.GetVerb() == m.fail, nil, os.ErrDeadlineExceeded
	})
	return m
}

// adopt runs the command for a node.
func (m *mover) adopt(node string, options ...func(*adoption)) error {
	m.Helper()
	a := newAdoption(m.T)
	a.node, a.save, a.apply = node, "", true
	for _, o := range options {
		o(&a)
	}
	m.out.Reset()
	return a.run(m.Context(), kubeapitest.Of(m.client), &m.out)
}

func (m *mover) mustAdopt(node string) {
	m.Helper()
	if err := m.adopt(node); err != nil {
		m.Fatalf("to %s: %v\n%s", node, err, m.out.String())
	}
}

// interrupted adopts, and fails at the first request of a kind.
func (m *mover) interrupted(node, verb string) {
	m.Helper()
	m.fail = verb
	if err := m.adopt(node); err == nil || !strings.Contains(err.Error(), "repeat the command") {
		m.Fatalf("interrupted at %s: %v", verb, err)
	}
	m.fail = ""
}

func (m *mover) setPolicy(policy string) {
	m.Helper()
	patch := `{"spec":{"persistentVolumeReclaimPolicy":"` + policy + `"}}`
	if _, err := m.client.CoreV1().PersistentVolumes().Patch(m.Context(), "one", types.MergePatchType, []byte(patch), metav1.PatchOptions{}); err != nil {
		m.Fatal(err)
	}
}

func (m *mover) deleteClaim() {
	m.Helper()
	if err := m.client.CoreV1().PersistentVolumeClaims("shop").Delete(m.Context(), "one", metav1.DeleteOptions{}); err != nil {
		m.Fatal(err)
	}
}

func (m *mover) deleteVolume() {
	m.Helper()
	if err := m.client.CoreV1().PersistentVolumes().Delete(m.Context(), "one", metav1.DeleteOptions{}); err != nil {
		m.Fatal(err)
	}
}

// want says where the volume is, with which policy; "" if it is not.
func (m *mover) want(want string) {
	m.Helper()
	pv, err := m.client.CoreV1().PersistentVolumes().Get(m.Context(), "one", metav1.GetOptions{})
	got := ""
	switch {
	case err == nil:
		got = pv.Spec.NodeAffinity.Required.NodeSelectorTerms[0].MatchExpressions[0].Values[0] + " " + string(pv.Spec.PersistentVolumeReclaimPolicy)
	case !apierrors.IsNotFound(err):
		m.Fatal(err)
	}
	if got != want {
		m.Errorf("the volume is %q, want %q; it said %s", got, want, m.out.String())
	}
	for _, k := range []string{"csi-loop.io/adopt-node", "csi-loop.io/adopt-policy"} {
		if err == nil && pv.Annotations[k] != "" && pv.UID != "uid-one" {
			m.Errorf("the new one has %s", k)
		}
	}
}

// A move that is complete says nothing about the next one: neither the policy, nor that
// what is missing is to be made again.
func TestAdoptTrustsNoOldFile(t *testing.T) {
	for _, next := range []string{"c", "b"} { // another node, and the same one once more
		t.Run("a policy that was changed, then to "+next, func(t *testing.T) {
			m := newMover(t)
			m.mustAdopt("b")
			m.want("b Delete")
			first, err := os.ReadFile("csi-loop-adopt-" + movedPool + ".yaml")
			if err != nil {
				t.Fatal(err)
			}
			if next == "b" {
				m.mustAdopt("a")
			}
			m.setPolicy("Retain")
			m.mustAdopt(next)
			m.want(next + " Retain")
			if now, err := os.ReadFile("csi-loop-adopt-" + movedPool + ".yaml"); err != nil || !bytes.Equal(now, first) {
				t.Error("the file of the first move was changed", err)
			}
			if _, err := os.Stat("csi-loop-adopt-" + movedPool + "-2.yaml"); err != nil {
				t.Error(err)
			}
		})
		t.Run("a volume that was taken away, then to "+next, func(t *testing.T) {
			m := newMover(t)
			m.mustAdopt("b")
			m.setPolicy("Retain")
			m.deleteClaim()
			m.deleteVolume()
			m.mustAdopt(next)
			m.want("")
		})
	}
}

// A move that was interrupted goes on as it began, but for what an administrator did
// meanwhile.
func TestAdoptGoesOnWithCare(t *testing.T) {
	t.Run("as it began", func(t *testing.T) {
		for _, verb := range []string{"patch", "delete", "create"} {
			m := newMover(t)
			m.interrupted("b", verb)
			m.mustAdopt("b")
			m.want("b Delete")
			m.setPolicy("Retain")
			m.mustAdopt("b") // there is nothing to go on with
			m.want("b Retain")
		}
	})
	t.Run("the claim was deleted", func(t *testing.T) {
		m := newMover(t)
		m.interrupted("b", "create")
		m.want("")
		m.deleteClaim()
		m.mustAdopt("b")
		m.want("b Retain")
		if !strings.Contains(m.out.String(), "its claim is gone") {
			t.Errorf("it says %s", m.out.String())
		}
	})
	t.Run("the policy was changed before adopt did", func(t *testing.T) {
		m := newMover(t)
		m.interrupted("b", "patch")
		m.setPolicy("Retain")
		m.mustAdopt("b")
		m.want("b Retain")
	})
	t.Run("the policy was changed after adopt did", func(t *testing.T) {
		m := newMover(t)
		m.interrupted("b", "delete")
		m.setPolicy("Recycle")
		m.mustAdopt("b")
		m.want("b Recycle")
	})
	t.Run("the volume was deleted before adopt did", func(t *testing.T) {
		m := newMover(t)
		m.interrupted("b", "patch")
		m.deleteVolume()
		m.mustAdopt("b")
		m.want("")
	})
	t.Run("to another node, nothing missing", func(t *testing.T) {
		m := newMover(t)
		m.interrupted("b", "delete")
		m.mustAdopt("c")
		m.want("c Retain") // nobody knows what it was left so for
	})
	t.Run("to another node, the volume missing", func(t *testing.T) {
		m := newMover(t)
		m.interrupted("b", "create")
		if err := m.adopt("c"); err == nil || !strings.Contains(err.Error(), "complete it with --node=b first") {
			t.Fatalf("%v", err)
		}
		m.want("")
		m.mustAdopt("b")
		m.mustAdopt("c")
		m.want("c Delete")
	})
	t.Run("a line that was not written to its end", func(t *testing.T) {
		m := newMover(t)
		m.interrupted("b", "delete")
		path := "csi-loop-adopt-" + movedPool + ".yaml"
		text, err := os.ReadFile(path)
		if err != nil || !bytes.HasSuffix(text, []byte("deleting uid-one one\n")) {
			t.Fatalf("%s, %v", text, err)
		}
		if err := os.WriteFile(path, text[:len(text)-3], 0o600); err != nil {
			t.Fatal(err)
		}
		m.deleteVolume()
		m.mustAdopt("b")
		m.want("")
	})
}

// A record that is not complete is of no use once another move came after it: what is
// missing after that was taken away on purpose.
func TestAdoptGoesOnWithNoMoveThatAnotherOvertook(t *testing.T) {
	takeAway := func(m *mover) {
		m.setPolicy("Retain")
		m.deleteClaim()
		m.deleteVolume()
	}
	second := persistent("two", movedPool, "a", corev1.PersistentVolumeReclaimDelete)
	elsewhere := func(m *mover, node string) { // another administrator, or another directory
		m.Helper()
		here, err := os.Getwd()
		if err != nil {
			m.Fatal(err)
		}
		m.Chdir(m.TempDir())
		m.mustAdopt(node)
		m.Chdir(here)
	}
	t.Run("in the same directory", func(t *testing.T) {
		m := newMover(t)
		m.interrupted("b", "delete")
		m.mustAdopt("c")
		takeAway(m)
		m.mustAdopt("b")
		m.want("")
	})
	t.Run("but not by looking", func(t *testing.T) {
		m := newMover(t)
		m.interrupted("b", "delete")
		if err := m.adopt("c", func(a *adoption) { a.apply = false }); err != nil {
			t.Fatal(err)
		}
		m.mustAdopt("b")
		m.want("b Delete")
	})
	t.Run("in another directory, nothing missing", func(t *testing.T) {
		m := newMover(t)
		m.interrupted("b", "delete")
		elsewhere(m, "c")
		m.setPolicy("Delete")
		m.mustAdopt("b")
		m.want("b Delete")
		if _, err := os.Stat("csi-loop-adopt-" + movedPool + "-2.yaml"); err != nil {
			t.Errorf("the old record was gone on with: %v", err)
		}
		takeAway(m)
		m.mustAdopt("b")
		m.want("")
	})
	t.Run("in another directory, one missing", func(t *testing.T) {
		m := newMover(t)
		if err := m.client.Tracker().Add(second); err != nil {
			t.Fatal(err)
		}
		m.interrupted("b", "create")
		elsewhere(m, "c") // moves the other one
		if err := m.adopt("b"); err == nil || !strings.Contains(err.Error(), "PersistentVolume one is missing since, and two was moved") {
			t.Errorf("%v", err)
		}
		m.want("")
	})
}

// Somebody else deletes it, and it waits for its pods: its deletion is not adopt's.
func TestAdoptPassesOverWhatOthersDelete(t *testing.T) {
	m := newMover(t)
	pv, err := m.client.CoreV1().PersistentVolumes().Get(t.Context(), "one", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	pv.DeletionTimestamp = new(metav1.Now())
	if _, err := m.client.CoreV1().PersistentVolumes().Update(t.Context(), pv, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	m.mustAdopt("b")
	m.want("a Delete")
	if !strings.Contains(m.out.String(), "passed over") {
		t.Errorf("it says %s", m.out.String())
	}
}

// A policy that changes between the list and the patch is not lost: the patch is for the
// object as it was listed.
func TestAdoptSeesWhatChangesMeanwhile(t *testing.T) {
	m := newMover(t)
	m.client.PrependReactor("patch", "persistentvolumes", func(action clienttesting.Action) (bool, runtime.Object, error) {
		patch := string(action.(clienttesting.PatchAction).GetPatch())
		stale := strings.Contains(patch, `"resourceVersion":"7"`) && strings.Contains(patch, `"uid":"uid-one"`)
		return stale, nil, apierrors.NewConflict(action.GetResource().GroupResource(), "one", os.ErrInvalid)
	})
	if err := m.adopt("b"); !apierrors.IsConflict(err) {
		t.Errorf("%v", err)
	}
	m.want("a Delete")
}

func TestAdoptRefusesAFileThatIsThere(t *testing.T) {
	m := newMover(t)
	named := func(a *adoption) { a.save = "mine.yaml" }
	if err := os.WriteFile("mine.yaml", []byte("kind: Other\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := m.adopt("b", named); err == nil || exitCode(err) != exitUsage || !strings.Contains(err.Error(), "--save mine.yaml") {
		t.Errorf("another file: %v", err)
	}
	m.want("a Delete")
	if err := os.Remove("mine.yaml"); err != nil {
		t.Fatal(err)
	}
	if err := m.adopt("b", named); err != nil {
		t.Fatal(err)
	}
	if err := m.adopt("b", named); err != nil {
		t.Errorf("nothing is to be done: %v", err)
	}
	if err := m.adopt("c", named); err == nil || !strings.Contains(err.Error(), "--save mine.yaml") {
		t.Errorf("a move that is complete: %v", err)
	}
	m.want("b Delete")
}
