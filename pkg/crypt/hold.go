package crypt

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
)

// Hold opens a mapping for reading and proves that it is m. Until the result is closed
// the kernel neither ends the mapping, which Close answers with ErrBusy, nor gives its
// number to another: its path can be used. ErrGone when there is no such mapping any more,
// or something else has its number.
func (c *Crypt) Hold(m Mapping) (io.Closer, error) {
	f, err := os.Open(m.Path)
	switch {
	case isNone(err):
		return nil, fmt.Errorf("hold %s: %w: %w", m.Path, ErrGone, err)
	case err != nil:
		return nil, fmt.Errorf("hold mapping %s: %w", m.Name, err)
	}
	if err := c.proveOpen(f, m); err != nil {
		return nil, errors.Join(fmt.Errorf("hold %s: %w", m.Path, err), f.Close())
	}
	return f, nil
}

// proveOpen makes sure that an open device is m. Since it is open, what the kernel tells
// of its numbers is about the very same device.
func (c *Crypt) proveOpen(f *os.File, m Mapping) error {
	numbers, err := blockNumbers(f)
	if err != nil {
		return err
	}
	sys := filepath.Join(c.sys, "dev/block", numbers)
	got := Mapping{Number: m.Number, Path: m.Path}
	ok, err := readIdentity(sys, &got)
	switch {
	case err != nil:
		return err
	case !ok:
		return fmt.Errorf("%w: %s is no mapping", ErrGone, numbers)
	case got != m:
		return fmt.Errorf("%w: %s is %s (%s), not %s (%s)", ErrGone, numbers, got.Name, got.UUID, m.Name, m.UUID)
	}
	return nil
}
