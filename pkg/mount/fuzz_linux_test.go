package mount

import (
	"encoding/binary"
	"slices"
	"testing"
)

// FuzzParseStatmount: whatever is in a struct statmount, it gives a mount with all
// that a Mount needs, or an error.
func FuzzParseStatmount(f *testing.F) {
	b := make([]byte, smStrings)
	binary.NativeEndian.PutUint64(b[smMask:], statmountWanted)
	for at, s := range map[int]string{smRoot: "/", smPoint: "/mnt", smFSType: "ext4", smSource: "/dev/loop0", smMntOpts: "errors=continue"} {
		binary.NativeEndian.PutUint32(b[at:], uint32(len(b)-smStrings))
		b = slices.Concat(b, []byte(s), []byte{0})
	}
	f.Add(b)
	f.Add(b[:smStrings])
	f.Add([]byte{})
	if m, err := parseStatmount(b); err != nil || m.Path != "/mnt" || m.Source != "/dev/loop0" {
		f.Fatalf("%+v, %v", m, err)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := parseStatmount(b)
		if err == nil && (m.Path == "" || m.Root == "" || m.Source == "" || len(m.Options) == 0 || len(m.SuperOptions) == 0) {
			t.Errorf("%+v", m)
		}
	})
}
