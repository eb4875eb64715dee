package driver

import (
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/csi-loop/csi-loop/pkg/image"
)

// Keys of mutable parameters (CreateVolume, ControllerModifyVolume), which a
// StorageClass may have as well.
const (
	paramReadIOPS       = "readIOPS"       // operations a second of each pod, or max
	paramWriteIOPS      = "writeIOPS"      //
	paramReadBandwidth  = "readBandwidth"  // bytes a second of each pod, a quantity, or max
	paramWriteBandwidth = "writeBandwidth" //
	paramReadAhead      = "readAhead"      // bytes, a quantity
	paramTrim           = "trim"           // whether a thin volume is trimmed in the background: true or false

	// unlimited is io.max's word for no limit.
	unlimited = "max"
)

// parseMutable checks mutable parameters. Keys that Kubernetes adds itself are passed
// over; any other key that is not known is refused by name.
func parseMutable(m map[string]string) (image.Tuning, error) {
	var t image.Tuning
	for _, key := range slices.Sorted(maps.Keys(m)) {
		if strings.HasPrefix(key, kubernetesPrefix) {
			continue
		}
		if err := setMutable(&t, key, m[key]); err != nil {
			return image.Tuning{}, err
		}
	}
	return t, nil
}

// setMutable takes one mutable parameter.
func setMutable(t *image.Tuning, key, value string) (err error) {
	if err := knownKey("mutable parameter", key, AttributesClass); err != nil {
		return err
	}
	switch key {
	case paramReadIOPS:
		t.ReadIOPS, err = parseIOPS(key, value)
	case paramWriteIOPS:
		t.WriteIOPS, err = parseIOPS(key, value)
	case paramReadBandwidth:
		t.ReadBandwidth, err = parseBandwidth(key, value)
	case paramWriteBandwidth:
		t.WriteBandwidth, err = parseBandwidth(key, value)
	case paramReadAhead:
		t.ReadAhead, err = parseReadAhead(key, value)
	case paramTrim:
		t.Trim, err = parseTrim(key, value)
	default:
		return unreadable(key)
	}
	return err
}

func parseIOPS(key, value string) (*int64, error) {
	if value == unlimited {
		return new(int64(0)), nil
	}
	n, err := strconv.ParseInt(value, 10, 64)
	if err != nil || n < image.LeastIOPS {
		return nil, invalidf("parameter %q: %q is neither %s nor a number of operations a second, %d or more", key, value, unlimited, image.LeastIOPS)
	}
	return &n, nil
}

func parseBandwidth(key, value string) (*int64, error) {
	if value == unlimited {
		return new(int64(0)), nil
	}
	n, err := parseBytes(key, value)
	if err != nil || n < image.LeastBandwidth {
		return nil, invalidf("parameter %q: %q is neither %s nor a number of bytes a second such as 50Mi, %d or more", key, value, unlimited, image.LeastBandwidth)
	}
	return &n, nil
}

func parseReadAhead(key, value string) (*int64, error) {
	n, err := parseBytes(key, value)
	if err != nil || n < 0 || n > image.LargestReadAhead || n%4096 != 0 {
		return nil, invalidf("parameter %q: %q is not a size such as 128Ki: a multiple of 4096 bytes, at most %d", key, value, image.LargestReadAhead)
	}
	return &n, nil
}

func parseTrim(key, value string) (*bool, error) {
	if value != "true" && value != "false" {
		return nil, invalidf("parameter %q: %q is neither true nor false", key, value)
	}
	return new(value == "true"), nil
}
