package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

const chart = "../../charts/csi-loop"

// helm runs helm, the program of $CSI_LOOP_E2E_HELM or that of the path.
func (e *env) helm(args ...string) string {
	e.Helper()
	program := os.Getenv("CSI_LOOP_E2E_HELM")
	if program == "" {
		program = "helm"
	}
	var trouble strings.Builder
	cmd := exec.CommandContext(e.Context(), program, append(args, "--namespace="+installed)...)
	cmd.Stderr = &trouble
	out, err := cmd.Output()
	if err != nil {
		e.Fatalf("helm %s: %v: %s%s", strings.Join(args, " "), err, out, trouble.String())
	}
	return string(out)
}

func TestUpgradeDisturbsNobody(t *testing.T) {
	e := volumes(t)
	class := e.class(nil)
	var checks []func()
	var users []*corev1.Pod
	for _, node := range e.nodes() {
		e.createClaim(claim(node, class, "64Mi"))
		users = append(users, e.run(e.shell(node, node, node), corev1.PodRunning))
		checks = append(checks, e.write(node, "/data/"+node))
	}
	now := time.Now().Format("150405.000")
	e.helm("upgrade", release, chart, "--reuse-values", "--wait", "--timeout=3m",
		"--set-string=node.podAnnotations.upgraded="+now, "--set-string=controller.podAnnotations.upgraded="+now)
	e.waitPods(installed, driverPods, len(users), func(p *corev1.Pod) bool { return p.Annotations["upgraded"] == now })
	for i, check := range checks {
		check()
		p := must[*corev1.Pod](e)(e.client.CoreV1().Pods(e.namespace).Get(t.Context(), users[i].Name, metav1.GetOptions{}))
		if p.UID != users[i].UID || p.Status.ContainerStatuses[0].RestartCount > 0 {
			t.Errorf("pod %s has been restarted", p.Name)
		}
	}
	for _, p := range users {
		e.stop(p.Name)
		e.run(e.shell("again-"+p.Name, p.Name, p.Name), corev1.PodRunning)
		if got := e.sh("again-"+p.Name, "wc -l < /data/"+p.Name+"/log"); got == "0" {
			t.Errorf("the log on %s is empty", p.Name)
		}
	}
}

func TestReinstallKeepsVolumes(t *testing.T) {
	e := volumes(t)
	class := e.filesystem("xfs")
	nodes := e.nodes()
	for _, node := range nodes {
		e.createClaim(claim(node, class, "320Mi"))
		e.run(e.shell(node, node, node), corev1.PodRunning)
		e.sh(node, "echo "+node+" > /data/"+node+"/word")
	}
	e.createClaim(claim("late", e.class(immediate), "64Mi"))
	e.volumeOf("late")
	check := e.write(nodes[0], "/data/"+nodes[0])
	r := e.reader()
	values := filepath.Join(t.TempDir(), "values.yaml")
	if err := os.WriteFile(values, []byte(e.helm("get", "values", release, "--output=yaml")), 0o600); err != nil {
		t.Fatal(err)
	}
	install := func() {
		e.helm("upgrade", "--install", release, chart, "--values="+values, "--wait", "--timeout=3m")
	}
	t.Cleanup(func() {
		if t.Failed() {
			cmd := exec.Command(os.Getenv("CSI_LOOP_E2E_HELM"), "upgrade", "--install", release, chart, "--values="+values, "--namespace="+installed, "--wait")
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("csi-loop is not installed again: %v: %s", err, out)
			}
		}
	})
	e.helm("uninstall", release, "--wait", "--timeout=3m")
	check()
	e.start(e.shell("late", "", "late"))
	r.sees("kubectl describe pod POD", []string{"ContainerCreating", "FailedMount", "csi-loop.io/csi.sock: connect: no such file or directory"}, "POD", "late")
	install()
	check()
	e.waitPhase("late", corev1.PodRunning)
	e.grow(nodes[0], "640Mi")
	for _, node := range nodes {
		e.stop(node)
		e.run(e.shell("again-"+node, node, node), corev1.PodRunning)
		if got := e.sh("again-"+node, "cat /data/"+node+"/word"); got != node {
			t.Errorf("the volume on %s has %q", node, got)
		}
	}
}
