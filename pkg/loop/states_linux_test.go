package loop

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

// Devices are counted by state, and one that runs down is told from one that is
// mounted.
func TestStates(t *testing.T) {
	m := fakeMachine(t, generations[0])
	manager := m.manager(t, impatient())
	want := func(what string, states map[State]int) {
		t.Helper()
		got := must(manager.States(t.Context()))(t)
		if diff := cmp.Diff(states, got); diff != "" {
			t.Errorf("%s: -want +got\n%s", what, diff)
		}
	}
	idle := must(manager.States(t.Context()))(t)[Unbound]
	mapping := whole
	mapping.Autoclear = true
	d := m.attach(t, manager, "a", mapping)
	other := m.manager(t)
	foreign := m.attach(t, other, "b", mapping)
	total := len(must(m.fake.Numbers())(t))
	if idle == 0 || total < 2 {
		t.Fatalf("%d idle of %d", idle, total)
	}
	want("two attached", map[State]int{Unbound: total - 2, Bound: 2, Rundown: 0, Deleting: 0})
	release := m.claim(t, d.Ref().Number) // mounted
	check(t, d.Close())
	want("mounted", map[State]int{Unbound: total - 2, Bound: 2, Rundown: 0, Deleting: 0})
	stray := must(m.node(d.Ref().Number, forReading))(t)
	release()
	strayForeign := must(m.node(foreign.Ref().Number, forReading))(t)
	opens := m.fake.count("Open")
	check(t, foreign.Close())
	want("unmounted, and somebody still reads", map[State]int{Unbound: total - 2, Bound: 1, Rundown: 1, Deleting: 0})
	if n := m.fake.count("Open") - opens; n != 2 {
		t.Errorf("%d opens: another's device was touched", n)
	}
	check(t, stray.Close())
	check(t, strayForeign.Close())
	want("all gone", map[State]int{Unbound: total, Bound: 0, Rundown: 0, Deleting: 0})
}
