package driver

import (
	"testing"

	"github.com/csi-loop/csi-loop/pkg/mount"
)

// A filesystem that stopped after an error was not meant to be read-only.
func TestMeantReadOnly(t *testing.T) {
	for name, test := range map[string]struct {
		m    mount.Mount
		want bool
	}{
		"writable":               {m: mount.Mount{Options: []string{"rw", "relatime"}}},
		"mounted for reading":    {m: mount.Mount{ReadOnly: true, Options: []string{"ro"}, SuperOptions: []string{"ro"}}, want: true},
		"a bind for reading":     {m: mount.Mount{ReadOnly: true, Options: []string{"ro"}, SuperOptions: []string{"rw"}}, want: true},
		"stopped":                {m: mount.Mount{ReadOnly: true, Options: []string{"rw"}, SuperOptions: []string{"rw", "emergency_ro"}}},
		"stopped, before 6.14":   {m: mount.Mount{ReadOnly: true, Options: []string{"rw"}, SuperOptions: []string{"ro"}}},
		"nobody says more":       {m: mount.Mount{ReadOnly: true}, want: true},
		"stopped, and read-only": {m: mount.Mount{ReadOnly: true, Options: []string{"ro"}, SuperOptions: []string{"rw", "emergency_ro"}}, want: true},
	} {
		if got := meantReadOnly(test.m); got != test.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}
