package main

import (
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// The reference is what the commands, the example and the metrics say now.
func TestReferenceIsFresh(t *testing.T) {
	dir := t.TempDir()
	if err := writeReference(newCommand(io.Discard, io.Discard), dir); err != nil {
		t.Fatal(err)
	}
	pages, err := filepath.Glob(dir + "/*.md")
	if err != nil || len(pages) != 3 {
		t.Fatal(pages, err)
	}
	for _, page := range pages {
		want, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		name := "../../docs/reference/" + filepath.Base(page)
		if got, err := os.ReadFile(name); err != nil || string(got) != string(want) {
			t.Errorf("%s is stale: run make generate (%v)", name, err)
		}
	}
	text, err := os.ReadFile(dir + "/csi-loop.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"| `--endpoint` |  | `CSI_ENDPOINT` |", "| `--node-id` |  | `CSILOOP_NODE_ID` |", "\n## csi-loop template add\n"} {
		if !strings.Contains(string(text), want) {
			t.Errorf("%q is not in it", want)
		}
	}
	if strings.Contains(string(text), "csi-loop reference") {
		t.Error("a hidden command is shown")
	}
}
