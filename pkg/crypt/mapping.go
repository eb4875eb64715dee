package crypt

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// Mapping is a device of the device mapper.
type Mapping struct {
	Name   string
	UUID   string
	Number int    // of /dev/dm-N
	Path   string // its node
}

// Temporary says whether cryptsetup made the mapping for a moment's use and, killed, left
// it.
func (m Mapping) Temporary() bool { return strings.HasPrefix(m.Name, "temporary-cryptsetup-") }

// Of says whether the mapping was opened by this header.
func (m Mapping) Of(h Header) bool {
	return h.UUID != "" && strings.HasPrefix(m.UUID, "CRYPT-LUKS2-"+strings.ReplaceAll(h.UUID, "-", "")+"-")
}

// Over lists the mappings that lie directly over a block device, by its name in
// /sys/block.
func (c *Crypt) Over(device string) ([]Mapping, error) {
	entries, err := os.ReadDir(filepath.Join(c.sys, "block", device, "holders"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("who uses %s: %w", device, err)
	}
	var all []Mapping
	for _, e := range entries {
		m, ok, err := c.mapping(e.Name())
		if err != nil {
			return nil, err
		}
		if ok {
			all = append(all, m)
		}
	}
	return all, nil
}

// Mappings lists all mappings of the machine whose names begin with prefix, and the
// devices below each, by their names in /sys/block.
func (c *Crypt) Mappings(prefix string) (map[Mapping][]string, error) {
	entries, err := os.ReadDir(filepath.Join(c.sys, "block"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	all := make(map[Mapping][]string)
	for _, e := range entries {
		m, ok, err := c.mapping(e.Name())
		if err != nil {
			return nil, err
		}
		if !ok || !strings.HasPrefix(m.Name, prefix) {
			continue
		}
		below, err := os.ReadDir(filepath.Join(c.sys, "block", e.Name(), "slaves"))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		names := make([]string, len(below))
		for i, b := range below {
			names[i] = b.Name()
		}
		all[m] = slices.Sorted(slices.Values(names))
	}
	return all, nil
}

// mapping describes a device of /sys/block; false when it is no mapping.
func (c *Crypt) mapping(device string) (m Mapping, ok bool, err error) {
	digits, isMapping := strings.CutPrefix(device, "dm-")
	number, numberErr := strconv.Atoi(digits)
	if !isMapping || numberErr != nil {
		return m, false, nil //nolint:nilerr // it is called otherwise
	}
	m = Mapping{Number: number, Path: filepath.Join(c.dev, device)}
	ok, err = readIdentity(filepath.Join(c.sys, "block", device), &m)
	return m, ok, err
}

// readIdentity reads name and UUID of the mapping that a directory of sysfs describes;
// false when there is none.
func readIdentity(dir string, m *Mapping) (bool, error) {
	for _, attr := range []struct {
		file string
		into *string
	}{{"name", &m.Name}, {"uuid", &m.UUID}} {
		b, err := os.ReadFile(filepath.Join(dir, "dm", attr.file))
		if isGone(err) {
			return false, nil
		} else if err != nil {
			return false, fmt.Errorf("describe %s: %w", filepath.Base(dir), err)
		}
		*attr.into = strings.TrimSuffix(string(b), "\n")
	}
	return true, nil
}

// isNone says whether opening the node of a mapping tells that there is none.
func isNone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENODEV) || errors.Is(err, syscall.ENXIO)
}

// isGone says whether a mapping ended while it was looked at.
func isGone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENODEV) || errors.Is(err, syscall.EINVAL)
}

// named finds a mapping by its name.
func (c *Crypt) named(name string) (Mapping, bool, error) {
	all, err := c.Mappings(name)
	for m := range all {
		if m.Name == name {
			return m, true, nil
		}
	}
	return Mapping{}, false, err
}

// ReadAhead is what a mapping reads ahead, in bytes.
func (c *Crypt) ReadAhead(m Mapping) (int64, error) {
	b, err := os.ReadFile(c.readAheadFile(m))
	if err != nil {
		return 0, err
	}
	kib, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
	return kib << 10, err
}

// SetReadAhead sets it. It ends with the mapping.
func (c *Crypt) SetReadAhead(m Mapping, n int64) error {
	return os.WriteFile(c.readAheadFile(m), []byte(strconv.FormatInt(n>>10, 10)), 0o200)
}

func (c *Crypt) readAheadFile(m Mapping) string {
	return filepath.Join(c.sys, "block", fmt.Sprintf("dm-%d", m.Number), "queue/read_ahead_kb")
}

// Size is the size of a mapping, in bytes.
func (c *Crypt) Size(m Mapping) (int64, error) {
	b, err := os.ReadFile(filepath.Join(c.sys, "block", fmt.Sprintf("dm-%d", m.Number), "size"))
	if err != nil {
		return 0, err
	}
	sectors, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
	return sectors * 512, err
}
