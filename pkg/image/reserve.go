package image

import (
	"fmt"
	"math"
	"math/bits"
	"strconv"
	"strings"
)

// Reserve is the part of a pool's filesystem that is left to others: bytes, or
// percent of the filesystem's size. The larger counts when both are set.
type Reserve struct {
	Bytes   int64   // 0 or more
	Percent float64 // 0 to 100
}

var units = map[string]int64{
	"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15,
	"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40, "Pi": 1 << 50,
}

// ParseReserve reads "10%", "5Gi", "500M" or plain bytes. Empty is no reserve.
func ParseReserve(s string) (Reserve, error) {
	if s == "" {
		return Reserve{}, nil
	}
	if p, ok := strings.CutSuffix(s, "%"); ok {
		percent, err := strconv.ParseFloat(p, 64)
		if err != nil || !(percent >= 0 && percent <= 100) || strings.ContainsAny(p, "xXpPeE_+-") {
			return Reserve{}, fmt.Errorf("reserve %q is not a percentage from 0%% to 100%%", s)
		}
		return Reserve{Percent: percent}, nil
	}
	digits := strings.TrimRight(s, "kKMGTPi")
	unit, ok := units[s[len(digits):]]
	n, err := strconv.ParseUint(digits, 10, 63)
	if err != nil || !ok {
		return Reserve{}, fmt.Errorf("reserve %q is neither a percentage (10%%) nor a size (5Gi)", s)
	}
	hi, lo := bits.Mul64(n, uint64(unit))
	if hi != 0 || lo > math.MaxInt64 {
		return Reserve{}, fmt.Errorf("reserve %q is too large", s)
	}
	return Reserve{Bytes: int64(lo)}, nil
}

// of is the reserve in bytes on a filesystem of the given size.
func (r Reserve) of(size int64) int64 {
	return max(r.Bytes, int64(math.Ceil(float64(size)*r.Percent/100)))
}

func (r Reserve) validate() error {
	if r.Bytes < 0 || !(r.Percent >= 0 && r.Percent <= 100) {
		return fmt.Errorf("reserve of %d bytes or %v%% is out of range", r.Bytes, r.Percent)
	}
	return nil
}
