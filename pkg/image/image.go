package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
)

// OpenImage opens a volume's image, for reading or for reading and writing. What
// it returns is a regular file with one link, inside the pool, and exactly as large
// as recorded. A thick image that is opened for writing has all its blocks (lost
// ones are replaced; ErrNoSpace when the pool is full). Otherwise ErrDamaged with
// the reason, or ErrNotFound. Another error, such as a lack of descriptors, says
// nothing about the volume.
func (p *Pool) OpenImage(ctx context.Context, id string, readOnly bool) (*os.File, error) {
	dir, ok := p.dirOf(id)
	if !ok {
		return nil, fmt.Errorf("%w: %q", ErrNotFound, id)
	}
	leave, err := p.enter(ctx, dir)
	if err != nil {
		return nil, err
	}
	defer leave()
	r, err := p.get(dir)
	if err != nil {
		return nil, err
	}
	d, f, err := p.openVolume(dir, r, !readOnly)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", id, err)
	}
	defer d.Close()
	if r.Allocation == Thick && !readOnly {
		if err := p.refill(f, r.Size); err != nil {
			return nil, errors.Join(fmt.Errorf("open %s: %w", id, err), f.Close())
		}
	}
	p.refreshOne(dir)
	return f, nil
}

// ImageInode returns the device and inode of the file in the place of a volume's
// image, sound or not, so that who is about to remove it can look whether anybody
// uses it. ErrNotFound when there is no volume or no regular file. Any other error
// leaves open whether there is one.
func (p *Pool) ImageInode(ctx context.Context, id string) (dev, ino uint64, err error) {
	dir, ok := p.dirOf(id)
	if !ok {
		return 0, 0, fmt.Errorf("%w: %q", ErrNotFound, id)
	}
	leave, err := p.enter(ctx, dir)
	if err != nil {
		return 0, 0, err
	}
	defer leave()
	st, err := p.imageStat(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist), err == nil && !st.Mode.IsRegular():
		return 0, 0, fmt.Errorf("%w: image of %q", ErrNotFound, id)
	case err != nil:
		return 0, 0, fmt.Errorf("image of %q: %w", id, err)
	}
	return st.Dev, st.Ino, nil
}

// openVolume opens a volume's directory and its image, and looks whether the
// image is what the record says. ErrDamaged is only what that look has proved.
func (p *Pool) openVolume(dir string, r record, write bool) (d, f *os.File, err error) {
	return p.openImage(p.volumes, volumesDir, dir, r.Size, write)
}

// openImage is openVolume for what is in a directory of the pool.
func (p *Pool) openImage(parent *os.File, name, dir string, size int64, write bool) (d, f *os.File, err error) {
	path := fmt.Sprintf("%s/%s/%s/%s", p.Path(), name, dir, imageFile)
	d, err = openDirAt(parent, dir)
	if err != nil {
		return nil, nil, openError(path, err)
	}
	f, err = openAt(d, imageFile, write)
	if err != nil {
		return nil, nil, errors.Join(openError(path, err), d.Close())
	}
	st, err := statFile(f)
	if err != nil {
		return nil, nil, errors.Join(opError("look at", path, err), f.Close(), d.Close())
	}
	if err := checkImage(size, st); err != nil {
		return nil, nil, errors.Join(fmt.Errorf("%w: %s: %w", ErrDamaged, path, err), f.Close(), d.Close())
	}
	return d, f, nil
}

func checkImage(size int64, st fileStat) error {
	switch {
	case !st.Mode.IsRegular():
		return errNotRegular
	case st.Links != 1:
		return fmt.Errorf("it has %d links; somebody else's file, or shared with somebody", st.Links)
	case st.Size != size:
		return fmt.Errorf("it has %d bytes, its record says %d", st.Size, size)
	}
	return nil
}
