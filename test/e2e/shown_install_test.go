package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

// TestInstallAsShown is the life of an installation as README.md, the chart's README and
// docs/operations.md show it, with the default values: installed, looked at, used,
// changed, drained, uninstalled. Of deploy/ it is only asked whether the API server would
// take it. At first, and again at the end, csi-loop is there with the values of the tests.
func TestInstallAsShown(t *testing.T) {
	e := volumes(t)
	r := e.reader()
	e.comesBack(r)
	e.nameImage()
	const (
		list      = `kubectl get pv -o jsonpath='{range .items[?(@.spec.csi.driver=="csi-loop.io")]}{.metadata.name} of {.spec.claimRef.namespace}/{.spec.claimRef.name}{"\n"}{end}'`
		snapshots = `kubectl get volumesnapshotcontents -o jsonpath='{range .items[?(@.spec.driver=="csi-loop.io")]}{.metadata.name} of {.spec.volumeSnapshotRef.namespace}/{.spec.volumeSnapshotRef.name}{"\n"}{end}'`
		uninstall = "helm uninstall csi-loop --namespace csi-loop"
	)
	r.run(uninstall)
	r.run("helm install csi-loop charts/csi-loop --namespace csi-loop")
	e.isInstalled(r)
	e.wouldTake(r)
	traces, reached := e.collects()
	r.run("helm upgrade csi-loop charts/csi-loop --namespace csi-loop --reset-then-reuse-values --set tracing.endpoint=http://collector.monitoring:4317 --wait",
		"collector.monitoring:4317", traces.address)
	e.isInstalled(r)
	e.firstVolume(r)
	volume := e.volumeOf("data").Name
	if reached {
		e.saw(traces, volume, must[*corev1.Pod](e)(e.client.CoreV1().Pods(e.namespace).Get(t.Context(), user, metav1.GetOptions{})).Spec.NodeName)
	}
	if out := r.run(list); out != volume+" of "+e.namespace+"/data\n" {
		t.Errorf("there is %s, and not %s", out, volume)
	}
	e.looksAround(r, volume)
	r.run("helm upgrade csi-loop charts/csi-loop --namespace csi-loop --reset-then-reuse-values")
	e.isInstalled(r)
	e.showsCalls(r)
	e.isDrained(r)
	e.keepsData()
	e.empties()
	e.eventually("nothing is listed", patience, func(context.Context) error {
		for _, what := range []string{list, snapshots} {
			if out, err := r.sh(r.shown(what)); err != nil || out != "" {
				return fmt.Errorf("there is %s: %w", out, or(err))
			}
		}
		return nil
	})
	r.run(uninstall)
}

// comesBack installs csi-loop at the end of the test as it was.
func (e *env) comesBack(r *reader) {
	e.Helper()
	values := filepath.Join(r.home, "values.yaml")
	if err := os.WriteFile(values, []byte(e.helm("get", "values", release, "--output=yaml")), 0o600); err != nil {
		e.Fatal(err)
	}
	e.Cleanup(func() {
		out, err := r.shell(context.Background(), `
kubectl delete clusterrolebinding storage-viewers --ignore-not-found
kubectl uncordon --selector=kubernetes.io/os=linux
if kubectl get namespace csi-loop; then
  helm uninstall csi-loop --namespace=csi-loop --ignore-not-found --wait --timeout=3m
  kubectl delete namespace csi-loop --ignore-not-found
fi
helm install csi-loop charts/csi-loop --namespace=csi-loop --create-namespace --values=`+values+` --hide-notes --wait --timeout=5m`)
		if err != nil {
			e.Errorf("csi-loop is not installed again: %v: %s", err, out)
		}
	})
}

var defaultImage = regexp.MustCompile(`image: (\S+/csi-loop/csi-loop:\S+)`)

// nameImage gives the image that the cluster has the name by which the default values
// call it, in the place of a registry that has it.
func (e *env) nameImage() {
	e.Helper()
	text := must[[]byte](e)(os.ReadFile("../../deploy/csi-loop.yaml"))
	name := defaultImage.FindSubmatch(text)
	if name == nil {
		e.Fatal("deploy has no image")
	}
	pods := must[*corev1.PodList](e)(e.client.CoreV1().Pods(installed).List(e.Context(), metav1.ListOptions{LabelSelector: driverPods}))
	if len(pods.Items) == 0 {
		e.Fatal("csi-loop is not installed")
	}
	have := pods.Items[0].Spec.Containers[0].Image
	// ctr is where containerd is.
	script := `for p in /proc/[0-9]*; do exe=$(readlink $p/exe); case $exe in */containerd) ctr=${exe%/*}/ctr; break;; esac; done
images="$ctr --namespace=k8s.io images"
`
	for _, node := range e.nodes() {
		e.onNode(node, script+fmt.Sprintf(`$images tag --force "$($images list --quiet | grep -E '(^|/)%s$' | head -n 1)" %s`, have, name[1]))
		e.Cleanup(func() {
			if _, err := e.host(context.Background(), node, script+fmt.Sprintf("$images remove %s", name[1])); err != nil {
				e.Error(err)
			}
		})
	}
}

// isInstalled waits for what docs/operations.md says one sees.
func (e *env) isInstalled(r *reader) {
	e.Helper()
	nodes := e.nodes()
	e.eventually("the pods and the space of each node are shown", patience, func(context.Context) error {
		out, err := r.sh(r.shown("kubectl -n csi-loop get pods -o wide"))
		if err != nil {
			return err
		}
		ready := regexp.MustCompile(`(?m)^csi-loop-(node|controller)-\S+ +(\d)/(\d) +Running`)
		count := map[string]int{}
		for _, m := range ready.FindAllStringSubmatch(out, -1) {
			if m[2] == m[3] {
				count[m[1]]++
			}
		}
		if count["node"] != len(nodes) || count["controller"] != 2 || strings.Count(out, "csisc-") != len(nodes) {
			return errors.New(out)
		}
		return nil
	})
}

// wouldTake asks the API server what it would do with deploy/.
func (e *env) wouldTake(r *reader) {
	e.Helper()
	objects, err := r.sh("kubectl kustomize deploy")
	count := strings.Count("\n"+objects, "\nkind: ")
	if err != nil || count == 0 {
		e.Fatal(objects, err)
	}
	for _, verb := range []string{"apply", "delete"} {
		out, err := r.sh("kubectl " + verb + " -k deploy --dry-run=server")
		if err != nil || strings.Count(out, "(server dry run)") != count {
			e.Errorf("%s of %d objects: %s, %v", verb, count, out, err)
		}
	}
}

// claimShown is the claim of README.md.
func claimShown(e *env) string {
	e.Helper()
	text := must[[]byte](e)(os.ReadFile("../../README.md"))
	_, rest, _ := strings.Cut(string(text), "```yaml\n")
	yaml, _, ok := strings.Cut(rest, "```")
	if !ok || !strings.Contains(yaml, "kind: PersistentVolumeClaim") {
		e.Fatal("README.md has no claim")
	}
	return yaml
}

// firstVolume makes the claim of README.md and a pod for it, of a StatefulSet: kubectl drain
// evicts no pod that nobody makes anew.
func (e *env) firstVolume(r *reader) {
	e.Helper()
	if out, err := r.sh("kubectl apply -f - <<'END'\n" + claimShown(e) + "END"); err != nil {
		e.Fatal(out, err)
	}
	for _, b := range r.blocks { // not with every installation
		if b.Text == "kubectl describe pvc CLAIM" && !r.taken[b.Text] {
			r.sees(b.Text, []string{"waiting for first consumer"}, "CLAIM", "data")
		}
	}
	p := e.shell("user", "", "data")
	must[*appsv1.StatefulSet](e)(e.client.AppsV1().StatefulSets(e.namespace).Create(e.Context(), &appsv1.StatefulSet{
		ObjectMeta: metav1.ObjectMeta{Name: "user"},
		Spec: appsv1.StatefulSetSpec{
			ServiceName: "user", Selector: &metav1.LabelSelector{MatchLabels: p.Labels},
			Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: p.Labels}, Spec: p.Spec},
		},
	}, metav1.CreateOptions{}))
	e.waitPods(e.namespace, "app=user", 1, running)
	e.sh(user, "echo word > /data/data/word; sync")
}

// user is the pod of firstVolume.
const user = "user-0"

// empties deletes what the test has.
func (e *env) empties() {
	e.Helper()
	ctx, cancel := context.WithTimeout(e.Context(), patience)
	defer cancel()
	e.removeContents(ctx)
}

func (e *env) keepsData() {
	e.Helper()
	e.waitPods(e.namespace, "app=user", 1, running)
	if got := e.sh(user, "cat /data/data/word"); got != "word" {
		e.Errorf("the volume has %q", got)
	}
}

// looksAround makes somebody of a group of viewers, who then sees the cluster by the plugin.
func (e *env) looksAround(r *reader, volume string) {
	e.Helper()
	r.run("kubectl create clusterrolebinding storage-viewers --clusterrole=csi-loop-viewer --group=storage-viewers")
	config := must[*clientcmdapi.Config](e)(clientcmd.LoadFromFile(r.kubeconfig()))
	user := config.AuthInfos[config.Contexts[config.CurrentContext].AuthInfo]
	user.Impersonate, user.ImpersonateGroups = "somebody", []string{"storage-viewers"}
	viewer := filepath.Join(r.home, "viewer")
	if err := clientcmd.WriteToFile(*config, viewer); err != nil {
		e.Fatal(err)
	}
	plugin := e.compile("kubectl-csi_loop")
	e.eventually("a viewer sees the volume", patience, func(context.Context) error {
		out, err := r.sh(plugin + " volumes -o wide --kubeconfig=" + viewer)
		if err == nil && !strings.Contains(out, volume) {
			err = errors.New(out)
		}
		return err
	})
	if out, err := r.sh("kubectl --kubeconfig=" + viewer + " delete pv " + volume); err == nil || !strings.Contains(err.Error(), "forbidden") {
		e.Errorf("a viewer may delete: %s, %v", out, err)
	}
}

// showsCalls raises the verbosity, and watches the log while a volume is used anew.
func (e *env) showsCalls(r *reader) {
	e.Helper()
	const logs = "kubectl -n csi-loop logs -l app.kubernetes.io/component=node --prefix --tail=-1 --max-log-requests=100 -f"
	r.watched[logs] = 10
	out := r.run(logs)
	if strings.Count(out, "[pod/csi-loop-node-") < len(e.nodes()) || !strings.Contains(out, `"Call" method=`) {
		e.Errorf("no call is shown")
	}
}

// isDrained drains the node of the volume: its pod waits until the node is uncordoned.
func (e *env) isDrained(r *reader) {
	e.Helper()
	pod := must[*corev1.Pod](e)(e.client.CoreV1().Pods(e.namespace).Get(e.Context(), user, metav1.GetOptions{}))
	block := r.shown("kubectl uncordon NODE")
	drain, uncordon, ok := strings.Cut(block, "\n")
	if !ok {
		e.Fatal(block)
	}
	out, err := r.sh(drain, "NODE", pod.Spec.NodeName)
	if err != nil || !strings.Contains(out, "pod/"+pod.Name+" evicted") || !strings.Contains(out, "drained") {
		e.Fatalf("%s, %v", out, err)
	}
	e.eventually("the pod waits", patience, func(ctx context.Context) error {
		p, err := e.client.CoreV1().Pods(e.namespace).Get(ctx, user, metav1.GetOptions{})
		if err == nil && !slices.ContainsFunc(p.Status.Conditions, func(c corev1.PodCondition) bool {
			return c.Type == corev1.PodScheduled && c.Reason == corev1.PodReasonUnschedulable
		}) {
			err = fmt.Errorf("it is %s", p.Status.Phase)
		}
		return err
	})
	if out, err := r.sh(uncordon, "NODE", pod.Spec.NodeName); err != nil {
		e.Fatal(out, err)
	}
}
