package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	chart "github.com/csi-loop/csi-loop/test/chart"
)

// order is that of the chart's files in the manifests: what is needed comes first.
var order = []string{"serviceaccounts.yaml", "rbac.yaml", "csidriver.yaml", "storageclasses.yaml", "controller.yaml", "node.yaml"}

const manifestsHead = `# csi-loop for those who do not use Helm: the chart with its default values, written
# by make generate. See docs/operations.md.
apiVersion: v1
kind: Namespace
metadata:
  name: csi-loop
  labels:
    # The node's pods attach loop devices and mount.
    pod-security.kubernetes.io/enforce: privileged
    pod-security.kubernetes.io/warn: privileged
    pod-security.kubernetes.io/audit: privileged
`

// manifests writes the chart as plain manifests.
func manifests() error {
	rendered, err := chart.Render(nil, "kubectl")
	if err != nil {
		return err
	}
	var b bytes.Buffer
	b.WriteString(manifestsHead)
	for _, name := range order {
		text := strings.TrimSpace(strings.TrimPrefix(strings.TrimSpace(rendered[name]), "---"))
		if text == "" {
			return errors.New("nothing in " + name)
		}
		fmt.Fprintf(&b, "---\n%s\n", text)
	}
	for name, text := range rendered {
		if !slices.Contains(order, name) && name != "NOTES.txt" && strings.TrimSpace(text) != "" {
			return errors.New(name + " is not in the manifests: where does it go?")
		}
	}
	dir := filepath.Join(chart.Root(), "deploy")
	return os.WriteFile(filepath.Join(dir, "csi-loop.yaml"), b.Bytes(), 0o644)
}
