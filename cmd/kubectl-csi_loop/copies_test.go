package main

import (
	"bytes"
	"strings"
	"testing"

	"github.com/csi-loop/csi-loop/pkg/report"
)

// Copies are drawn over each other on a terminal, are lines elsewhere, and end with a word.
func TestDrawCopies(t *testing.T) {
	all := []copying{
		{report.Copy{Name: "pvc-a", Kind: report.Receiving, Done: 1 << 30, Total: 2 << 30}, "n1"},
		{report.Copy{Name: "p.b\x1b", Kind: report.Sending, Done: 1 << 20}, "n2"},
	}
	draw := func(o *options, all []copying) string {
		var out bytes.Buffer
		if err := o.drawCopies(&out, all); err != nil {
			t.Fatal(err)
		}
		return out.String()
	}
	if got, want := draw(&options{}, all), "n1 receive pvc-a: 1Gi of 2Gi\nn2 send p.b?: 1Mi of an unknown size\n"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	if got := draw(&options{colours: true}, all); !strings.HasPrefix(got, "\x1b[H\x1b[2J") || !strings.Contains(got, "#####.....  50%") {
		t.Errorf("%q", got)
	}
	if got, want := draw(&options{}, nil), "Nothing is being copied.\n"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

// Watching ends when nothing is left.
func TestWatchCopies(t *testing.T) {
	a := newAPI()
	looks := 0
	a.pages[proxied] = func() any {
		looks++
		n := report.Node{Name: "n1"}
		if looks == 1 {
			n.Copies = []report.Copy{{Name: "pvc-a", Kind: report.Copying, Done: 1, Total: 2}}
		}
		return report.Cluster{Nodes: []report.Node{n}}
	}
	out, _, err := run(t, a, "copies", "--watch", "--interval=3s")
	if want := "n1 copy pvc-a: 1 of 2\nNothing is being copied.\n"; err != nil || out != want {
		t.Errorf("%v, %q, want %q", err, out, want)
	}
	if _, _, err := run(t, a, "copies", "--watch", "--interval=1s"); err == nil {
		t.Error("the controller is asked too often")
	}
}
