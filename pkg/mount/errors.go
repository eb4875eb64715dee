package mount

import (
	"errors"
	"fmt"
	"strings"
	"syscall"
)

var (
	// ErrBusy means that somebody uses the mount, the target or the device. It
	// is an answer, not a fault: the same call may succeed later.
	ErrBusy = errors.New("in use")
	// ErrUnknownFilesystem means that no filesystem this package knows was
	// found, or that one was asked for by an unknown name.
	ErrUnknownFilesystem = errors.New("unknown filesystem")
	// ErrPermission means that the kernel wants a capability that this process
	// does not have.
	ErrPermission = errors.New("operation not permitted")
	// ErrDamaged means that the kernel found the filesystem not intact. For the ext
	// family Check may mend it; for others a person has to.
	ErrDamaged = fmt.Errorf("filesystem is damaged: %w", ErrRefused)
	// ErrRefused means that the kernel does not mount this filesystem this way: it
	// lacks a feature, its log has to be replayed on a device that is read-only, or
	// one with its UUID is mounted. ErrDamaged is a case of it.
	ErrRefused = errors.New("refused by the kernel")
	// ErrUnsupported means that this kernel, filesystem or platform cannot do
	// it, whoever asks. It is also an errors.ErrUnsupported.
	ErrUnsupported = fmt.Errorf("mount: %w", errors.ErrUnsupported)
	// ErrRange means that the filesystem ends before the part that was asked for.
	ErrRange = errors.New("the filesystem ends before that")
)

// OpError is a failed system call or program.
//
// errors.Is sees the errno, and the sentinel that it stands for: EBUSY is
// ErrBusy, EPERM is ErrPermission, ENOSYS and EOPNOTSUPP are ErrUnsupported.
type OpError struct {
	Op    string // what was being done, such as "move mount"
	Path  string // the target, or the device when there is no target
	Err   error  // the errno, or an error of this package
	Words string // what the kernel or the program said, or advice; may be empty
}

func (e *OpError) Error() string {
	var b strings.Builder
	b.WriteString(e.Op)
	if e.Path != "" {
		fmt.Fprintf(&b, " %s", shorten(e.Path))
	}
	fmt.Fprintf(&b, ": %v", e.Err)
	if e.Words != "" {
		fmt.Fprintf(&b, " (%s)", e.Words)
	}
	return b.String()
}

// Unwrap returns Err.
func (e *OpError) Unwrap() error { return e.Err }

// Is reports whether the errno inside stands for the sentinel target.
func (e *OpError) Is(target error) bool {
	switch target { // by identity, as the contract of Is says
	case ErrBusy:
		return errors.Is(e.Err, syscall.EBUSY)
	case ErrPermission:
		return errors.Is(e.Err, syscall.EPERM)
	case ErrUnsupported:
		return errors.Is(e.Err, errors.ErrUnsupported)
	}
	return false
}

// ForeignError means that something else is mounted at the target than what was
// asked for. It was left alone.
type ForeignError struct {
	Target string
	Found  Mount
	Reason string // what differs, such as "it is read-only"
}

func (e *ForeignError) Error() string {
	return fmt.Sprintf("something else is mounted at %s: %s of %s, root %s: %s",
		shorten(e.Target), e.Found.FSType, e.Found.Source, shorten(e.Found.Root), e.Reason)
}

// OptionError names a mount option that is not allowed, or that the kernel
// refused, and says why.
type OptionError struct {
	FSType string
	Option string // as it was given, value included
	Reason string
	Err    error // the kernel's errno; nil when it was refused before any call
}

func (e *OptionError) Error() string {
	where := ""
	if e.FSType != "" {
		where = " for " + e.FSType
	}
	return fmt.Sprintf("mount option %q%s: %s", shorten(e.Option), where, e.Reason)
}

// Unwrap returns the errno, or nil.
func (e *OptionError) Unwrap() error { return e.Err }

// CheckError means that a filesystem check did not end with a sound filesystem.
type CheckError struct {
	Device string
	Code   int    // exit status of the program; -1 when a signal ended it
	Output string // its last words, at most 4 KiB
}

func (e *CheckError) Error() string {
	return fmt.Sprintf("check of %s ended with status %d, a person has to look at it: %s", e.Device, e.Code, e.Output)
}

// shorten keeps an error readable when a path is thousands of bytes long: both
// ends are kept, for the head says whose it is and the tail which one.
func shorten(s string) string {
	const limit = 512
	if len(s) <= limit {
		return s
	}
	half := limit / 2
	return fmt.Sprintf("%s...(%d bytes)...%s", s[:half], len(s), s[len(s)-half:])
}
