package loop

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

// Counters are the requests that a device has completed since its number was
// registered. A bind does not set them back (what counts for one binding is the
// difference), and all are 0 where the device's queue/iostats is off.
type Counters struct {
	Reads, Writes         uint64
	ReadBytes, WriteBytes uint64
	// ReadTime and WriteTime are the durations of all requests together.
	ReadTime, WriteTime time.Duration
	// Busy is the time in which there was a request.
	Busy time.Duration
}

// Counters reads the counters of a device by one file of sysfs, without opening the
// device. ErrNotBound if the binding is not that of ref any more, ErrNotExist if the
// device is gone.
func (m *Manager) Counters(ref Ref) (Counters, error) {
	text, err := m.kernel.Attr(ref.Number, attrStat)
	if err != nil {
		return Counters{}, counterError(ref, attrStat, err)
	}
	// Afterwards: a number that was bound anew meanwhile counts for somebody else.
	seq, err := m.kernel.Attr(ref.Number, attrDiskSeq)
	if err != nil {
		return Counters{}, counterError(ref, attrDiskSeq, err)
	}
	if seq != strconv.FormatUint(ref.DiskSeq, 10) {
		return Counters{}, opError("read "+attrStat, ref.Number, ErrNotBound)
	}
	c, err := parseCounters(text)
	if err != nil {
		return Counters{}, opError("read "+attrStat, ref.Number, err)
	}
	return c, nil
}

func counterError(ref Ref, attr string, err error) error {
	if absent(err) {
		err = ErrNotExist
	}
	return opError("read "+attr, ref.Number, err)
}

// statFields is how many fields every kernel has that we support; newer ones have
// more.
const statFields = 11

// parseCounters reads a line of /sys/block/*/stat: requests, merges, sectors of 512
// bytes whatever the device's block size is, and milliseconds, first of reads, then
// of writes, then what is under way and for how long there was something.
func parseCounters(text string) (Counters, error) {
	fields := strings.Fields(text)
	if len(fields) < statFields {
		return Counters{}, fmt.Errorf("%q has %d fields, not %d", text, len(fields), statFields)
	}
	var n [statFields]uint64
	for i := range n {
		var err error
		if n[i], err = strconv.ParseUint(fields[i], 10, 64); err != nil {
			return Counters{}, fmt.Errorf("%q: %w", text, err)
		}
	}
	const sector = 512
	ms := func(n uint64) time.Duration { return time.Duration(n) * time.Millisecond }
	return Counters{
		Reads: n[0], ReadBytes: n[2] * sector, ReadTime: ms(n[3]),
		Writes: n[4], WriteBytes: n[6] * sector, WriteTime: ms(n[7]), Busy: ms(n[9]),
	}, nil
}
