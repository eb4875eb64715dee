package e2e

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

const gib = 1 << 30

// capacity is what the scheduler is told of a class on a node.
func (e *env) capacity(ctx context.Context, class, node string) (int64, error) {
	list, err := e.client.StorageV1().CSIStorageCapacities(installed).List(ctx, metav1.ListOptions{})
	if err != nil {
		return 0, err
	}
	for _, c := range list.Items {
		if c.StorageClassName == class && c.NodeTopology != nil && c.NodeTopology.MatchLabels["topology.csi-loop.io/node"] == node {
			if c.Capacity == nil {
				return 0, errors.New("no capacity is published yet")
			}
			return c.Capacity.Value(), nil
		}
	}
	return 0, fmt.Errorf("nothing is published for %s on %s", class, node)
}

// published waits for a capacity that is as wanted, and returns it.
func (e *env) published(what, class, node string, as func(bytes int64) bool) int64 {
	e.Helper()
	var last int64
	e.eventually(what, patience, func(ctx context.Context) error {
		have, err := e.capacity(ctx, class, node)
		if err != nil {
			return err
		}
		if last = have; !as(have) {
			return fmt.Errorf("it is %d MiB", have>>20)
		}
		return nil
	})
	return last
}

func some(bytes int64) bool { return bytes > 0 }

func TestCapacityFollowsThePool(t *testing.T) {
	e := volumes(t)
	node, class := e.nodes()[0], e.class(nil)
	before := e.published("the node's capacity is published", class, node, some)
	e.createClaim(claim("large", class, "2Gi"))
	e.run(e.shell("user", node, "large"), corev1.PodRunning)
	e.published("it is 2 GiB less with a volume of 2 GiB", class, node, func(n int64) bool { return n <= before-2*gib && n > before-3*gib })
	e.stop("user")
	if err := e.client.CoreV1().PersistentVolumeClaims(e.namespace).Delete(t.Context(), "large", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	e.published("it is back without", class, node, func(n int64) bool { return n > before-gib/2 })
}

func TestTooLargeClaimStaysPendingAndSaysWhy(t *testing.T) {
	e := volumes(t)
	late, now := e.class(nil), e.class(immediate)
	for _, node := range e.nodes() {
		e.published("capacity on "+node, late, node, some)
	}
	e.createClaim(claim("late", late, "900Ti"))
	e.start(e.shell("late", "", "late"))
	e.eventSays("late", "FailedScheduling", "did not have enough free storage")
	e.createClaim(claim("now", now, "900Ti"))
	e.eventSays("now", "ProvisioningFailed", "not enough space", "989560464998400 bytes")
	for _, name := range []string{"late", "now"} {
		c := must[*corev1.PersistentVolumeClaim](e)(e.client.CoreV1().PersistentVolumeClaims(e.namespace).Get(t.Context(), name, metav1.GetOptions{}))
		if c.Status.Phase != corev1.ClaimPending {
			t.Errorf("claim %s is %s", name, c.Status.Phase)
		}
	}
}

func TestPodsGoWhereTheSpaceIs(t *testing.T) {
	e := volumes(t)
	nodes, class := e.nodes(), e.class(nil)
	if len(nodes) < 2 {
		t.Fatal("one node is no choice")
	}
	for _, node := range nodes[1:] {
		free := e.published("capacity on "+node, class, node, some)
		e.createClaim(claim("fill-"+node, class, fmt.Sprintf("%dMi", free>>20-1024)))
		e.run(e.shell("fill-"+node, node, "fill-"+node), corev1.PodRunning)
	}
	for _, node := range nodes[1:] {
		e.published("there is little on "+node, class, node, func(n int64) bool { return n < 2*gib })
	}
	for i := range 3 {
		name := fmt.Sprintf("free-%d", i)
		e.createClaim(claim(name, class, "2Gi"))
		p := e.shell(name, "", name)
		p.Spec.Tolerations = []corev1.Toleration{{Operator: corev1.TolerationOpExists, Effect: corev1.TaintEffectNoSchedule}}
		if got := e.run(p, corev1.PodRunning).Spec.NodeName; got != nodes[0] {
			t.Errorf("pod %s is on %s; only %s has the space", name, got, nodes[0])
		}
	}
}

func TestImmediateVolumeBindsWithoutAPod(t *testing.T) {
	e := volumes(t)
	e.createClaim(claim("early", e.class(immediate), "64Mi"))
	v := e.volumeOf("early")
	if v.Spec.NodeAffinity == nil || v.Spec.NodeAffinity.Required == nil {
		t.Fatal("the volume is said to be everywhere")
	}
	e.run(e.shell("user", "", "early"), corev1.PodRunning)
}

func TestWrongParametersAreNamed(t *testing.T) {
	e := volumes(t)
	for name, c := range map[string]struct {
		parameters []string
		words      []string
	}{
		"misspelt":   {[]string{"allocaton", "thin"}, []string{"allocaton"}},
		"value":      {[]string{"allocation", "fat"}, []string{"allocation", "fat"}},
		"pool":       {[]string{"pool", "no-such-pool"}, []string{"no-such-pool"}},
		"filesystem": {[]string{"csi.storage.k8s.io/fstype", "ntfs"}, []string{"ntfs"}},
		"mkfs":       {[]string{"mkfsOptions", "-E discard"}, []string{"discard"}},
	} {
		t.Run(name, func(*testing.T) {
			e.createClaim(claim(name, e.class(immediate, c.parameters...), "64Mi"))
			e.eventSays(name, append([]string{"ProvisioningFailed"}, c.words...)...)
		})
	}
}

// A claim for less than the filesystem can be is bound to the least that it can, which
// is what the volume and the claim say; and so is a clone that is claimed in the same words.
func TestSmallClaimGetsTheMinimum(t *testing.T) {
	e := volumes(t)
	class := e.class(immediate, "csi.storage.k8s.io/fstype", "xfs")
	e.createClaim(claim("small", class, "16Mi"))
	check := func(name string) {
		t.Helper()
		volume := e.volumeOf(name)
		made := must[*corev1.PersistentVolumeClaim](e)(e.client.CoreV1().PersistentVolumeClaims(e.namespace).Get(t.Context(), name, metav1.GetOptions{}))
		for what, got := range map[string]resource.Quantity{
			"volume": volume.Spec.Capacity[corev1.ResourceStorage], "claim": made.Status.Capacity[corev1.ResourceStorage],
		} {
			if got.Value() != 300<<20 {
				t.Errorf("the %s of %s says %s", what, name, got.String())
			}
		}
	}
	check("small")
	e.createClaim(cloned("clone", class, "16Mi", "small"))
	check("clone")
	e.run(e.shell("user", "", "small", "clone"), corev1.PodRunning)
}

// Provisioning that was asked for before the class could be served goes on by
// itself.
func TestReclaimedSpaceServesWhoWaits(t *testing.T) {
	e := volumes(t)
	node := e.nodes()[0]
	class := e.class(func(c *storagev1.StorageClass) {
		c.AllowedTopologies = []corev1.TopologySelectorTerm{{MatchLabelExpressions: []corev1.TopologySelectorLabelRequirement{{
			Key: "topology.csi-loop.io/node", Values: []string{node},
		}}}}
	})
	free := e.published("capacity on "+node, class, node, some)
	size := resource.NewQuantity(free-gib, resource.BinarySI).String()
	e.createClaim(claim("first", class, size))
	e.run(e.shell("first", "", "first"), corev1.PodRunning)
	e.published("little is left", class, node, func(n int64) bool { return n < 2*gib })
	e.createClaim(claim("second", class, size))
	e.start(e.shell("second", "", "second"))
	e.eventSays("second", "FailedScheduling")
	e.stop("first")
	if err := e.client.CoreV1().PersistentVolumeClaims(e.namespace).Delete(t.Context(), "first", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	e.waitPhase("second", corev1.PodRunning)
	t.Logf("after %s", time.Since(start).Round(time.Second))
}
