package main

import (
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

// One call at a time runs on few processors; many calls get many, until there were few
// for a while.
func TestProcessors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var set []int
		p := &processors{few: 1, many: 8, set: func(n int) { set = append(set, n) }, rest: time.Second}
		want := func(what string, all ...int) {
			t.Helper()
			synctest.Wait()
			if !slices.Equal(set, all) {
				t.Errorf("%s: set %v, want %v", what, set, all)
			}
		}
		p.note(1)
		p.note(-1)
		time.Sleep(time.Minute)
		want("one call")
		p.note(1)
		p.note(1)
		want("two calls", 8)
		p.note(-1)
		time.Sleep(p.rest / 2)
		want("one is left", 8)
		p.note(1)
		time.Sleep(time.Minute)
		want("two again", 8)
		p.note(-1)
		p.note(-1)
		p.note(1)
		time.Sleep(p.rest + time.Millisecond)
		want("few for a while", 8, 1)
		p.note(1)
		want("and many once more", 8, 1, 8)
		p.note(-1)
		p.stop()
		time.Sleep(time.Minute)
		want("stopped", 8, 1, 8)
	})
}
