package driver

import (
	"fmt"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/google/go-cmp/cmp"

	"github.com/csi-loop/csi-loop/pkg/loop"
	"github.com/csi-loop/csi-loop/pkg/report"
)

// Whatever is wrong with a volume, a pool or the node: there is a word for it, and people
// are told what to do, in full also where the rest is cut.
func TestEveryReasonHasAnAction(t *testing.T) {
	word := regexp.MustCompile(`^[A-Z][A-Za-z]{2,40}$`)
	for i, r := range Reasons() {
		if !word.MatchString(r.Word) || len(r.Action) < 10 || len(r.Action) > 250 || strings.HasSuffix(r.Action, ".") {
			t.Errorf("reason %d: %q, %q", i, r.Word, r.Action)
		}
		if got := withAction(strings.Repeat("ä", 4000), r.Action); !strings.HasSuffix(got, "ä...; "+r.Action) || len(got) > maxMessage {
			t.Errorf("%s: %q", r.Word, got)
		}
	}
}

// storageHealth is what is wrong with the node, without what is wrong with its pools.
func (n *node) storageHealth() (all []string) {
	n.t.Helper()
	r, err := n.client.NodeGetStorageHealth(n.t.Context(), &csi.NodeGetStorageHealthRequest{})
	n.must(err)
	for _, h := range r.GetBackendHealth() {
		all = append(all, fmt.Sprintf("%s %s: %s", h.GetStatus(), h.GetReason(), h.GetMessage()))
	}
	return all
}

// A node that has no loop device left says so, and what to do, until it has some again.
func TestLackOfDevicesIsTold(t *testing.T) {
	n := newFake(t)
	v := n.create("pvc-1", 16*mib, blockCap(oneWriter), nil)
	told := func(want ...string) {
		t.Helper()
		n.d.reports.busy <- struct{}{}
		n.d.reports.last = report.Machine{}
		<-n.d.reports.busy
		m, err := n.d.Report(t.Context())
		n.must(err)
		var reported []string
		for _, p := range m.Problems {
			reported = append(reported, "STORAGE_DEGRADED "+p.Reason+": "+p.Message)
		}
		if diff := cmp.Diff(want, n.storageHealth()); diff != "" {
			t.Error(diff)
		}
		if diff := cmp.Diff(want, reported); diff != "" {
			t.Error(diff)
		}
	}
	told()

	no := fmt.Errorf("%w: the kernel has no number left (%w)", loop.ErrLimit, syscall.ENOSPC)
	n.fake.failOnce("attach", no)
	if err := v.stage(); err == nil {
		t.Fatal("staged without a device")
	}
	told("STORAGE_DEGRADED NoLoopDeviceNumber: " + no.Error() + "; " + reasonTable[reasonNoNumber].action)
	n.must(v.stage())
	told()

	n.fake.mu.Lock()
	n.fake.limit = 1
	n.fake.mu.Unlock()
	told("STORAGE_DEGRADED LoopDeviceLimit: 1 of 1 loop devices are attached: no more volumes can be staged; " + reasonTable[reasonDeviceLimit].action)
	n.must(v.unstage())
	told()
	n.must(v.delete())
}
