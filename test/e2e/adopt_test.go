package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// disk is one that can be mounted on either of two nodes, as one that people carry: a loop
// device over a file of the node that survives. Nodes of our clusters share a kernel.
type disk struct {
	*env

	from, to     string // nodes
	device, file string
	values       string // those of the installation, as they were
	yaml         string // those of docs/operations.md, for the node NEW
	mounted      string // node that has it
}

const movedDir = "/mnt/moved"

// TestDiskIsMovedToAnotherNode: a node dies, and its disk is brought to another one, where
// the steps of docs/operations.md make volumes, snapshots and templates usable again.
func TestDiskIsMovedToAnotherNode(t *testing.T) {
	powerCommand(t)
	e := volumes(t)
	nodes := e.nodes()
	if len(nodes) < 3 {
		t.Skip("it needs a node that dies, one that gets its disk, and the control plane")
	}
	r := e.reader()
	program := e.compile("csi-loop")
	if err := os.Symlink(program, filepath.Join(r.home, "bin", "csi-loop")); err != nil {
		t.Fatal(err)
	}
	d := e.newDisk(nodes[len(nodes)-1], nodes[len(nodes)-2])
	defer d.remove()
	d.mount(d.from)
	// Before the move it is a pool like any other, under another name.
	d.install(strings.NewReplacer("NEW", d.from, "name: moved", "name: disk", "existing: true", "filesystem: xfs").Replace(d.yaml))
	free := d.free()
	d.makesTemplate()
	pool := d.uses()
	before := e.volumeOf("data-user-0")

	e.power("kill-node", d.from)
	d.mounted = ""
	e.waitReady(d.from, false)
	if err := e.client.CoreV1().Nodes().Delete(t.Context(), d.from, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	d.unmounted()
	d.mount(d.to)
	d.isServed(r, pool)
	d.isAdopted(r, pool, before)
	e.waitPods(e.namespace, "app=user", 1, running)
	d.hasAll()
	d.goesOn()

	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	e.removeContents(ctx)
	d.isEmpty(free)
}

// newDisk makes one with XFS.
func (e *env) newDisk(from, to string) *disk {
	e.Helper()
	d := &disk{env: e, from: from, to: to, file: "/var/lib/csi-loop-e2e-disk.img", values: filepath.Join(e.TempDir(), "values.yaml")}
	if err := os.WriteFile(d.values, []byte(e.helm("get", "values", release, "--output=yaml")), 0o600); err != nil {
		e.Fatal(err)
	}
	page := string(must[[]byte](e)(os.ReadFile("../../docs/operations.md")))
	_, section, _ := strings.Cut(page, "\n### Its disk is moved to another node\n")
	_, rest, _ := strings.Cut(section, "\n```yaml\n")
	yaml, _, ok := strings.Cut(rest, "```")
	if !ok || !strings.Contains(yaml, movedDir) {
		e.Fatal("the page shows no values for the new node")
	}
	d.yaml = yaml
	d.device = e.onNode(to, "truncate -s 4G "+d.file+" && /usr/sbin/losetup --find --show "+d.file)
	if _, err := e.exec(e.Context(), installed, e.driverOn(to), "mkfs.xfs", "-q", d.device); err != nil {
		e.Fatal(err)
	}
	return d
}

func (d *disk) mount(node string) {
	d.Helper()
	d.onNode(node, "mkdir -p "+movedDir+" && /usr/bin/mount "+d.device+" "+movedDir)
	d.mounted = node
}

// unmounted waits until the kernel has no mount of it: those of the dead node end with its
// processes.
func (d *disk) unmounted() {
	d.Helper()
	d.eventually("the dead node's mount is gone", patience, func(ctx context.Context) error {
		_, err := d.host(ctx, d.to, "[ ! -e /sys/fs/xfs/"+filepath.Base(d.device)+" ]")
		return err
	})
}

// install upgrades to the values of the tests and these.
func (d *disk) install(yaml string) {
	d.Helper()
	more := filepath.Join(d.TempDir(), "disk.yaml")
	if err := os.WriteFile(more, []byte(yaml), 0o600); err != nil {
		d.Fatal(err)
	}
	d.helm("upgrade", release, chart, "--values="+d.values, "--values="+more, "--wait", "--timeout=3m")
}

// makesTemplate makes one on the disk.
func (d *disk) makesTemplate() {
	d.Helper()
	d.csiLoop(d.from, "template", "add", "golden", d.imageOn(d.from, "golden.img"), "--into=disk")
}

// uses makes a volume of a StatefulSet with data, and a snapshot of it after which more
// was written. It returns the pool's ID.
func (d *disk) uses() (pool string) {
	d.Helper()
	p := d.shell("", "")
	p.Spec.Containers[0].VolumeMounts = []corev1.VolumeMount{{Name: "data", MountPath: "/data"}}
	labels := map[string]string{"app": "user"}
	must[*appsv1.StatefulSet](d.env)(d.client.AppsV1().StatefulSets(d.namespace).Create(d.Context(), &appsv1.StatefulSet{
		ObjectMeta: metav1.ObjectMeta{Name: "user"},
		Spec: appsv1.StatefulSetSpec{
			ServiceName: "user", Selector: &metav1.LabelSelector{MatchLabels: labels},
			Template: corev1.PodTemplateSpec{
				ObjectMeta: metav1.ObjectMeta{Labels: labels},
				Spec:       corev1.PodSpec{Containers: p.Spec.Containers, TerminationGracePeriodSeconds: new(int64(1))},
			},
			VolumeClaimTemplates: []corev1.PersistentVolumeClaim{*claim("data", d.class(nil, "pool", "disk", "csi.storage.k8s.io/fstype", "xfs"), "320Mi")},
		},
	}, metav1.CreateOptions{}))
	d.waitPods(d.namespace, "app=user", 1, running)
	d.wantOnNode("data-user-0", d.from)
	d.sh(user, "head -c 20971520 /dev/urandom > /data/file && cd /data && sha256sum file > sum && echo before > word && sync")
	d.takeSnapshot("kept", "data-user-0")
	d.sh(user, "echo after > /data/word && sync")
	pool, _, ok := strings.Cut(d.volumeOf("data-user-0").Spec.CSI.VolumeHandle, ".")
	if !ok {
		d.Fatal("the volume's handle names no pool")
	}
	return pool
}

// isServed has the new node serve the pool, as the page shows it.
func (d *disk) isServed(r *reader, pool string) {
	d.Helper()
	more := filepath.Join(r.home, "moved.yaml")
	if err := os.WriteFile(more, []byte(strings.ReplaceAll(d.yaml, "NEW", d.to)), 0o600); err != nil {
		d.Fatal(err)
	}
	upgrade, show, ok := strings.Cut(r.shown("kubectl -n csi-loop exec csi-loop-node-x7x2p -- csi-loop pool show /mnt/moved"), "\n")
	if !ok {
		d.Fatal(upgrade)
	}
	if out, err := r.sh(upgrade, "moved.yaml", more); err != nil {
		d.Fatal(out, err)
	}
	// The node's pod is another one since.
	d.eventually("the pool is served", patience, func(context.Context) error {
		out, err := r.sh(show, "csi-loop-node-x7x2p", d.driverOn(d.to))
		if err == nil && (!strings.Contains(out, pool) || !strings.Contains(out, "yes")) {
			err = errors.New(out)
		}
		return err
	})
}

// isAdopted moves the PersistentVolume as the page shows it. Once more changes nothing.
func (d *disk) isAdopted(r *reader, pool string, before *corev1.PersistentVolume) {
	d.Helper()
	saved := filepath.Join("../..", "csi-loop-adopt-"+pool+".yaml") // where the reader's shell is
	d.Cleanup(func() {
		if err := os.Remove(saved); err != nil {
			d.Error(err)
		}
	})
	const lists = "csi-loop adopt --pool-id=ID --node=NEW"
	out := r.run(lists, "=ID", "="+pool, "NEW", d.to)
	if strings.Count(out, before.Spec.CSI.VolumeHandle) != 2 || !strings.Contains(out, "1 PersistentVolumes would be replaced") || !strings.Contains(out, "1 PersistentVolumes replaced") {
		d.Errorf("it says %s", out)
	}
	after := d.volumeOf("data-user-0")
	if after.UID == before.UID || after.Name != before.Name || after.Spec.PersistentVolumeReclaimPolicy != corev1.PersistentVolumeReclaimDelete ||
		after.Spec.ClaimRef.UID != before.Spec.ClaimRef.UID || after.Spec.CSI.VolumeHandle != before.Spec.CSI.VolumeHandle {
		d.Errorf("%+v", after)
	}
	d.wantOnNode("data-user-0", d.to)
	if out := r.run(lists, "=ID", "="+pool, "NEW", d.to); strings.Count(out, "Nothing to do.") != 2 {
		d.Errorf("once more: %s", out)
	}
	if again := d.volumeOf("data-user-0"); again.UID != after.UID {
		d.Error("it was replaced once more")
	}
}

// hasAll looks at what was written before the move.
func (d *disk) hasAll() {
	d.Helper()
	pod := must[*corev1.Pod](d.env)(d.client.CoreV1().Pods(d.namespace).Get(d.Context(), user, metav1.GetOptions{}))
	if pod.Spec.NodeName != d.to {
		d.Errorf("the pod runs on %s", pod.Spec.NodeName)
	}
	if got := d.sh(user, "cd /data && sha256sum -c sum && cat word"); got != "file: OK\nafter" {
		d.Errorf("the volume has %q", got)
	}
}

// goesOn uses what came along: the volume grows, the snapshot is restored, the template
// used, another snapshot taken.
func (d *disk) goesOn() {
	d.Helper()
	d.grow("data-user-0", "640Mi")
	class := d.class(nil, "pool", "moved", "csi.storage.k8s.io/fstype", "xfs")
	d.createClaim(restored("restored", class, "320Mi", "kept"))
	d.createClaim(claim("golden", d.class(immediate, "pool", "moved", "template", "golden"), "128Mi"))
	d.run(d.shell("reader", "", "restored", "golden"), corev1.PodRunning)
	if got := d.sh("reader", "cd /data/restored && sha256sum -c sum && cat word && ls /data/golden"); got != "file: OK\nbefore\nlost+found" {
		d.Errorf("snapshot and template have %q", got)
	}
	d.wantOnNode("restored", d.to)
	d.wantOnNode("golden", d.to)
	d.takeSnapshot("another", "data-user-0")
}

// isEmpty waits until nothing is left in the pool, and it has the room that it had.
func (d *disk) isEmpty(free int64) {
	d.Helper()
	d.csiLoop(d.to, "template", "rm", "golden", "--into=moved")
	d.eventually("the pool on the disk is empty", patience, func(ctx context.Context) error {
		out, err := d.host(ctx, d.to, "cd "+movedDir+" && ls -d volumes/* snapshots/* templates/* .new-* .gone-* 2>/dev/null; true")
		if err != nil {
			return err
		}
		if out != "" {
			return fmt.Errorf("there is %q", out)
		}
		if now := d.free(); now < free-4<<20 {
			return fmt.Errorf("%d bytes are free, and were %d", now, free)
		}
		return nil
	})
}

// free is the room of the disk's filesystem in bytes.
func (d *disk) free() int64 {
	d.Helper()
	var blocks int64
	if _, err := fmt.Sscan(d.onNode(d.mounted, "sync -f "+movedDir+"; stat -f -c %f "+movedDir), &blocks); err != nil {
		d.Fatal(err)
	}
	return blocks * 4096
}

// remove takes the disk away, installs csi-loop as it was, and has the dead node back.
func (d *disk) remove() {
	d.Helper()
	ctx, cancel := context.WithTimeout(d.Context(), patience)
	defer cancel()
	d.removeContents(ctx)
	d.helm("upgrade", release, chart, "--reset-values", "--values="+d.values, "--wait", "--timeout=3m")
	d.power("start-node", d.from)
	d.eventually("the node is there again", patience, func(ctx context.Context) error {
		n, err := d.client.CoreV1().Nodes().Get(ctx, d.from, metav1.GetOptions{})
		if err == nil && !ready(n) {
			err = errors.New("it is not ready")
		}
		return err
	})
	d.waitPods(installed, driverPods, len(d.nodes()), running)
	if d.mounted != "" {
		d.onNode(d.mounted, "/usr/bin/umount "+movedDir)
	}
	d.unmounted()
	d.onNode(d.to, "/usr/sbin/losetup -d "+d.device+" && rm "+d.file)
}
