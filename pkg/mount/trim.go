package mount

import (
	"context"
	"errors"
	"fmt"
	"syscall"
)

// TrimSpec names a part of a filesystem in use.
type TrimSpec struct {
	Path   string // where it is mounted, writable
	Device Device // the device that has to be mounted there
	// Bytes of the filesystem, by its own addresses: those of btrfs may go beyond the
	// size of its device. Length is a request: the kernel rounds to its groups of
	// blocks (128 MiB on ext4, chunks of up to 1 GiB on btrfs).
	Start, Length uint64
}

// Trim tells the device which blocks of that part the filesystem does not use (FITRIM),
// and returns how many bytes the filesystem says they are; btrfs and XFS say it again
// when asked again. One call cannot be interrupted, so callers ask for parts. While it
// runs the filesystem cannot be unmounted.
//
// ErrRange: the filesystem ends before Start. ErrUnsupported: the device takes no
// discards, or the filesystem has none. *ForeignError: the device is not mounted there.
func (m *Mounter) Trim(ctx context.Context, spec TrimSpec) (int64, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	found, ok, err := m.At(spec.Path)
	switch {
	case err != nil:
		return 0, err
	case !ok:
		return 0, &OpError{Op: "trim", Path: spec.Path, Err: syscall.EINVAL, Words: "nothing is mounted there"}
	case !found.IsOf(spec.Device):
		return 0, &ForeignError{Target: spec.Path, Found: found, Reason: fmt.Sprintf("want device %d:%d", spec.Device.Major, spec.Device.Minor)}
	}
	n, err := trimRange(spec.Path, found.FSType, found.ID, spec.Start, spec.Length)
	if errors.Is(err, syscall.EINVAL) && spec.Start > 0 {
		return 0, fmt.Errorf("trim %s: %w", shorten(spec.Path), ErrRange)
	}
	return n, wrapOp("trim", spec.Path, err)
}
