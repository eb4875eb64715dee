package chart

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	core "k8s.io/api/core/v1"
	storage "k8s.io/api/storage/v1"
	"sigs.k8s.io/yaml"
)

// The plain manifests are the chart's objects and the namespace, which comes first.
func TestManifests(t *testing.T) {
	read := func(name string) string {
		text, err := os.ReadFile(filepath.Join(Root(), "deploy", name))
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	all := decode(t, "csi-loop.yaml", read("csi-loop.yaml"))
	namespace, ok := all[0].(*core.Namespace)
	if !ok || namespace.Name != Namespace || namespace.Labels["pod-security.kubernetes.io/enforce"] != "privileged" {
		t.Errorf("first comes %+v", all[0])
	}
	if want := len(render(t, "")) + 1; len(all) != want {
		t.Errorf("%d objects, want %d", len(all), want)
	}
	find[*storage.StorageClass](t, all, "csi-loop")
	if text := read("csi-loop.yaml"); strings.Contains(text, "helm.sh/") || strings.Contains(text, "managed-by: Helm") {
		t.Error("there are traces of Helm, which others would take for its release")
	}
	var kustomization struct {
		Resources []string `json:"resources"`
	}
	if err := yaml.Unmarshal([]byte(read("kustomization.yaml")), &kustomization); err != nil {
		t.Fatal(err)
	}
	if len(kustomization.Resources) != 1 || kustomization.Resources[0] != "csi-loop.yaml" {
		t.Errorf("kustomization %+v", kustomization)
	}
}
