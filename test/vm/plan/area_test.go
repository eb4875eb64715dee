package plan

import (
	"slices"
	"testing"
)

// filledArea is an area after so many writes.
func filledArea(writer string, writes int64) []byte {
	b := make([]byte, AreaSize)
	for n := range writes {
		copy(b[Offset(n):], Record(writer, n))
	}
	return b
}

func TestAreaIsChecked(t *testing.T) {
	torn := func(b []byte, n int64) []byte {
		b = slices.Clone(b)
		copy(b[Offset(n):], Record("v", n)[:RecordSize/2])
		return b
	}
	for _, c := range []struct {
		name string
		area Area
		got  []byte
		ok   bool
	}{
		{"nothing was written", Area{}, filledArea("v", 0), true},
		{"something was", Area{}, filledArea("v", 1), false},
		{"three writes of three", Area{Min: 3, Max: 3}, filledArea("v", 3), true},
		{"the last is missing", Area{Min: 3, Max: 3}, filledArea("v", 2), false},
		{"one too many", Area{Min: 3, Max: 3}, filledArea("v", 4), false},
		{"those of another volume", Area{Min: 3, Max: 3}, filledArea("w", 3), false},
		{"twice over everything", Area{Min: 19, Max: 19}, filledArea("v", 19), true},
		{"an old record is back", Area{Min: 19, Max: 19}, filledArea("v", 18), false},
		{"a moment between", Area{Min: 9, Max: 12, Whole: true}, filledArea("v", 11), true},
		{"before it", Area{Min: 9, Max: 12, Whole: true}, filledArea("v", 8), false},
		{"after it", Area{Min: 9, Max: 12, Whole: true}, filledArea("v", 13), false},
		{"the write under way by half", Area{Min: 9, Max: 10}, torn(filledArea("v", 9), 9), true},
		{"by half where it may not", Area{Min: 9, Max: 10, Whole: true}, torn(filledArea("v", 9), 9), false},
		{"a synced one by half", Area{Min: 10, Max: 11}, torn(filledArea("v", 9), 9), false},
		{"of no one moment", Area{Min: 9, Max: 12}, torn(filledArea("v", 9), 11), false},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.area.Writer = "v"
			if err := c.area.Check(c.got); (err == nil) != c.ok {
				t.Errorf("Check = %v, want ok %v", err, c.ok)
			}
		})
	}
}
