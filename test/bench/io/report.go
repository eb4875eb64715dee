//go:build linux

package main

import (
	"fmt"
	"html"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/csi-loop/csi-loop/test/bench/lab"
)

// report is what came out of a piece.
type report struct {
	title, head string
	names       []string // contenders; others are compared with the first
	jobs        []job
	rate        map[string]lab.Numbers   // by job/contender
	p99         map[string]lab.Durations // the same
	extra       string                   // more, as a page has it
}

func (r *report) add(j job, name string, res result) {
	if r.rate == nil {
		r.rate, r.p99 = map[string]lab.Numbers{}, map[string]lab.Durations{}
	}
	key := j.name + "/" + name
	if r.rate[j.name+"/"+r.names[0]] == nil && r.first(j) {
		r.jobs = append(r.jobs, j)
	}
	value, unit := res.ops, "ops/s"
	if j.large {
		value, unit = res.bytes/float64(lab.MiB), "MiB/s"
	}
	r.rate[key] = append(r.rate[key], value)
	r.p99[key] = append(r.p99[key], res.p99)
	line := "IO/" + r.title + "/" + strings.ReplaceAll(key, " ", "_")
	lab.Numbers{value}.Lines(os.Stdout, line, unit)
	lab.Durations{res.p99}.Lines(os.Stdout, line+"/p99")
}

// first tells whether the job was not seen before.
func (r *report) first(j job) bool {
	for _, have := range r.jobs {
		if have.name == j.name {
			return false
		}
	}
	return true
}

// median is that of a job's rate on a contender.
func (r *report) median(j job, name string) float64 { return r.rate[j.name+"/"+name].Median() }

func (r *report) table() string {
	t := lab.Table{Head: append([]string{""}, r.names...)}
	t.Head = append(t.Head, "p99 of "+r.names[0])
	withOurs := false
	for _, n := range r.names {
		withOurs = withOurs || n == ours
	}
	if withOurs {
		t.Head = append(t.Head, "p99 of "+ours, ours+" to "+byHand)
	}
	for _, j := range r.jobs {
		base := r.median(j, r.names[0])
		row := []string{j.name, amount(base, j.large)}
		for _, n := range r.names[1:] {
			row = append(row, lab.Ratio(r.median(j, n), base))
		}
		row = append(row, micros(r.p99[j.name+"/"+r.names[0]]))
		if withOurs {
			row = append(row, micros(r.p99[j.name+"/"+ours]), lab.Ratio(r.median(j, ours), r.median(j, byHand)))
		}
		t.Add(row...)
	}
	return t.Markdown()
}

func amount(v float64, large bool) string {
	if large {
		return fmt.Sprintf("%.0f MiB/s", v)
	}
	return fmt.Sprintf("%.0f/s", v)
}

func micros(d lab.Durations) string {
	return fmt.Sprintf("%.2f ms", float64(d.Percentile(50))/float64(time.Millisecond))
}

// write prints the report, and saves it as a page and a plot.
func (r *report) write(dir string) error {
	text := ""
	if len(r.names) > 0 {
		text = r.table()
	}
	text += r.extra
	fmt.Printf("\n%s\n", text)
	if dir == "" {
		return nil
	}
	path := filepath.Join(dir, "io-"+r.title)
	page := fmt.Sprintf("<!-- Written by make bench-io. -->\n\n# %s\n\n%s.\n\n%s", r.title, r.head, text)
	if len(r.jobs) > 0 {
		page += fmt.Sprintf("\n![%s](io-%s.svg)\n", r.title, r.title)
		if err := lab.Save(path+".svg", r.plot()); err != nil {
			return err
		}
	}
	return lab.Save(path+".md", page)
}

// plot is a bar for each job and contender: its rate beside the first contender's.
func (r *report) plot() string {
	const (
		left, bar, gap, unit, most = 170, 11, 12, 330, 1.6 // unit is the length of a ratio of 1
	)
	colours := []string{"", "#9aa7b4", "#1f77b4", "#e0a030", "#7a9e5e", "#b07aa1", "#76b7b2", "#9c755f", "#bab0ac", "#d37295"}
	others := r.names[1:]
	height := 60 + len(r.jobs)*(len(others)*bar+gap)
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="760" height="%d" font-family="sans-serif" font-size="11">`+"\n", height+18)
	fmt.Fprintf(&b, `<rect width="100%%" height="100%%" fill="#ffffff"/><text x="8" y="16" font-size="13">%s: rate beside "%s" = 1</text>`+"\n", html.EscapeString(r.title), r.names[0])
	x := 8
	for i, n := range others {
		fmt.Fprintf(&b, `<rect x="%d" y="25" width="10" height="10" fill="%s"/><text x="%d" y="34">%s</text>`+"\n", x, colours[(i+1)%len(colours)], x+14, html.EscapeString(n))
		x += 24 + 7*len(n)
	}
	y := 50
	for _, j := range r.jobs {
		fmt.Fprintf(&b, `<text x="%d" y="%d" text-anchor="end">%s</text>`+"\n", left-6, y+len(others)*bar/2+4, html.EscapeString(j.name))
		for i, n := range others {
			v := 0.0
			if base := r.median(j, r.names[0]); base > 0 {
				v = r.median(j, n) / base
			}
			width := min(v, most) * unit
			fmt.Fprintf(&b, `<rect x="%d" y="%d" width="%.0f" height="%d" fill="%s"/><text x="%.0f" y="%d" font-size="9">%.2f</text>`+"\n",
				left, y, width, bar-1, colours[(i+1)%len(colours)], float64(left)+width+3, y+bar-2, v)
			y += bar
		}
		y += gap
	}
	fmt.Fprintf(&b, `<line x1="%d" y1="44" x2="%d" y2="%d" stroke="#333" stroke-dasharray="3 3"/>`+"\n</svg>\n", left+unit, left+unit, y)
	return b.String()
}
