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

// crds copies the CRDs of snapshots into the chart, with a note of where they are
// from, and so that Helm never deletes them.
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
	to := filepath.Join(chart.Dir(), "files", "crds")
	if err := os.RemoveAll(to); err != nil {
		return err
	}
	if err := os.MkdirAll(to, 0o755); err != nil {
		return err
	}
	note := fmt.Sprintf("# From %s@%s, config/crd.\n# Copyright The Kubernetes Authors; licensed under the Apache License 2.0.\n# Changed: the annotation that Helm must keep it.\n",
		snapshotModule, module.Version)
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		before := []byte("  annotations:\n")
		if bytes.Count(text, before) != 1 {
			return fmt.Errorf("%s: where are its annotations?", file)
		}
		text = bytes.Replace(text, before, append(before, "    helm.sh/resource-policy: keep\n"...), 1)
		text = append([]byte(note), bytes.TrimPrefix(text, []byte("---\n"))...)
		if err := os.WriteFile(filepath.Join(to, filepath.Base(file)), text, 0o644); err != nil {
			return err
		}
	}
	return nil
}
