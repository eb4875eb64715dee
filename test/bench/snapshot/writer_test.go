//go:build linux

package main

import (
	"errors"
	"testing"
	"time"
)

// The longest pause that overlaps the time asked about counts, and no other.
func TestGap(t *testing.T) {
	start := time.Now().Add(-time.Hour)
	at := func(ms int) time.Time { return start.Add(time.Duration(ms) * time.Millisecond) }
	w := &writer{}
	for _, ms := range []int{0, 100, 101, 103, 140, 141, 300} {
		w.done = append(w.done, at(ms))
	}
	got, err := w.gap(at(102), at(141))
	if err != nil || got != 37*time.Millisecond {
		t.Errorf("%v, %v", got, err)
	}
	if len(w.done) != 1 {
		t.Errorf("%d times are kept", len(w.done))
	}
	w.err = errors.New("disk full")
	if _, err := w.gap(at(0), at(1)); err == nil {
		t.Error("the writer failed and nobody says so")
	}
}
