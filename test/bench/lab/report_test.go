//go:build linux

package lab

import (
	"strings"
	"testing"
	"time"
)

func TestStatistics(t *testing.T) {
	d := Durations{3, 1, 2, 10}
	for p, want := range map[int]time.Duration{50: 2, 75: 3, 99: 10, 100: 10, 0: 1} {
		if got := d.Percentile(p); got != want {
			t.Errorf("percentile %d: %d, want %d", p, got, want)
		}
	}
	if got := (Durations{}).Percentile(50); got != 0 {
		t.Error(got)
	}
	for want, n := range map[float64]Numbers{0: nil, 2: {3, 1, 2}, 2.5: {4, 1, 3, 2}} {
		if got := n.Median(); got != want {
			t.Errorf("median of %v: %v", n, got)
		}
	}
	if got := Ratio(3.0, 2); got != "1.50x" {
		t.Error(got)
	}
	if got := Ratio(time.Second, 0); got != "-" {
		t.Error(got)
	}
}

// benchstat wants a name that begins with Benchmark, a count, and pairs.
func TestLines(t *testing.T) {
	var b strings.Builder
	Durations{1500}.Lines(&b, "A/b")
	Numbers{2.5}.Lines(&b, "C", "ops/s")
	if got, want := b.String(), "BenchmarkA/b 1 1500 ns/op\nBenchmarkC 1 2.50 ops/s\n"; got != want {
		t.Errorf("%q", got)
	}
}
