//go:build linux

package main

import (
	"fmt"
	"slices"
	"time"
)

// steps are the RPCs of a life, in order.
var steps = []string{"create", "stage", "publish", "unpublish", "unstage", "delete"}

// Sums of them: what a pod waits for, and all.
const (
	readyStep = "ready" // create, stage and publish
	cycleStep = "cycle"
)

var allSteps = append(slices.Clone(steps), readyStep, cycleStep)

// timing is the duration of each step of one cycle.
type timing map[string]time.Duration

// samples are the durations of each step over many cycles.
type samples map[string][]time.Duration

func (s samples) add(t timing) {
	var sum time.Duration
	for step, d := range t {
		s[step] = append(s[step], d)
		sum += d
	}
	s[readyStep] = append(s[readyStep], t["create"]+t["stage"]+t["publish"])
	s[cycleStep] = append(s[cycleStep], sum)
}

// print writes one line for each sample in the form of go test -bench, which
// benchstat reads.
func (s samples) print(name, step string) {
	for _, d := range s[step] {
		fmt.Printf("Benchmark%s/%s 1 %d ns/op\n", name, step, d.Nanoseconds())
	}
}

// percentile is the smallest sample that p percent of all are not above.
func percentile(d []time.Duration, p int) time.Duration {
	if len(d) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(d))
	return sorted[max(0, (len(sorted)*p+99)/100-1)]
}

func ms(d time.Duration) string { return fmt.Sprintf("%.2f ms", float64(d)/float64(time.Millisecond)) }

func ratio(a, b time.Duration) string {
	if b == 0 {
		return "-"
	}
	return fmt.Sprintf("%.2fx", float64(a)/float64(b))
}
