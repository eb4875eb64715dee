package kind

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rhysd/actionlint"
	"go.yaml.in/yaml/v3"
	"sigs.k8s.io/kind/pkg/apis/config/v1alpha4"
)

// What can be known of kind and of GitHub's workflows without Docker and without
// GitHub.

func TestConfigIsKinds(t *testing.T) {
	content, err := os.ReadFile("kind.yaml")
	if err != nil {
		t.Fatal(err)
	}
	decoder := yaml.NewDecoder(strings.NewReader(strings.ReplaceAll(string(content), "${STATE}", "/state")))
	decoder.KnownFields(true)
	var config v1alpha4.Cluster
	if err := decoder.Decode(&config); err != nil {
		t.Fatal(err)
	}
	if len(config.Nodes) != 3 || config.Nodes[0].Role != v1alpha4.ControlPlaneRole {
		t.Errorf("the nodes are %+v", config.Nodes)
	}
	for i, node := range config.Nodes {
		var dev, pool bool
		for _, m := range node.ExtraMounts {
			dev = dev || m.HostPath == "/dev" && m.ContainerPath == "/dev"
			pool = pool || m.ContainerPath == "/var/lib/csi-loop"
		}
		if !dev || !pool {
			t.Errorf("node %d lacks /dev or its pool", i)
		}
		for _, patch := range node.KubeadmConfigPatches {
			if err := yaml.Unmarshal([]byte(patch), new(map[string]any)); err != nil {
				t.Error(err)
			}
		}
	}
}

func TestWorkflowsAreValid(t *testing.T) {
	workflows, err := filepath.Glob("../../../.github/workflows/*.yaml")
	if err != nil || len(workflows) == 0 {
		t.Fatalf("there are no workflows (%v)", err)
	}
	var report strings.Builder
	linter, err := actionlint.NewLinter(&report, &actionlint.LinterOptions{})
	if err != nil {
		t.Fatal(err)
	}
	trouble, err := linter.LintFiles(workflows, nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(trouble) > 0 {
		t.Error(report.String())
	}
}
