// Package partition reads the partition tables of disk images: GPT, and MBR with
// logical partitions. It says where a partition lies and changes nothing.
//
// What it reads was written by others and may lie. Whatever is in the image, it
// answers or refuses: a partition that it returns lies in the image, is not empty and
// shares no byte with another one. A table whose checksums are wrong, or that makes no
// sense, is refused as a whole; a second copy is not looked for, since a person should
// decide which of two is right.
//
// The numbers are those that the kernel gives: the slots of a GPT, 1 to 4 of an MBR,
// and logical partitions from 5 on in the order of their chain.
package partition

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"

	"github.com/diskfs/go-diskfs/partition/mbr"
)

// Sentinels of this package; test with errors.Is. Other errors are those of the
// reader.
var (
	// ErrNoTable: there is no partition table.
	ErrNoTable = errors.New("no partition table")
	// ErrTable: there is one, and it is damaged or makes no sense.
	ErrTable = errors.New("damaged partition table")
	// ErrNotFound: the table is sound and has no such partition.
	ErrNotFound = errors.New("no such partition")
)

// MaxNumber bounds the number of a partition, and the slots of a table.
const MaxNumber = 1024

// Partition is a range of an image.
type Partition struct {
	Number         int
	Offset, Length int64 // bytes
}

func (p Partition) end() int64 { return p.Offset + p.Length }

// sector is the unit of an MBR, in bytes. Disks whose sectors are larger may use these;
// their images are rare and not told apart.
const sector = 512

// Find returns one partition of an image of the given size in bytes. Errors:
// ErrNoTable, ErrTable, ErrNotFound, and those of r.
func Find(r io.ReaderAt, size int64, number int) (Partition, error) {
	all, err := Read(r, size)
	if err != nil {
		return Partition{}, err
	}
	i := slices.IndexFunc(all, func(p Partition) bool { return p.Number == number })
	if i < 0 {
		return Partition{}, fmt.Errorf("%w: %d; the table has %s", ErrNotFound, number, numbers(all))
	}
	return all[i], nil
}

func numbers(all []Partition) string {
	if len(all) == 0 {
		return "none"
	}
	var words []string
	for _, p := range all {
		words = append(words, strconv.Itoa(p.Number))
	}
	return strings.Join(words, ", ")
}

// Read returns all partitions of an image of the given size in bytes, in the order of
// their numbers. An extended partition is not one of them: it is where the logical
// ones lie. Errors: ErrNoTable, ErrTable, and those of r.
func Read(r io.ReaderAt, size int64) ([]Partition, error) {
	d := disk{r: r, size: size}
	table, err := d.mbr(0)
	if err != nil {
		return nil, err
	}
	var all []Partition
	if slices.ContainsFunc(table, func(p *mbr.Partition) bool { return p.Type == mbr.GPTProtective }) {
		all, err = d.gpt()
	} else {
		all, err = d.primaries(table)
	}
	if err != nil {
		return nil, err
	}
	return all, d.check(all)
}

// check refuses what cannot be: partitions that are empty, outside or overlap.
func (d disk) check(all []Partition) error {
	byPlace := slices.SortedFunc(slices.Values(all), func(a, b Partition) int {
		switch {
		case a.Offset < b.Offset:
			return -1
		case a.Offset > b.Offset:
			return 1
		}
		return 0
	})
	for i, p := range byPlace {
		switch {
		case p.Length <= 0 || p.Offset <= 0:
			return fmt.Errorf("%w: partition %d has %d bytes from byte %d on", ErrTable, p.Number, p.Length, p.Offset)
		case p.Offset > d.size || p.Length > d.size-p.Offset:
			return fmt.Errorf("%w: partition %d ends at byte %d, the image has %d", ErrTable, p.Number, p.end(), d.size)
		case i > 0 && byPlace[i-1].end() > p.Offset:
			return fmt.Errorf("%w: partitions %d and %d overlap", ErrTable, byPlace[i-1].Number, p.Number)
		}
	}
	return nil
}
