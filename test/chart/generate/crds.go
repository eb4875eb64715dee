package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	// The module that the CRDs come from, and its version.
	_ "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"

	chart "github.com/csi-loop/csi-loop/test/chart"
)

const snapshotModule = "github.com/kubernetes-csi/external-snapshotter/client/v8"

// crds copies the CRDs of snapshots to where Helm installs them from before anything
// else, with a note of where they are from.
func crds() error {
	out, err := exec.Command("go", "list", "-m", "-json", snapshotModule).Output()
	if err != nil {
		return fmt.Errorf("go list %s: %w", snapshotModule, err)
	}
	var module struct {
		Dir     string `json:"Dir"`
		Version string `json:"Version"`
	}
	if err := json.Unmarshal(out, &module); err != nil {
		return err
	}
	files, err := filepath.Glob(filepath.Join(module.Dir, "config", "crd", "*.k8s.io_*.yaml"))
	if err != nil {
		return err
	}
	if len(files) == 0 {
		return errors.New("no CRDs in " + module.Dir)
	}
	to := filepath.Join(chart.Dir(), "charts", "snapshot-crds", "crds")
	if err := os.RemoveAll(to); err != nil {
		return err
	}
	if err := os.MkdirAll(to, 0o755); err != nil {
		return err
	}
	note := fmt.Sprintf("# From %s@%s, config/crd.\n# Copyright The Kubernetes Authors; licensed under the Apache License 2.0.\n",
		snapshotModule, module.Version)
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		text = append([]byte(note), bytes.TrimPrefix(text, []byte("---\n"))...)
		if err := os.WriteFile(filepath.Join(to, filepath.Base(file)), text, 0o644); err != nil {
			return err
		}
	}
	return nil
}
