package driver

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"syscall"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/csi-loop/csi-loop/pkg/image"
	"github.com/csi-loop/csi-loop/pkg/loop"
	"github.com/csi-loop/csi-loop/pkg/mount"
	"github.com/csi-loop/csi-loop/pkg/partition"
	"github.com/csi-loop/csi-loop/pkg/transfer"
)

// codeError is an error of this package that already knows its gRPC code:
// findings about the request itself, which no lower package can make.
type codeError struct {
	code codes.Code
	msg  string
}

func (e *codeError) Error() string { return e.msg }

func invalidf(format string, args ...any) error {
	return &codeError{codes.InvalidArgument, fmt.Sprintf(format, args...)}
}

func notFoundf(format string, args ...any) error {
	return &codeError{codes.NotFound, fmt.Sprintf(format, args...)}
}

func preconditionf(format string, args ...any) error {
	return &codeError{codes.FailedPrecondition, fmt.Sprintf(format, args...)}
}

func existsf(format string, args ...any) error {
	return &codeError{codes.AlreadyExists, fmt.Sprintf(format, args...)}
}

func outOfRangef(format string, args ...any) error {
	return &codeError{codes.OutOfRange, fmt.Sprintf(format, args...)}
}

func exhaustedf(format string, args ...any) error {
	return &codeError{codes.ResourceExhausted, fmt.Sprintf(format, args...)}
}

func abortedf(format string, args ...any) error {
	return &codeError{codes.Aborted, fmt.Sprintf(format, args...)}
}

func unavailablef(format string, args ...any) error {
	return &codeError{codes.Unavailable, fmt.Sprintf(format, args...)}
}

// sentinelCodes is the one table from the errors of the packages below to gRPC
// codes. The first match wins.
var sentinelCodes = []struct {
	err  error
	code codes.Code
}{
	{context.Canceled, codes.Canceled},
	{context.DeadlineExceeded, codes.DeadlineExceeded},

	{image.ErrNotFound, codes.NotFound},
	{image.ErrIncompatible, codes.AlreadyExists},
	{image.ErrNoSpace, codes.ResourceExhausted},
	{image.ErrSize, codes.OutOfRange},
	{image.ErrSource, codes.InvalidArgument},
	{image.ErrContent, codes.InvalidArgument},
	{image.ErrInGroup, codes.InvalidArgument},
	// A copy from another node that did not come whole. It is begun anew.
	{image.ErrInflow, codes.Unavailable},
	{transfer.ErrCut, codes.Unavailable},
	{transfer.ErrCorrupt, codes.Unavailable},
	{image.ErrNotAllowed, codes.InvalidArgument},
	{image.ErrUnsupported, codes.InvalidArgument},
	// The bytes are not what the record says. A person has to look; nothing a
	// CO can repeat will mend it.
	{image.ErrDamaged, codes.DataLoss},
	// The pool is not what it should be (not mounted, read-only): it may come
	// back by itself, and until then nothing is known about the volume.
	{image.ErrPool, codes.Unavailable},

	{loop.ErrBusy, codes.Aborted},
	{loop.ErrLimit, codes.ResourceExhausted},
	{loop.ErrDirectIO, codes.FailedPrecondition},
	// The device went away under us: detached by hand, or by a reboot.
	{loop.ErrNotBound, codes.FailedPrecondition},
	{loop.ErrNotExist, codes.FailedPrecondition},

	// The writers did not hold still long enough; what was copied is thrown away.
	{mount.ErrThawed, codes.Aborted},
	// Something is left: a filesystem that only the next start can thaw.
	{mount.ErrNotThawed, codes.Aborted},
	{mount.ErrBusy, codes.Aborted},
	{mount.ErrRefused, codes.FailedPrecondition},
	{mount.ErrUnknownFilesystem, codes.FailedPrecondition},
	{partition.ErrNoTable, codes.FailedPrecondition},
	{partition.ErrTable, codes.FailedPrecondition},
	{partition.ErrNotFound, codes.FailedPrecondition},
	{mount.ErrPermission, codes.FailedPrecondition},
	{mount.ErrUnsupported, codes.FailedPrecondition},

	// What the kernel answers for the moment: the CO asks again, and does not take
	// the call for one that had no effect (fact 57).
	{syscall.EINTR, codes.Aborted},
	{syscall.EAGAIN, codes.Aborted},
	{syscall.EBUSY, codes.Aborted},
	{syscall.ENOMEM, codes.Unavailable},
	{syscall.EMFILE, codes.Unavailable},
	{syscall.ENFILE, codes.Unavailable},
	{syscall.ENOSPC, codes.ResourceExhausted},
	{syscall.EDQUOT, codes.ResourceExhausted},
}

// codeOf finds the gRPC code of an error.
func codeOf(err error) codes.Code {
	if coded, ok := errors.AsType[*codeError](err); ok {
		return coded.code
	}
	if errors.As(err, new(*busyError)) {
		return codes.Aborted
	}
	for _, s := range sentinelCodes {
		if errors.Is(err, s.err) {
			return s.code
		}
	}
	switch {
	case errors.As(err, new(*mount.OptionError)), errors.As(err, new(*loop.MappingError)), errors.As(err, new(*image.SpecError)):
		return codes.InvalidArgument
	case errors.As(err, new(*loop.ConflictError)), errors.As(err, new(*mount.ForeignError)), errors.As(err, new(*mount.CheckError)):
		return codes.FailedPrecondition
	}
	return codes.Internal
}

// toStatus makes the gRPC status of an error: the code from the table, the
// whole chain as message, no details (CSI wants them empty).
func toStatus(err error) error {
	if err == nil {
		return nil
	}
	if _, ok := status.FromError(err); ok {
		return err
	}
	// Joined errors come on lines of their own, and COs show messages on one.
	return status.Error(codeOf(err), strings.ReplaceAll(err.Error(), "\n", "; "))
}
