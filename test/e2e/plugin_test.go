package e2e

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

// compile builds one of our commands for the machine that the tests run on.
func (e *env) compile(command string) string {
	e.Helper()
	path := filepath.Join(e.TempDir(), command)
	build := exec.CommandContext(e.Context(), "go", "build", "-buildvcs=false", "-o", path, "./cmd/"+command)
	build.Dir, build.Env = "../..", append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off")
	if out, err := build.CombinedOutput(); err != nil {
		e.Fatalf("%v: %s", err, out)
	}
	return path
}

// plugin returns what runs kubectl csi-loop against the cluster.
func (e *env) plugin() func(args ...string) string {
	e.Helper()
	path := e.compile("kubectl-csi_loop")
	return func(args ...string) string {
		e.Helper()
		var trouble strings.Builder
		cmd := exec.CommandContext(e.Context(), path, append(args, "--kubeconfig="+os.Getenv("KUBECONFIG"), "--csi-loop-namespace="+installed)...)
		cmd.Stderr = &trouble
		out, err := cmd.Output()
		if err != nil {
			e.Fatalf("kubectl csi-loop %s: %v: %s%s", strings.Join(args, " "), err, out, trouble.String())
		}
		return string(out)
	}
}

// TestPluginShowsTheCluster: through the API server's proxy, what nodes have and whose
// it is.
func TestPluginShowsTheCluster(t *testing.T) {
	e := volumes(t)
	e.createClaim(claim("shown", e.class(nil), "64Mi"))
	node := e.run(e.shell("pod", "", "shown"), corev1.PodRunning).Spec.NodeName
	plugin := e.plugin()
	r := e.reader()
	r.watched["kubectl csi-loop top"] = 8
	r.sees("kubectl csi-loop top", []string{node, "linked", "shown", "SNAPSHOT", "TEMPLATE", "PROGRESS", "READ/S"})

	var nodes []struct {
		Name, State, Error string
		Pools              []struct {
			Name, Filesystem string
			Size             int64
			Volumes          int
		}
	}
	if err := json.Unmarshal([]byte(plugin("nodes", "-o", "json", "--node="+node)), &nodes); err != nil { //nolint:musttag // names match in any case
		t.Fatal(err)
	}
	if len(nodes) != 1 || nodes[0].State != "linked" || nodes[0].Error != "" || len(nodes[0].Pools) != 1 || nodes[0].Pools[0].Size == 0 || nodes[0].Pools[0].Volumes == 0 {
		t.Errorf("nodes: %+v", nodes)
	}

	var shown []struct {
		Claim, Namespace, Node, Device, State, PersistentVolume string

		Pods                  []string
		Size, Allocated, Used int64
		Known                 bool
	}
	out := plugin("volumes", "shown", "-o", "json", "--namespace="+e.namespace)
	if err := json.Unmarshal([]byte(out), &shown); err != nil { //nolint:musttag // as above
		t.Fatal(err)
	}
	if len(shown) != 1 {
		t.Fatalf("volumes: %s", out)
	}
	v := shown[0]
	if v.Claim != "shown" || v.Namespace != e.namespace || v.Node != node || v.State != "published" || !strings.HasPrefix(v.Device, "/dev/loop") ||
		v.PersistentVolume != e.volumeOf("shown").Name || !v.Known || v.Size != 64<<20 || v.Allocated < v.Size || v.Used == 0 || len(v.Pods) != 1 || v.Pods[0] != "pod" {
		t.Errorf("volume: %s", out)
	}
	if table := plugin("volumes", "shown", "--namespace="+e.namespace); !strings.Contains(table, v.Device) || strings.Contains(table, "\x1b[") {
		t.Errorf("a table without a terminal:\n%s", table)
	}
}
