package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/pflag"

	"github.com/csi-loop/csi-loop/cmd/csi-loop/survey"
)

func TestServeArguments(t *testing.T) {
	for name, c := range map[string]struct {
		cmdline string
		want    []string
	}{
		"csi-loop serve":   {"/usr/local/bin/csi-loop\x00serve\x00--config=/c\x00--node-id=n\x00", []string{"--config=/c", "--node-id=n"}},
		"without flags":    {"csi-loop\x00serve\x00", []string{}},
		"another command":  {"csi-loop\x00demo\x00", nil},
		"another program":  {"/sbin/init\x00serve\x00", nil},
		"a kernel thread":  {"", nil},
		"only its name":    {"csi-loop\x00", nil},
		"a shell with it":  {"sh\x00-c\x00csi-loop serve\x00", nil},
		"an empty element": {"csi-loop\x00serve\x00\x00x\x00", []string{"", "x"}},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if err := os.WriteFile(filepath.Join(dir, "cmdline"), []byte(c.cmdline), 0o600); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(c.want, serveArguments(dir)); diff != "" {
				t.Error(diff)
			}
		})
	}
	if got := serveArguments("/nonexistent"); got != nil {
		t.Errorf("of no process: %q", got)
	}
}

// TestFlagsBesideProcess1: what a command was given counts more than what process 1 was,
// and that more than the environment.
func TestFlagsBesideProcess1(t *testing.T) {
	proc := t.TempDir()
	if err := os.WriteFile(filepath.Join(proc, "cmdline"), []byte(
		"csi-loop\x00serve\x00--pool=default=/pool\x00--endpoint=unix:///theirs.sock\x00--state-dir=/theirs\x00--node-id=theirs\x00--image-dir=/a\x00--image-dir=/b\x00",
	), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("CSI_ENDPOINT", "unix:///environment.sock")
	load := func(args ...string) config {
		t.Helper()
		set := pflag.NewFlagSet("template ls", pflag.ContinueOnError)
		f := newServeFlags(set)
		set.String("into", "", "")
		if err := set.Parse(args); err != nil {
			t.Fatal(err)
		}
		c, err := f.loadBeside(proc, set)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	want := load()
	if want.Endpoint != "unix:///theirs.sock" || want.StateDir != "/theirs" || len(want.ImageDirs) != 2 || len(want.Pools) != 1 {
		t.Fatalf("%+v", want)
	}
	want.StateDir, want.ImageDirs, want.ExpediteFreezes = "/mine", []string{"/c"}, false
	got := load("--state-dir=/mine", "--image-dir=/c", "--expedite-freezes=false", "--into=default")
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(config{}, linkConfig{})); diff != "" {
		t.Error(diff)
	}
	if got := load("--pool=own=/own"); got.Endpoint != "unix:///environment.sock" || got.Pools[0].Name != "own" {
		t.Errorf("with a pool of its own: %+v", got)
	}
}

func TestSurveyUsage(t *testing.T) {
	for name, c := range map[string]struct {
		args []string
		code int
		want string
	}{
		"no pool":                {[]string{"volumes"}, exitUsage, "no pool: give --pool"},
		"output format":          {[]string{"devices", "-o", "xml"}, exitUsage, `--output "xml": use one of text, wide, json`},
		"wide is for lists":      {[]string{"doctor", "-o", "wide"}, exitUsage, "use one of text, json"},
		"the controller":         {[]string{"volumes", "--mode=controller"}, exitUsage, "run this on a node"},
		"relative pool":          {[]string{"doctor", "--pool=p=x"}, exitUsage, "is not absolute"},
		"a flag that is none":    {[]string{"doctor", "--fix"}, exitUsage, "unknown flag: --fix"},
		"pool that is not there": {[]string{"volumes", "--pool=p=/nonexistent/pool"}, exitFailure, "there is no such directory"},
	} {
		t.Run(name, func(t *testing.T) {
			p := spawn(t, nil, c.args...)
			if code := p.wait(); code != c.code {
				t.Errorf("exit status %d, want %d", code, c.code)
			}
			if got := p.complaint(); !strings.Contains(got, c.want) {
				t.Errorf("it says %q, want %q in it", got, c.want)
			}
			if p.stdout.Len() > 0 {
				t.Errorf("it prints %q", p.stdout.String())
			}
		})
	}
}

func TestTablesShowNoControlCharacters(t *testing.T) {
	var out bytes.Buffer
	rows := volumeRows([]survey.Volume{{ID: "id", Name: "a\x1b[2Jb\nc\td\u0085", State: survey.Available, Size: 1 << 20}}, true)
	if err := printTable(&out, rows); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(out.String(), "a?[2Jb?c?d?") || strings.Count(out.String(), "\n") != 2 || strings.ContainsAny(out.String(), "\x1b\t") {
		t.Errorf("%q", out.String())
	}
}
