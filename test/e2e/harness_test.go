package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/remotecommand"
)

// The images that pods run. They are there in our own cluster, and can be pulled
// in others.
const (
	agnhost = "registry.k8s.io/e2e-test-images/agnhost:2.66.1"
	busybox = "registry.k8s.io/e2e-test-images/busybox:1.37.0-2"
)

// What values.yaml installs.
const (
	driver    = "csi-loop.io"
	release   = "csi-loop"
	installed = "csi-loop" // namespace
	poolDir   = "/var/lib/csi-loop"
	imageDir  = "/var/lib/csi-loop-images"
	hostname  = "kubernetes.io/hostname"
	mark      = "csi-loop.io/e2e" // label of what the tests make
)

// patience is for one thing that should take seconds.
const patience = 3 * time.Minute

// env is what a test works in: a cluster, and a namespace of its own, which goes
// with the test. After it no volume of the test may be left anywhere.
type env struct {
	*testing.T

	client    kubernetes.Interface
	config    *rest.Config
	namespace string
	before    map[string][]string // volumes by node
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
		ObjectMeta: metav1.ObjectMeta{GenerateName: "csi-loop-e2e-", Labels: map[string]string{
			"pod-security.kubernetes.io/enforce": "privileged", mark: "",
		}},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	e := &env{T: t, client: client, config: config, namespace: made.Name}
	t.Cleanup(e.remove)
	return e
}

// volumes is setup for a test that has volumes: it proves that none is left.
func volumes(t *testing.T) *env {
	t.Helper()
	e := setup(t)
	probes(e)
	before, err := e.listVolumes(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	e.before = before
	return e
}

// remove waits until all that the test made is gone: what is stuck is a finding. The
// empty namespace goes by itself.
func (e *env) remove() {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if e.Failed() {
		e.dump(ctx)
	}
	made, err := e.madeVolumes(ctx)
	if err != nil {
		e.Error(err)
	}
	e.removeContents(ctx)
	if err := e.client.CoreV1().Namespaces().Delete(ctx, e.namespace, metav1.DeleteOptions{}); err != nil {
		e.Error(err)
	}
	e.checkLeaks(ctx, made)
}

// removeContents deletes what the namespace controller, which looks at a namespace
// every few seconds, would be slow to wait for.
func (e *env) removeContents(ctx context.Context) {
	all := metav1.ListOptions{}
	err := errors.Join(
		e.removeSnapshots(ctx),
		e.client.AppsV1().StatefulSets(e.namespace).DeleteCollection(ctx, metav1.DeleteOptions{}, all),
		e.client.CoreV1().Pods(e.namespace).DeleteCollection(ctx, metav1.DeleteOptions{}, all),
		e.client.CoreV1().PersistentVolumeClaims(e.namespace).DeleteCollection(ctx, metav1.DeleteOptions{}, all),
		poll(ctx, 300*time.Millisecond, func(ctx context.Context) error {
			claims, err := e.client.CoreV1().PersistentVolumeClaims(e.namespace).List(ctx, all)
			if err != nil {
				return err
			}
			pods, err := e.client.CoreV1().Pods(e.namespace).List(ctx, all)
			if err == nil && len(claims.Items)+len(pods.Items) > 0 {
				err = fmt.Errorf("%d claims and %d pods do not go away", len(claims.Items), len(pods.Items))
			}
			return err
		}),
	)
	if err != nil {
		e.Error(err)
	}
}

// dump logs what a failure leaves in the namespace.
func (e *env) dump(ctx context.Context) {
	events, err := e.client.CoreV1().Events(e.namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		e.Log(err)
		return
	}
	for _, ev := range events.Items {
		if ev.Type == corev1.EventTypeWarning {
			e.Logf("%s/%s: %s: %s", ev.InvolvedObject.Kind, ev.InvolvedObject.Name, ev.Reason, ev.Message)
		}
	}
}

// poll calls f until it succeeds or ctx ends; the error is f's last.
func poll(ctx context.Context, every time.Duration, f func(context.Context) error) error {
	var last error
	err := wait.PollUntilContextCancel(ctx, every, true, func(ctx context.Context) (bool, error) {
		err := f(ctx)
		// At the end requests fail because of it, some before: they would have to wait too long.
		if err != nil && (last == nil || ctx.Err() == nil && !strings.Contains(err.Error(), "would exceed context deadline")) {
			last = err
		}
		return err == nil, nil
	})
	if err != nil && last != nil {
		return last
	}
	return err
}

// eventually fails the test if f does not succeed in time.
func (e *env) eventually(what string, limit time.Duration, f func(context.Context) error) {
	e.Helper()
	ctx, cancel := context.WithTimeout(e.Context(), limit)
	defer cancel()
	start := time.Now()
	if err := poll(ctx, 300*time.Millisecond, f); err != nil {
		e.Fatalf("%s: not after %s: %v", what, time.Since(start).Round(time.Second), err)
	}
	e.Logf("%s: after %s", what, time.Since(start).Round(100*time.Millisecond))
}

// must fails the test on an error.
func must[T any](e *env) func(v T, err error) T {
	return func(v T, err error) T {
		e.Helper()
		if err != nil {
			e.Fatal(err)
		}
		return v
	}
}

// nodes are the names of those that are ready, in order.
func (e *env) nodes() []string {
	e.Helper()
	names, err := e.listNodes(e.Context())
	if err != nil {
		e.Fatal(err)
	}
	return names
}

func (e *env) listNodes(ctx context.Context) ([]string, error) {
	list, err := e.client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, err
	}
	var names []string
	for i := range list.Items {
		if ready(&list.Items[i]) {
			names = append(names, list.Items[i].Name)
		}
	}
	slices.Sort(names)
	return names, nil
}

func ready(n *corev1.Node) bool {
	return slices.ContainsFunc(n.Status.Conditions, func(c corev1.NodeCondition) bool {
		return c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue
	})
}

// exec runs a command in a container of a pod and returns what it wrote.
func (e *env) exec(ctx context.Context, namespace, pod string, argv ...string) (string, error) {
	request := e.client.CoreV1().RESTClient().Post().Namespace(namespace).Resource("pods").Name(pod).SubResource("exec").
		VersionedParams(&corev1.PodExecOptions{Command: argv, Stdout: true, Stderr: true}, scheme.ParameterCodec)
	executor, err := remotecommand.NewWebSocketExecutor(e.config, "GET", request.URL().String())
	if err != nil {
		return "", err
	}
	var out, trouble bytes.Buffer
	err = executor.StreamWithContext(ctx, remotecommand.StreamOptions{Stdout: &out, Stderr: &trouble})
	if err != nil {
		return out.String(), fmt.Errorf("%s in %s: %w: %s", strings.Join(argv, " "), pod, err, trouble.String())
	}
	return out.String(), nil
}

// sh runs a shell command in a pod of the test; it must succeed.
func (e *env) sh(pod, script string) string {
	e.Helper()
	out, err := e.exec(e.Context(), e.namespace, pod, "sh", "-c", script)
	if err != nil {
		e.Fatal(err)
	}
	return strings.TrimSpace(out)
}

// logs never fail: they are for the words of another failure.
func (e *env) logs(name string) string {
	out, err := e.client.CoreV1().Pods(e.namespace).GetLogs(name, &corev1.PodLogOptions{}).DoRaw(e.Context())
	if err != nil {
		return err.Error()
	}
	return string(out)
}

// events of an object, one a line.
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

// eventSays waits for an event of the object that has all the words.
func (e *env) eventSays(object string, words ...string) {
	e.Helper()
	e.eventually(fmt.Sprintf("an event of %s with %q", object, words), patience, func(context.Context) error {
		all := e.events(object)
		for line := range strings.Lines(all) {
			if !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(line, w) }) {
				e.Log(strings.TrimSpace(line))
				return nil
			}
		}
		return fmt.Errorf("there is only:\n%s", all)
	})
}
