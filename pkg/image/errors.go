package image

import (
	"errors"
	"fmt"
	"io/fs"
	"syscall"
)

// Sentinels of this package; test with errors.Is.
var (
	// ErrNotFound: no such volume or snapshot. Also for IDs of other pools and for nonsense.
	ErrNotFound = errors.New("not found")
	// ErrIncompatible: a volume, snapshot or template of that name exists and differs in the named field.
	ErrIncompatible = errors.New("exists and is different")
	// ErrNoSpace: the pool cannot promise or hold that much. Nothing was changed.
	ErrNoSpace = errors.New("not enough space in the pool")
	// ErrSize: the size is below the filesystem's minimum or above what the pool's
	// filesystem can hold in one file.
	ErrSize = errors.New("size is not possible")
	// ErrDamaged: the record or the image is not what csi-loop left there. Never
	// that it could not be looked at.
	ErrDamaged = errors.New("damaged")
	// ErrSource: the volume asked for would be no copy of its source.
	ErrSource = errors.New("not possible from this source")
	// ErrInflow: what came in from elsewhere cannot be the content of the source.
	ErrInflow = errors.New("not the content of the source")
	// ErrContent: the file to be taken in cannot be, or not in that way.
	ErrContent = errors.New("file cannot be taken in")
	// ErrInGroup: the snapshot exists and goes only with its group.
	ErrInGroup = errors.New("part of a group")
	// ErrNotAllowed: a mapped file is outside the allowed directories, or is not
	// a plain file.
	ErrNotAllowed = errors.New("file is not allowed")
	// ErrUnsupported: this machine lacks a tool, or the pool's filesystem a feature.
	ErrUnsupported = errors.New("not supported")
	// ErrPool: the pool cannot be used: wrong filesystem, in use by another
	// process, read-only, gone, or closed.
	ErrPool = errors.New("pool is unusable")
)

// OpError is a system call that failed.
type OpError struct {
	Op   string // what was being done, such as "allocate"
	Path string // for people
	Err  error  // the errno, usually
}

func (e *OpError) Error() string { return e.Op + " " + e.Path + ": " + e.Err.Error() }

// Unwrap returns the errno.
func (e *OpError) Unwrap() error { return e.Err }

// SpecError is a Spec that no pool would accept.
type SpecError struct {
	Field  string // name of the Spec's field
	Reason string
}

func (e *SpecError) Error() string { return "invalid " + e.Field + ": " + e.Reason }

// opError makes an OpError, and marks those errnos that have a meaning for
// callers: a full pool, a file larger than the filesystem can have, and a pool
// that went read-only.
func opError(op, path string, err error) error {
	if err == nil {
		return nil
	}
	// os.File methods wrap the errno with the path.
	if pe, ok := errors.AsType[*fs.PathError](err); ok {
		err = pe.Err
	}
	e := &OpError{Op: op, Path: path, Err: err}
	switch {
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return fmt.Errorf("%w: %w", ErrNoSpace, e)
	case errors.Is(err, syscall.EFBIG):
		return fmt.Errorf("%w: %w", ErrSize, e)
	case errors.Is(err, syscall.EROFS):
		return fmt.Errorf("%w: it is read-only: %w", ErrPool, e)
	case errors.Is(err, syscall.EOPNOTSUPP), errors.Is(err, errors.ErrUnsupported):
		return fmt.Errorf("%w: %w", ErrUnsupported, e)
	}
	return e
}

// openError makes the error of opening a file of a pool. It wraps ErrDamaged only
// when the errno proves that something else is in the file's place. All others,
// such as a lack of descriptors or an I/O error, say nothing about the file, and
// who takes them for damage may give up a volume that is well.
func openError(path string, err error) error {
	for _, proof := range []error{
		syscall.ENOENT, syscall.ENOTDIR, // it is gone, or its directory is
		syscall.ELOOP, syscall.EXDEV, // a link, a mount point: openat2 does not pass
		errNotRegular,
	} {
		if errors.Is(err, proof) {
			return fmt.Errorf("%w: %s: %w", ErrDamaged, path, err)
		}
	}
	return opError("open", path, err)
}

// scarce tells whether an error is a lack of something that this process or this
// machine has too little of now.
func scarce(err error) bool {
	for _, errno := range []syscall.Errno{
		syscall.EMFILE, syscall.ENFILE, syscall.ENOMEM,
		syscall.EINTR, syscall.EAGAIN, // a call that was tried again too often
	} {
		if errors.Is(err, errno) {
			return true
		}
	}
	return false
}

// outOfDescriptors tells whether this process, or the machine, has too many files open.
func outOfDescriptors(err error) bool {
	return errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE)
}
