package e2e

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

func TestEveryNodeHasVolumes(t *testing.T) {
	e := volumes(t)
	for _, kind := range []string{"ext4", "xfs", "btrfs"} {
		class := e.filesystem(kind)
		for _, node := range e.nodes() {
			name := kind + "-" + node
			e.createClaim(claim(name, class, "320Mi"))
			e.run(e.shell(name, node, name), corev1.PodRunning)
			if got := e.sh(name, "stat -f -c %T /data/"+name+" && echo kept > /data/"+name+"/file && cat /data/"+name+"/file"); !strings.HasSuffix(got, "kept") {
				t.Errorf("%s: %q", name, got)
			}
		}
	}
}

func TestRawBlockKeepsItsData(t *testing.T) {
	e := volumes(t)
	c := claim("raw", e.class(nil), "64Mi")
	c.Spec.VolumeMode = new(corev1.PersistentVolumeBlock)
	e.createClaim(c)
	e.run(e.shell("writer", "", "raw"), corev1.PodRunning)
	if size := e.sh("writer", "blockdev --getsize64 /dev/raw"); size != strconv.Itoa(64<<20) {
		t.Errorf("it has %s bytes", size)
	}
	const seek = 63 // MiB: the end
	e.sh("writer", fmt.Sprintf("echo precious | dd of=/dev/raw bs=1M seek=%d conv=fsync", seek))
	e.stop("writer")
	e.run(e.shell("reader", "", "raw"), corev1.PodRunning)
	if got := e.sh("reader", fmt.Sprintf("dd if=/dev/raw bs=1M skip=%d 2>/dev/null | head -n 1", seek)); got != "precious" {
		t.Errorf("the device has %q", got)
	}
}

func TestReadWriteOncePodIsOnePods(t *testing.T) {
	e := volumes(t)
	c := claim("single", e.class(nil), "64Mi")
	c.Spec.AccessModes = []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOncePod}
	e.createClaim(c)
	e.run(e.shell("first", "", "single"), corev1.PodRunning)
	e.start(e.shell("second", "", "single"))
	e.eventSays("second", "FailedScheduling", "ReadWriteOncePod")
	e.stop("first")
	e.waitPhase("second", corev1.PodRunning)
}

func TestReadOnlyIsReadOnly(t *testing.T) {
	e := volumes(t)
	e.createClaim(claim("shared", e.class(nil), "64Mi"))
	e.run(e.shell("writer", "", "shared"), corev1.PodRunning)
	e.sh("writer", "echo words > /data/shared/file")
	reader := e.shell("reader", "", "shared")
	reader.Spec.Volumes[0].PersistentVolumeClaim.ReadOnly = true
	e.run(reader, corev1.PodRunning)
	if got := e.sh("reader", "cat /data/shared/file"); got != "words" {
		t.Errorf("the reader sees %q", got)
	}
	_, err := e.exec(t.Context(), e.namespace, "reader", "sh", "-c", "echo more > /data/shared/file")
	if err == nil || !strings.Contains(err.Error(), "Read-only file system") {
		t.Errorf("the reader writes: %v", err)
	}
	if got := e.sh("writer", "echo more >> /data/shared/file && tail -n 1 /data/shared/file"); got != "more" {
		t.Errorf("the writer, beside a reader: %q", got)
	}
}

func TestFSGroupOwnsTheFiles(t *testing.T) {
	e := volumes(t)
	for _, kind := range []string{"ext4", "xfs"} {
		e.createClaim(claim(kind, e.filesystem(kind), "320Mi"))
		p := e.shell(kind, "", kind)
		p.Spec.SecurityContext = &corev1.PodSecurityContext{
			RunAsUser: new(int64(1000)), RunAsGroup: new(int64(1000)), FSGroup: new(int64(4321)),
		}
		e.run(p, corev1.PodRunning)
		if got := e.sh(kind, "echo x > /data/"+kind+"/f && stat -c %u:%g /data/"+kind+"/f"); got != "1000:4321" {
			t.Errorf("%s: a new file is of %s", kind, got)
		}
	}
}

func TestInlineEphemeralVolumeGoesWithItsPod(t *testing.T) {
	e := volumes(t)
	inline := func(name, size string) *corev1.Pod {
		p := e.shell(name, "")
		p.Spec.Volumes = []corev1.Volume{{Name: "scratch", VolumeSource: corev1.VolumeSource{CSI: &corev1.CSIVolumeSource{
			Driver: driver, VolumeAttributes: map[string]string{"size": size},
		}}}}
		p.Spec.Containers[0].VolumeMounts = []corev1.VolumeMount{{Name: "scratch", MountPath: "/data"}}
		return p
	}
	e.run(inline("modest", "64Mi"), corev1.PodRunning)
	e.sh("modest", "echo x > /data/file")
	if kib := e.number("modest", "df -k /data | tail -n 1 | awk '{print $2}'"); kib < 48<<10 || kib > 64<<10 {
		t.Errorf("a volume of 64Mi has %d KiB", kib)
	}
	e.expectMade(1)
	e.stop("modest")
	e.expectMade(0)
	e.start(inline("greedy", "1Ti"))
	e.eventSays("greedy", "FailedMount", "2147483648", "this node allows")
}

func TestGenericEphemeralVolumeGoesWithItsPod(t *testing.T) {
	e := volumes(t)
	p := e.shell("owner", "")
	spec := claim("", e.class(nil), "64Mi").Spec
	p.Spec.Volumes = []corev1.Volume{{Name: "scratch", VolumeSource: corev1.VolumeSource{
		Ephemeral: &corev1.EphemeralVolumeSource{VolumeClaimTemplate: &corev1.PersistentVolumeClaimTemplate{Spec: spec}},
	}}}
	p.Spec.Containers[0].VolumeMounts = []corev1.VolumeMount{{Name: "scratch", MountPath: "/data"}}
	e.run(p, corev1.PodRunning)
	e.sh("owner", "echo x > /data/file")
	e.stop("owner")
	e.expectMade(0)
}

// number runs a shell command that prints one.
func (e *env) number(pod, script string) int64 {
	e.Helper()
	out := e.sh(pod, script)
	n, err := strconv.ParseInt(out, 10, 64)
	if err != nil {
		e.Fatal(err)
	}
	return n
}

// writes is a loop that appends to a file until it cannot, and counts.
const writes = `i=0; while i=$((i+1)); echo $i >> %[1]s/log && sync %[1]s/log; do echo $i > /tmp/next && mv /tmp/next /tmp/count; sleep 0.05; done > /tmp/error 2>&1; echo stopped >> /tmp/error`

// write starts the loop in a pod's volume; the function that it returns checks
// that it went on without an error.
func (e *env) write(pod, dir string) func() {
	e.Helper()
	e.sh(pod, "("+fmt.Sprintf(writes, dir)+") >/dev/null 2>&1 &")
	count := func() int64 { return e.number(pod, "cat /tmp/count 2>/dev/null || echo 0") }
	last := count()
	return func() {
		e.Helper()
		if trouble := e.sh(pod, "cat /tmp/error"); trouble != "" {
			e.Errorf("%s cannot write any more: %s", pod, trouble)
			return
		}
		e.eventually(pod+" goes on writing", 30*time.Second, func(context.Context) error {
			if n := count(); n <= last {
				return fmt.Errorf("at %d, it was at %d", n, last)
			}
			return nil
		})
		last = count()
	}
}

// grow asks for a larger volume and waits until the claim says that it is.
func (e *env) grow(name, size string) {
	e.Helper()
	e.resize(name, size)
	e.waitSize(name, size)
}

// resize asks for another size.
func (e *env) resize(name, size string) {
	e.Helper()
	patch := fmt.Sprintf(`{"spec":{"resources":{"requests":{"storage":%q}}}}`, size)
	claims := e.client.CoreV1().PersistentVolumeClaims(e.namespace)
	must[*corev1.PersistentVolumeClaim](e)(claims.Patch(e.Context(), name, types.StrategicMergePatchType, []byte(patch), metav1.PatchOptions{}))
}

// waitSize waits until the claim says that its volume is that large.
func (e *env) waitSize(name, size string) {
	e.Helper()
	want := resource.MustParse(size)
	e.eventually("claim "+name+" has "+size, patience, func(ctx context.Context) error {
		c, err := e.client.CoreV1().PersistentVolumeClaims(e.namespace).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		if have := c.Status.Capacity[corev1.ResourceStorage]; have.Cmp(want) < 0 {
			return fmt.Errorf("it has %s\n%s", have.String(), e.events(name))
		}
		return nil
	})
}

func TestGrowsWhileItIsWritten(t *testing.T) {
	e := volumes(t)
	for _, kind := range []string{"xfs", "btrfs"} {
		e.createClaim(claim(kind, e.filesystem(kind), "320Mi"))
		e.run(e.shell(kind, "", kind), corev1.PodRunning)
		check := e.write(kind, "/data/"+kind)
		e.grow(kind, "1Gi")
		if kib := e.number(kind, "df -k /data/"+kind+" | tail -n 1 | awk '{print $2}'"); kib < 800<<10 {
			t.Errorf("%s of 1Gi has %d KiB", kind, kib)
		}
		check()
	}
}

func TestMountedExt4GrowsWhereTheKernelAllowsIt(t *testing.T) {
	e := volumes(t)
	e.createClaim(claim("ext4", e.filesystem("ext4"), "64Mi"))
	p := e.run(e.shell("ext4", "", "ext4"), corev1.PodRunning)
	check := e.write("ext4", "/data/ext4")
	const resource = 24 // CAP_SYS_RESOURCE
	mask, err := strconv.ParseUint(e.onNode(p.Spec.NodeName, "awk '/^CapBnd/{print $2}' /proc/1/status"), 16, 64)
	if err != nil {
		t.Fatal(err)
	}
	if mask&(1<<resource) != 0 {
		e.grow("ext4", "256Mi")
		check()
		return
	}
	e.resize("ext4", "256Mi")
	e.eventually("the claim says why it does not grow", patience, func(ctx context.Context) error {
		c, err := e.client.CoreV1().PersistentVolumeClaims(e.namespace).Get(ctx, "ext4", metav1.GetOptions{})
		if err != nil {
			return err
		}
		for _, condition := range c.Status.Conditions {
			if strings.Contains(condition.Message, "CAP_SYS_RESOURCE") {
				return nil
			}
		}
		return fmt.Errorf("it says %+v", c.Status.Conditions)
	})
	check()
}

func TestRawBlockGrowsInUse(t *testing.T) {
	e := volumes(t)
	c := claim("raw", e.class(nil), "64Mi")
	c.Spec.VolumeMode = new(corev1.PersistentVolumeBlock)
	e.createClaim(c)
	e.run(e.shell("user", "", "raw"), corev1.PodRunning)
	e.grow("raw", "128Mi")
	e.eventually("the pod sees it", patience, func(context.Context) error {
		if size := e.sh("user", "blockdev --getsize64 /dev/raw"); size != strconv.Itoa(128<<20) {
			return fmt.Errorf("it sees %s bytes", size)
		}
		return nil
	})
}

func TestSixtyClaimsAtOnce(t *testing.T) {
	e := volumes(t)
	const pods, each = 12, 5
	class := e.class(nil)
	start := time.Now()
	for i := range pods {
		var claims []string
		for j := range each {
			name := fmt.Sprintf("claim-%d-%d", i, j)
			e.createClaim(claim(name, class, "16Mi"))
			claims = append(claims, name)
		}
		p := e.shell(fmt.Sprintf("pod-%d", i), "", claims...)
		p.Labels = map[string]string{"app": "many"}
		e.start(p)
	}
	e.waitPods(e.namespace, "app=many", pods, running)
	t.Logf("%d volumes are in use after %s", pods*each, time.Since(start).Round(time.Second))
}

func TestRangeOfAnImageIsMapped(t *testing.T) {
	e := volumes(t)
	node := e.nodes()[0]
	const mib = 1 << 20
	image := imageDir + "/" + e.namespace + ".img"
	// 1 MiB of words, a filesystem of 64 MiB, and words again.
	e.onNode(node, "truncate -s 66M "+image+"; yes before | head -c 1M | dd of="+image+" conv=notrunc bs=1M; "+
		"yes after | head -c 1M | dd of="+image+" conv=notrunc bs=1M seek=65")
	t.Cleanup(func() {
		if _, err := e.host(context.Background(), node, "rm "+image); err != nil {
			t.Error(err)
		}
	})
	if _, err := e.exec(t.Context(), installed, e.driverOn(node), "mkfs.ext4", "-q", "-E", "offset="+strconv.Itoa(mib), image, "64M"); err != nil {
		t.Fatal(err)
	}
	neighbours := "(head -c 1M " + image + "; tail -c 1M " + image + ") | sha256sum"
	before := e.onNode(node, neighbours)
	e.createMapped(node, map[string]string{"image": image, "offset": strconv.Itoa(mib), "sizeLimit": strconv.Itoa(64 * mib)})
	e.run(e.shell("user", node, "mapped"), corev1.PodRunning)
	e.sh("user", "dd if=/dev/zero of=/data/mapped/fill bs=1M 2>/dev/null; rm /data/mapped/fill; echo precious > /data/mapped/file; sync")
	e.stop("user")
	if e.onNode(node, neighbours) != before {
		t.Error("the bytes beside the range have changed")
	}
	e.run(e.shell("again", node, "mapped"), corev1.PodRunning)
	if got := e.sh("again", "cat /data/mapped/file"); got != "precious" {
		t.Errorf("the file has %q", got)
	}
}

func TestPartitionOfAnImageIsMapped(t *testing.T) {
	e := volumes(t)
	node := e.nodes()[0]
	image := e.diskOn(node, "disk.img", 2)
	e.createMapped(node, map[string]string{"image": image, "partition": "2"})
	e.run(e.shell("user", node, "mapped"), corev1.PodRunning)
	e.sh("user", "dd if=/dev/zero of=/data/mapped/fill bs=1M 2>/dev/null; rm /data/mapped/fill; echo precious > /data/mapped/file; sync")
	e.stop("user")
	if got := e.onNode(node, "tail -c 1M "+image+" | tr -d '\\000' | wc -c"); strings.TrimSpace(got) != "0" {
		t.Errorf("%s bytes behind the partition were written", got)
	}
}

// diskOn makes an image of a disk on a node. The given partition in its MBR, 1 to 4, has the
// 64 MiB from 1 MiB on, and ext4.
func (e *env) diskOn(node, name string, partition int) string {
	e.Helper()
	path := imageDir + "/" + e.namespace + "-" + name
	// 20000 hexadecimal sectors.
	e.onNode(node, "truncate -s 66M "+path+"; printf '\\000\\000\\000\\000\\203\\000\\000\\000\\000\\010\\000\\000\\000\\000\\002\\000' | "+
		"dd of="+path+" conv=notrunc bs=1 seek="+strconv.Itoa(446+16*(partition-1))+"; printf '\\125\\252' | dd of="+path+" conv=notrunc bs=1 seek=510")
	e.Cleanup(func() {
		if _, err := e.host(context.Background(), node, "rm "+path); err != nil {
			e.Error(err)
		}
	})
	if _, err := e.exec(e.Context(), installed, e.driverOn(node), "mkfs.ext4", "-q", "-E", "offset="+strconv.Itoa(1<<20), path, "64M"); err != nil {
		e.Fatal(err)
	}
	return path
}

// driverOn is the driver's pod on a node.
func (e *env) driverOn(node string) string {
	e.Helper()
	list := must[*corev1.PodList](e)(e.client.CoreV1().Pods(installed).List(e.Context(), metav1.ListOptions{
		LabelSelector: driverPods, FieldSelector: "spec.nodeName=" + node,
	}))
	for i := range list.Items {
		if running(&list.Items[i]) {
			return list.Items[i].Name
		}
	}
	e.Fatalf("no driver runs on %s", node)
	return ""
}

// createMapped makes a volume of an image that exists, and the claim "mapped" for it.
func (e *env) createMapped(node string, attributes map[string]string) {
	e.Helper()
	name := e.namespace + "-mapped"
	c := claim("mapped", "", "64Mi")
	c.Spec.VolumeName = name
	persistent := e.client.CoreV1().PersistentVolumes()
	must[*corev1.PersistentVolume](e)(persistent.Create(e.Context(), mappedVolume(name, node, attributes), metav1.CreateOptions{}))
	e.createClaim(c)
	e.Cleanup(func() {
		if err := persistent.Delete(context.Background(), name, metav1.DeleteOptions{}); err != nil {
			e.Error(err)
		}
	})
}

// mappedVolume is a PersistentVolume of 64 MiB on a node.
func mappedVolume(name, node string, attributes map[string]string) *corev1.PersistentVolume {
	c := claim("", "", "64Mi")
	return &corev1.PersistentVolume{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: corev1.PersistentVolumeSpec{
			Capacity: c.Spec.Resources.Requests, AccessModes: c.Spec.AccessModes,
			PersistentVolumeReclaimPolicy: corev1.PersistentVolumeReclaimRetain,
			PersistentVolumeSource: corev1.PersistentVolumeSource{CSI: &corev1.CSIPersistentVolumeSource{
				Driver: driver, VolumeHandle: name, FSType: "ext4", VolumeAttributes: attributes,
			}},
			NodeAffinity: &corev1.VolumeNodeAffinity{Required: &corev1.NodeSelector{
				NodeSelectorTerms: []corev1.NodeSelectorTerm{{MatchExpressions: []corev1.NodeSelectorRequirement{{
					Key: "topology.csi-loop.io/node", Operator: corev1.NodeSelectorOpIn, Values: []string{node},
				}}}},
			}},
		},
	}
}
