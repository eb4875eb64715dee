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
	draw := func(s *screen, all []copying, done bool) string {
		var out bytes.Buffer
		s.out = &out
		if err := drawCopies(s, all, done); err != nil {
			t.Fatal(err)
		}
		return out.String()
	}
	if got, want := draw(&screen{}, all, false), "n1 receive pvc-a: 1Gi of 2Gi\nn2 send p.b?: 1Mi of an unknown size\n"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	if got, want := draw(&screen{}, nil, true), "Nothing is being copied.\n"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	if got, want := draw(&screen{redraw: true}, nil, true), wipe+"Nothing is being copied.\n"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	if got := draw(&screen{}, nil, false); got != "" {
		t.Errorf("%q, and it is not known that nothing is copied", got)
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

// An answer that is missing is no end: not of one node, not of the controller, and not of a
// node that was copying and went away.
func TestWatchCopiesWaitsForAnswers(t *testing.T) {
	copies := report.Machine{Copies: []report.Copy{{Name: "pvc-a", Kind: report.Copying, Done: 1, Total: 2}}}
	page := func(nodes ...report.Node) any { return report.Cluster{Nodes: nodes} }
	looks := []any{
		page(report.Node{Name: "n1", State: report.Linked, Machine: copies}, report.Node{Name: "n0", State: report.Away}),
		page(report.Node{Name: "n1", State: report.Linked, Error: "deadline exceeded"}),
		broken,
		page(report.Node{Name: "n1", State: report.Away}),
		page(report.Node{Name: "n1", State: report.Linked, Machine: copies}),
		page(report.Node{Name: "n1", State: report.Linked}, report.Node{Name: "n0", State: report.Away}),
	}
	l := newLoop(t, looks...)
	for _, redraw := range []bool{false, true} {
		l.begin(redraw)
		if err := l.o.watchCopies(t.Context(), l.screen, l.k); err != nil {
			t.Fatal(err)
		}
		if l.asked != len(looks) {
			t.Errorf("redraw %t: it ended after %d looks of %d", redraw, l.asked, len(looks))
		}
		all := l.out.String() + l.errOut.String()
		for _, want := range []string{"node n1 did not answer", "nothing new since", "n1 (away)", "n0 (away)"} {
			if !strings.Contains(all, want) {
				t.Errorf("redraw %t: no %q in\n%s", redraw, want, all)
			}
		}
		if strings.Count(all, "Nothing is being copied.") != 1 || redraw != strings.Contains(all, "#####.....  50%") {
			t.Errorf("redraw %t:\n%s", redraw, all)
		}
	}
}
