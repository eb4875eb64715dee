package image

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// Dirs are the directories whose files may be mapped as volumes. It holds nothing
// open, so that their disks can be unmounted.
type Dirs struct{ dirs []string }

// OpenDirs checks the directories that the operator allows: absolute paths of
// directories that exist, none of them /, none of them in or around one of the
// given pools, whose images are nobody's to map. The error wraps ErrNotAllowed.
func OpenDirs(dirs []string, pools ...*Pool) (*Dirs, error) {
	configs := make([]Config, len(pools))
	for i, p := range pools {
		configs[i] = p.config
	}
	return openDirs(dirs, configs)
}

// OpenDirs is the function of that name with all configured pools, absent ones
// too.
func (s *Store) OpenDirs(dirs []string) (*Dirs, error) {
	configs := make([]Config, len(s.members))
	for i, m := range s.members {
		configs[i] = m.config
	}
	return openDirs(dirs, configs)
}

func openDirs(dirs []string, pools []Config) (*Dirs, error) {
	d := &Dirs{}
	for _, dir := range dirs {
		if !filepath.IsAbs(dir) || filepath.Clean(dir) == "/" {
			return nil, fmt.Errorf("%w: directory %q must be absolute, and not /", ErrNotAllowed, dir)
		}
		resolved, err := filepath.EvalSymlinks(dir)
		if err != nil {
			return nil, fmt.Errorf("%w: directory %q: %w", ErrNotAllowed, dir, err)
		}
		if st, err := os.Stat(resolved); err != nil || !st.IsDir() {
			return nil, fmt.Errorf("%w: %q is not a directory", ErrNotAllowed, dir)
		}
		for _, p := range pools {
			pool, err := resolve(p.Path)
			if err != nil {
				return nil, fmt.Errorf("%w: pool %q: %w", ErrNotAllowed, p.Name, err)
			}
			if within(resolved, pool) || within(pool, resolved) {
				return nil, fmt.Errorf("%w: directory %q overlaps pool %q", ErrNotAllowed, dir, p.Name)
			}
		}
		d.dirs = append(d.dirs, filepath.Clean(dir))
	}
	return d, nil
}

// resolve is filepath.EvalSymlinks, also for a path that cannot be followed
// now, because its disk is missing: it is where that path would be.
func resolve(path string) (string, error) {
	rest := ""
	for range 1000 { // links may form a circle
		resolved, err := filepath.EvalSymlinks(path)
		if err == nil {
			return filepath.Join(resolved, rest), nil
		}
		if target, err := os.Readlink(path); err == nil { // it leads nowhere
			if !filepath.IsAbs(target) {
				target = filepath.Join(filepath.Dir(path), target)
			}
			path = target
			continue
		}
		path, rest = filepath.Dir(path), filepath.Join(filepath.Base(path), rest)
	}
	return "", syscall.ELOOP
}

func within(path, dir string) bool { return path == dir || strings.HasPrefix(path, dir+"/") }

// Open opens a file by its absolute path, which must be plain (no "..", "." or
// empty component) and lie in an allowed directory, with no link on the way below
// that. What it returns is a regular file with one link (fact 73). Everything else
// is ErrNotAllowed; a path that does not exist is that and fs.ErrNotExist. A lack
// of descriptors or memory says nothing about the file, and is neither.
func (d *Dirs) Open(path string, readOnly bool) (*os.File, error) {
	dir, rest, err := d.split(path)
	if err != nil {
		return nil, err
	}
	refused := func(err error) error {
		if scarce(err) || errors.Is(err, syscall.EIO) {
			return opError("open", path, err)
		}
		return fmt.Errorf("%w: %q: %w", ErrNotAllowed, path, err)
	}
	base, err := openPath(dir)
	if err != nil {
		return nil, refused(err)
	}
	defer base.Close()
	f, err := openMapped(base, rest, !readOnly)
	if err != nil {
		return nil, refused(err)
	}
	st, err := statFile(f)
	switch {
	case err != nil:
	case !st.Mode.IsRegular():
		err = errNotRegular
	case st.Links != 1:
		err = fmt.Errorf("it has %d links, so it may be a file from outside", st.Links)
	}
	if err != nil {
		return nil, errors.Join(refused(err), f.Close())
	}
	return f, nil
}

// split finds the allowed directory of a path; the longest, if they nest.
func (d *Dirs) split(path string) (dir, rest string, err error) {
	if !filepath.IsAbs(path) || filepath.Clean(path) != path || strings.ContainsRune(path, 0) {
		return "", "", fmt.Errorf("%w: %q is not a plain absolute path", ErrNotAllowed, path)
	}
	for _, allowed := range d.dirs {
		if r, ok := strings.CutPrefix(path, allowed+"/"); ok && fs.ValidPath(r) && len(allowed) > len(dir) {
			dir, rest = allowed, r
		}
	}
	if dir == "" {
		return "", "", fmt.Errorf("%w: %q is in none of the allowed directories (%s)", ErrNotAllowed, path, strings.Join(d.dirs, ", "))
	}
	return dir, rest, nil
}
