package driver

import (
	"testing"

	"github.com/kubernetes-csi/csi-test/v5/pkg/sanity"
)

// TestSanityOnFakes runs csi-sanity without root: real pools and records, fake
// loop devices and mounts. The same suite runs on the real thing in
// test/sanity, which also holds the list of what is skipped and why.
func TestSanityOnFakes(t *testing.T) {
	n := newFake(t)
	config := sanity.NewTestConfig()
	config.Address = "unix:" + n.socket
	config.TargetPath, config.StagingPath = n.dir+"/target", n.dir+"/staging"
	config.TestVolumeSize, config.TestVolumeExpandSize = 16*mib, 32*mib
	config.TestVolumeMutableParameters = map[string]string{"readIOPS": "1000", "writeBandwidth": "50Mi", "readAhead": "256Ki", "trim": "false"}
	sanity.Test(t, config)
}
