package partition

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"github.com/diskfs/go-diskfs/partition/gpt"
)

// gptSignature begins the header, which is in the second sector.
const gptSignature = "EFI PART"

// gptSectors are the sizes of sectors, in bytes, that a GPT is looked for with: it does
// not say so itself.
var gptSectors = []int{512, 4096}

// gpt reads a GPT, with all its checksums.
func (d disk) gpt() ([]Partition, error) {
	for _, size := range gptSectors {
		header := make([]byte, gptHeader)
		if !d.holds(int64(size), gptHeader) {
			break
		}
		if err := d.readAt(header, int64(size)); err != nil {
			return nil, err
		}
		if bytes.HasPrefix(header, []byte(gptSignature)) {
			return d.gptOf(header, size)
		}
	}
	return nil, fmt.Errorf("%w: the MBR announces a GPT and there is none", ErrTable)
}

// Of the header.
const (
	gptHeader    = 92 // bytes
	gptEntries   = 72 // where the number of the first sector of the entries is
	gptCount     = 80
	gptEntrySize = 84
)

func (d disk) gptOf(header []byte, sector int) ([]Partition, error) {
	// The library makes room for as many entries as the header says.
	le := binary.LittleEndian
	first, count, size := le.Uint64(header[gptEntries:]), le.Uint32(header[gptCount:]), le.Uint32(header[gptEntrySize:])
	switch {
	case size != gpt.PartitionEntrySize:
		return nil, fmt.Errorf("%w: entries of %d bytes, not of %d", ErrTable, size, gpt.PartitionEntrySize)
	case count > MaxNumber:
		return nil, fmt.Errorf("%w: %d entries, more than %d", ErrTable, count, MaxNumber)
	case first > uint64(d.size)/uint64(sector) || !d.holds(int64(first)*int64(sector), int64(count)*int64(size)):
		return nil, fmt.Errorf("%w: its entries are outside the image", ErrTable)
	}
	v := &view{disk: d}
	table, err := gpt.Read(v, sector, sector)
	if err != nil {
		return nil, v.refuse(err)
	}
	var all []Partition
	for _, p := range table.Partitions {
		if p.Type == gpt.Unused {
			continue
		}
		sectors := uint64(d.size) / uint64(sector)
		if p.End >= sectors || p.Start > p.End {
			return nil, fmt.Errorf("%w: partition %d has the sectors %d to %d, the image has %d", ErrTable, p.Index, p.Start, p.End, sectors)
		}
		all = append(all, Partition{
			Number: p.Index, Offset: int64(p.Start) * int64(sector), Length: int64(p.End-p.Start+1) * int64(sector),
		})
	}
	return all, nil
}
