package loop

import (
	"errors"
	"fmt"
)

// Errors that callers tell apart with errors.Is.
var (
	// ErrBusy: the device or the image is in use, so the request cannot be
	// finished now. Trying again later may succeed.
	ErrBusy = errors.New("in use")
	// ErrNotBound: the binding does not exist (any more).
	ErrNotBound = errors.New("not bound")
	// ErrNotExist: no loop device with that number is registered.
	ErrNotExist = errors.New("no such loop device")
	// ErrLimit: the manager has as many devices attached as it may, or the kernel as
	// many as it can.
	ErrLimit = errors.New("limit of attached loop devices reached")
	// ErrUnsupported: the kernel or the environment lacks what the package needs.
	// It is never about one request.
	ErrUnsupported = errors.New("not supported")
	// ErrDirectIO: direct I/O was required or forbidden and the kernel decided
	// otherwise.
	ErrDirectIO = errors.New("direct I/O not as required")
	// ErrDiscard: the kernel lets discards through to an image that is to keep its blocks.
	ErrDiscard = errors.New("this kernel does not keep discards from the image; Linux 5.19 or later does, and 5.15")
	// ErrSilent: a device does not say what it shows, because the filesystem of its file
	// hangs. Nothing is known of it.
	ErrSilent = errors.New("the filesystem of its file does not answer")
	// ErrIdentity: a device or file is not what it was a moment ago.
	ErrIdentity = errors.New("not the same any more")
)

// OpError is a system call that failed.
type OpError struct {
	// Op names the call: "configure", "open", "get free", ...
	Op string
	// Device is the device's number, -1 if the call is not about one device.
	Device int
	// Err is the cause, an errno in most cases.
	Err error
}

func (e *OpError) Error() string {
	if e.Device < 0 {
		return fmt.Sprintf("loop %s: %v", e.Op, e.Err)
	}
	return fmt.Sprintf("loop%d %s: %v", e.Device, e.Op, e.Err)
}

// Unwrap returns the cause.
func (e *OpError) Unwrap() error { return e.Err }

// MappingError is a Mapping that cannot be attached as it is. No system call that
// changes anything was made.
type MappingError struct {
	// Field is the name of the Mapping's field, or "backing" for the file.
	Field string
	// Reason says what is wrong with it.
	Reason string
}

func (e *MappingError) Error() string { return e.Field + ": " + e.Reason }

// ConflictError is a device that already shows some of the same bytes in another
// way. It stays as long as that device is bound.
type ConflictError struct {
	// Ref is the other binding, Path its node.
	Ref  Ref
	Path string
	// Field is what tells the two mappings apart, the name of a Mapping's field.
	Field string
	// Have and Want are that field's values, for people.
	Have, Want string
}

func (e *ConflictError) Error() string {
	return fmt.Sprintf("image is attached as %s with another %s (%s, not %s)", e.Path, e.Field, e.Have, e.Want)
}

// TransitionError is an event that the state machine does not have in that state.
// Nothing was done.
type TransitionError struct {
	From  State
	Event Event
}

func (e *TransitionError) Error() string {
	return fmt.Sprintf("%v is not possible for a loop device that is %v", e.Event, e.From)
}

func opError(op string, number int, err error) error {
	if err == nil {
		return nil
	}
	return &OpError{Op: op, Device: number, Err: err}
}
