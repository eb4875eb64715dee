package demo

import (
	"errors"
	"fmt"
	"os"
	"syscall"
)

// showImage shows the file behind a thick volume, and checks it.
func (d *demo) showImage(v *volume, size int64) error {
	st, err := os.Stat(v.image)
	if err != nil {
		return err
	}
	d.out.factf("image", "%s", v.image)
	d.out.factf("", "size %s, allocated %s", bytesText(st.Size()), bytesText(allocated(st)))
	if st.Size() != size || allocated(st) < size {
		return fmt.Errorf("the image has %d bytes, %d of them allocated, instead of %d", st.Size(), allocated(st), size)
	}
	return nil
}

// showLoop shows the loop device over a file, and checks its size.
func (d *demo) showLoop(file string, size int64, readOnly bool) (loopDevice, error) {
	l, err := loopOver(file, readOnly)
	if err != nil {
		return l, err
	}
	where := ""
	if l.offset != 0 || l.sizeLimit != 0 {
		where = fmt.Sprintf(" from offset %s, limit %s", bytesText(l.offset), bytesText(l.sizeLimit))
	}
	d.out.factf("device", "%s shows %s%s", l.node(), l.backing, where)
	d.out.factf("", "%s, blocks of %s bytes, %s", bytesText(l.size), l.blockSize, l.mode())
	if l.size != size {
		return l, fmt.Errorf("%s has %d bytes instead of %d", l.node(), l.size, size)
	}
	return l, nil
}

func (d *demo) showMount(path string) error {
	m, err := mountAt(path)
	if err != nil {
		return err
	}
	d.out.factf("mount", "%s at %s (%s, %s)", m.source, m.path, m.fsType, m.options)
	return nil
}

func (d *demo) showDF(path string) (df, error) {
	s, err := statfs(path)
	if err == nil {
		d.out.factf("df", "%s in all, %s used, %s free", bytesText(s.total), bytesText(s.used), bytesText(s.free))
	}
	return s, err
}

// showFile reads a file from below the cache, and compares it with what was
// written.
func (d *demo) showFile(path string) error {
	got, size, err := sumFile(path)
	if err != nil {
		return err
	}
	d.out.factf("file", "%s, sha256 %.16s... as written", path, got)
	if want := sumOf(size, d.cast.files.name); size != letterSize || got != want {
		return fmt.Errorf("%s has %d bytes with sha256 %s instead of %d with %s", path, size, got, letterSize, want)
	}
	return nil
}

// refused checks that an attempt failed with the errno it should, and tells.
func (d *demo) refused(label string, want syscall.Errno, err error) error {
	if !errors.Is(err, want) {
		return fmt.Errorf("expected %q, got: %w", want.Error(), orNothing(err))
	}
	d.out.factf(label, "%v", err)
	return nil
}

func orNothing(err error) error {
	if err == nil {
		return errors.New("success")
	}
	return err
}
