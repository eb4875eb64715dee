package driver

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
)

const (
	// stalledAbove is the share of the last ten seconds, in percent, in which some task of
	// the machine waited for I/O, above which work in the background waits too.
	stalledAbove = 20
	pressureFile = "/proc/pressure/io"
	loadFile     = "/proc/loadavg"
)

// requests counts what is under way on a device; *loop.Manager does.
type requests interface {
	InFlight(ctx context.Context, number int) (int, error)
}

// loadOf makes a function that says why work in the background on a device should wait
// now: somebody is using it at this moment, or the machine waits for its disks; "" if
// nothing is known. A kernel without pressure figures is judged by its load average.
func loadOf(r requests) func(ctx context.Context, device int) string {
	return func(ctx context.Context, device int) string {
		if n, err := r.InFlight(ctx, device); err == nil && n > 0 {
			return fmt.Sprintf("/dev/loop%d has %d requests under way", device, n)
		}
		return machineLoad()
	}
}

func machineLoad() string {
	if text, err := os.ReadFile(pressureFile); err == nil {
		if stalled, ok := parsePressure(string(text)); ok {
			if stalled > stalledAbove {
				return fmt.Sprintf("tasks waited for I/O for %.0f%% of the last 10 s", stalled)
			}
			return ""
		}
	}
	text, err := os.ReadFile(loadFile)
	if load, ok := parseLoad(string(text)); err == nil && ok && load > float64(runtime.NumCPU()) {
		return fmt.Sprintf("the load average is %.1f", load)
	}
	return ""
}

// parsePressure reads avg10 of the line "some avg10=0.22 avg60=...".
func parsePressure(text string) (percent float64, ok bool) {
	for line := range strings.Lines(text) {
		fields := strings.Fields(line)
		if len(fields) < 2 || fields[0] != "some" {
			continue
		}
		value, found := strings.CutPrefix(fields[1], "avg10=")
		percent, err := strconv.ParseFloat(value, 64)
		return percent, found && err == nil && percent >= 0
	}
	return 0, false
}

// parseLoad reads the first number of "0.52 0.58 0.59 1/467 21713".
func parseLoad(text string) (float64, bool) {
	first, _, _ := strings.Cut(text, " ")
	load, err := strconv.ParseFloat(first, 64)
	return load, err == nil && load >= 0
}
