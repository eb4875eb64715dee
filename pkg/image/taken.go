package image

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"time"
)

// Incoming is a directory of a pool for files that are to be taken in: it is on the
// pool's mount, also in a container. Who needs it makes it; csi-loop only takes files out
// of it.
const Incoming = "incoming"

const maxPath = 4096

// check refuses what cannot be taken in. The error wraps ErrContent.
func (c FileContent) check() error {
	st, err := statFile(c.File)
	switch {
	case err != nil:
		return opError("look at", c.Path, err)
	case !st.Mode.IsRegular():
		return fmt.Errorf("%w: %s: %w", ErrContent, c.Path, errNotRegular)
	case !filepath.IsAbs(c.Path) || len(c.Path) > maxPath:
		return fmt.Errorf("%w: %q is not an absolute path of at most %d bytes", ErrContent, c.Path, maxPath)
	case c.Offset < 0 || c.Length <= 0 || c.Offset > st.Size || c.Length > st.Size-c.Offset:
		return fmt.Errorf("%w: %s: %d bytes from byte %d on are not in it, it has %d", ErrContent, c.Path, c.Length, c.Offset, st.Size)
	case c.Method != Auto && c.Method != Copy && c.Method != Reflink && c.Method != Move:
		return fmt.Errorf("%w: method %q is none of auto, copy, reflink and move", ErrContent, c.Method)
	case c.Method == Move && (c.Offset != 0 || c.Length != st.Size):
		return fmt.Errorf("%w: %s: a part of a file cannot be moved: copy it", ErrContent, c.Path)
	}
	return nil
}

// Taken says which bytes of a file were taken in, and what the file was then: a path
// alone does not tell a file from the one that was there before. What an older csi-loop
// took in has the zero value. Times are RFC 3339 in UTC, with nanoseconds.
//
// Device numbers are not part of it: they may be others after each start of the machine,
// when a call that a power cut interrupted is repeated.
type Taken struct {
	Offset   int64  `json:"offset"` // bytes
	Length   int64  `json:"length"` // bytes
	Inode    uint64 `json:"inode"`
	Modified string `json:"modified"` // the content
	Changed  string `json:"changed"`  // the content, owner, mode or names; nobody can set it back
}

// takenOf looks at a file. After a later change of it, the result is another one.
func takenOf(c FileContent) (Taken, error) {
	inode, modified, changed, err := stateOf(c.File)
	if err != nil {
		return Taken{}, opError("look at", c.Path, err)
	}
	text := func(t time.Time) string { return t.UTC().Format(time.RFC3339Nano) }
	return Taken{Offset: c.Offset, Length: c.Length, Inode: inode, Modified: text(modified), Changed: text(changed)}, nil
}

// check refuses what takenOf does not say.
func (t Taken) check() error {
	if t == (Taken{}) {
		return nil
	}
	const longest = 40 // of a time; years need not have four digits
	if t.Offset < 0 || t.Length <= 0 || t.Modified == "" || t.Changed == "" || max(len(t.Modified), len(t.Changed)) > longest {
		return &SpecError{"Source", fmt.Sprintf("%+v is not what was taken in of a file", t)}
	}
	return nil
}

// differs says what differs from what is to be taken in now, or nothing.
func (t Taken) differs(now Taken) string {
	switch {
	case t == Taken{} || t == now:
		return ""
	case t.Offset != now.Offset || t.Length != now.Length:
		return fmt.Sprintf("it has %d bytes from byte %d on, asked for %d from byte %d on", t.Length, t.Offset, now.Length, now.Offset)
	case t.Inode != now.Inode:
		return fmt.Sprintf("the file is another one than then (inode %d, now %d)", t.Inode, now.Inode)
	case t.Modified != now.Modified:
		return fmt.Sprintf("the file was written to since (modified %s, now %s)", t.Modified, now.Modified)
	default:
		return fmt.Sprintf("the file was written to, or got another owner, mode or name since (changed %s, now %s)", t.Changed, now.Changed)
	}
}

// sameAs is nil if the content is what was taken in of it. Else it is ErrIncompatible,
// and says what to do about that with what, a volume or a template.
func (t Taken) sameAs(c FileContent, what string) error {
	now, err := takenOf(c)
	if err != nil {
		return err
	}
	if how := t.differs(now); how != "" {
		return fmt.Errorf("%w: it was made of %s, but %s: use another name, or remove the %s first", ErrIncompatible, c.Path, how, what)
	}
	return nil
}

// sameImport is sameAs for a volume. A file that is being moved is the image, and was
// extended by that.
func (p *Pool) sameImport(dir string, r record, c FileContent) error {
	img, err := p.imageStat(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // it is gone, and the record says enough
		return opError("look at", imageFile, err)
	}
	st, err := statFile(c.File)
	if err != nil {
		return opError("look at", c.Path, err)
	}
	if st.Dev == img.Dev && st.Ino == img.Ino {
		return nil
	}
	return r.Source.Taken.sameAs(c, "volume")
}
