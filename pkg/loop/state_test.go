package loop

import (
	"errors"
	"testing"
)

func TestEveryStateAndEvent(t *testing.T) {
	const none = State(-1)
	states := []State{Unbound, Bound, Rundown, Deleting}
	events := []Event{Bind, Clear, Released, Remove, Refused, Register}
	want := map[State][]State{ // one column per event
		Unbound:  {Bound, none, none, Deleting, none, none},
		Bound:    {none, Rundown, Unbound, none, none, none},
		Rundown:  {none, Rundown, Unbound, Deleting, none, none},
		Deleting: {none, none, none, none, Unbound, Unbound},
	}
	legal := 0
	for _, from := range states {
		for i, event := range events {
			t.Run(from.String()+"/"+event.String(), func(t *testing.T) {
				to, err := Next(from, event)
				if want[from][i] != none {
					legal++
					if err != nil || to != want[from][i] {
						t.Fatalf("Next = %v, %v; want %v", to, err, want[from][i])
					}
					return
				}
				var te *TransitionError
				if !errors.As(err, &te) || te.From != from || te.Event != event {
					t.Fatalf("Next = %v, %v; want a TransitionError of the pair", to, err)
				}
				if to != from {
					t.Errorf("a refused event leads to %v", to)
				}
			})
		}
	}
	if legal != len(moves) {
		t.Errorf("the table has %d moves, the test %d", len(moves), legal)
	}
}

func TestUnknownStateAndEventPrintAndAreRefused(t *testing.T) {
	if got := State(7).String() + Event(9).String(); got != "State(7)Event(9)" {
		t.Errorf("got %q", got)
	}
	if _, err := Next(State(7), Bind); err == nil {
		t.Error("an unknown state has a successor")
	}
}
