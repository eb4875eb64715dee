package image

import (
	"errors"
	"fmt"
	"io/fs"
	"syscall"
)

// Sentinels of this package; test with errors.Is.
var (
	// ErrNotFound: no such volume. Also for IDs of other pools and for nonsense.
	ErrNotFound = errors.New("volume not found")
	// ErrIncompatible: a volume of that name exists and differs in the named field.
	ErrIncompatible = errors.New("volume exists and is different")
	// ErrNoSpace: the pool cannot promise or hold that much. Nothing was changed.
	ErrNoSpace = errors.New("not enough space in the pool")
	// ErrSize: the size is below the filesystem's minimum or above what the pool's
	// filesystem can hold in one file.
	ErrSize = errors.New("size is not possible")
	// ErrDamaged: the record or the image is not what csi-loop left there.
	ErrDamaged = errors.New("volume is damaged")
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
