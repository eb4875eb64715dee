package link

import (
	"fmt"
	"maps"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// follow applies what a stream was told, as a controller does.
func follow(known map[string]map[string]bool, u Update) {
	for _, p := range u.Pools {
		if known[p.ID] == nil {
			known[p.ID] = map[string]bool{}
		}
		for _, v := range p.Added {
			known[p.ID][v] = true
		}
		for _, v := range p.Removed {
			delete(known[p.ID], v)
		}
	}
}

// Volumes that come and go while a pool is read, the one it begins with and one that
// comes in later, are told right: whatever the order of reading and change was.
func TestInventoryFollowsChanges(t *testing.T) {
	for round := range 50 {
		var mu sync.Mutex
		actual := map[string]map[string]bool{"a": {}, "late": {}}
		var tell func(string, string, bool)
		change := func(pool, volume string, exists bool) {
			mu.Lock()
			if exists {
				actual[pool][volume] = true
			} else {
				delete(actual[pool], volume)
			}
			f := tell
			mu.Unlock()
			if f != nil {
				f(pool, volume, exists)
			}
		}
		busy := func(pool string) (finish func()) {
			var wg sync.WaitGroup
			for worker := range 4 {
				wg.Go(func() {
					for i := range 25 {
						v := fmt.Sprintf("%d-%d", worker, i%5)
						change(pool, v, true)
						if i%3 != 0 {
							change(pool, v, false)
						}
					}
				})
			}
			return wg.Wait
		}
		pool := func(id string) Pool {
			return Pool{ID: id, Name: id, Free: func() Free { return Free{} }, Volumes: func() []string {
				mu.Lock()
				defer mu.Unlock()
				return slices.Collect(maps.Keys(actual[id]))
			}}
		}
		var found []Pool
		change("a", "old", true)
		finish := busy("a")
		found = []Pool{pool("a")}
		i, stop := openInventory(func() []Pool { return found }, func(f func(string, string, bool)) func() {
			mu.Lock()
			defer mu.Unlock()
			tell = f
			return func() {}
		})
		known := map[string]map[string]bool{}
		s, updates := i.subscribe("")
		for _, u := range updates {
			follow(known, u)
		}
		change("late", "old", true)
		finishLate := busy("late")
		found = append(found, pool("late"))
		i.discover(time.Minute)
		finish()
		finishLate()
		follow(known, i.take(s))
		delete(known, "")
		for id, want := range actual {
			if !maps.Equal(known[id], want) {
				t.Fatalf("round %d, pool %s: told %v, there are %v", round, id, known[id], want)
			}
		}
		i.unsubscribe(s)
		stop()
	}
}

// A pool that hangs is asked once, holds up no other, and comes in when it answers.
func TestInventoryWithAPoolThatHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		asked, open := 0, make(chan struct{})
		pool := func(id string, free func() Free) Pool {
			return Pool{ID: id, Name: id, Free: free, Volumes: func() []string { return []string{"v"} }}
		}
		room := int64(1)
		found := []Pool{
			pool("hangs", func() Free { asked++; <-open; return Free{Thick: 5} }),
			pool("good", func() Free { return Free{Thick: room} }),
		}
		i, stop := openInventory(func() []Pool { return found }, nil)
		defer stop()
		told := map[string]Free{}
		tell := func(updates ...Update) {
			for _, u := range updates {
				for _, p := range u.Pools {
					if p.Free != nil {
						told[p.ID] = *p.Free
					}
				}
			}
		}
		s, updates := i.subscribe("")
		tell(updates...)
		room, found = 2, append(found, pool("late", func() Free { return Free{Thick: 7} }))
		for range 5 {
			i.discover(0)
			i.refresh()
			synctest.Wait()
		}
		tell(i.take(s))
		if want := map[string]Free{"good": {Thick: 2}, "late": {Thick: 7}}; !maps.Equal(told, want) || asked != 1 {
			t.Errorf("told %v, want %v; asked %d times", told, want, asked)
		}
		start := time.Now()
		i.settle(lastAnswers)
		if took := time.Since(start); took != lastAnswers {
			t.Errorf("a stop waited %s for it", took)
		}
		close(open)
		i.settle(lastAnswers)
		if tell(i.take(s)); told["hangs"].Thick != 5 {
			t.Errorf("it is not told of: %v", told)
		}
	})
}
