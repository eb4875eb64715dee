package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// ghost is a bound volume of a node that is not in the cluster, with a snapshot.
func (e *env) ghost(node string) (volume string) {
	e.Helper()
	volume = e.namespace + "-ghost"
	pv := mappedVolume(volume, node, nil)
	pv.Spec.CSI.VolumeHandle = strings.Repeat("a", 20) + "." + volume
	pv.Spec.PersistentVolumeReclaimPolicy = corev1.PersistentVolumeReclaimDelete
	volumes := e.client.CoreV1().PersistentVolumes()
	must[*corev1.PersistentVolume](e)(volumes.Create(e.Context(), pv, metav1.CreateOptions{}))
	e.Cleanup(func() {
		if err := ignoreGone(volumes.Delete(context.Background(), volume, metav1.DeleteOptions{})); err != nil {
			e.Error(err)
		}
	})
	c := claim("ghost", pv.Spec.StorageClassName, pv.Spec.Capacity.Storage().String())
	c.Spec.VolumeName, c.Spec.AccessModes, c.Spec.VolumeMode = volume, pv.Spec.AccessModes, pv.Spec.VolumeMode
	e.createClaim(c)
	e.volumeOf("ghost")

	api, handle := e.snapshots().SnapshotV1(), strings.Repeat("a", 20)+".snapshot"
	must[*snapshotv1.VolumeSnapshotContent](e)(api.VolumeSnapshotContents().Create(e.Context(), &snapshotv1.VolumeSnapshotContent{
		ObjectMeta: metav1.ObjectMeta{Name: volume},
		Spec: snapshotv1.VolumeSnapshotContentSpec{
			Driver: pv.Spec.CSI.Driver, DeletionPolicy: snapshotv1.VolumeSnapshotContentDelete, Source: snapshotv1.VolumeSnapshotContentSource{SnapshotHandle: &handle},
			VolumeSnapshotRef: corev1.ObjectReference{Namespace: e.namespace, Name: "ghost"},
		},
	}, metav1.CreateOptions{}))
	must[*snapshotv1.VolumeSnapshot](e)(api.VolumeSnapshots(e.namespace).Create(e.Context(), &snapshotv1.VolumeSnapshot{
		ObjectMeta: metav1.ObjectMeta{Name: "ghost"},
		Spec:       snapshotv1.VolumeSnapshotSpec{Source: snapshotv1.VolumeSnapshotSource{VolumeSnapshotContentName: &volume}},
	}, metav1.CreateOptions{}))
	e.ghostSnapshotIsBound(volume)
	return volume
}

func (e *env) ghostSnapshotIsBound(volume string) {
	e.Helper()
	e.eventually("the snapshot is bound", patience, func(ctx context.Context) error {
		api := e.snapshots().SnapshotV1()
		c, err := api.VolumeSnapshotContents().Get(ctx, volume, metav1.GetOptions{})
		if err != nil {
			return err
		}
		s, err := api.VolumeSnapshots(e.namespace).Get(ctx, "ghost", metav1.GetOptions{})
		if err == nil && (c.Spec.VolumeSnapshotRef.UID != s.UID || len(s.Finalizers) == 0) {
			err = fmt.Errorf("%+v, %q", c.Spec.VolumeSnapshotRef, s.Finalizers)
		}
		return err
	})
}

const forgotten = "1 PersistentVolumes and 1 contents of snapshots deleted"

// TestNodeThatIsGoneIsForgotten: a claim learns that its node is gone; csi-loop forget
// refuses a node that is there, and deletes volume and claim of the one that is not.
// What it saved makes them again, bound to each other. So it is for a snapshot.
func TestNodeThatIsGoneIsForgotten(t *testing.T) {
	e := volumes(t)
	const node = "csi-loop-e2e-no-such-node"
	volume := e.ghost(node)
	e.eventSays("ghost", "Warning", "NodeGone", node)

	program, dir := e.compile("csi-loop"), e.TempDir()
	forget := func(node string, args ...string) (string, error) {
		c := exec.CommandContext(e.Context(), program, append([]string{"forget", node}, args...)...)
		c.Dir = dir
		out, err := c.CombinedOutput()
		return string(out), err
	}
	if out, err := forget(e.nodes()[0], "--claims", "--apply"); err == nil || !strings.Contains(out, "is in the cluster") {
		t.Fatalf("a node that is there: %s, %v", out, err)
	}
	if out, err := forget(node); err != nil || !strings.Contains(out, volume) || !strings.Contains(out, "passed over") {
		t.Errorf("%s, %v", out, err)
	}
	if out, err := forget(node, "--claims", "--apply"); err != nil || !strings.Contains(out, forgotten) {
		t.Fatalf("%s, %v", out, err)
	}
	e.ghostIsGone(volume)
	saved := filepath.Join(dir, "csi-loop-forget-"+node+".yaml")
	if b, err := os.ReadFile(saved); err != nil || !strings.Contains(string(b), volume) || !strings.Contains(string(b), "Retain") {
		t.Errorf("saved: %s, %v", b, err)
	}

	comesBack := func() {
		t.Helper()
		if out, err := exec.CommandContext(e.Context(), "kubectl", "create", "-f", saved).CombinedOutput(); err != nil {
			t.Fatalf("%s, %v", out, err)
		}
		if got := e.volumeOf("ghost").Name; got != volume {
			t.Errorf("the claim has volume %s", got)
		}
		e.ghostSnapshotIsBound(volume)
	}
	comesBack()
	if out, err := forget(node, "--claims", "--apply"); err != nil || !strings.Contains(out, "csi-loop-forget-"+node+"-2.yaml") {
		t.Fatalf("%s, %v", out, err)
	}
	e.ghostIsGone(volume)
	comesBack()
	e.forgetsAsShown(node, program, volume)
	e.ghostIsGone(volume)
}

func (e *env) ghostIsGone(volume string) {
	e.Helper()
	e.eventually("volume, claim and snapshot are gone", patience, func(ctx context.Context) error {
		api := e.snapshots().SnapshotV1()
		_, contentErr := api.VolumeSnapshotContents().Get(ctx, volume, metav1.GetOptions{})
		_, snapshotErr := api.VolumeSnapshots(e.namespace).Get(ctx, "ghost", metav1.GetOptions{})
		if !apierrors.IsNotFound(contentErr) || !apierrors.IsNotFound(snapshotErr) {
			return fmt.Errorf("content %w, snapshot %w", or(contentErr), or(snapshotErr))
		}

		_, err := e.client.CoreV1().PersistentVolumes().Get(ctx, volume, metav1.GetOptions{})
		_, claimErr := e.client.CoreV1().PersistentVolumeClaims(e.namespace).Get(ctx, "ghost", metav1.GetOptions{})
		if !apierrors.IsNotFound(err) || !apierrors.IsNotFound(claimErr) {
			return fmt.Errorf("volume %w, claim %w", or(err), or(claimErr))
		}
		return nil
	})
}

// forgetsAsShown has csi-loop forget the node as docs/operations.md shows it. A Node object
// is made before, for kubectl to delete.
func (e *env) forgetsAsShown(node, program, volume string) {
	e.Helper()
	r := e.reader()
	if err := os.Symlink(program, filepath.Join(r.home, "bin", "csi-loop")); err != nil {
		e.Fatal(err)
	}
	savedHere := func() []string { // where the shell is; by an earlier run that was ended too
		files, err := filepath.Glob(filepath.Join("../..", "csi-loop-forget-"+node+"*.yaml"))
		if err != nil {
			e.Fatal(err)
		}
		return files
	}
	clean := func() {
		for _, f := range savedHere() {
			if err := os.Remove(f); err != nil {
				e.Error(err)
			}
		}
		// Were it left, no rollout of the DaemonSet would ever be complete.
		err := e.client.CoreV1().Nodes().Delete(context.WithoutCancel(e.Context()), node, metav1.DeleteOptions{})
		if err != nil && !apierrors.IsNotFound(err) {
			e.Error(err)
		}
	}
	clean()
	e.Cleanup(clean)
	shown := r.shown("csi-loop forget NODE --claims --apply")
	for _, commands := range []string{r.shown("kubectl drain NODE --ignore-daemonsets --delete-emptydir-data"), shown} {
		must[*corev1.Node](e)(e.client.CoreV1().Nodes().Create(e.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: node}}, metav1.CreateOptions{}))
		out, err := r.sh(commands, "NODE", node)
		if err != nil || !strings.Contains(out, "node \""+node+"\" deleted") {
			e.Errorf("%s, %v", out, err)
		}
		if commands == shown && (!strings.Contains(out, volume) || !strings.Contains(out, forgotten)) {
			e.Fatalf("%s", out)
		}
	}
	if files := savedHere(); len(files) != 1 {
		e.Errorf("saved: %q", files)
	}
}

// or turns success into an error that says so.
func or(err error) error {
	if err == nil {
		return errors.New("is there")
	}
	return err
}
