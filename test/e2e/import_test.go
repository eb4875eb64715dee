package e2e

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
)

// imageOn makes an image with a filesystem on a node, where the driver sees it.
func (e *env) imageOn(node, name string) string {
	e.Helper()
	path := imageDir + "/" + e.namespace + "-" + name
	e.onNode(node, "truncate -s 64M "+path)
	e.Cleanup(func() {
		if _, err := e.host(context.Background(), node, "rm -f "+path); err != nil {
			e.Error(err)
		}
	})
	if _, err := e.exec(e.Context(), installed, e.driverOn(node), "mkfs.ext4", "-q", path); err != nil {
		e.Fatal(err)
	}
	return path
}

// csiLoop runs a command of csi-loop in the driver's pod of a node.
func (e *env) csiLoop(node string, args ...string) string {
	e.Helper()
	out, err := e.exec(e.Context(), installed, e.driverOn(node), append([]string{"csi-loop"}, args...)...)
	if err != nil {
		e.Fatal(err)
	}
	return out
}

func TestImportedImageIsAVolume(t *testing.T) {
	e := volumes(t)
	node := e.nodes()[0]
	path := e.imageOn(node, "old.img")
	out := e.csiLoop(node, "import", "--claim="+e.namespace+"/imported", "--reclaim=Delete", path)
	var pv corev1.PersistentVolume
	var c corev1.PersistentVolumeClaim
	d := utilyaml.NewYAMLOrJSONDecoder(strings.NewReader(out), 4096)
	for _, object := range []any{&pv, &c} {
		if err := d.Decode(object); err != nil {
			t.Fatalf("%v in %s", err, out)
		}
	}
	must[*corev1.PersistentVolume](e)(e.client.CoreV1().PersistentVolumes().Create(e.Context(), &pv, metav1.CreateOptions{}))
	e.createClaim(&c)
	e.run(e.shell("user", node, "imported"), corev1.PodRunning)
	e.sh("user", "echo own > /data/imported/file; sync")
	e.stop("user")
	e.run(e.shell("again", node, "imported"), corev1.PodRunning)
	if got := e.sh("again", "cat /data/imported/file"); got != "own" {
		t.Errorf("the file has %q", got)
	}
}

func TestVolumesOfATemplate(t *testing.T) {
	e := volumes(t)
	nodes := e.nodes()
	name := "golden-" + e.namespace
	if len(name) > 63 {
		name = name[:63]
	}
	early := e.class(immediate, "template", name)
	e.createClaim(claim("early", early, "64Mi"))
	e.eventSays("early", "template", name)

	path := e.imageOn(nodes[0], "golden.img")
	e.csiLoop(nodes[0], "template", "add", name, path)
	onIt := e.driverOn(nodes[0])
	e.Cleanup(func() {
		if _, err := e.exec(context.Background(), installed, onIt, "csi-loop", "template", "rm", name); err != nil {
			e.Error(err)
		}
	})
	class := e.class(nil, "template", name)
	e.published("the node with the template has room", class, nodes[0], some)
	for _, other := range nodes[1:] {
		e.published("a node without it has none", class, other, func(n int64) bool { return n == 0 })
	}
	e.createClaim(claim("copy", class, "128Mi"))
	pod := e.run(e.shell("user", "", "copy", "early"), corev1.PodRunning)
	if pod.Spec.NodeName != nodes[0] {
		t.Errorf("the pod runs on %s, the template is on %s", pod.Spec.NodeName, nodes[0])
	}
	if size := e.number("user", "df -m /data/copy | tail -n 1 | awk '{print $2}'"); size < 100 {
		t.Errorf("the filesystem has %d MiB", size)
	}
	if out := e.csiLoop(nodes[0], "template", "ls"); !strings.Contains(out, name) {
		t.Errorf("ls: %s", out)
	}
}

// A disk cannot be moved here, and the other volumes of a pool are other tests': the PersistentVolume is of a pool that
// is nowhere. That it is replaced and keeps its claim is what Kubernetes has a say in.
func TestAdoptKeepsTheClaim(t *testing.T) {
	e := volumes(t)
	nodes := e.nodes()
	const pool = "aaaaaaaaaaaaaaaaaaaa"
	name := e.namespace + "-moved"
	pv := mappedVolume(name, nodes[0], nil)
	pv.Spec.CSI.VolumeHandle = pool + ".moved"
	pv.Spec.PersistentVolumeReclaimPolicy = corev1.PersistentVolumeReclaimDelete
	persistent := e.client.CoreV1().PersistentVolumes()
	must[*corev1.PersistentVolume](e)(persistent.Create(e.Context(), pv, metav1.CreateOptions{}))
	e.Cleanup(func() {
		if err := persistent.Delete(context.Background(), name, metav1.DeleteOptions{}); err != nil {
			e.Error(err)
		}
	})
	c := claim("moved", "", "64Mi")
	c.Spec.VolumeName = name
	e.createClaim(c)
	bound := func(after types.UID) *corev1.PersistentVolume {
		t.Helper()
		var have *corev1.PersistentVolume
		e.eventually("the claim is bound", patience, func(ctx context.Context) (err error) {
			claim, err := e.client.CoreV1().PersistentVolumeClaims(e.namespace).Get(ctx, "moved", metav1.GetOptions{})
			if err != nil {
				return err
			}
			if have, err = persistent.Get(ctx, name, metav1.GetOptions{}); err != nil {
				return err
			}
			if claim.Status.Phase != corev1.ClaimBound || have.Status.Phase != corev1.VolumeBound || have.UID == after {
				return fmt.Errorf("the claim is %s, the volume %s", claim.Status.Phase, have.Status.Phase)
			}
			return nil
		})
		return have
	}
	before := bound("")
	adopt := exec.CommandContext(e.Context(), "go", "run", "./cmd/csi-loop", "adopt", "--kubeconfig="+os.Getenv("KUBECONFIG"),
		"--pool-id="+pool, "--node="+nodes[1], "--save="+filepath.Join(t.TempDir(), "saved.yaml"), "--apply")
	adopt.Dir = "../.."
	if out, err := adopt.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	after := bound(before.UID)
	if after.Spec.PersistentVolumeReclaimPolicy != corev1.PersistentVolumeReclaimDelete || after.Spec.ClaimRef.UID != before.Spec.ClaimRef.UID ||
		after.Spec.NodeAffinity.Required.NodeSelectorTerms[0].MatchExpressions[0].Values[0] != nodes[1] {
		t.Errorf("%+v", after.Spec)
	}
	// The pool is nowhere, so that the volume could not be deleted with its claim.
	patch := []byte(`{"spec":{"persistentVolumeReclaimPolicy":"Retain"}}`)
	must[*corev1.PersistentVolume](e)(persistent.Patch(e.Context(), name, types.MergePatchType, patch, metav1.PatchOptions{}))
}
