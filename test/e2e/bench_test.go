package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
)

const (
	benchVariable = "CSI_LOOP_E2E_BENCH"
	benchLimit    = 20 * time.Minute
	// What values.yaml leaves as it is: the ports of /metrics of the driver on a node
	// and of external-provisioner beside the controller.
	nodeMetrics        = 9809
	provisionerMetrics = 9810
)

// moment is when something of one claim and its pod was first seen.
type moment struct{ created, bound, scheduled, running time.Time }

// TestBenchClaims creates CSI_LOOP_E2E_BENCH claims, each with a pod, at once, and
// reports how long they take to be bound and running, and who took that time. It is a
// benchmark: it fails when something does not work, not when it is slow.
func TestBenchClaims(t *testing.T) {
	n, err := strconv.Atoi(os.Getenv(benchVariable))
	if err != nil || n < 1 {
		t.Skipf("%s is not set to a number of claims", benchVariable)
	}
	e := volumes(t)
	class := e.filesystem("ext4")
	// One before the others: templates, images of containers, caches.
	e.createClaim(claim("first", class, "16Mi"))
	e.run(e.shell("first", "", "first"), corev1.PodRunning)

	drivers, provisioner := e.scrape(driverPods, nodeMetrics), e.scrape(controllerPods, provisionerMetrics)
	seen := &witness{env: e, moments: map[string]*moment{}}
	ctx, stop := context.WithTimeout(t.Context(), benchLimit)
	defer stop()
	watching := seen.watch(ctx)
	began := time.Now()
	e.createAll(ctx, n, class, seen)
	all := seen.wait(ctx, n)
	took := time.Since(began)
	stop()
	if err := watching(); err != nil && !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if t.Failed() {
		return
	}
	fmt.Printf("%d claims with pods at once, all running after %s\n", n, took.Round(time.Millisecond))
	span := func(name string, of func(m *moment) time.Duration) {
		var d []time.Duration
		for _, m := range all {
			d = append(d, of(m))
		}
		slices.Sort(d)
		fmt.Printf("%-40s p50 %8s  p99 %8s  max %8s\n", name, at(d, 50), at(d, 99), at(d, 100))
		for _, x := range d {
			fmt.Printf("Benchmark%s 1 %d ns/op\n", strings.ReplaceAll(name, " ", ""), x.Nanoseconds())
		}
	}
	span("created to bound", func(m *moment) time.Duration { return m.bound.Sub(m.created) })
	span("created to scheduled", func(m *moment) time.Duration { return m.scheduled.Sub(m.created) })
	span("created to running", func(m *moment) time.Duration { return m.running.Sub(m.created) })
	span("bound to running, kubelet and driver", func(m *moment) time.Duration { return m.running.Sub(m.bound) })
	e.reportCalls("driver", drivers, e.scrape(driverPods, nodeMetrics))
	e.reportCalls("provisioner", provisioner, e.scrape(controllerPods, provisionerMetrics))
	e.reportEvents()
}

func at(sorted []time.Duration, percent int) time.Duration {
	return sorted[max(0, (len(sorted)*percent+99)/100-1)].Round(time.Millisecond)
}

// createAll makes the claims and their pods, as fast as the API server takes them.
func (e *env) createAll(ctx context.Context, n int, class string, seen *witness) {
	e.Helper()
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(32)
	for i := range n {
		g.Go(func() error {
			name := "bench-" + strconv.Itoa(i)
			seen.of(name, func(m *moment) { m.created = time.Now() })
			if _, err := e.client.CoreV1().PersistentVolumeClaims(e.namespace).Create(ctx, claim(name, class, "16Mi"), metav1.CreateOptions{}); err != nil {
				return err
			}
			p := pod(name, "", busybox)
			p.Spec.Containers[0].Command = idle
			p.Spec.Volumes = []corev1.Volume{{Name: "v", VolumeSource: corev1.VolumeSource{
				PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: name},
			}}}
			p.Spec.Containers[0].VolumeMounts = []corev1.VolumeMount{{Name: "v", MountPath: "/data"}}
			_, err := e.client.CoreV1().Pods(e.namespace).Create(ctx, p, metav1.CreateOptions{})
			return err
		})
	}
	if err := g.Wait(); err != nil {
		e.Fatal(err)
	}
}

// witness notes when things happen, as the API server tells of them: the times in
// objects are whole seconds.
type witness struct {
	*env

	mu      sync.Mutex
	moments map[string]*moment // guarded by mu; by name of claim and pod
}

// of changes what is known of a claim.
func (w *witness) of(name string, change func(m *moment)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.moments[name] == nil {
		w.moments[name] = &moment{}
	}
	change(w.moments[name])
}

// watch begins to look, and returns a function that waits for its end.
func (w *witness) watch(ctx context.Context) (wait func() error) {
	w.Helper()
	var g errgroup.Group
	first := func(t *time.Time, is bool) {
		if is && t.IsZero() {
			*t = time.Now()
		}
	}
	g.Go(func() error {
		return follow(ctx, w.client.CoreV1().PersistentVolumeClaims(w.namespace).Watch, func(o runtime.Object) {
			if c, ok := o.(*corev1.PersistentVolumeClaim); ok {
				w.of(c.Name, func(m *moment) { first(&m.bound, c.Status.Phase == corev1.ClaimBound) })
			}
		})
	})
	g.Go(func() error {
		return follow(ctx, w.client.CoreV1().Pods(w.namespace).Watch, func(o runtime.Object) {
			if p, ok := o.(*corev1.Pod); ok {
				w.of(p.Name, func(m *moment) {
					first(&m.scheduled, p.Spec.NodeName != "")
					first(&m.running, running(p))
				})
			}
		})
	})
	return g.Wait
}

// follow tells of what a watch says until ctx ends. The API server may end a watch at
// any time; the next one begins with the state that things are in.
func follow(ctx context.Context, begin func(context.Context, metav1.ListOptions) (watch.Interface, error), tell func(o runtime.Object)) error {
	for ctx.Err() == nil {
		events, err := begin(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		for event := range events.ResultChan() {
			tell(event.Object)
		}
	}
	return ctx.Err()
}

// wait returns the moments of n claims once all have all of them.
func (w *witness) wait(ctx context.Context, n int) []*moment {
	w.Helper()
	var all []*moment
	err := poll(ctx, 100*time.Millisecond, func(context.Context) error {
		w.mu.Lock()
		defer w.mu.Unlock()
		all = nil
		for _, m := range w.moments {
			if !m.created.IsZero() && !m.bound.IsZero() && !m.scheduled.IsZero() && !m.running.IsZero() {
				all = append(all, m)
			}
		}
		if len(all) < n {
			return fmt.Errorf("%d of %d pods run", len(all), n)
		}
		return nil
	})
	if err != nil {
		w.Fatal(err)
	}
	return all
}

// call is how often one was answered, and the seconds that took.
type call struct{ count, seconds float64 }

// scrape adds up the CSI calls in the metrics of some pods, by method.
func (e *env) scrape(selector string, port int) map[string]call {
	e.Helper()
	calls := map[string]call{}
	pods := must[*corev1.PodList](e)(e.client.CoreV1().Pods(installed).List(e.Context(), metav1.ListOptions{LabelSelector: selector}))
	for _, p := range pods.Items {
		if p.DeletionTimestamp != nil { // of before the chart was installed
			continue
		}
		text, err := e.client.CoreV1().Pods(installed).ProxyGet("http", p.Name, strconv.Itoa(port), "metrics", nil).DoRaw(e.Context())
		if err != nil {
			e.Logf("no metrics of %s: %v", p.Name, err)
			continue
		}
		addCalls(calls, text)
	}
	return calls
}

// addCalls reads the histograms of calls: the driver's own, and that of csi-lib-utils
// in the sidecars.
func addCalls(calls map[string]call, text []byte) {
	for line := range bytes.Lines(text) {
		name, rest, ok := strings.Cut(strings.TrimSpace(string(line)), "{")
		labels, value, found := strings.Cut(rest, "} ")
		if !ok || !found || !strings.HasPrefix(name, "csi_loop_csi_calls_seconds_") && !strings.HasPrefix(name, "csi_sidecar_operations_seconds_") {
			continue
		}
		_, method, _ := strings.Cut(labels, `method="`)
		if _, sidecar, ok := strings.Cut(labels, `method_name="`); ok {
			method = sidecar
		}
		method, _, _ = strings.Cut(method, `"`)
		number, err := strconv.ParseFloat(value, 64)
		if err != nil {
			continue
		}
		c := calls[method]
		switch {
		case strings.HasSuffix(name, "_count"):
			c.count += number
		case strings.HasSuffix(name, "_sum"):
			c.seconds += number
		default:
			continue
		}
		calls[method] = c
	}
}

// reportCalls prints what was called in between.
func (e *env) reportCalls(who string, before, after map[string]call) {
	e.Helper()
	if len(after) == 0 {
		e.Errorf("no metrics of the %s", who)
	}
	for _, method := range slices.Sorted(maps.Keys(after)) {
		n, s := after[method].count-before[method].count, after[method].seconds-before[method].seconds
		if n > 0 {
			fmt.Printf("%-12s %-50s %6.0f calls, %8.1f ms each, %8.2f s in all\n", who, method, n, s/n*1000, s)
		}
	}
}

// reportEvents counts what Kubernetes said of the claims and pods.
func (e *env) reportEvents() {
	e.Helper()
	said := map[string]int{}
	for _, event := range must[*corev1.EventList](e)(e.client.CoreV1().Events(e.namespace).List(e.Context(), metav1.ListOptions{})).Items {
		said[event.Type+" "+event.Reason] += max(1, int(event.Count))
	}
	for _, what := range slices.Sorted(maps.Keys(said)) {
		fmt.Printf("event %-40s %6d\n", what, said[what])
	}
}
