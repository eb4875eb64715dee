package partition

import (
	"fmt"
	"slices"

	"github.com/diskfs/go-diskfs/partition/mbr"
)

// mbr reads the table in one sector: the MBR, or a link of the chain of logical
// partitions.
func (d disk) mbr(offset int64) ([]*mbr.Partition, error) {
	none := ErrTable
	if offset == 0 {
		none = ErrNoTable
	}
	if !d.holds(offset, sector) {
		return nil, fmt.Errorf("%w: byte %d is outside the image, which has %d", none, offset, d.size)
	}
	var end [2]byte
	if err := d.readAt(end[:], offset+sector-int64(len(end))); err != nil {
		return nil, err
	}
	if end != [2]byte{0x55, 0xaa} {
		return nil, fmt.Errorf("%w: no signature at byte %d", none, offset)
	}
	v := &view{disk: d, offset: offset}
	table, err := mbr.Read(v, sector, sector)
	if err != nil {
		return nil, v.refuse(err)
	}
	return table.Partitions, nil
}

func extended(p *mbr.Partition) bool {
	return p.Type == mbr.ExtendedCHS || p.Type == mbr.ExtendedLBA || p.Type == mbr.LinuxExtended
}

func place(number int, base int64, p *mbr.Partition) Partition {
	return Partition{Number: number, Offset: (base + int64(p.Start)) * sector, Length: int64(p.Size) * sector}
}

// primaries are the partitions of an MBR, the logical ones too.
func (d disk) primaries(table []*mbr.Partition) ([]Partition, error) {
	var all []Partition
	var containers []Partition
	for _, p := range table {
		switch {
		case p.Size == 0 || p.Type == mbr.Empty:
		case extended(p):
			containers = append(containers, place(p.Index, 0, p))
		default:
			all = append(all, place(p.Index, 0, p))
		}
	}
	if err := d.check(slices.Concat(all, containers)); err != nil {
		return nil, err
	}
	switch len(containers) {
	case 0:
		return all, nil
	case 1:
		logical, err := d.logicals(containers[0])
		return append(all, logical...), err
	}
	return nil, fmt.Errorf("%w: %d extended partitions", ErrTable, len(containers))
}

// firstLogical is the number of the first logical partition.
const firstLogical = 5

// logicals follows the chain in an extended partition. Each link describes one
// partition, placed relative to the link, and the next link, relative to the container.
func (d disk) logicals(container Partition) ([]Partition, error) {
	var all []Partition
	seen := map[int64]bool{}
	for at := container.Offset; ; {
		if seen[at] || len(seen) == MaxNumber {
			return nil, fmt.Errorf("%w: the chain of logical partitions does not end", ErrTable)
		}
		seen[at] = true
		table, err := d.mbr(at)
		if err != nil {
			return nil, err
		}
		used := slices.DeleteFunc(table, func(p *mbr.Partition) bool { return p.Size == 0 })
		var links []*mbr.Partition
		for _, p := range used {
			if extended(p) {
				links = append(links, p)
				continue
			}
			next := place(firstLogical+len(all), at/sector, p)
			if next.Offset <= at || next.end() > container.end() {
				return nil, fmt.Errorf("%w: logical partition %d is outside the extended one", ErrTable, next.Number)
			}
			all = append(all, next)
		}
		if len(links) > 1 || len(used)-len(links) > 1 {
			return nil, fmt.Errorf("%w: the link at byte %d has more than one partition and one successor", ErrTable, at)
		}
		if len(links) == 0 {
			return all, nil
		}
		next := place(0, container.Offset/sector, links[0]).Offset
		if next >= container.end() {
			return nil, fmt.Errorf("%w: the chain of logical partitions leaves the extended one", ErrTable)
		}
		at = next
	}
}
