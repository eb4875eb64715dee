package mount

import "io/fs"

// place is what statx(2) says about the top of what is at a path.
type place struct {
	mountID   uint64
	uniqueID  bool // mountID is never used again (6.8); else it is mountinfo's
	mountRoot bool // a mount begins exactly here
	mode      fs.FileMode
	dev, rdev uint64
	ino       uint64
}

// sameAs reports whether two places show the same file. Nodes of one block
// device are the same wherever they were made.
func (p place) sameAs(q place) bool {
	if p.mode.Type() != q.mode.Type() {
		return false
	}
	if p.isBlock() {
		return p.rdev == q.rdev
	}
	return p.dev == q.dev && p.ino == q.ino
}

func (p place) isBlock() bool {
	return p.mode&fs.ModeDevice != 0 && p.mode&fs.ModeCharDevice == 0
}

// configError is a parameter that the kernel refused, or a filesystem that could
// not be opened (param empty), with what the kernel said about it.
type configError struct {
	op    string
	param string
	words string
	err   error
}

func (e *configError) Error() string { return e.op + ": " + e.err.Error() }
func (e *configError) Unwrap() error { return e.err }

const (
	// opDriver is the op of a configError before anything about the source is known.
	opDriver = "open driver"
	// maxParamBytes is the longest string that fsconfig(2) takes.
	maxParamBytes = 255
)
