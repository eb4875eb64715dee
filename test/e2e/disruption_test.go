package e2e

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

const replicas = 3

// statefulSet is one of pods that each write their own word, on nodes of their own
// where there are enough.
func (e *env) statefulSet(class string) {
	e.Helper()
	template := claim("data", class, "64Mi")
	p := e.shell("", "")
	p.Spec.Containers[0].VolumeMounts = []corev1.VolumeMount{{Name: "data", MountPath: "/data"}}
	labels := map[string]string{"app": "set"}
	must[*appsv1.StatefulSet](e)(e.client.AppsV1().StatefulSets(e.namespace).Create(e.Context(), &appsv1.StatefulSet{
		ObjectMeta: metav1.ObjectMeta{Name: "set"},
		Spec: appsv1.StatefulSetSpec{
			Replicas: new(int32(replicas)), PodManagementPolicy: appsv1.ParallelPodManagement,
			Selector: &metav1.LabelSelector{MatchLabels: labels}, ServiceName: "set",
			Template: corev1.PodTemplateSpec{
				ObjectMeta: metav1.ObjectMeta{Labels: labels},
				Spec: corev1.PodSpec{
					Containers: p.Spec.Containers, TerminationGracePeriodSeconds: new(int64(1)),
					Tolerations: []corev1.Toleration{{Operator: corev1.TolerationOpExists, Effect: corev1.TaintEffectNoSchedule}},
					TopologySpreadConstraints: []corev1.TopologySpreadConstraint{{
						MaxSkew: 1, TopologyKey: hostname, WhenUnsatisfiable: corev1.DoNotSchedule,
						LabelSelector: &metav1.LabelSelector{MatchLabels: labels},
					}},
				},
			},
			VolumeClaimTemplates: []corev1.PersistentVolumeClaim{*template},
		},
	}, metav1.CreateOptions{}))
	e.waitSet()
	for i := range replicas {
		e.sh(member(i), "echo word of $HOSTNAME > /data/word; sync")
	}
}

func member(i int) string { return fmt.Sprintf("set-%d", i) }

func (e *env) waitSet() {
	e.Helper()
	e.waitPods(e.namespace, "app=set", replicas, running)
}

// checkSet waits for the set and checks that every pod has its word.
func (e *env) checkSet() {
	e.Helper()
	e.waitSet()
	for i := range replicas {
		if got := e.sh(member(i), "cat /data/word && echo $HOSTNAME > /data/last"); got != "word of "+member(i) {
			e.Errorf("%s has %q", member(i), got)
		}
	}
}

func TestStatefulSetKeepsItsData(t *testing.T) {
	e := volumes(t)
	e.statefulSet(e.class(nil))
	t.Log("its pods are restarted")
	e.restartPods(e.namespace, "app=set")
	e.checkSet()
	t.Log("the driver is restarted")
	var checks []func()
	for i := range replicas {
		checks = append(checks, e.write(member(i), "/data"))
	}
	e.restartPods(installed, driverPods)
	for _, check := range checks {
		check()
	}
	e.checkSet()
	t.Log("the controller is restarted")
	e.restartPods(installed, controllerPods)
	for _, check := range checks {
		check()
	}
	t.Log("the kubelets are killed")
	for _, node := range e.nodes() {
		e.killKubelet(node)
	}
	for _, check := range checks {
		check()
	}
	e.restartPods(e.namespace, "app=set")
	e.checkSet()
}

// kubelets prints the process IDs of a node's kubelet.
const kubelets = `for p in /proc/[0-9]*; do tr '\0' ' ' < $p/cmdline 2>/dev/null | grep -qE '^[^ ]*/?(hyperkube )?kubelet ' && echo ${p#/proc/}; done; true`

// killKubelet kills it and waits until another answers for the node.
func (e *env) killKubelet(node string) {
	e.Helper()
	old := strings.Fields(e.onNode(node, kubelets))
	if len(old) != 1 {
		e.Fatalf("the kubelets of %s are %q", node, old)
	}
	e.onNode(node, "(sleep 1; kill -9 "+old[0]+") >/dev/null 2>&1 &") // which would go through the kubelet too
	e.eventually("another kubelet answers on "+node, patience, func(ctx context.Context) error {
		now, err := e.host(ctx, node, kubelets) // which goes through the kubelet
		if err != nil {
			return err
		}
		if p := strings.Fields(now); len(p) != 1 || p[0] == old[0] {
			return fmt.Errorf("there are %q", p)
		}
		return nil
	})
}

func TestPowerCutLosesNothingThatWasSynced(t *testing.T) {
	powerCommand(t)
	e := volumes(t)
	nodes := e.nodes()
	node := nodes[len(nodes)-1] // not the control plane
	class := e.class(nil)
	names := []string{"ext4", "xfs", "btrfs", "raw"}
	for _, name := range names[:3] {
		e.createClaim(claim(name, e.filesystem(name), "320Mi"))
	}
	raw := claim("raw", class, "64Mi")
	raw.Spec.VolumeMode = new(corev1.PersistentVolumeBlock)
	e.createClaim(raw)
	e.run(e.shell("user", node, names...), corev1.PodRunning)
	e.sh("user", "for fs in ext4 xfs btrfs; do echo $fs > /data/$fs/word; sync; done; echo raw | dd of=/dev/raw conv=fsync")
	var handles []string
	for _, name := range names {
		handles = append(handles, e.volumeOf(name).Name)
	}
	e.power("kill-node", node)
	t.Cleanup(func() { e.power("start-node", node) })
	e.waitReady(node, false)
	e.createClaim(claim("elsewhere", class, "64Mi"))
	e.run(e.shell("elsewhere", nodes[0], "elsewhere"), corev1.PodRunning)
	e.power("start-node", node)
	e.waitReady(node, true)
	e.waitPods(installed, driverPods, len(nodes), running)
	e.eventually("the pod is back with its data", patience, func(ctx context.Context) error {
		got, err := e.exec(ctx, e.namespace, "user", "sh", "-c", "cat /data/ext4/word /data/xfs/word /data/btrfs/word && head -n 1 /dev/raw")
		if err == nil && strings.Join(strings.Fields(got), " ") != strings.Join(names, " ") {
			e.Fatalf("the volumes have %q", got)
		}
		return err
	})
	for i, name := range names {
		if got := e.onNode(node, "cat /sys/block/loop*/loop/backing_file | grep -c "+handles[i]+"/disk.img"); got != "1" {
			t.Errorf("%s has %s loop devices", name, got)
		}
	}
}

// waitReady waits until the control plane says that a node is ready, or is not.
func (e *env) waitReady(node string, want bool) {
	e.Helper()
	e.eventually(fmt.Sprintf("%s is ready: %t", node, want), patience, func(ctx context.Context) error {
		n, err := e.client.CoreV1().Nodes().Get(ctx, node, metav1.GetOptions{})
		if err != nil {
			return err
		}
		if ready(n) != want {
			return errors.New("it is not so")
		}
		return nil
	})
}

// cutLink drops what a node's driver sends to the controller, until it is restored.
func (e *env) cutLink(node string) (restore func()) {
	e.Helper()
	change := func(action string) {
		for _, chain := range []string{"OUTPUT", "FORWARD"} {
			if _, err := e.host(context.Background(), node, "iptables -w "+action+" "+chain+" -p tcp --dport 9808 -j DROP"); err != nil {
				e.Error(err)
			}
		}
	}
	restore = sync.OnceFunc(func() { change("-D") })
	e.Cleanup(restore)
	change("-I")
	return restore
}

func TestNodeThatIsCutOffServesItsPods(t *testing.T) {
	e := volumes(t)
	nodes := e.nodes()
	node := nodes[len(nodes)-1]
	class := e.class(nil)
	e.createClaim(claim("before", class, "64Mi"))
	e.run(e.shell("before", node, "before"), corev1.PodRunning)
	restore := e.cutLink(node)
	e.createClaim(claim("during", class, "64Mi"))
	e.start(e.shell("during", node, "during"))
	e.createClaim(claim("elsewhere", class, "64Mi"))
	e.run(e.shell("elsewhere", nodes[0], "elsewhere"), corev1.PodRunning)
	e.stop("before")
	e.run(e.shell("after", node, "before"), corev1.PodRunning)
	e.eventSays("during", "ProvisioningFailed")
	restore()
	e.waitPhase("during", corev1.PodRunning)
	e.expectMade(3) // and no second one for a claim
}

func TestOneControllerOfTwoIsEnough(t *testing.T) {
	e := volumes(t)
	pods := e.client.CoreV1().Pods(installed)
	list := must[*corev1.PodList](e)(pods.List(t.Context(), metav1.ListOptions{LabelSelector: controllerPods}))
	if len(list.Items) != 2 {
		t.Fatalf("there are %d replicas", len(list.Items))
	}
	class := e.class(immediate)
	leader := ""
	e.eventually("the provisioner has a leader", patience, func(ctx context.Context) error {
		l, err := e.client.CoordinationV1().Leases(installed).Get(ctx, "csi-loop-io", metav1.GetOptions{})
		if err != nil {
			return err
		}
		for _, p := range list.Items {
			if h := l.Spec.HolderIdentity; h != nil && strings.HasSuffix(*h, p.Name) {
				leader = p.Name
				return nil
			}
		}
		return errors.New("it is none of the pods")
	})
	if err := pods.Delete(t.Context(), leader, metav1.DeleteOptions{GracePeriodSeconds: new(int64(0))}); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	e.createClaim(claim("after", class, "64Mi"))
	e.volumeOf("after")
	t.Logf("the other one provisions %s after the leader's death", time.Since(start).Round(time.Second))
	e.eventually("the leader is replaced", patience, func(ctx context.Context) error {
		_, err := pods.Get(ctx, leader, metav1.GetOptions{})
		if !apierrors.IsNotFound(err) {
			return errors.Join(errors.New("it is still there"), err)
		}
		return nil
	})
	e.waitPods(installed, controllerPods, 2, running)
}
