package image

import (
	"context"
	"errors"
	"testing"
	"time"
)

// A call is not refused for the want of blocks that are being erased just then: it waits, as
// long as the removal did, and looks again.
func TestRefusalWaitsForErasers(t *testing.T) {
	t.Parallel()
	goOn := make(chan struct{})
	s, p := openPool(t, poolDir(t), withKill(func(point string) {
		if point == "remove: unlinking" {
			<-goOn
		}
	}))
	if p.lag(ctx, 0) {
		t.Error("it waits for nothing")
	}
	v := create(t, p, Spec{Name: "v", Size: MiB})
	if err := p.Remove(ctx, v.ID); err != nil {
		t.Fatal(err)
	}
	looksAgain := make(chan bool, 1)
	go func() { looksAgain <- p.lag(ctx, 0) }()
	select {
	case again := <-looksAgain:
		t.Error("it does not wait")
		looksAgain <- again
	case <-time.After(patience / 10):
	}
	close(goOn)
	if !<-looksAgain {
		t.Error("it is refused while its blocks are being erased")
	}
	if err := s.Erased(ctx); err != nil {
		t.Fatal(err)
	}
	if n := len(p.erasers.under); n != 0 {
		t.Errorf("%d erasers are remembered", n)
	}
}

func TestErasedWaits(t *testing.T) {
	s := openStore(t.Context(), t, 0, madePool(t, "a"))
	if err := s.Erased(t.Context()); err != nil {
		t.Error(err)
	}
	end := make(chan struct{})
	s.Pools()[0].erasers.work.Go(func() { <-end })
	gone, leave := context.WithCancel(t.Context())
	leave()
	if err := s.Erased(gone); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	close(end)
	if err := s.Erased(t.Context()); err != nil {
		t.Error(err)
	}
}
