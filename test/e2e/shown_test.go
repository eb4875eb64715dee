package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/clientcmd"
)

// A reader runs what pages show: the blocks that they say the test runs, as they are there,
// but for the names that whoever reads them fills in. Its shell is in the
// repository, and has a home, a kubeconfig for the test's namespace and programs of its own.
type reader struct {
	*env

	home    string
	environ []string
	blocks  []shownBlock
	taken   map[string]bool
	// watched are lines that go on until somebody interrupts them, which happens after so
	// many seconds.
	watched map[string]int
	// input is what is typed, at a terminal if there is any.
	input string
}

// shownBlock is what test/docs/blocks prints.
type shownBlock struct {
	Page string `json:"page"`
	Line int    `json:"line"`
	Text string `json:"text"`
}

// reader fails the test at its end if a block has not been run.
func (e *env) reader() *reader {
	e.Helper()
	ask := exec.CommandContext(e.Context(), "go", "run", "./test/docs/blocks", "of", e.Name())
	ask.Dir = "../.."
	out, err := ask.Output()
	if err != nil {
		e.Fatal(err)
	}
	r := &reader{env: e, home: e.TempDir(), taken: map[string]bool{}, watched: map[string]int{}}
	if err := json.Unmarshal(out, &r.blocks); err != nil {
		e.Fatal(err)
	}
	config, err := clientcmd.LoadFromFile(os.Getenv("KUBECONFIG"))
	if err != nil {
		e.Fatal(err)
	}
	config.Contexts[config.CurrentContext].Namespace = e.namespace
	if err := clientcmd.WriteToFile(*config, r.kubeconfig()); err != nil {
		e.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(r.home, "bin"), 0o755); err != nil {
		e.Fatal(err)
	}
	if helm := os.Getenv("CSI_LOOP_E2E_HELM"); helm != "" {
		if err := os.Symlink(helm, filepath.Join(r.home, "bin", "helm")); err != nil {
			e.Fatal(err)
		}
	}
	r.environ = r.environment()
	e.Cleanup(func() {
		for _, b := range r.blocks {
			if !r.taken[b.Text] && !e.Failed() && !e.Skipped() {
				e.Errorf("%s, line %d: the page says that this test runs it", b.Page, b.Line)
			}
		}
	})
	return r
}

func (r *reader) kubeconfig() string { return filepath.Join(r.home, ".kube", "config") }

// shown is the block with that line. Blocks with the same text are one.
func (r *reader) shown(line string) string {
	r.Helper()
	for _, b := range r.blocks {
		if slices.Contains(strings.Split(b.Text, "\n"), line) {
			r.taken[b.Text] = true
			return b.Text
		}
	}
	r.Fatalf("no page has a block for this test with the line %q", line)
	return ""
}

// run runs the block with that line, which must succeed, and returns what it prints. Names
// are pairs: what the page has, and what it stands for.
func (r *reader) run(line string, names ...string) string {
	r.Helper()
	out, err := r.sh(r.shown(line), names...)
	if err != nil {
		r.Fatal(err)
	}
	r.Logf("%s\n%s", line, out)
	return out
}

// sees runs the block until what it prints has all the words.
func (r *reader) sees(line string, words []string, names ...string) {
	r.Helper()
	text := r.shown(line)
	r.eventually(fmt.Sprintf("%s shows %q", line, words), patience, func(context.Context) error {
		out, err := r.sh(text, names...)
		if err != nil {
			return err
		}
		for _, w := range words {
			if !strings.Contains(out, w) {
				return fmt.Errorf("%q is not in\n%s", w, out)
			}
		}
		return nil
	})
}

// sh runs commands, and stops at the first that fails.
func (r *reader) sh(commands string, names ...string) (string, error) {
	r.Helper()
	return r.shell(r.Context(), commands, names...)
}

// shell is sh for clean-ups too, after which the test's context has ended.
func (r *reader) shell(ctx context.Context, commands string, names ...string) (string, error) {
	commands = strings.NewReplacer(append(names, "/usr/local/bin/", r.home+"/bin/")...).Replace(commands)
	script := []string{"set -euo pipefail"}
	for line := range strings.SplitSeq(commands, "\n") {
		if seconds, ok := r.watched[line]; ok {
			line = fmt.Sprintf("timeout --signal=INT %d %s || [ $? = 124 ]", seconds, line) // 124: it went on until then
		}
		script = append(script, line)
	}
	ctx, cancel := context.WithTimeout(ctx, 3*patience)
	defer cancel()
	shell := exec.CommandContext(ctx, "bash", "-c", strings.Join(script, "\n"))
	if r.input != "" {
		shell = exec.CommandContext(ctx, "script", "--quiet", "--return", "--command", `bash -c "$SCRIPT"`, "/dev/null")
	}
	shell.Dir = "../.."
	shell.Env = slices.Concat(r.environ, []string{"SCRIPT=" + strings.Join(script, "\n")})
	shell.Stdin = strings.NewReader(r.input)
	var trouble strings.Builder
	shell.Stderr = &trouble
	out, err := shell.Output()
	if err != nil {
		return string(out), fmt.Errorf("%s: %w\n%s\n%s", commands, err, out, trouble.String())
	}
	return string(out), nil
}

// environment is that of the shell. What Go keeps is not in its home.
func (r *reader) environment() []string {
	r.Helper()
	environ := os.Environ()
	for _, name := range []string{"GOCACHE", "GOMODCACHE", "GOPATH"} {
		out, err := exec.CommandContext(r.Context(), "go", "env", name).Output()
		if err != nil {
			r.Fatal(err)
		}
		environ = append(environ, name+"="+strings.TrimSpace(string(out)))
	}
	return append(environ, "HOME="+r.home, "KUBECONFIG="+r.kubeconfig(), "PATH="+r.home+"/bin:"+os.Getenv("PATH"), "MAKEFLAGS=", "NO_COLOR=1")
}

// What an administrator runs in the pods of csi-loop: at a node, for images, and about
// a volume that nobody claims, which has to be known for a minute before it is removed.
func TestCommandsInPodsAsShown(t *testing.T) {
	e := volumes(t)
	r := e.reader()
	orphan := e.orphan()
	shown := r.shown("kubectl -n csi-loop exec deploy/csi-loop-controller -c csi-loop -- csi-loop orphans")
	list, _, _ := strings.Cut(shown, "\n")
	// Not yet on a controller that has just started, to which the nodes are not linked.
	e.eventually("the orphan is listed", patience, func(context.Context) error {
		out, err := r.sh(list)
		if err == nil && (!strings.Contains(out, orphan) || !strings.Contains(out, "unclaimed")) {
			err = errors.New(out)
		}
		return err
	})

	node := e.nodes()[0]
	e.looksAt(r, node)
	e.takesImages(r, node)

	r.input = "yes\n"
	e.eventually("the orphan is removed", patience, func(context.Context) error {
		out, err := r.sh(shown, "ID...", orphan)
		if err == nil && !strings.Contains(out, "Removed "+orphan) {
			err = errors.New(out)
		}
		return err
	})
}

// orphan makes a volume that nobody claims any more.
func (e *env) orphan() (id string) {
	e.Helper()
	e.createClaim(claim("orphan", e.class(func(c *storagev1.StorageClass) {
		immediate(c)
		c.ReclaimPolicy = new(corev1.PersistentVolumeReclaimRetain)
	}), "64Mi"))
	pv := e.volumeOf("orphan")
	persistent := e.client.CoreV1().PersistentVolumes()
	if err := errors.Join(
		e.client.CoreV1().PersistentVolumeClaims(e.namespace).Delete(e.Context(), "orphan", metav1.DeleteOptions{}),
		persistent.Delete(e.Context(), pv.Name, metav1.DeleteOptions{}),
	); err != nil {
		e.Fatal(err)
	}
	e.eventually("the PersistentVolume is gone", patience, func(ctx context.Context) error {
		_, err := persistent.Get(ctx, pv.Name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return nil
		}
		return or(err)
	})
	return pv.Spec.CSI.VolumeHandle
}

// looksAt asks a node with a volume in use.
func (e *env) looksAt(r *reader, node string) {
	e.Helper()
	e.createClaim(claim("used", e.class(nil), "64Mi"))
	e.run(e.shell("pod", node, "used"), corev1.PodRunning)
	r.sees("kubectl -n csi-loop exec csi-loop-node-x7x2p -- csi-loop doctor",
		[]string{"\n0 problem(s)", e.volumeOf("used").Name, "published", "/dev/loop"}, "csi-loop-node-x7x2p", e.driverOn(node))
}

// takesImages makes a volume and a template of images on a node.
func (e *env) takesImages(r *reader, node string) {
	e.Helper()
	image, disk := e.imageOn(node, "golden.img"), e.diskOn(node, "old.img", 1)
	golden := "golden-" + e.namespace[len(e.namespace)-5:]
	out, err := r.sh(r.shown("kubectl exec -n csi-loop csi-loop-node-x7x2p -- csi-loop template ls"), "csi-loop-node-x7x2p", e.driverOn(node), "shop/", e.namespace+"/",
		"/srv/images/old.img", disk, "/srv/images/golden.img", image, " golden", " "+golden)
	if err != nil {
		e.Fatal(err)
	}
	for _, want := range []string{"persistentvolume/" + e.namespace + ".data created", "persistentvolumeclaim/data created", golden} {
		if !strings.Contains(out, want) {
			e.Errorf("%q is not in\n%s", want, out)
		}
	}
	user := e.run(e.shell("user", "", "data"), corev1.PodRunning)
	if user.Spec.NodeName != node {
		e.Errorf("the pod runs on %s", user.Spec.NodeName)
	}
	e.sh("user", "echo own > /data/data/file")
	patch := []byte(`{"spec":{"persistentVolumeReclaimPolicy":"Delete"}}`) // import says Retain
	must[*corev1.PersistentVolume](e)(e.client.CoreV1().PersistentVolumes().Patch(e.Context(), e.namespace+".data", types.MergePatchType, patch, metav1.PatchOptions{}))
}
