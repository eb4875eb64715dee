package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"unicode"
	"unicode/utf8"

	"k8s.io/apimachinery/pkg/api/resource"

	"github.com/csi-loop/csi-loop/internal/yamltext"
)

// colour is how a cell is shown on a terminal.
type colour string

const (
	plain  colour = ""
	green  colour = "\x1b[32m"
	yellow colour = "\x1b[33m"
	red    colour = "\x1b[31m"
	bold   colour = "\x1b[1m"
	reset         = "\x1b[0m"
)

// cell is one field of a table.
type cell struct {
	text   string
	colour colour
}

func text(s string) cell { return cell{text: s} }

// line is one line of a table as it is written, and how many characters of it are seen.
type line struct {
	text  string
	width int
}

// table writes rows whose columns are aligned; the first row is the head. What nodes and
// users said is shown without control characters.
func table(w io.Writer, colours bool, rows [][]cell) error {
	var out strings.Builder
	for _, l := range lines(colours, rows) {
		out.WriteString(l.text + "\n")
	}
	_, err := io.WriteString(w, out.String())
	return err
}

func lines(colours bool, rows [][]cell) []line {
	var widths []int
	for _, row := range rows {
		for i := range row {
			row[i].text = printable(row[i].text)
			if row[i].text == "" {
				row[i].text = "-"
			}
			if i == len(widths) {
				widths = append(widths, 0)
			}
			widths[i] = max(widths[i], utf8.RuneCountInString(row[i].text))
		}
	}
	all := make([]line, 0, len(rows))
	for n, row := range rows {
		var l line
		for i, c := range row {
			if n == 0 {
				c.colour = bold
			}
			seen := utf8.RuneCountInString(c.text)
			pad := widths[i] - seen + 3
			if i == len(row)-1 {
				pad = 0
			}
			if colours && c.colour != plain {
				c.text = string(c.colour) + c.text + reset
			}
			l.text, l.width = l.text+c.text+strings.Repeat(" ", pad), l.width+seen+pad
		}
		all = append(all, l)
	}
	return all
}

func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) || !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, s)
}

// show writes v as the user asked, or rows.
func (o *options) show(w io.Writer, v any, rows [][]cell) error {
	switch o.output {
	case "json":
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		return e.Encode(v)
	case "yaml":
		b, err := yamltext.Marshal(v)
		if err == nil {
			_, err = w.Write(b)
		}
		return err
	}
	return table(w, o.colours, rows)
}

// size shows bytes by three digits and a unit.
func size(n int64) string {
	if n <= 0 {
		return "0"
	}
	units := []string{"", "Ki", "Mi", "Gi", "Ti", "Pi"}
	v, i := float64(n), 0
	for v >= 1024 && i < len(units)-1 {
		v, i = v/1024, i+1
	}
	if v >= 100 || v == float64(int64(v)) {
		return fmt.Sprintf("%.0f%s", v, units[i])
	}
	return fmt.Sprintf("%.1f%s", v, units[i])
}

// whole shows a size that somebody asked for as they did.
func whole(n int64) string { return resource.NewQuantity(n, resource.BinarySI).String() }

// bar shows a part of something as a bar of ten characters.
func bar(part, all int64) cell {
	if all <= 0 {
		return text("")
	}
	percent := min(100, max(0, 100*float64(part)/float64(all)))
	full := int(percent / 10)
	c := cell{text: fmt.Sprintf("%s%s %3.0f%%", strings.Repeat("#", full), strings.Repeat(".", 10-full), percent), colour: green}
	switch {
	case percent >= 90:
		c.colour = red
	case percent >= 80:
		c.colour = yellow
	}
	return c
}
