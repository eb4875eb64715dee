package main

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/csi-loop/csi-loop/pkg/report"
)

// Whether pictures are redrawn is a matter of the terminal; whether they have colours, of
// the user too.
func TestScreens(t *testing.T) {
	terminal := func() (int, int, error) { return 80, 24, nil }
	for name, c := range map[string]struct {
		size            func() (int, int, error)
		env             map[string]string
		redraw, colours bool
	}{
		"a terminal":             {terminal, nil, true, true},
		"without colours":        {terminal, map[string]string{"NO_COLOR": "1"}, true, false},
		"NO_COLOR that is empty": {terminal, map[string]string{"NO_COLOR": ""}, true, true},
		"a dumb terminal":        {terminal, map[string]string{"TERM": "dumb"}, false, false},
		"a file":                 {nil, nil, false, false},
	} {
		t.Run(name, func(t *testing.T) {
			s := newScreen(nil, nil, c.size, func(key string) string { return c.env[key] })
			if s.redraw != c.redraw || s.colours != c.colours || (s.size == nil) != (c.size == nil) {
				t.Errorf("%+v", s)
			}
		})
	}
}

// linesOn counts the lines that a picture takes on a terminal.
func linesOn(width int, picture string) (n int) {
	for l := range strings.Lines(strings.TrimPrefix(picture, wipe)) {
		n += max(1, (len(strings.TrimSuffix(l, "\n"))+width-1)/width)
	}
	return n
}

// A picture is never higher than the terminal: its first rows would scroll off.
func TestPicturesFitTheTerminal(t *testing.T) {
	rows := [][]cell{{text("CLAIM"), text("BUSY")}}
	for i := range 40 {
		rows = append(rows, []cell{text(fmt.Sprintf("claim-%02d", i)), text(strings.Repeat("#", 30))})
	}
	for name, c := range map[string]struct {
		width, height int
		rows          int
		notes         []string
		shown         int // claims
		more          string
	}{
		"room for all":             {80, 42, 41, nil, 40, ""},
		"one line is missing":      {80, 41, 41, nil, 38, "and 2 more that are less busy"},
		"a usual terminal":         {80, 24, 41, nil, 21, "and 19 more that are less busy"},
		"rows that take two lines": {30, 24, 41, nil, 10, "and 30 more that are less busy"},
		"notes":                    {80, 24, 41, []string{"a", "b"}, 19, "and 21 more that are less busy"},
		"more notes than room":     {80, 10, 41, []string{"a", "b", "c", "d", "e", "f"}, 3, "and 37 more that are less busy"},
		"a long note":              {80, 24, 41, []string{strings.Repeat("x", 1000)}, 19, "and 21 more that are less busy"},
		"a terminal of no size":    {0, 0, 41, nil, 40, ""},
		"few rows":                 {80, 24, 3, nil, 2, ""},
	} {
		t.Run(name, func(t *testing.T) {
			var out bytes.Buffer
			s := &screen{out: &out, redraw: true, size: func() (int, int, error) { return c.width, c.height, nil }}
			if err := s.show(picture{rows[:c.rows], c.notes, "that are less busy"}); err != nil {
				t.Fatal(err)
			}
			got := out.String()
			if n := strings.Count(got, "claim-"); n != c.shown || !strings.Contains(got, c.more) || (c.more == "") != !strings.Contains(got, "more") {
				t.Errorf("%d claims, want %d, and %q:\n%s", n, c.shown, c.more, got)
			}
			if n := linesOn(max(1, c.width), got); c.height > 0 && n >= c.height {
				t.Errorf("%d lines on a terminal of %d:\n%s", n, c.height, got)
			}
			if !strings.HasPrefix(got, wipe+"CLAIM") || len(c.notes) > 0 && !strings.Contains(got, "note: ") {
				t.Errorf("%q", got)
			}
		})
	}
}

// A size that cannot be asked cuts nothing.
func TestTerminalWithoutASize(t *testing.T) {
	var out bytes.Buffer
	s := &screen{out: &out, size: func() (int, int, error) { return 0, 0, errors.ErrUnsupported }}
	if err := s.show(picture{rows: [][]cell{{text("A")}, {text("b")}}}); err != nil || out.String() != "A\nb\n" {
		t.Errorf("%v %q", err, out.String())
	}
}

// The busiest stay on the terminal.
func TestTopKeepsTheBusiest(t *testing.T) {
	look := func(second int64) report.Cluster {
		n := report.Node{Name: "n1", State: report.Linked, Machine: report.Machine{Time: time.Unix(second, 0)}}
		for i := range 100 {
			busy := float64(i) / 100 * float64(second)
			n.Volumes = append(n.Volumes, report.Volume{ID: fmt.Sprintf("p.%03d", i), Name: fmt.Sprintf("pvc-%03d", i), IO: &report.IO{BusySeconds: busy}})
		}
		return report.Cluster{Nodes: []report.Node{n}}
	}
	l := newLoop(t, look(0), look(10))
	l.begin(true)
	l.screen.size = func() (int, int, error) { return 120, 10, nil }
	if err := l.top(t); err == nil {
		t.Fatal("it ended by itself")
	}
	last := l.pictures()[1]
	if !strings.Contains(last, "pvc-099") || strings.Contains(last, "pvc-000") || !strings.Contains(last, "more that are less busy") || linesOn(120, last) > 9 {
		t.Errorf("%s", last)
	}
}
