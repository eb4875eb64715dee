//go:build linux

package lab

import (
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"
)

// Durations are samples of one thing.
type Durations []time.Duration

// Percentile is the smallest sample that p percent of all are not above; 0 of none.
func (d Durations) Percentile(p int) time.Duration {
	if len(d) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(d))
	return sorted[max(0, (len(sorted)*p+99)/100-1)]
}

// Lines writes a line for each sample that benchstat reads.
func (d Durations) Lines(w io.Writer, name string) {
	for _, s := range d {
		fmt.Fprintf(w, "Benchmark%s 1 %d ns/op\n", name, s.Nanoseconds())
	}
}

// Numbers are samples of a rate or a count.
type Numbers []float64

// Median is the middle of the samples, or the mean of the two in the middle; 0 of none.
func (n Numbers) Median() float64 {
	if len(n) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(n))
	half := len(sorted) / 2
	if len(sorted)%2 == 1 {
		return sorted[half]
	}
	return (sorted[half-1] + sorted[half]) / 2
}

// Lines writes a line for each sample that benchstat reads.
func (n Numbers) Lines(w io.Writer, name, unit string) {
	for _, s := range n {
		fmt.Fprintf(w, "Benchmark%s 1 %.2f %s\n", name, s, unit)
	}
}

// Millis is a duration in words.
func Millis(d time.Duration) string {
	ms := float64(d) / float64(time.Millisecond)
	if ms >= 100 {
		return fmt.Sprintf("%.0f ms", ms)
	}
	return fmt.Sprintf("%.1f ms", ms)
}

// Ratio is a/b in words, "-" when there is no b.
func Ratio[T ~int64 | ~float64](a, b T) string {
	if b == 0 {
		return "-"
	}
	return fmt.Sprintf("%.2fx", float64(a)/float64(b))
}

// Table is rows beneath a head, all equally long.
type Table struct {
	Head []string
	Rows [][]string
}

// Add appends a row.
func (t *Table) Add(cells ...string) { t.Rows = append(t.Rows, cells) }

// Markdown is the table as a page has it.
func (t *Table) Markdown() string {
	var b strings.Builder
	line := func(cells []string) { fmt.Fprintf(&b, "| %s |\n", strings.Join(cells, " | ")) }
	line(t.Head)
	line(slices.Repeat([]string{"---"}, len(t.Head)))
	for _, r := range t.Rows {
		line(r)
	}
	return b.String()
}

// Save writes a file; path "" is nowhere.
func Save(path, text string) error {
	if path == "" {
		return nil
	}
	return os.WriteFile(path, []byte(text), 0o644)
}
