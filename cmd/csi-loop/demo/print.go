package demo

import (
	"fmt"
	"io"
	"strings"
	"time"
)

// Terminal escapes.
const (
	bold  = "\x1b[1m"
	dim   = "\x1b[2m"
	red   = "\x1b[31m"
	green = "\x1b[32m"
	cyan  = "\x1b[36m"
	reset = "\x1b[0m"
)

// printer tells the story. A step is printed when it is finished, because its
// time stands in its first line.
type printer struct {
	out    io.Writer
	colour bool
	dir    string // begins most paths, and is shortened
	now    func() time.Time

	open    bool // between begin and finish
	number  int
	heading string
	start   time.Time
	lines   []string
}

// short is printed instead of the demo's directory.
const short = "..."

func newPrinter(out io.Writer, colour bool, dir string) *printer {
	return &printer{out: out, colour: colour, dir: dir, now: time.Now}
}

// paint wraps text in an escape, if there are colours.
func (p *printer) paint(escape, text string) string {
	if !p.colour {
		return text
	}
	return escape + text + reset
}

func (p *printer) line(text string) { fmt.Fprintln(p.out, text) }

func (p *printer) title(text string) { p.line(p.paint(bold, text)) }

// factf prints a labelled line, at the end of the step that is open.
func (p *printer) factf(label, format string, args ...any) {
	text := strings.ReplaceAll(fmt.Sprintf(format, args...), p.dir+"/", short+"/")
	text = fmt.Sprintf("      %s %s", p.paint(dim, fmt.Sprintf("%-9s", label)), text)
	if p.open {
		p.lines = append(p.lines, text)
		return
	}
	p.line(text)
}

// call notes a CSI call, the volume it was for, and how long it took.
func (p *printer) call(method, volume string, took time.Duration) {
	if volume != "" {
		volume += " "
	}
	p.factf("call", "%s %s%s", p.paint(cyan, method), volume, p.paint(dim, millis(took)))
}

func (p *printer) begin(number int, title string) {
	p.open, p.number, p.heading, p.start, p.lines = true, number, title, p.now(), nil
}

const titleWidth = 76

func (p *printer) finish(ok bool) {
	p.open = false
	took := millis(p.now().Sub(p.start))
	mark, colour := "ok", green
	if !ok {
		mark, colour = "FAILED", red
	}
	gap := strings.Repeat(" ", max(1, titleWidth-len(p.heading)))
	p.line("")
	p.line(fmt.Sprintf("%s  %s%s%10s  %s", p.paint(cyan, fmt.Sprintf("%3d", p.number)), p.paint(bold, p.heading), gap, took, p.paint(colour, mark)))
	for _, l := range p.lines {
		p.line(l)
	}
}

func (p *printer) endf(format string, args ...any) {
	p.line("")
	p.line(p.paint(bold+green, fmt.Sprintf(format, args...)))
}

func millis(d time.Duration) string { return fmt.Sprintf("%.1f ms", float64(d.Microseconds())/1000) }

// bytesText shows a number of bytes for people: exact when it is a whole number
// of MiB, which the sizes of volumes are.
func bytesText(n int64) string {
	const mib, gib = 1 << 20, 1 << 30
	switch {
	case n >= 10*gib:
		return fmt.Sprintf("%.1f GiB", float64(n)/gib)
	case n > 0 && n%mib == 0:
		return fmt.Sprintf("%d MiB", n/mib)
	case n >= mib:
		return fmt.Sprintf("%.1f MiB", float64(n)/mib)
	default:
		return fmt.Sprintf("%d bytes", n)
	}
}
