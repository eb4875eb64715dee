package e2e

import (
	"context"
	"fmt"
	"testing"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TestVolumeAttributesClass: a claim has the parameters of its class from the start,
// those of another class while its pod runs, and keeps them over its next pod. What
// the kernel reads ahead is seen in the pod's own sysfs, whether the volume is trimmed
// in its record on the node.
func TestVolumeAttributesClass(t *testing.T) {
	e := volumes(t)
	r := e.reader()
	classes := e.client.StorageV1().VolumeAttributesClasses()
	class := func(name, readAhead, trim string) string {
		made := must[*storagev1.VolumeAttributesClass](e)(classes.Create(e.Context(), &storagev1.VolumeAttributesClass{
			ObjectMeta: metav1.ObjectMeta{Name: name, GenerateName: "csi-loop-e2e-", Labels: map[string]string{mark: ""}}, DriverName: driver,
			Parameters: map[string]string{"readAhead": readAhead, "readIOPS": "5000", "trim": trim},
		}, metav1.CreateOptions{}))
		e.Cleanup(func() {
			if err := classes.Delete(context.Background(), made.Name, metav1.DeleteOptions{}); err != nil {
				e.Error(err)
			}
		})
		return made.Name
	}
	first, second := class("", "64Ki", "false"), class("slow", "1Mi", "true")
	c := claim("data", e.class(nil, "allocation", "thin"), "64Mi")
	c.Spec.VolumeAttributesClassName = &first
	e.createClaim(c)
	node := e.run(e.shell("pod", "", "data"), corev1.PodRunning).Spec.NodeName
	trims := func(when, want string) {
		e.Helper()
		script := fmt.Sprintf("grep -o '\"trim\": [a-z]*' %s/volumes/%s/volume.json", poolDir, e.volumeOf("data").Name)
		if got := e.onNode(node, script); got != `"trim": `+want {
			t.Errorf("%s its record says %s, not %s", when, got, want)
		}
	}
	trims("made with class "+first, "false")
	const readAhead = `cat /sys/dev/block/$(awk '$5 == "/data/data" {print $3}' /proc/self/mountinfo)/queue/read_ahead_kb`
	if got := e.sh("pod", readAhead); got != "64" {
		t.Errorf("made with class %s it reads %s KiB ahead", first, got)
	}
	r.run(`kubectl patch pvc data --type=merge -p '{"spec":{"volumeAttributesClassName":"slow"}}'`)
	e.eventually("the claim has its new class", patience, func(ctx context.Context) error {
		c, err := e.client.CoreV1().PersistentVolumeClaims(e.namespace).Get(ctx, "data", metav1.GetOptions{})
		if err == nil && (c.Status.CurrentVolumeAttributesClassName == nil || *c.Status.CurrentVolumeAttributesClassName != second) {
			err = fmt.Errorf("status %+v", c.Status)
		}
		return err
	})
	if got := e.sh("pod", readAhead); got != "1024" {
		t.Errorf("changed to class %s it reads %s KiB ahead", second, got)
	}
	trims("changed to class "+second, "true")
	e.stop("pod")
	e.run(e.shell("next", "", "data"), corev1.PodRunning)
	if got := e.sh("next", readAhead); got != "1024" {
		t.Errorf("the next pod reads %s KiB ahead", got)
	}
}
