//go:build linux

package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/csi-loop/csi-loop/test/bench/lab"
)

// report is what came out, by situation.
type report struct {
	names []string
	times map[string]map[string]lab.Durations
	notes map[string]map[string]string
}

func newReport() *report {
	return &report{times: map[string]map[string]lab.Durations{}, notes: map[string]map[string]string{}}
}

func (r *report) begin(name string) {
	if r.times[name] == nil {
		r.names = append(r.names, name)
		r.times[name], r.notes[name] = map[string]lab.Durations{}, map[string]string{}
	}
}

// add keeps a sample and prints it for benchstat.
func (r *report) add(name, what string, d time.Duration) {
	r.begin(name)
	r.times[name][what] = append(r.times[name][what], d)
	lab.Durations{d}.Lines(os.Stdout, "Snapshot/"+name+"/"+what)
}

func (r *report) note(name, what, value string) {
	r.begin(name)
	r.notes[name][what] = value
}

// most notes the largest of several numbers.
func (r *report) most(name, what string, n int64) {
	r.begin(name)
	if have, err := strconv.ParseInt(r.notes[name][what], 10, 64); err != nil || n > have {
		r.notes[name][what] = strconv.FormatInt(n, 10)
	}
}

func (r *report) markdown() string {
	var b strings.Builder
	snapshots := lab.Table{Head: []string{
		"Snapshot in use", "extents", "bare p50", "bare, synced p50", "driver p50", "ratio", "ratio to synced",
		"idle gap p99", "stall p99, bare", "stall p99, driver", "ratio",
	}}
	copies := lab.Table{Head: []string{"Copy of", "data", "bare reflink, synced", "restore, thin", "clone in use, thin", "restore, thick", "full copy"}}
	deltas := lab.Table{Head: []string{"Delta of", "found", "time p50", "read from the pool's disk", "read by the driver", "full copy"}}
	for _, name := range r.names {
		t, n := r.times[name], r.notes[name]
		p := func(what string, percent int) time.Duration { return t[what].Percentile(percent) }
		snapshots.Add(name, n["extents"], lab.Millis(p("bare/time", 50)), lab.Millis(p("durable/time", 50)), lab.Millis(p("driver/time", 50)),
			lab.Ratio(p("driver/time", 50), p("bare/time", 50)), lab.Ratio(p("driver/time", 50), p("durable/time", 50)), lab.Millis(p("idle/stall", 99)),
			lab.Millis(p("bare/stall", 99)), lab.Millis(p("driver/stall", 99)), lab.Ratio(p("driver/stall", 99), p("bare/stall", 99)))
		copies.Add(name, n["data"], or(t["reflink/time"]), or(t["restore-thin/time"]), or(t["clone-thin/time"]), or(t["restore-thick/time"]), or(t["full-copy/time"]))
		deltas.Add(name, n["delta"], or(t["delta/time"]), n["delta read from the pool's disk, bytes"]+" bytes", n["delta read by the driver, bytes"]+" bytes", or(t["full-copy/time"]))
	}
	fmt.Fprintf(&b, "%s\n%s\n%s", snapshots.Markdown(), copies.Markdown(), deltas.Markdown())
	return b.String()
}

// or is the median in words, or a dash.
func or(d lab.Durations) string {
	if len(d) == 0 {
		return "-"
	}
	return lab.Millis(d.Percentile(50))
}
