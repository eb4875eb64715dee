package image

import (
	"context"
	"errors"
	"testing"
)

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
