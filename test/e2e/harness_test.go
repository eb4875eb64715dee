package e2e

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
)

// agnhost is there in our own cluster, and can be pulled in others.
const agnhost = "registry.k8s.io/e2e-test-images/agnhost:2.66.1"

// patience is for one thing that should take seconds.
const patience = 2 * time.Minute

// env is what a test works in: a cluster, and a namespace of its own, which goes
// with the test.
type env struct {
	*testing.T

	client    kubernetes.Interface
	namespace string
}

// setup skips without a KUBECONFIG, and fails with one that is of no use.
func setup(t *testing.T) *env {
	t.Helper()
	path := os.Getenv("KUBECONFIG")
	if path == "" {
		t.Skip("KUBECONFIG names no cluster: make cluster starts one")
	}
	config, err := clientcmd.BuildConfigFromFlags("", path)
	if err != nil {
		t.Fatal(err)
	}
	config.QPS, config.Burst = 100, 200
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	made, err := client.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{
		ObjectMeta: metav1.ObjectMeta{GenerateName: "csi-loop-e2e-"},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	e := &env{T: t, client: client, namespace: made.Name}
	t.Cleanup(e.remove)
	return e
}

// remove waits until the namespace is gone: what is stuck in it is a finding.
func (e *env) remove() {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	namespaces := e.client.CoreV1().Namespaces()
	if err := namespaces.Delete(ctx, e.namespace, metav1.DeleteOptions{}); err != nil {
		e.Error(err)
		return
	}
	err := wait.PollUntilContextCancel(ctx, time.Second, true, func(ctx context.Context) (bool, error) {
		_, err := namespaces.Get(ctx, e.namespace, metav1.GetOptions{})
		return apierrors.IsNotFound(err), nil
	})
	if err != nil {
		e.Errorf("namespace %s does not go away: %v", e.namespace, err)
	}
}

// nodes are the names of those that are ready.
func (e *env) nodes() []string {
	e.Helper()
	list, err := e.client.CoreV1().Nodes().List(e.Context(), metav1.ListOptions{})
	if err != nil {
		e.Fatal(err)
	}
	var names []string
	for _, n := range list.Items {
		for _, c := range n.Status.Conditions {
			if c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue {
				names = append(names, n.Name)
			}
		}
	}
	return names
}

// pod is one container that ends by itself.
func pod(name, node, image string, args ...string) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"app": name}},
		Spec: corev1.PodSpec{
			NodeName: node, RestartPolicy: corev1.RestartPolicyNever,
			TerminationGracePeriodSeconds: new(int64(1)),
			Containers: []corev1.Container{{
				Name: "main", Image: image, Args: args, ImagePullPolicy: corev1.PullIfNotPresent,
			}},
		},
	}
}

// run creates a pod and waits for a phase; it fails with what the pod says.
func (e *env) run(p *corev1.Pod, want corev1.PodPhase) *corev1.Pod {
	e.Helper()
	pods := e.client.CoreV1().Pods(e.namespace)
	last, err := pods.Create(e.Context(), p, metav1.CreateOptions{})
	if err != nil {
		e.Fatal(err)
	}
	name := last.Name
	err = wait.PollUntilContextTimeout(e.Context(), 200*time.Millisecond, patience, true,
		func(ctx context.Context) (bool, error) {
			last, err = pods.Get(ctx, name, metav1.GetOptions{})
			if err != nil {
				return false, err
			}
			if last.Status.Phase == corev1.PodFailed && want != corev1.PodFailed {
				return false, fmt.Errorf("it failed: %s", e.logs(name))
			}
			return last.Status.Phase == want, nil
		})
	if err != nil {
		e.Fatalf("pod %s on %s is not %s: %v\n%s", name, p.Spec.NodeName, want, err, e.events(name))
	}
	return last
}

// logs never fail: they are for the words of another failure.
func (e *env) logs(name string) string {
	out, err := e.client.CoreV1().Pods(e.namespace).GetLogs(name, &corev1.PodLogOptions{}).DoRaw(e.Context())
	if err != nil {
		return err.Error()
	}
	return string(out)
}

func (e *env) events(object string) string {
	list, err := e.client.CoreV1().Events(e.namespace).List(e.Context(), metav1.ListOptions{
		FieldSelector: "involvedObject.name=" + object,
	})
	if err != nil {
		return err.Error()
	}
	var out strings.Builder
	for _, ev := range list.Items {
		fmt.Fprintf(&out, "%s %s: %s\n", ev.Type, ev.Reason, ev.Message)
	}
	return out.String()
}
