package crypt

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// Hollow lists the mappings whose names begin with prefix and that have no table in force:
// cryptsetup was ended, or failed, between the steps in which it makes one. Nobody can
// have read or written through them. Those without any table are not under /sys/block,
// and over no device that Over could be asked about, and only the device mapper knows
// them. Their Number and Path are not told.
//
// Another process may be about to give one its table: it is for the caller to know by
// the name that there is none.
func (c *Crypt) Hollow(prefix string) ([]Mapping, error) {
	// The device mapper is not loaded for this question: without it there are none.
	if _, err := os.Stat(filepath.Join(c.sys, "class/misc/device-mapper")); err != nil {
		return nil, nil //nolint:nilerr // as above
	}
	names, err := listNames(c.control())
	if err != nil {
		return nil, err
	}
	var all []Mapping
	for _, name := range names {
		if !strings.HasPrefix(name, prefix) {
			continue
		}
		uuid, active, err := status(c.control(), name)
		switch {
		case errors.Is(err, syscall.ENXIO): // it ended meanwhile
		case err != nil:
			return all, err
		case !active:
			all = append(all, Mapping{Name: name, UUID: uuid})
		}
	}
	return all, nil
}

// endHollow ends the mapping of a name if it has no table in force, and says whether it
// did.
func (c *Crypt) endHollow(ctx context.Context, name string) (bool, error) {
	all, err := c.Hollow(name)
	for _, m := range all {
		if m.Name == name {
			return true, errors.Join(err, c.Close(ctx, m))
		}
	}
	return false, err
}

// control is the node by which the device mapper is asked.
func (c *Crypt) control() string { return filepath.Join(c.dev, "mapper/control") }

// parseNames reads the list that DM_LIST_DEVICES gives: entries of a device number, the
// distance to the next entry from the start of this one, 0 in the last, and a name that
// ends with NUL; in the machine's order of bytes.
func parseNames(data []byte) []string {
	const head = 12
	var names []string
	for len(data) > head {
		number, next := binary.NativeEndian.Uint64(data), binary.NativeEndian.Uint32(data[8:])
		name, _, whole := bytes.Cut(data[head:], []byte{0})
		if !whole || number == 0 { // none at all is one entry without a number
			break
		}
		names = append(names, string(name))
		if next < head || int64(next) >= int64(len(data)) {
			break
		}
		data = data[next:]
	}
	return names
}
