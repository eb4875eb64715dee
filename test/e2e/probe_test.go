package e2e

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
)

// A probe is a pod on each node from which the tests look at the node itself, and
// act on it: any cluster has nothing but its API.

const probeNamespace = "csi-loop-e2e-probe"

var probesOnce struct {
	sync.Once
	err    error
	client kubernetes.Interface
}

func TestMain(m *testing.M) {
	code := m.Run()
	if client := probesOnce.client; client != nil {
		err := client.CoreV1().Namespaces().Delete(context.Background(), probeNamespace, metav1.DeleteOptions{})
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

// probes starts them, once for all tests.
func probes(e *env) {
	e.Helper()
	probesOnce.Do(func() {
		probesOnce.client = e.client
		probesOnce.err = startProbes(e)
	})
	if probesOnce.err != nil {
		e.Fatal(probesOnce.err)
	}
}

// sweep removes what an earlier run left that was ended from outside.
func (e *env) sweep() {
	e.Helper()
	ours := metav1.ListOptions{LabelSelector: mark}
	if err := e.client.StorageV1().StorageClasses().DeleteCollection(e.Context(), metav1.DeleteOptions{}, ours); err != nil {
		e.Fatal(err)
	}
	namespaces := e.client.CoreV1().Namespaces()
	e.eventually("nothing is left of an earlier run", patience, func(ctx context.Context) error {
		list, err := namespaces.List(ctx, ours)
		if err != nil {
			return err
		}
		var left []string
		for _, n := range list.Items {
			if n.Name == e.namespace {
				continue
			}
			left = append(left, n.Name)
			if err := ignoreGone(namespaces.Delete(ctx, n.Name, metav1.DeleteOptions{})); err != nil {
				return err
			}
		}
		if len(left) > 0 {
			return fmt.Errorf("there are %q", left)
		}
		return nil
	})
}

func startProbes(e *env) error {
	e.sweep()
	labels := map[string]string{"app": "probe"}
	_, err := e.client.CoreV1().Namespaces().Create(e.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{
		Name: probeNamespace, Labels: map[string]string{"pod-security.kubernetes.io/enforce": "privileged", mark: ""},
	}}, metav1.CreateOptions{})
	if err != nil {
		return err
	}
	_, err = e.client.AppsV1().DaemonSets(probeNamespace).Create(e.Context(), &appsv1.DaemonSet{
		ObjectMeta: metav1.ObjectMeta{Name: "probe"},
		Spec: appsv1.DaemonSetSpec{
			Selector: &metav1.LabelSelector{MatchLabels: labels},
			Template: corev1.PodTemplateSpec{
				ObjectMeta: metav1.ObjectMeta{Labels: labels},
				Spec: corev1.PodSpec{
					HostPID: true, HostNetwork: true, TerminationGracePeriodSeconds: new(int64(0)),
					Tolerations: []corev1.Toleration{{Operator: corev1.TolerationOpExists}},
					Containers: []corev1.Container{{
						Name: "probe", Image: busybox, Command: idle,
						SecurityContext: &corev1.SecurityContext{Privileged: new(true)},
					}},
				},
			},
		},
	}, metav1.CreateOptions{})
	return err
}

func ignoreGone(err error) error {
	if apierrors.IsNotFound(err) {
		return nil
	}
	return err
}

// host runs a shell command on a node, in all the namespaces of its first process.
// A node that is being restarted is waited for.
func (e *env) host(ctx context.Context, node, script string) (string, error) {
	var out string
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	err := poll(ctx, 500*time.Millisecond, func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, 30*time.Second) // a kubelet that dies leaves streams open
		defer cancel()
		list, err := e.client.CoreV1().Pods(probeNamespace).List(ctx, metav1.ListOptions{FieldSelector: "spec.nodeName=" + node})
		if err != nil {
			return err
		}
		err = fmt.Errorf("there is no probe on %s", node)
		for i := range list.Items {
			if p := &list.Items[i]; running(p) {
				out, err = e.exec(ctx, probeNamespace, p.Name,
					"nsenter", "-t", "1", "-m", "-u", "-i", "-n", "-p", "--", "sh", "-c", script)
			}
		}
		return err
	})
	return out, err
}

// onNode is host for a command that must succeed.
func (e *env) onNode(node, script string) string {
	e.Helper()
	out, err := e.host(e.Context(), node, script)
	if err != nil {
		e.Fatalf("on %s: %v", node, err)
	}
	return strings.TrimSpace(out)
}

// listVolumes are the names of volumes, snapshots and groups, and of what is left of
// them, by node.
func (e *env) listVolumes(ctx context.Context) (map[string][]string, error) {
	nodes, err := e.listNodes(ctx)
	if err != nil {
		return nil, err
	}
	found := map[string][]string{}
	for _, node := range nodes {
		out, err := e.host(ctx, node, "cd "+poolDir+" && ls -d volumes/* snapshots/* groups/* .new-* .gone-* 2>/dev/null; true")
		if err != nil {
			return nil, err
		}
		found[node] = strings.Fields(strings.ReplaceAll(out, "volumes/", ""))
	}
	return found, nil
}

// madeVolumes are the names of the volumes since the test began.
func (e *env) madeVolumes(ctx context.Context) ([]string, error) {
	if e.before == nil {
		return nil, nil
	}
	found, err := e.listVolumes(ctx)
	var made []string
	for node, names := range found {
		for _, name := range names {
			if !slices.Contains(e.before[node], name) {
				made = append(made, name)
			}
		}
	}
	return made, err
}

// expectMade waits until there are so many volumes and snapshots more than when the
// test began.
func (e *env) expectMade(want int) {
	e.Helper()
	e.eventually(fmt.Sprintf("the test has %d volumes and snapshots", want), patience, func(ctx context.Context) error {
		made, err := e.madeVolumes(ctx)
		if err == nil && len(made) != want {
			err = fmt.Errorf("there are %q", made)
		}
		return err
	})
}

// checkLeaks waits until nothing is left of the volumes: no PersistentVolume, no
// image, no loop device, no mount.
func (e *env) checkLeaks(ctx context.Context, made []string) {
	if e.before == nil {
		return
	}
	err := poll(ctx, time.Second, func(ctx context.Context) error {
		left, err := e.madeVolumes(ctx)
		if err != nil {
			return err
		}
		list, err := e.client.CoreV1().PersistentVolumes().List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		for _, pv := range list.Items {
			if pv.Spec.ClaimRef != nil && pv.Spec.ClaimRef.Namespace == e.namespace {
				left = append(left, "PersistentVolume "+pv.Name)
			}
		}
		pattern := strings.Join(append(made, e.namespace), "|") // the namespace is in the names of mapped images
		for node := range e.before {
			out, err := e.host(ctx, node, "grep -hsE '"+pattern+"' /sys/block/loop*/loop/backing_file /proc/1/mountinfo; true")
			if err != nil {
				return err
			}
			left = append(left, strings.Fields(out)...)
		}
		if len(left) > 0 {
			return fmt.Errorf("left behind: %q", left)
		}
		return nil
	})
	if err != nil {
		e.Error(err)
	}
}

// power cuts or restores a node's power ("kill-node", "start-node"), which an API
// cannot do. $CSI_LOOP_E2E_POWER is the command that can.
func (e *env) power(action, node string) {
	e.Helper()
	argv := append(powerCommand(e), action, node)
	ctx := context.WithoutCancel(e.Context()) // for clean-ups too
	if out, err := exec.CommandContext(ctx, argv[0], argv[1:]...).CombinedOutput(); err != nil {
		e.Fatalf("%s: %v: %s", strings.Join(argv, " "), err, out)
	}
}

func powerCommand(t testing.TB) []string {
	t.Helper()
	argv := strings.Fields(os.Getenv("CSI_LOOP_E2E_POWER"))
	if len(argv) == 0 {
		t.Skip("CSI_LOOP_E2E_POWER names no command that cuts a node's power; make test-e2e does")
	}
	return argv
}
