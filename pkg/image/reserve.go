package image

import (
	"fmt"
	"math"
	"math/big"
	"regexp"
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
	"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18,
	"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40, "Pi": 1 << 50, "Ei": 1 << 60,
}

// sizeForm is a size with a unit of units.
var sizeForm = regexp.MustCompile(`^([0-9]{1,20}(?:\.[0-9]{1,20})?)(|[kMGTPE]|[KMGTPE]i)$`)

// ParseReserve reads "10%", "5Gi", "1.5Gi", "500M" or plain bytes. Empty is no reserve.
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
	parts := sizeForm.FindStringSubmatch(s)
	if parts == nil {
		return Reserve{}, fmt.Errorf("reserve %q is neither a percentage (10%%) nor a size (5Gi)", s)
	}
	n, ok := new(big.Rat).SetString(parts[1])
	if !ok {
		return Reserve{}, fmt.Errorf("reserve %q is neither a percentage (10%%) nor a size (5Gi)", s)
	}
	n.Mul(n, new(big.Rat).SetInt64(units[parts[2]]))
	bytes := new(big.Int).Quo(n.Num(), n.Denom())
	if !n.IsInt() {
		bytes.Add(bytes, big.NewInt(1)) // rather more
	}
	if !bytes.IsInt64() {
		return Reserve{}, fmt.Errorf("reserve %q is too large", s)
	}
	return Reserve{Bytes: bytes.Int64()}, nil
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
