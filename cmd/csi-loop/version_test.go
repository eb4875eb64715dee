package main

import (
	"bytes"
	"encoding/json"
	"runtime"
	"runtime/debug"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestBuild(t *testing.T) {
	platform := runtime.GOOS + "/" + runtime.GOARCH
	recorded := &debug.BuildInfo{
		Main:     debug.Module{Version: "v1.2.3"},
		Deps:     []*debug.Module{{Path: csiModule, Version: "v1.13.0"}},
		Settings: []debug.BuildSetting{{Key: "vcs.revision", Value: "abc"}, {Key: "vcs.modified", Value: "true"}},
	}
	for name, c := range map[string]struct {
		version, commit string
		info            *debug.BuildInfo
		want            build
	}{
		"the linker's words win":       {"v9", "fff", recorded, build{"v9", "fff", runtime.Version(), "1.13.0", platform}},
		"else what Go recorded":        {"", "", recorded, build{"v1.2.3", "abc (modified)", runtime.Version(), "1.13.0", platform}},
		"else it is not known":         {"", "", &debug.BuildInfo{}, build{unknown, unknown, runtime.Version(), unknown, platform}},
		"(devel) is no version at all": {"", "", &debug.BuildInfo{Main: debug.Module{Version: "(devel)"}}, build{unknown, unknown, runtime.Version(), unknown, platform}},
	} {
		t.Run(name, func(t *testing.T) {
			if diff := cmp.Diff(c.want, describeBuild(c.version, c.commit, c.info)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestVersionCommand(t *testing.T) {
	run := func(args ...string) (string, error) {
		var out bytes.Buffer
		c := newCommand(&out, &out)
		c.SetArgs(args)
		err := c.Execute()
		return out.String(), err
	}
	text, err := run("version")
	if err != nil || !strings.Contains(text, "CSI       ") || !strings.Contains(text, runtime.Version()) {
		t.Errorf("version: %q, %v", text, err)
	}
	text, err = run("version", "-o", "json")
	var b build
	if err != nil || json.Unmarshal([]byte(text), &b) != nil || b.Go != runtime.Version() {
		t.Errorf("version -o json: %q, %v", text, err)
	}
	if _, err = run("version", "-o", "xml"); err == nil || exitCode(err) != exitUsage {
		t.Errorf("version -o xml: %v", err)
	}
}
