package driver

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"syscall"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/csi-loop/csi-loop/pkg/crypt"
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
// codes, and to what a person does about them, in Markdown. The first match wins.
var sentinelCodes = []struct {
	err    error
	code   codes.Code
	advice string
}{
	{context.Canceled, codes.Canceled, "the caller gave up, or csi-loop was stopped; it asks again"},
	{context.DeadlineExceeded, codes.DeadlineExceeded, "it took longer than the caller waits; it asks again and finds what was done so far. If it never ends, look at the disk of the pool"},

	{image.ErrNotFound, codes.NotFound, "there is no such volume, snapshot or template on this node. A volume that Kubernetes has a PersistentVolume of was deleted behind its back, or its pool is another: `csi-loop volumes`"},
	{image.ErrIncompatible, codes.AlreadyExists, "a volume, snapshot or template of this name is there and was asked for differently: delete it, or ask for the same"},
	{image.ErrNoSpace, codes.ResourceExhausted, "delete what is not needed, grow the pool's filesystem, or use another pool or node. In Kubernetes the scheduler chooses again"},
	{image.ErrSize, codes.OutOfRange, "ask for a size within the limits that the message names"},
	{image.ErrSource, codes.InvalidArgument, "the volume cannot begin as this snapshot, volume or template, for the reason in the message: usually it is smaller than its source, or has another filesystem"},
	{image.ErrContent, codes.InvalidArgument, "the file does not hold what was said, or is in use: see [images and templates](../operations.md#images-and-templates)"},
	{image.ErrInGroup, codes.InvalidArgument, "delete the group snapshot instead, which has it"},
	// A copy from another node that did not come whole. It is begun anew.
	{image.ErrInflow, codes.Unavailable, "a copy from another node did not come whole; it is begun anew by itself"},
	{transfer.ErrCut, codes.Unavailable, "a copy from another node was cut off; it is begun anew by itself. If that goes on, look at the links: [CSILoopNodeNotLinked](../operations.md#csiloopnodenotlinked)"},
	{transfer.ErrCorrupt, codes.Unavailable, "it is begun anew by itself. If that goes on, suspect the memory or the network of one of the nodes"},
	{image.ErrNotAllowed, codes.InvalidArgument, "put the image beneath a directory that `--image-dir` allows, as a regular file with one link and no symbolic links on the way"},
	{image.ErrUnsupported, codes.InvalidArgument, "the pool's filesystem or this kernel cannot do it: leave the parameter out, or use another pool"},
	// The bytes are not what the record says. A person has to look; nothing a
	// CO can repeat will mend it.
	{image.ErrDamaged, codes.DataLoss, "the files of the volume are not what its record says, and nothing will touch them: see [CSILoopVolumesDamaged](../operations.md#csiloopvolumesdamaged)"},
	// The pool is not what it should be (not mounted, read-only): it may come
	// back by itself, and until then nothing is known about the volume.
	{image.ErrPool, codes.Unavailable, "the disk of the pool is not mounted, fails, or is another than configured: see [CSILoopPoolUnreachable](../operations.md#csilooppoolunreachable)"},

	{crypt.ErrUnavailable, codes.FailedPrecondition, "install cryptsetup on the node and load dm-crypt (`modprobe dm-crypt`): `csi-loop doctor` says what is missing. CreateVolume answers `ResourceExhausted` with it, so that Kubernetes chooses another node"},
	{crypt.ErrPassphrase, codes.InvalidArgument, "the node-stage secret has another passphrase than the volume; that of a copy is its source's: see [encrypted volumes](../operations.md#encrypted-volumes)"},
	{crypt.ErrGone, codes.Aborted, "the mapping of an encrypted volume was removed by hand while it was used; it is tried again"},
	{crypt.ErrBusy, codes.Aborted, "somebody has the mapping of an encrypted volume open; it is tried again. `fuser -v /dev/dm-N` on the node says who"},

	{loop.ErrSilent, codes.Unavailable, "the disk or server with the backing file of the loop device that the message names hangs: mend that, or detach the device (`losetup -d`) and restart csi-loop, which waits for its answer and so keeps it; it is tried again"},
	{loop.ErrBusy, codes.Aborted, "somebody has the loop device open; it is tried again. `fuser -vm` on the node says who"},
	{loop.ErrLimit, codes.ResourceExhausted, "raise `--loop-devices-max` (`loopDevices.max` in the chart), or spread the pods: see [CSILoopDevicesRunOut](../operations.md#csiloopdevicesrunout)"},
	{loop.ErrDirectIO, codes.FailedPrecondition, "the pool cannot do direct I/O with blocks of this size: use `directIO: auto`, or a `blockSize` that is not below that of the disk"},
	{loop.ErrDiscard, codes.FailedPrecondition, "the node's kernel lets a pod's discards through to the image of a volume that is to keep its blocks: use Linux 5.19 or later (or 5.15), or `allocation: thin`, or `readOnly: \"true\"` for a mapped volume"},
	// The device went away under us: detached by hand, or by a reboot.
	{loop.ErrNotBound, codes.FailedPrecondition, "the loop device was detached by hand: delete the pods that use the volume, so that it is staged anew"},
	{loop.ErrNotExist, codes.FailedPrecondition, "the loop device is gone: delete the pods that use the volume, so that it is staged anew"},

	// The writers did not hold still long enough; what was copied is thrown away.
	{mount.ErrThawed, codes.Aborted, "the snapshot took longer than the filesystem may be frozen; it is tried again. Raise `freezeTimeout`, or make snapshots when less is written"},
	// Something is left: a filesystem that only the next start can thaw.
	{mount.ErrNotThawed, codes.Aborted, "a filesystem may still be frozen: restart csi-loop on the node, which thaws it"},
	{mount.ErrBusy, codes.Aborted, "something still uses the mount; it is tried again. `fuser -vm` on the node says who"},
	{mount.ErrRefused, codes.FailedPrecondition, "the kernel does not mount it: its log (`dmesg`) on the node has the reason"},
	{mount.ErrUnknownFilesystem, codes.FailedPrecondition, "there is no filesystem in the image that this driver mounts: ext2, ext3, ext4, XFS or btrfs. It is never formatted; use it as a raw block volume"},
	{partition.ErrNoTable, codes.FailedPrecondition, "the image has neither a GPT nor an MBR: leave `partition` out, or give `offset` and `sizeLimit`"},
	{partition.ErrTable, codes.FailedPrecondition, "mend the partition table with `sgdisk` or `fdisk`"},
	{partition.ErrNotFound, codes.FailedPrecondition, "look at the image with `fdisk -l`, and name a partition that is there"},
	{mount.ErrPermission, codes.FailedPrecondition, "the container lacks a capability; growing a mounted ext4 needs CAP_SYS_RESOURCE"},
	{mount.ErrUnsupported, codes.FailedPrecondition, "this kernel or filesystem cannot do it: see [limitations](../limitations.md)"},

	// What the kernel answers for the moment: the CO asks again, and does not take
	// the call for one that had no effect (fact 57).
	{syscall.EINTR, codes.Aborted, "it is tried again"},
	{syscall.EAGAIN, codes.Aborted, "it is tried again"},
	{syscall.EBUSY, codes.Aborted, "something has it open; it is tried again"},
	{syscall.ENOMEM, codes.Unavailable, "the node is short of memory; it is tried again"},
	{syscall.EMFILE, codes.Unavailable, "csi-loop has too many files open: raise its limit (`ulimit -n`)"},
	{syscall.ENFILE, codes.Unavailable, "the node has too many files open: `fs.file-max`"},
	{syscall.ENOSPC, codes.ResourceExhausted, "the disk is full, beside what csi-loop counts: free space on it"},
	{syscall.EDQUOT, codes.ResourceExhausted, "a quota of the pool's filesystem is used up"},
}

// passes says whether an error is one of the moment, for want of descriptors for example,
// and tells nothing of what it came from.
func passes(err error) bool {
	code := codeOf(err)
	return code == codes.Aborted || code == codes.Unavailable
}

// ErrorKind is a class of errors that calls end with, for people.
type ErrorKind struct {
	Text   string // is in the message
	Code   codes.Code
	Advice string // what to do, in Markdown
}

// ErrorKinds lists what calls end with because of the pool, the devices, the mounts or
// the kernel, in the order in which they are told apart.
func ErrorKinds() []ErrorKind {
	kinds := make([]ErrorKind, len(sentinelCodes))
	for i, s := range sentinelCodes {
		kinds[i] = ErrorKind{s.err.Error(), s.code, s.advice}
	}
	return kinds
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
