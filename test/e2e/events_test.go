package e2e

import (
	"fmt"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

// TestClaimSaysWhatIsWrong: a volume whose image somebody moved away tells so on its
// claim, and when the image is back; the claim beside it says nothing.
func TestClaimSaysWhatIsWrong(t *testing.T) {
	e := volumes(t)
	r := e.reader()
	class := e.class(nil)
	e.createClaim(claim("data", class, "64Mi"))
	e.createClaim(claim("well", class, "64Mi"))
	node := e.run(e.shell("pod", "", "data", "well"), corev1.PodRunning).Spec.NodeName
	dir := fmt.Sprintf("%s/volumes/%s", poolDir, e.volumeOf("data").Name)
	e.onNode(node, fmt.Sprintf("mv %s/disk.img %s/../../hidden.img", dir, dir))
	restored := false
	restore := func() {
		if !restored {
			restored = true
			e.onNode(node, fmt.Sprintf("mv %s/../../hidden.img %s/disk.img", dir, dir))
		}
	}
	defer restore()
	e.eventSays("data", "Warning", "ImageMissing", node)
	r.sees("kubectl describe pvc data", []string{
		"Name:          data", "ImageMissing", e.namespace + " ", "persistentvolumeclaim/data",
	})
	restore()
	e.eventSays("data", "Normal", "VolumeRecovered")
	for _, reason := range []string{"ImageMissing", "VolumeRecovered", "VolumeMissing"} {
		if events := e.events("well"); strings.Contains(events, reason) {
			t.Errorf("the other claim has events of it: %s", events)
		}
	}
}
