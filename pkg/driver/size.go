package driver

import (
	"math"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/csi-loop/csi-loop/pkg/image"
)

const (
	// sizeUnit is what every volume size is a multiple of, in bytes: a device
	// whose size is not a multiple of its block size is cut by the kernel (facts
	// 13 and 16), and 1 MiB is a multiple of every block and extent size in use.
	sizeUnit = 1 << 20
	// defaultSize is the size of a volume whose request names none, in bytes.
	defaultSize = 1 << 30
	// maxSize is the largest size that can be asked for, in bytes: offsets of
	// loop devices end at 2^63-1 (fact 4).
	maxSize = math.MaxInt64 &^ (sizeUnit - 1)
)

// capacity is a CSI capacity range after validation: the sizes that satisfy it,
// in bytes; limit 0 means no limit.
type capacity struct {
	required int64
	limit    int64
}

// parseCapacity checks the numbers of a range; nil is the empty range.
func parseCapacity(r *csi.CapacityRange) (capacity, error) {
	c := capacity{required: r.GetRequiredBytes(), limit: r.GetLimitBytes()}
	switch {
	case c.required < 0 || c.limit < 0:
		return c, invalidf("capacity_range: required_bytes %d and limit_bytes %d must not be negative", c.required, c.limit)
	case c.limit > 0 && c.required > c.limit:
		return c, invalidf("capacity_range: required_bytes %d is above limit_bytes %d", c.required, c.limit)
	case c.required > maxSize:
		return c, outOfRangef("capacity_range: required_bytes %d is above the largest possible size %d", c.required, int64(maxSize))
	}
	return c, nil
}

// size chooses the size of a new volume: what is required, rounded up to the
// next MiB and to least, the smallest that its filesystem can have; else the
// default, cut to the limit. OUT_OF_RANGE if the limit is in the way.
func (c capacity) size(least int64) (int64, error) {
	want := c.required
	if want == 0 {
		want = defaultSize
		if c.limit > 0 && c.limit < want {
			want = c.limit &^ (sizeUnit - 1)
		}
	}
	size := max(roundUp(want), least)
	switch {
	case size == 0, c.limit > 0 && roundUp(want) > c.limit:
		return 0, outOfRangef("capacity_range: sizes are multiples of %d bytes and none lies between required_bytes %d and limit_bytes %d", sizeUnit, c.required, c.limit)
	case c.limit > 0 && size > c.limit:
		return 0, outOfRangef("capacity_range: the filesystem needs at least %d bytes, limit_bytes is %d", least, c.limit)
	}
	return size, nil
}

// imageSize is size for the image that holds a volume encrypted that way or not.
func (c capacity) imageSize(least int64, e image.Encryption) (int64, error) {
	size, err := c.size(least)
	if err != nil {
		return 0, err
	}
	return withHeader(size, e)
}

// withHeader is the size of the image of a volume of size bytes.
func withHeader(size int64, e image.Encryption) (int64, error) {
	if e.Type == "" {
		return size, nil
	}
	if size > maxSize-image.HeaderSize {
		return 0, outOfRangef("capacity_range: %d bytes and a header of %d are more than the largest possible size %d", size, image.HeaderSize, int64(maxSize))
	}
	return size + image.HeaderSize, nil
}

// holds says whether a volume of size satisfies the range.
func (c capacity) holds(size int64) bool {
	return size >= c.required && (c.limit == 0 || size <= c.limit)
}

// roundUp rounds up to the next multiple of sizeUnit. Precondition: size <= maxSize.
func roundUp(size int64) int64 {
	return (size + sizeUnit - 1) &^ (sizeUnit - 1)
}
