package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
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
	e.pluginShowsTheRest(plugin, node)
	if table := plugin("volumes", "shown", "--namespace="+e.namespace); !strings.Contains(table, v.Device) || strings.Contains(table, "\x1b[") {
		t.Errorf("a table without a terminal:\n%s", table)
	}
}

// pluginShowsTheRest looks at what is of the volume "shown", and at what is around it: an
// inline volume, a snapshot, a template, no copy, and what the volume's pod writes.
func (e *env) pluginShowsTheRest(plugin func(args ...string) string, node string) {
	e.Helper()
	parse := func(out string, into any) {
		e.Helper()
		if err := json.Unmarshal([]byte(out), into); err != nil {
			e.Fatalf("%v in %s", err, out)
		}
	}

	inline := e.shell("inline", node)
	inline.Spec.Volumes = []corev1.Volume{{Name: "scratch", VolumeSource: corev1.VolumeSource{CSI: &corev1.CSIVolumeSource{
		Driver: driver, VolumeAttributes: map[string]string{"size": "64Mi"},
	}}}}
	inline.Spec.Containers[0].VolumeMounts = []corev1.VolumeMount{{Name: "scratch", MountPath: "/data"}}
	e.run(inline, corev1.PodRunning)
	// The controller and the node hand out a report again for 3 s each.
	e.eventually("the inline volume is shown", patience, func(context.Context) error {
		if out := plugin("volumes", "--node="+node, "--namespace="+e.namespace); !strings.Contains(out, "inline:scratch") {
			return errors.New(out)
		}
		return nil
	})

	taken := e.takeSnapshot("kept", "shown")
	e.eventually("the snapshot is shown", patience, func(context.Context) error {
		var snapshots []struct {
			Node, Pool, Namespace, VolumeSnapshot, SourceVolume string

			Size int64
		}
		out := plugin("snapshots", "-o", "json", "--namespace="+e.namespace)
		parse(out, &snapshots)
		if len(snapshots) != 1 {
			return errors.New(out)
		}
		s := snapshots[0]
		if s.Node != node || s.Pool == "" || s.Namespace != e.namespace || s.VolumeSnapshot != taken.Name || s.SourceVolume != e.volumeOf("shown").Name || s.Size != 64<<20 {
			e.Errorf("snapshot: %s", out)
		}
		return nil
	})

	name := "shown-" + e.namespace
	if len(name) > 63 {
		name = name[:63]
	}
	e.csiLoop(node, "template", "add", name, e.imageOn(node, "shown.img"))
	defer e.csiLoop(node, "template", "rm", name) // while the test's context lives
	e.eventually("the template is shown", patience, func(context.Context) error {
		if out := plugin("templates", "--node="+node); !strings.Contains(out, name) {
			return errors.New(out)
		}
		return nil
	})

	// Nothing is copied on a node whose only test this is; tests do not run beside each other.
	var copies []any
	if out := plugin("copies", "-o", "json", "--node="+node); json.Unmarshal([]byte(out), &copies) != nil || len(copies) > 0 {
		e.Errorf("copies: %s", out)
	}
	e.sh("pod", "(while :; do echo x >> /data/shown/file; sync; done) >/dev/null 2>&1 &")
	if out := plugin("top", "--once", "--interval=10s", "--namespace="+e.namespace); !regexp.MustCompile(regexp.QuoteMeta(e.namespace) + ` +shown +pod +` + regexp.QuoteMeta(node) + ` +\S+ +[1-9]\S* +\S+ +[1-9]`).MatchString(out) {
		e.Errorf("top: %s", out)
	}
}
