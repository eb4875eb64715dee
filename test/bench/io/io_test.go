//go:build linux

package main

import (
	"encoding/xml"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/csi-loop/csi-loop/test/bench/lab"
)

func TestFioOutput(t *testing.T) {
	const direction = `{"bw_bytes": %, "iops": %, "clat_ns": {"percentile": {"50.000000": 7, "99.000000": %}}}`
	of := func(n string) string { return strings.ReplaceAll(direction, "%", n) }
	for name, c := range map[string]struct {
		out  string
		want result
		fail bool
	}{
		"both directions are added":  {out: `{"jobs": [{"read": ` + of("100") + `, "write": ` + of("20") + `}]}`, want: result{bytes: 120, ops: 120, p99: 100}},
		"a job that failed":          {out: `{"jobs": [{"error": 5, "read": ` + of("1") + `, "write": ` + of("1") + `}]}`, fail: true},
		"a job that did nothing":     {out: `{"jobs": [{}]}`, fail: true},
		"two groups are not one":     {out: `{"jobs": [{"read": ` + of("1") + `}, {"read": ` + of("1") + `}]}`, fail: true},
		"a warning is not a result":  {out: `fio: no`, fail: true},
		"a reader only has one side": {out: `{"jobs": [{"read": ` + of("3") + `}]}`, want: result{bytes: 3, ops: 3, p99: 3}},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := parseFio([]byte(c.out))
			if diff := cmp.Diff(c.want, got, cmp.AllowUnexported(result{})); (err != nil) != c.fail || err == nil && diff != "" {
				t.Errorf("%v\n%s", err, diff)
			}
		})
	}
}

func TestPgbenchLog(t *testing.T) {
	prefix := filepath.Join(t.TempDir(), "pgbench")
	for name, text := range map[string]string{".1": "0 1 500 0 1 2\n0 2 700 0 1 2\n", ".1.1": "1 1 100 0 1 2\n"} {
		if err := os.WriteFile(prefix+name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	got, err := pgLog(prefix)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(lab.Durations{500 * time.Microsecond, 700 * time.Microsecond, 100 * time.Microsecond}, got); diff != "" {
		t.Error(diff)
	}
	if left, _ := filepath.Glob(prefix + "*"); left != nil {
		t.Errorf("left for the next run: %v", left)
	}
}

// The table compares medians with those of the first contender, and ours with losetup.
func TestReport(t *testing.T) {
	r := &report{title: "x<y", names: []string{onFile, byHand, ours}}
	j, large := job{name: "j"}, job{name: "l", large: true}
	for i, name := range r.names {
		for _, n := range []float64{1, 3, 2} {
			r.add(j, name, result{ops: n * float64(i+1), p99: time.Millisecond})
		}
		r.add(large, name, result{bytes: float64((4 - i) * int(lab.MiB)), ops: 1})
	}
	want := `|  | file | losetup | csi-loop | p99 of file | p99 of csi-loop | csi-loop to losetup |
| --- | --- | --- | --- | --- | --- | --- |
| j | 2/s | 2.00x | 3.00x | 1.00 ms | 1.00 ms | 1.50x |
| l | 4 MiB/s | 0.75x | 0.50x | 0.00 ms | 0.00 ms | 0.67x |
`
	if diff := cmp.Diff(want, r.table()); diff != "" {
		t.Error(diff)
	}
	plot := r.plot()
	for d := xml.NewDecoder(strings.NewReader(plot)); ; {
		if _, err := d.Token(); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	if !strings.Contains(plot, ">3.00<") || !strings.Contains(plot, ">0.75<") {
		t.Error(plot)
	}
}
