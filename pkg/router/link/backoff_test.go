package link

import (
	"errors"
	"testing"
	"time"
)

// Links that end as soon as they are up are tried again ever more rarely.
func TestBackoff(t *testing.T) {
	a := &Agent{cfg: Config{RetryMin: time.Millisecond, RetryMax: 8 * time.Millisecond}}
	b := a.backoff()
	wait := func(lasted time.Duration) {
		t.Helper()
		if err := b.wait(t.Context(), lasted, "a:1", errors.New("x")); err != nil {
			t.Fatal(err)
		}
	}
	for _, lasted := range []time.Duration{0, 1, time.Millisecond} {
		wait(lasted)
	}
	if b.next != b.max {
		t.Errorf("after three short links the pause is %s", b.next)
	}
	wait(9 * time.Millisecond)
	if b.next != 2*b.min {
		t.Errorf("after a link that lasted the pause is %s", b.next)
	}
}
