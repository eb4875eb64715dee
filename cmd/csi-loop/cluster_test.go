package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// The cluster is found as kubectl finds it, and never by being in a pod.
func TestWhichCluster(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"one", "two"} {
		text := fmt.Sprintf(`{apiVersion: v1, kind: Config, current-context: %[1]s,
clusters: [{name: %[1]s, cluster: {server: "https://%[1]s"}}, {name: %[1]s-more, cluster: {server: "https://%[1]s-more"}}],
contexts: [{name: %[1]s, context: {cluster: %[1]s}}, {name: %[1]s-more, context: {cluster: %[1]s-more}}]}
`, name)
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	one, two, none := filepath.Join(dir, "one"), filepath.Join(dir, "two"), filepath.Join(dir, "none")
	for name, tt := range map[string]struct {
		environment string
		flags       clusterFlags
		want        string // "": a mistake in usage
	}{
		"the environment":        {one, clusterFlags{}, "https://one"},
		"several files":          {one + ":" + two, clusterFlags{context: "two"}, "https://two"},
		"a context":              {one, clusterFlags{context: "one-more"}, "https://one-more"},
		"a flag":                 {one, clusterFlags{kubeconfig: two}, "https://two"},
		"a file that is not":     {one, clusterFlags{kubeconfig: none}, ""},
		"a context that is not":  {one, clusterFlags{context: "two"}, ""},
		"nothing, and in a pod":  {none, clusterFlags{}, ""},
		"a context, and nothing": {none, clusterFlags{context: "two"}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv("KUBECONFIG", tt.environment)
			t.Setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
			t.Setenv("KUBERNETES_SERVICE_PORT", "443")
			cfg, err := tt.flags.config()
			switch {
			case tt.want == "":
				if !errors.As(err, new(*usageError)) {
					t.Errorf("%v, %v", cfg, err)
				}
			case err != nil || cfg.Host != tt.want:
				t.Errorf("%v, %v", cfg, err)
			}
		})
	}
	t.Setenv("KUBECONFIG", none)
	for _, args := range [][]string{{"forget", "a"}, {"adopt", "--pool-id=" + movedPool, "--node=b"}} {
		c := newCommand(&bytes.Buffer{}, &bytes.Buffer{})
		c.SetArgs(args)
		if err := c.ExecuteContext(t.Context()); err == nil || !strings.Contains(err.Error(), "no cluster: give --kubeconfig") {
			t.Errorf("%q: %v", args, err)
		}
	}
}
