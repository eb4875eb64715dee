package chart

import (
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	apps "k8s.io/api/apps/v1"
	core "k8s.io/api/core/v1"
)

// What the chart tells csi-loop, csi-loop takes: flags, environment and file.
func TestCSILoopTakesItsConfiguration(t *testing.T) {
	for name, values := range cases {
		t.Run(name, func(t *testing.T) {
			all := render(t, values)
			asked := 0
			for _, o := range all {
				switch x := o.(type) {
				case *apps.DaemonSet:
					check(t, all, x.Spec.Template.Spec)
					asked++
				case *apps.Deployment:
					if strings.HasSuffix(x.Name, "-snapshot-controller") {
						continue
					}
					check(t, all, x.Spec.Template.Spec)
					asked++
				}
			}
			if asked < 2 {
				t.Errorf("csi-loop was asked %d times", asked)
			}
		})
	}
}

// check runs csi-loop as the pod would, up to where it would look at the machine.
func check(t *testing.T, all []object, pod core.PodSpec) {
	t.Helper()
	c := container(t, pod, "csi-loop")
	variables := map[string]string{"NODE_NAME": "node-1", "POD_IP": "fd00::1", "NAMESPACE": Namespace}
	args := slices.Clone(c.Args)
	for _, e := range c.Env {
		if e.Name == "CSI_ENDPOINT" { // the binary is run without an environment
			args = append(args, "--endpoint="+e.Value)
		}
	}
	for i, a := range args {
		for _, e := range c.Env {
			if value, ok := variables[e.Name]; ok {
				a = strings.ReplaceAll(a, "$("+e.Name+")", value)
			}
		}
		if strings.Contains(a, "$(") {
			t.Errorf("%s: there is no such variable", a)
		}
		if file, ok := strings.CutPrefix(a, "--config="); ok {
			a = "--config=" + mounted(t, all, pod, c, file)
		}
		args[i] = a
	}
	if args[0] != "serve" {
		t.Fatalf("arguments %q", args)
	}
	if got := run(t, append([]string{"serve", "--check-config"}, args[1:]...)...); got != "the configuration is good\n" {
		t.Error(got)
	}
}

// mounted writes a file that the pod gets from a ConfigMap.
func mounted(t *testing.T, all []object, pod core.PodSpec, c core.Container, file string) string {
	t.Helper()
	for _, m := range c.VolumeMounts {
		if m.MountPath != filepath.Dir(file) {
			continue
		}
		for _, v := range pod.Volumes {
			if v.Name == m.Name {
				to := filepath.Join(t.TempDir(), filepath.Base(file))
				text := find[*core.ConfigMap](t, all, v.ConfigMap.Name).Data[filepath.Base(file)]
				if err := os.WriteFile(to, []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
				return to
			}
		}
	}
	t.Fatalf("nothing is mounted at %s", file)
	return ""
}

func container(t *testing.T, pod core.PodSpec, name string) core.Container {
	t.Helper()
	for _, c := range pod.Containers {
		if c.Name == name {
			return c
		}
	}
	t.Fatalf("there is no container %s", name)
	return core.Container{}
}

// The sidecars are those that the end-to-end tests run.
func TestSidecarsAreThoseOfTheTests(t *testing.T) {
	list, err := os.ReadFile(filepath.Join(Root(), "test", "e2e", "images", "list.go"))
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for _, o := range render(t, "snapshots: {enabled: true}\nsnapshotController: {enabled: true}") {
		d, ok := o.(*apps.Deployment)
		if !ok {
			continue
		}
		for _, c := range d.Spec.Template.Spec.Containers {
			if c.Name == "csi-loop" {
				continue
			}
			name, ok := strings.CutPrefix(c.Image, "registry.k8s.io/sig-storage/")
			if !ok || !strings.Contains(string(list), `"`+name+`"`) {
				t.Errorf("%s is not what the tests run", c.Image)
			}
			seen[c.Name] = true
		}
	}
	if got := slices.Sorted(maps.Keys(seen)); !slices.Equal(got, []string{"csi-provisioner", "csi-resizer", "csi-snapshotter", "snapshot-controller"}) {
		t.Errorf("sidecars %q", got)
	}
}
