package driver

import (
	"slices"
	"testing"

	"github.com/csi-loop/csi-loop/pkg/mount"
)

func TestWritableSpec(t *testing.T) {
	for _, c := range []struct{ have, want []string }{
		{nil, []string{"rw"}},
		{[]string{"ro"}, []string{"ro", "rw"}},
		{[]string{"norecovery"}, []string{"rw"}},
		{[]string{"noatime,norecovery,ro", "nouuid"}, []string{"noatime,ro", "nouuid", "rw"}},
		{[]string{"rescue=nologreplay:all", "nologreplay"}, []string{"rw"}},
		{[]string{`context="a,b"`, "noload"}, []string{`context="a,b"`, "rw"}},
	} {
		have := slices.Clone(c.have)
		got := writableSpec(mount.Spec{ReadOnly: true, Options: have})
		if got.ReadOnly || !slices.Equal(got.Options, c.want) || !slices.Equal(have, c.have) {
			t.Errorf("%q: %+v, want %q", c.have, got, c.want)
		}
	}
}
