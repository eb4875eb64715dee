package main

import (
	"bytes"
	"context"
	"errors"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/csi-loop/csi-loop/pkg/report"
)

// loop runs what is refreshed against a controller that answers one thing after the other,
// and without any time that goes by.
type loop struct {
	o           *options
	k           *cluster
	screen      *screen
	out, errOut bytes.Buffer
	asked       int
	api         *api
	looks       []any
	stop        func() // called when it looks once more than there are looks
}

// newLoop serves looks, one for each time that the report is asked for: pages, or broken.
func newLoop(t *testing.T, looks ...any) *loop {
	t.Helper()
	l := &loop{o: &options{timeout: time.Minute}, api: newAPI(), looks: looks}
	l.api.pages[proxied] = func() any {
		l.asked++
		if l.asked > len(l.looks) {
			l.stop()
			return broken
		}
		return l.looks[l.asked-1]
	}
	srv := httptest.NewServer(l.api)
	t.Cleanup(srv.Close)
	l.o.install, l.o.service, l.o.driver = "csi-loop", "csi-loop-controller", "csi-loop.io"
	l.o.kubeconfig = configOf(t, srv.URL)
	ticks := make(chan time.Time)
	close(ticks)
	l.o.tick = func(time.Duration) (<-chan time.Time, func()) { return ticks, func() {} }
	k, err := l.o.cluster()
	if err != nil {
		t.Fatal(err)
	}
	l.k = k
	return l
}

func (l *loop) begin(redraw bool) {
	l.asked = 0
	l.out.Reset()
	l.errOut.Reset()
	l.screen = &screen{out: &l.out, errOut: &l.errOut, redraw: redraw}
}

// ioAt is a report of a second, in which pvc-a has read so many bytes.
func ioAt(second int64, read uint64) report.Cluster {
	return report.Cluster{Nodes: []report.Node{{Name: "n1", State: report.Linked, Machine: report.Machine{
		Time: time.Unix(second, 0),
		Volumes: []report.Volume{
			{ID: "p.a", Name: "pvc-a", IO: &report.IO{Reads: read >> 20, ReadBytes: read, BusySeconds: float64(read>>20) / 2}},
			{ID: "p.idle", Name: "idle", IO: &report.IO{}},
		},
	}}}}
}

// top runs it until the looks are over.
func (l *loop) top(t *testing.T) error {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	l.stop = stop
	return l.o.top(ctx, l.screen, l.k, false)
}

// pictures are what was drawn, one after the other.
func (l *loop) pictures() []string { return strings.Split(l.out.String(), wipe)[1:] }

// rowOf is the row of a claim or volume, without the columns before NODE.
func rowOf(t *testing.T, picture, name string) string {
	t.Helper()
	row := fields(t, picture, name)
	_, row, _ = strings.Cut(row, " n1 ")
	return row
}

// top shows first what is there, and then what was read between two looks, in the nodes'
// own time. What was said before counts where a look failed or was handed out again.
func TestTopIsRefreshed(t *testing.T) {
	silent := report.Cluster{Nodes: []report.Node{{Name: "n1", State: report.Linked, Error: "deadline exceeded"}}}
	l := newLoop(t, ioAt(100, 0), ioAt(110, 10<<20), ioAt(110, 10<<20), broken, ioAt(120, 30<<20), silent, ioAt(140, 70<<20), ioAt(150, 0))
	l.begin(true)
	if err := l.top(t); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	got := l.pictures()
	const nothing, first, second = "- - - - -", "1Mi 0 1 0 #####..... 50%", "2Mi 0 2 0 ########## 100%"
	want := []string{nothing, first, first, first, second, "", second, nothing}
	if len(got) != len(want) {
		t.Fatalf("%d pictures, want %d:\n%s", len(got), len(want), strings.Join(got, "\n"))
	}
	for i := range want {
		if want[i] == "" {
			if strings.Contains(got[i], "data-db-0") || !strings.Contains(got[i], "note: node n1 did not answer") {
				t.Errorf("picture %d:\n%s", i, got[i])
			}
			continue
		}
		if row := rowOf(t, got[i], "data-db-0"); row != want[i] {
			t.Errorf("picture %d: %s, want %s", i, row, want[i])
		}
		if stale := strings.Contains(got[i], "nothing new since"); stale != (i == 3) {
			t.Errorf("picture %d:\n%s", i, got[i])
		}
		// Once its rate is not known any more, it is last.
		if first := strings.Index(got[i], "data-db-0") < strings.Index(got[i], "idle"); first != (i != 7) {
			t.Errorf("picture %d is in the wrong order:\n%s", i, got[i])
		}
	}
	if l.errOut.Len() > 0 {
		t.Errorf("beside the pictures: %s", l.errOut.String())
	}
}

// In a file pictures follow each other, and a note is said once.
func TestTopIntoAFile(t *testing.T) {
	l := newLoop(t, ioAt(100, 0), broken, broken, ioAt(110, 10<<20))
	l.begin(false)
	delete(l.api.pages, "/api/v1/pods")
	if err := l.top(t); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	if out := l.out.String(); strings.Count(out, "NAMESPACE") != 2 || strings.Contains(out, "\x1b") || rowOf(t, out, "#") != "1Mi 0 1 0 #####..... 50%" {
		t.Errorf("%s", out)
	}
	notes := l.errOut.String()
	if strings.Count(notes, "nothing new since") != 1 || strings.Count(notes, "which pods use the volumes cannot be told") != 3 {
		t.Errorf("%s", notes)
	}
}

// What asking again does not mend ends it, and so does the first look.
func TestTopEnds(t *testing.T) {
	l := newLoop(t, ioAt(100, 0), ioAt(110, 1))
	l.begin(true)
	next := l.api.pages[proxied]
	l.api.pages[proxied] = func() any {
		delete(l.api.pages, proxied) // from the next one on it is forbidden
		return ioAt(100, 0)
	}
	if err := l.top(t); !apierrors.IsForbidden(err) {
		t.Errorf("%v, want forbidden", err)
	}
	l.begin(true)
	l.api.pages[proxied] = next
	l.looks = []any{broken}
	if err := l.top(t); !apierrors.IsServiceUnavailable(err) {
		t.Errorf("%v, want that the first answer's error", err)
	}
}

// --once shows one interval, and that only.
func TestTopOnce(t *testing.T) {
	l := newLoop(t, ioAt(100, 0), ioAt(110, 10<<20))
	l.begin(false)
	if err := l.o.top(t.Context(), l.screen, l.k, true); err != nil {
		t.Fatal(err)
	}
	if out := l.out.String(); strings.Count(out, "NAMESPACE") != 1 || rowOf(t, out, "data-db-0") != "1Mi 0 1 0 #####..... 50%" {
		t.Errorf("%s", out)
	}
	l.begin(false)
	l.looks = []any{ioAt(100, 0), broken}
	if err := l.o.top(t.Context(), l.screen, l.k, true); err == nil {
		t.Error("a look that failed is none of --once")
	}
}
