package crypt

import (
	"encoding/binary"
	"slices"
	"strings"
	"testing"
)

// nameList is the kernel's list of mappings, as it writes one.
func nameList(names ...string) []byte {
	if len(names) == 0 {
		return make([]byte, 512)
	}
	var all []byte
	for i, name := range names {
		entry := binary.NativeEndian.AppendUint64(nil, 253<<8|uint64(i))
		entry = append(entry, 0, 0, 0, 0)
		entry = append(append(entry, name...), 0)
		for len(entry)%8 != 0 {
			entry = append(entry, 0)
		}
		entry = append(entry, 7, 0, 0, 0, 0, 0, 0, 0) // the number of the last event
		if i < len(names)-1 {
			binary.NativeEndian.PutUint32(entry[8:], uint32(len(entry)))
		}
		all = append(all, entry...)
	}
	return append(all, make([]byte, 512)...)
}

func TestParseNames(t *testing.T) {
	three := []string{"csi-loop-loop0-12", "vg-root", strings.Repeat("x", 127)}
	for name, test := range map[string]struct {
		list []byte
		want []string
	}{
		"none":                 {nameList(), nil},
		"one":                  {nameList("vg-root"), three[1:2]},
		"three":                {nameList(three...), three},
		"empty":                {nil, nil},
		"cut in an entry":      {nameList(three...)[:45], three[:1]},
		"an entry behind all":  {append([]byte{1, 0, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255}, "a\x00"...), []string{"a"}},
		"an entry upon itself": {append([]byte{1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0}, "a\x00"...), []string{"a"}},
		"a name without end":   {append(make([]byte, 12), "abc"...), nil},
	} {
		if got := parseNames(test.list); !slices.Equal(got, test.want) {
			t.Errorf("%s: %q, want %q", name, got, test.want)
		}
	}
}

func FuzzParseNames(f *testing.F) {
	f.Add(nameList())
	f.Add(nameList("vg-root", "csi-loop-loop0-12"))
	f.Fuzz(func(t *testing.T, list []byte) {
		if names := parseNames(list); len(names) > len(list)/12 {
			t.Errorf("%d names in %d bytes", len(names), len(list))
		}
	})
}

// Without a device mapper there is none, and it is not loaded to be asked.
func TestHollowWithoutDeviceMapper(t *testing.T) {
	c, err := New(cheap)
	if err != nil {
		t.Fatal(err)
	}
	c.sys, c.dev = t.TempDir(), t.TempDir()
	if all, err := c.Hollow("csi-loop-"); err != nil || len(all) > 0 {
		t.Errorf("%v, %v", all, err)
	}
}
