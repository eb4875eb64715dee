package driver

import (
	"testing"

	"github.com/csi-loop/csi-loop/pkg/mount"
)

// TestReadOnlyInAList: Kubernetes passes a mount option on as it was written, with commas and
// spaces.
func TestReadOnlyInAList(t *testing.T) {
	for _, flags := range [][]string{{"ro"}, {"noatime,ro"}, {"noatime, ro"}, {"rw", " ro"}} {
		if !readOnlyFlag(flags) {
			t.Errorf("%q is not read-only", flags)
		}
		options, err := mount.ParseOptions("ext4", flags)
		if err != nil || !options.ReadOnly {
			t.Errorf("%q: %+v, %v", flags, options, err)
		}
	}
}

// TestCopyThatIsReadOnlyGrowsOnce: however its mount options are written.
func TestCopyThatIsReadOnlyGrowsOnce(t *testing.T) {
	for _, flag := range []string{"ro", "noatime,ro"} {
		spec := mount.Spec{Source: "/dev/loop0", Target: "/mnt", FSType: "xfs", Options: []string{flag}, ReadOnly: true}
		if writable := writableSpec(spec); writable.ReadOnly || len(spec.Options) != 1 {
			t.Errorf("%q: %+v", flag, writable)
		} else if options, err := mount.ParseOptions("xfs", writable.Options); err != nil || options.ReadOnly {
			t.Errorf("%q: mounted with %q: %+v, %v", flag, writable.Options, options, err)
		}
	}
}
