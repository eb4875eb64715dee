//go:build linux

package main

import (
	"testing"
	"time"
)

// What real runs gave passes, also that of a busy machine; the same with a few
// milliseconds more for each of the six calls, or with twice the work, does not.
func TestJudge(t *testing.T) {
	const ms = time.Millisecond
	tenths := func(n int) time.Duration { return time.Duration(n) * ms / 10 }
	for name, c := range map[string]struct {
		ours, floor time.Duration
		bound       float64
		slow        bool
	}{
		"ext4 beside mkfs":                   {ours: tenths(93), floor: tenths(84), bound: bounds["ext4"].mkfs},
		"ext4 beside copies":                 {ours: tenths(93), floor: tenths(52), bound: bounds["ext4"].copied},
		"xfs beside mkfs":                    {ours: tenths(191), floor: tenths(197), bound: bounds["xfs"].mkfs},
		"raw block":                          {ours: tenths(66), floor: tenths(23), bound: bounds["block"].copied},
		"among others":                       {ours: tenths(95), floor: tenths(93), bound: crowdBound},
		"all of it four times slower":        {ours: tenths(372), floor: tenths(336), bound: bounds["ext4"].mkfs},
		"no bound":                           {ours: time.Hour, floor: ms, bound: bounds["block"].mkfs},
		"ext4, calls with 3 ms more":         {ours: tenths(93 + 180), floor: tenths(84), bound: bounds["ext4"].mkfs, slow: true},
		"ext4 beside copies, 6 ms more":      {ours: tenths(93 + 360), floor: tenths(52), bound: bounds["ext4"].copied, slow: true},
		"ext4, all that mkfs takes twice":    {ours: tenths(2 * 93), floor: tenths(84), bound: bounds["ext4"].mkfs, slow: true},
		"among others, with a look at each":  {ours: tenths(93 + 200), floor: tenths(93), bound: crowdBound, slow: true},
		"raw block, calls with 5 ms more":    {ours: tenths(66 + 300), floor: tenths(23), bound: bounds["block"].copied, slow: true},
		"slow on a machine that is slow too": {ours: tenths(930), floor: tenths(336), bound: bounds["ext4"].mkfs, slow: true},
	} {
		t.Run(name, func(t *testing.T) {
			if err := judge(name, c.ours, c.floor, c.bound); (err != nil) != c.slow {
				t.Errorf("%v, slow: %t", err, c.slow)
			}
		})
	}
}
