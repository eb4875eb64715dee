//go:build linux

package main

import (
	"bytes"
	"fmt"
	"html"
	"math"
)

// series is one line of a picture.
type series struct {
	name string
	x, y []float64
}

func (s *series) add(x, y float64) { s.x, s.y = append(s.x, x), append(s.y, y) }

// plot is the picture of one run: latency by volumes, and throughput by clients.
type plot struct {
	title            string
	volumes, clients []series
}

var colours = []string{"#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#777777", "#222222"}

func (p *plot) svg() []byte {
	var b bytes.Buffer
	b.WriteString(`<svg xmlns="http://www.w3.org/2000/svg" width="900" height="400" font-family="sans-serif" font-size="12">` + "\n" +
		`<rect width="900" height="400" fill="white"/>` + "\n")
	fmt.Fprintf(&b, `<text x="20" y="22" font-size="13">%s</text>`+"\n", html.EscapeString(p.title))
	panel{left: 55, head: "p50 of an ext4 call, ms, by other volumes in the pool"}.draw(&b, p.volumes)
	panel{left: 505, head: "ext4 cycles a second, by clients"}.draw(&b, p.clients)
	b.WriteString("</svg>\n")
	return b.Bytes()
}

// panel is one of the two diagrams. Its x axis has the points at equal distances.
type panel struct {
	left float64
	head string
}

const (
	panelWidth, panelTop, panelHeight = 240.0, 65.0, 280.0
	gridLines                         = 4
)

func (a panel) draw(b *bytes.Buffer, lines []series) {
	most := 0.0
	for _, l := range lines {
		for _, y := range l.y {
			most = max(most, y)
		}
	}
	if most == 0 {
		return
	}
	unit := math.Pow(10, math.Floor(math.Log10(most)))
	top := math.Ceil(most/unit*2) / 2 * unit
	bottom := panelTop + panelHeight
	fmt.Fprintf(b, `<text x="%.0f" y="50">%s</text>`+"\n", a.left-30, html.EscapeString(a.head))
	for i := range gridLines + 1 {
		y := bottom - panelHeight*float64(i)/gridLines
		fmt.Fprintf(b, `<line x1="%.0f" x2="%.0f" y1="%.1f" y2="%.1f" stroke="#ddd"/><text x="%.0f" y="%.1f" text-anchor="end">%.4g</text>`+"\n",
			a.left, a.left+panelWidth, y, y, a.left-5, y+4, top*float64(i)/gridLines)
	}
	for n, l := range lines {
		colour := colours[n%len(colours)]
		fmt.Fprintf(b, `<polyline fill="none" stroke="%s" stroke-width="2" points="`, colour)
		for i, y := range l.y {
			fmt.Fprintf(b, "%.1f,%.1f ", a.at(i, len(l.x)), bottom-panelHeight*y/top)
		}
		b.WriteString(`"/>` + "\n")
		for i, x := range l.x {
			if n == 0 {
				fmt.Fprintf(b, `<text x="%.1f" y="%.0f" text-anchor="middle">%g</text>`+"\n", a.at(i, len(l.x)), bottom+18, x)
			}
		}
		fmt.Fprintf(b, `<rect x="%.0f" y="%.0f" width="10" height="10" fill="%s"/><text x="%.0f" y="%.0f">%s</text>`+"\n",
			a.left+panelWidth+12, panelTop+18*float64(n), colour, a.left+panelWidth+27, panelTop+9+18*float64(n), html.EscapeString(l.name))
	}
}

func (a panel) at(i, of int) float64 {
	if of < 2 {
		return a.left
	}
	return a.left + panelWidth*float64(i)/float64(of-1)
}
