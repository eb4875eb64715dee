package partition

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
)

// disk is an image that may say anything.
type disk struct {
	r    io.ReaderAt
	size int64
}

// holds tells whether a range lies in the image.
func (d disk) holds(offset, length int64) bool {
	return offset >= 0 && length >= 0 && offset <= d.size && length <= d.size-offset
}

// readError is an error of the reader, which says nothing about the table.
type readError struct{ err error }

func (e *readError) Error() string { return "read partition table: " + e.err.Error() }
func (e *readError) Unwrap() error { return e.err }

// readAt fills b from a range that the image holds.
func (d disk) readAt(b []byte, offset int64) error {
	if n, err := d.r.ReadAt(b, offset); n < len(b) {
		if err == nil {
			err = io.ErrUnexpectedEOF
		}
		return &readError{err}
	}
	return nil
}

// view is the part of the image from an offset on, as the library wants it. The
// library asks for the size only to look for a second copy of a table, which it is
// not to use.
type view struct {
	disk

	offset int64
	err    error // of the reader; the library does not wrap it
}

var errNoCopy = errors.New("the backup is for a person to look at")

// ReadAt reads in the image. A range that is outside is no error of the reader.
func (v *view) ReadAt(b []byte, offset int64) (int, error) {
	if !v.holds(v.offset+offset, int64(len(b))) {
		return 0, io.ErrUnexpectedEOF
	}
	if v.err = v.readAt(b, v.offset+offset); v.err != nil {
		return 0, v.err
	}
	return len(b), nil
}

// refuse makes ErrTable of what the library says, but not of an error of the reader.
func (v *view) refuse(err error) error {
	if v.err != nil {
		return v.err
	}
	return fmt.Errorf("%w: %w", ErrTable, err)
}

func (v *view) Seek(int64, int) (int64, error) { return 0, errNoCopy }

func (v *view) Read([]byte) (int, error) { return 0, errNoCopy }

func (v *view) Close() error { return nil }

func (v *view) Stat() (fs.FileInfo, error) { return nil, errNoCopy }
