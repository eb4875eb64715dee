//go:build linux

package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// blocks is what is not zero of an image that mkfs made, for a floor that writes it
// instead of running mkfs.
type blocks []piece

type piece struct {
	at   int64
	data []byte
}

// capture runs mkfs once and reads back what it wrote.
func capture(dir string, argv []string, size int64) (b *blocks, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	f, err := os.Create(filepath.Join(dir, "disk.img"))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		return nil, err
	}
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("%w: %s", err, out)
	}
	if err := f.Sync(); err != nil {
		return nil, err
	}
	b = &blocks{}
	var ranges [][2]int64
	for at := int64(0); ; {
		start, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			break
		}
		if err != nil {
			return nil, err
		}
		if at, err = unix.Seek(int(f.Fd()), start, unix.SEEK_HOLE); err != nil {
			return nil, err
		}
		ranges = append(ranges, [2]int64{start, at})
	}
	for _, r := range ranges {
		if err := b.read(f, r[0], r[1]); err != nil {
			return nil, err
		}
	}
	return b, nil
}

// read adds the blocks of a range that are not zero.
func (b *blocks) read(f *os.File, from, to int64) error {
	const size = 4096
	zero, block := make([]byte, size), make([]byte, size)
	for at := from; at < to; at += size {
		if _, err := f.ReadAt(block, at); err != nil {
			return err
		}
		if bytes.Equal(block, zero) {
			continue
		}
		if n := len(*b); n > 0 && (*b)[n-1].at+int64(len((*b)[n-1].data)) == at {
			(*b)[n-1].data = append((*b)[n-1].data, block...)
		} else {
			*b = append(*b, piece{at, bytes.Clone(block)})
		}
	}
	return nil
}

func (b *blocks) write(f *os.File) error {
	for _, r := range *b {
		if _, err := f.WriteAt(r.data, r.at); err != nil {
			return err
		}
	}
	return nil
}
