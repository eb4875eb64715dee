package loop

import "strconv"

// State is what a registered loop device is doing. The zero value is Unbound.
type State int

// The states of a loop device. The package comment has the diagram.
const (
	// Unbound devices have no backing file and can be bound.
	Unbound State = iota
	// Bound devices have a mapping in force.
	Bound
	// Rundown devices unbind when their last opener leaves.
	Rundown
	// Deleting devices are being unregistered.
	Deleting
)

// String returns the state's name as the documentation writes it.
func (s State) String() string {
	switch s {
	case Unbound:
		return "Unbound"
	case Bound:
		return "Bound"
	case Rundown:
		return "Rundown"
	case Deleting:
		return "Deleting"
	}
	return "State(" + strconv.Itoa(int(s)) + ")"
}

// Event is what happens to a loop device.
type Event int

// The events that move a loop device from state to state.
const (
	// Bind is a successful LOOP_CONFIGURE.
	Bind Event = iota
	// Clear is LOOP_CLR_FD, which from Linux 6.11 on only marks the device
	// (fact 31). Clearing twice is clearing once.
	Clear
	// Released is the kernel unbinding the device, at the last close or inside
	// LOOP_CLR_FD.
	Released
	// Remove is the request to unregister the device.
	Remove
	// Refused is the kernel answering that the device cannot be unregistered.
	Refused
	// Register is LOOP_CTL_ADD for the number of a device that was removed. A
	// device that is gone has no state until then.
	Register
)

// String returns the event's name as the documentation writes it.
func (e Event) String() string {
	switch e {
	case Bind:
		return "Bind"
	case Clear:
		return "Clear"
	case Released:
		return "Released"
	case Remove:
		return "Remove"
	case Refused:
		return "Refused"
	case Register:
		return "Register"
	}
	return "Event(" + strconv.Itoa(int(e)) + ")"
}

type move struct {
	from  State
	event Event
}

// moves is the whole state machine. The diagram in the package comment shows the
// same, and changes with it.
var moves = map[move]State{
	{Unbound, Bind}:      Bound,
	{Unbound, Remove}:    Deleting,
	{Bound, Clear}:       Rundown, // what follows at once if nobody else has it open is Released
	{Bound, Released}:    Unbound, // autoclear at the last close, or losetup -d behind our back
	{Rundown, Clear}:     Rundown,
	{Rundown, Released}:  Unbound,
	{Rundown, Remove}:    Deleting, // the kernel refuses until the last opener left
	{Deleting, Refused}:  Unbound,  // then looked at afresh: somebody may have bound it
	{Deleting, Register}: Unbound,
}

// Next returns the state that follows when the event happens in state from. For a
// pair that the machine does not have it returns from and a *TransitionError.
func Next(from State, event Event) (State, error) {
	to, ok := moves[move{from, event}]
	if !ok {
		return from, &TransitionError{From: from, Event: event}
	}
	return to, nil
}
