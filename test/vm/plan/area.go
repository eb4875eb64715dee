package plan

import (
	"bytes"
	"fmt"
	"math/rand/v2"
)

// Sizes of what is written to volumes, in bytes.
const (
	RecordSize = 16 << 10
	// Slots is how many records an area has: write n goes to slot n % Slots, over
	// what write n - Slots left there.
	Slots    = 8
	AreaSize = Slots * RecordSize
)

// Area is what the writer of one volume wrote to it, one synced record after the
// other, at some moment: between Min and Max writes were done.
type Area struct {
	Writer   string // the volume's name
	Min, Max int64
	// Whole: no write is done by half.
	Whole bool
}

// Record is what write n of a volume consists of: every byte depends on both.
func Record(writer string, n int64) []byte {
	b := make([]byte, RecordSize)
	fill := rand.NewChaCha8([32]byte([]byte(fmt.Sprintf("%-24.24s%08d", writer, n))))
	_, _ = fill.Read(b)
	return b
}

// Offset is where write n goes within its area.
func Offset(n int64) int64 { return n % Slots * RecordSize }

// Check says whether got, of AreaSize bytes, is the area after Min to Max writes. Where
// nothing was written there are zeros.
func (a Area) Check(got []byte) error {
	var err error
	for done := a.Max; done >= a.Min; done-- {
		if err = a.after(done, got); err == nil {
			return nil
		}
	}
	return fmt.Errorf("%s: it is not what %d to %d writes leave: %w", a.Writer, a.Min, a.Max, err)
}

// after compares the area with what it is after so many writes.
func (a Area) after(done int64, got []byte) error {
	for slot := range int64(Slots) {
		if !a.Whole && done < a.Max && slot == done%Slots {
			continue // the next write is under way
		}
		last := (done-1-slot)/Slots*Slots + slot // of the writes before done, if any
		want := make([]byte, RecordSize)
		if slot < done {
			want = Record(a.Writer, last)
		}
		have := got[slot*RecordSize:][:RecordSize]
		if !bytes.Equal(have, want) {
			return fmt.Errorf("after %d: slot %d has %s", done, slot, a.describe(have, slot))
		}
	}
	return nil
}

// describe says what is in a slot.
func (a Area) describe(have []byte, slot int64) string {
	if bytes.Equal(have, make([]byte, RecordSize)) {
		return "zeros"
	}
	for n := slot; n < a.Max+2*Slots; n += Slots {
		if bytes.Equal(have, Record(a.Writer, n)) {
			return fmt.Sprintf("write %d", n)
		}
	}
	return "something else"
}
