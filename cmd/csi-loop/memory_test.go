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

// maxOwn is how much memory of its own serve may take with 1000 volumes, in KiB. What is
// mapped of the program's file comes on top, by how large the pages are in which the kernel
// happens to cache it; here that is the tests' program, which is larger than csi-loop.
const maxOwn = 30 << 10

// resident is a field of the child's memory in KiB: VmRSS, VmHWM for its peak, or RssAnon
// for what is not of a file.
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
	t.Logf("no volume: %d KiB resident, %d of them its own", s.resident("VmRSS"), s.resident("RssAnon"))

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
	made := s.resident("RssAnon")
	t.Logf("after making them: %d KiB resident, %d at most, %d its own", s.resident("VmRSS"), s.resident("VmHWM"), made)
	s.stop()

	s = spawn(t, nil, p.args()...)
	s.waitFor("Serving")
	probe(t, p.socket)
	found := s.resident("RssAnon")
	t.Logf("after a start with them: %d KiB resident, %d at most, %d its own", s.resident("VmRSS"), s.resident("VmHWM"), found)
	s.stop()
	if most := max(made, found); most > maxOwn && !raceDetector {
		t.Errorf("%d KiB of its own, want at most %d", most, maxOwn)
	}
}
