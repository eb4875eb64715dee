package main

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sync/errgroup"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

// maxResident is how much memory serve may take with 1000 volumes, in KiB.
const maxResident = 60 << 10

// resident is a field of the child's memory in KiB: VmRSS, or VmHWM for the peak.
func (c *child) resident(field string) int {
	c.t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", c.cmd.Process.Pid))
	if err != nil {
		c.t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		var kib int
		if n, _ := fmt.Sscanf(line, field+": %d kB", &kib); n == 1 {
			return kib
		}
	}
	c.t.Fatalf("no %s", field)
	return 0
}

func TestMemoryWithManyVolumes(t *testing.T) {
	roottest.Require(t)
	const volumes = 1000
	p := newPlace(t)
	s := spawn(t, nil, p.args()...)
	s.waitFor("Serving")
	probe(t, p.socket)
	t.Logf("no volume: %d KiB resident", s.resident("VmRSS"))

	controller := csi.NewControllerClient(dial(t, p.socket))
	start := time.Now()
	var g errgroup.Group
	g.SetLimit(8)
	for i := range volumes {
		g.Go(func() error {
			_, err := controller.CreateVolume(t.Context(), &csi.CreateVolumeRequest{
				Name:          fmt.Sprintf("pvc-%036d", i),
				CapacityRange: &csi.CapacityRange{RequiredBytes: 1 << 20},
				Parameters:    map[string]string{"allocation": "thin"},
				VolumeCapabilities: []*csi.VolumeCapability{{
					AccessType: &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}},
					AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
				}},
			})
			return err
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d volumes made in %s", volumes, time.Since(start).Round(time.Millisecond))
	for range 20 {
		if resp, err := controller.ListVolumes(t.Context(), &csi.ListVolumesRequest{}); err != nil || len(resp.GetEntries()) != volumes {
			t.Fatalf("ListVolumes: %d, %v", len(resp.GetEntries()), err)
		}
	}
	made := s.resident("VmHWM")
	t.Logf("after making them: %d KiB resident, %d at most", s.resident("VmRSS"), made)
	s.stop()

	s = spawn(t, nil, p.args()...)
	s.waitFor("Serving")
	probe(t, p.socket)
	found := s.resident("VmHWM")
	t.Logf("after a start with them: %d KiB resident, %d at most", s.resident("VmRSS"), found)
	s.stop()
	if peak := max(made, found); peak > maxResident && !raceDetector {
		t.Errorf("%d KiB resident, want at most %d", peak, maxResident)
	}
}
