package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"

	"github.com/csi-loop/csi-loop/internal/kubeapi"
	"github.com/csi-loop/csi-loop/pkg/driver"
	"github.com/csi-loop/csi-loop/pkg/image"
)

const forgetHelp = `Delete the PersistentVolumes of a node that is gone for ever, and the contents of its
snapshots, and with --claims the claims that are bound to them and the VolumeSnapshots,
so that a StatefulSet makes new claims elsewhere, and no deletion waits for the node.

It refuses while Kubernetes has the Node object: a node that is only away comes back,
and everything goes on by itself. Delete the Node object first (kubectl delete node
NAME), which ends its pods; for the CSINode, which Kubernetes deletes after it, forget
waits a minute. Without --apply it says what it would do, and does nothing.

Which pool a volume or a snapshot is in is the ID that its handle begins with, and is
listed. With --pool-id only what is in the pools that are named is deleted, also the
snapshots of one that has no volume left. --apply asks for it where the volumes are of
several pools: one of them may be alive, on a node that was made anew under the name, or
on a disk that is to be moved. Mapped volumes are in no pool, which --pool-id=none names.
A pool that has a volume on another node was moved there, and its snapshots are passed
over.

With --apply all PersistentVolumes, VolumeSnapshotContents, with the policy Retain, and
their claims and VolumeSnapshots are written to the file --save, which must not be
there; without --save to the next free name. After an interruption the next run saves
what is left then: keep each file. Then, for one snapshot and then one volume after the
other:

  1. nobody has changed it since it was listed, or forget ends;
  2. its policy becomes Retain, so that no deletion reaches the data, should the disk
     turn up again;
  3. the claim, or the VolumeSnapshot, is deleted, if --claims is given; what has one is
     passed over otherwise;
  4. the PersistentVolume, or the content, is deleted, with its finalizers.

No image is deleted. If the node or its disk comes back after all, csi-loop orphans
lists the volumes, and kubectl create -f FILE makes again what the saved file has: a
volume and its claim bound to each other, with the policy Retain, and a VolumeSnapshot
and its content likewise. Delete first a claim of the same name that was made meanwhile.
A volume that had lost its claim is Released again. A group snapshot is not made again:
its snapshots are, each by itself. A disk that is on another node is for csi-loop adopt,
after that.

The cluster is found as kubectl finds it, but for the service account of a pod, which
is never used.`

// forgetting is what forget was told.
type forgetting struct {
	node, driver, save string
	pools              []string // IDs
	cluster            clusterFlags
	dynamic            dynamic.Interface
	claims, apply      bool
	patience           time.Duration // how long the CSINode of a node that is gone may stay
}

func newForgetCommand() *cobra.Command {
	f := forgetting{patience: time.Minute}
	c := &cobra.Command{Use: "forget NODE", Short: "Delete the PersistentVolumes of a node that is gone for ever", Long: forgetHelp, Args: cobra.ExactArgs(1)}
	f.cluster.register(c.Flags())
	c.Flags().StringVar(&f.driver, "driver-name", driver.DefaultName, "name of the driver")
	c.Flags().StringVar(&f.save, "save", "", "file for what is deleted (default: csi-loop-forget-<NODE>.yaml, or -2.yaml and so on)")
	c.Flags().StringSliceVar(&f.pools, "pool-id", nil, "ID of a pool that is lost, or none: only what was in it is deleted; may be repeated")
	c.Flags().BoolVar(&f.claims, "claims", false, "delete the claims of the volumes, and the VolumeSnapshots, too")
	c.Flags().BoolVar(&f.apply, "apply", false, "do it")
	c.RunE = func(c *cobra.Command, args []string) error {
		f.node = args[0]
		client, err := f.cluster.client()
		if err != nil {
			return err
		}
		if f.dynamic, err = f.cluster.dynamicClient(); err != nil {
			return err
		}
		return failed(f.run(c.Context(), client, c.OutOrStdout()))
	}
	return c
}

// lost is a volume of the node, and the claim that is bound to it.
type lost struct {
	pv    *corev1.PersistentVolume
	claim *corev1.PersistentVolumeClaim // nil: there is none
}

// noPool stands for the pool of volumes that are in none: mapped ones.
const noPool = "none"

// pool is the ID of its pool, or noPool.
func (l lost) pool() string {
	if id, _, ok := image.ParseID(l.pv.Spec.CSI.VolumeHandle); ok {
		return id
	}
	return noPool
}

// run deletes, or says what would be deleted.
func (f *forgetting) run(ctx context.Context, client kubeapi.Interface, out io.Writer) error {
	if err := f.gone(ctx, client); err != nil {
		return err
	}
	all, elsewhere, err := f.volumes(ctx, client)
	if err != nil {
		return err
	}
	all, pools, err := f.lostPools(all, elsewhere, out)
	if err != nil {
		return err
	}
	snapshots, err := f.lostSnapshots(ctx, f.withoutMoved(pools, elsewhere, out))
	if err != nil {
		return err
	}
	chosen := f.chooseVolumes(all, out)
	ended := f.choose(snapshots, out)
	count := fmt.Sprintf("%d PersistentVolumes", len(chosen))
	if len(ended) > 0 {
		count += fmt.Sprintf(" and %d contents of snapshots", len(ended))
	}
	switch {
	case len(chosen)+len(ended) == 0:
		fmt.Fprintln(out, "Nothing to do.")
		return nil
	case !f.apply:
		how := "--apply does it"
		if len(f.pools) == 0 && len(pools) > 1 {
			how = "--apply does it once --pool-id names those of the pools that are lost: " + strings.Join(pools, ", ")
		}
		fmt.Fprintf(out, "%s would be deleted; %s.\n", count, how)
		return nil
	case len(f.pools) == 0 && len(pools) > 1:
		return usagef("the volumes are of %d pools: name those that are lost, each with --pool-id: %s", len(pools), strings.Join(pools, ", "))
	}
	saved, err := f.keep(chosen, ended)
	if err != nil {
		return err
	}
	// The volumes tell which pools are lost, and go last: after an interruption the next run
	// finds them.
	for i := range ended {
		s := &ended[i]
		if err := f.gone(ctx, client); err != nil {
			return err
		}
		if err := f.end(ctx, s); err != nil {
			return fmt.Errorf("%s %s: %w (what was to be deleted is in %s)", s.content.GetKind(), s.content.GetName(), err, saved)
		}
	}
	for _, l := range chosen {
		if err := f.delete(ctx, client, l); err != nil {
			return fmt.Errorf("PersistentVolume %s: %w (what was to be deleted is in %s)", l.pv.Name, err, saved)
		}
	}
	fmt.Fprintf(out, "%s deleted. They are in %s.\n", count, saved)
	return nil
}

// chooseVolumes says which there are, and keeps those that are to be deleted.
func (f *forgetting) chooseVolumes(all []lost, out io.Writer) (chosen []lost) {
	for _, l := range all {
		what := "no claim"
		if l.claim != nil {
			what = "claim " + l.claim.Namespace + "/" + l.claim.Name
		}
		if l.claim != nil && !f.claims {
			fmt.Fprintf(out, "%s\t%s\t%s\tpassed over: --claims deletes the claim too\n", l.pv.Name, l.pool(), what)
			continue
		}
		fmt.Fprintf(out, "%s\t%s\t%s\n", l.pv.Name, l.pool(), what)
		chosen = append(chosen, l)
	}
	return chosen
}

// gone returns an error unless Kubernetes has no such node.
func (f *forgetting) gone(ctx context.Context, client kubeapi.Interface) error {
	_, err := client.Nodes().Get(ctx, f.node, metav1.GetOptions{})
	if err == nil {
		return fmt.Errorf("node %s is in the cluster: if it is gone for ever, kubectl delete node %s", f.node, f.node)
	}
	if !apierrors.IsNotFound(err) {
		return err
	}
	// Kubernetes deletes it some seconds after its node.
	for end := time.Now().Add(f.patience); ; {
		_, err = client.CSINodes().Get(ctx, f.node, metav1.GetOptions{})
		switch {
		case apierrors.IsNotFound(err):
			return nil
		case err != nil:
			return err
		case !time.Now().Before(end):
			return fmt.Errorf("CSINode %s is in the cluster: Kubernetes deletes it after its node, try again soon", f.node)
		}
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// volumes lists those that can be on the node only. elsewhere has a volume that is not,
// by the ID of its pool.
func (f *forgetting) volumes(ctx context.Context, client kubeapi.Interface) (all []lost, elsewhere map[string]string, err error) {
	list, err := client.PersistentVolumes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, nil, err
	}
	elsewhere = map[string]string{}
	a := adoption{node: f.node, driver: f.driver}
	for i := range list.Items {
		pv := &list.Items[i]
		if pv.Spec.CSI == nil || pv.Spec.CSI.Driver != f.driver {
			continue
		}
		if !a.there(pv) {
			if pool, _, ok := image.ParseID(pv.Spec.CSI.VolumeHandle); ok {
				elsewhere[pool] = pv.Name
			}
			continue
		}
		l := lost{pv: pv}
		if ref := pv.Spec.ClaimRef; ref != nil {
			claim, err := client.PersistentVolumeClaims(ref.Namespace).Get(ctx, ref.Name, metav1.GetOptions{})
			switch {
			case err == nil && claim.UID == ref.UID && claim.Spec.VolumeName == pv.Name:
				l.claim = claim
			case err != nil && !apierrors.IsNotFound(err):
				return nil, nil, err
			}
		}
		all = append(all, l)
	}
	return all, elsewhere, nil
}

// keep saves what is to be deleted, durably, and tells where. An earlier file is never
// written over.
func (f *forgetting) keep(all []lost, snapshots []lostSnapshot) (path string, err error) {
	var file *os.File
	if f.save == "" {
		file, err = createNumbered("csi-loop-forget-" + f.node)
	} else {
		file, err = createNew(f.save)
	}
	if err != nil {
		return "", fmt.Errorf("--save: %w", err)
	}
	var objects []any
	for _, l := range all {
		objects = append(objects, l.volume())
		if l.claim != nil {
			objects = append(objects, l.claimAgain())
		}
	}
	err = errors.Join(printManifests(file, objects...), keepSnapshots(file, snapshots, len(objects) > 0))
	if err == nil {
		err = file.Sync()
	}
	err = errors.Join(err, file.Close())
	if err == nil {
		err = syncDir(file.Name())
	}
	return file.Name(), err
}

// volume is the PersistentVolume as it can be created again, before its claim. One that
// has lost its claim keeps the UID of that, so that it is Released again: a new claim of
// the name does not get what is in it.
func (l lost) volume() *corev1.PersistentVolume {
	pv := &corev1.PersistentVolume{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "PersistentVolume"},
		ObjectMeta: metav1.ObjectMeta{Name: l.pv.Name, Labels: l.pv.Labels, Annotations: without(l.pv.Annotations, ofBinding...)},
		Spec:       *l.pv.Spec.DeepCopy(),
	}
	// Between volume and claim it has no claim, and what is so and is not retained is deleted.
	pv.Spec.PersistentVolumeReclaimPolicy = corev1.PersistentVolumeReclaimRetain
	if ref := pv.Spec.ClaimRef; ref != nil {
		ref.ResourceVersion = ""
		if l.claim != nil {
			ref.UID = ""
		}
	}
	return pv
}

// claimAgain is the claim as it can be created again. It has no owner: that is known by a
// UID, and a claim whose owner is gone is deleted.
func (l lost) claimAgain() *corev1.PersistentVolumeClaim {
	return &corev1.PersistentVolumeClaim{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "PersistentVolumeClaim"},
		ObjectMeta: metav1.ObjectMeta{
			Namespace: l.claim.Namespace, Name: l.claim.Name, Labels: l.claim.Labels, Annotations: without(l.claim.Annotations, ofBinding...),
		},
		Spec: *l.claim.Spec.DeepCopy(), // volumeName is in it
	}
}

// ofBinding are the annotations by which Kubernetes remembers how a claim came to its
// volume. With the first a claim that is new to it is Lost.
var ofBinding = []string{
	"pv.kubernetes.io/bind-completed", "pv.kubernetes.io/bound-by-controller", "volume.kubernetes.io/selected-node",
	"volume.kubernetes.io/storage-provisioner", "volume.beta.kubernetes.io/storage-provisioner",
}

func without(all map[string]string, keys ...string) map[string]string {
	all = maps.Clone(all)
	for _, k := range keys {
		delete(all, k)
	}
	return all
}

// delete deletes one volume, unless the node is there again.
func (f *forgetting) delete(ctx context.Context, client kubeapi.Interface, l lost) error {
	if err := f.gone(ctx, client); err != nil {
		return err
	}
	volumes := client.PersistentVolumes()
	// With it in force no deletion of the object reaches the data.
	// It is refused when somebody changed the object meanwhile: a claim may have taken it.
	patch := `{"spec":{"persistentVolumeReclaimPolicy":"Retain"},"metadata":{"uid":"` + string(l.pv.UID) + `","resourceVersion":"` + l.pv.ResourceVersion + `"}}`
	if _, err := volumes.Patch(ctx, l.pv.Name, types.MergePatchType, []byte(patch), metav1.PatchOptions{}); err != nil {
		return err
	}
	if l.claim != nil {
		err := client.PersistentVolumeClaims(l.claim.Namespace).Delete(ctx, l.claim.Name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &l.claim.UID}})
		if err != nil && !apierrors.IsNotFound(err) {
			return err
		}
	}
	err := volumes.Delete(ctx, l.pv.Name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &l.pv.UID}})
	if err != nil && !apierrors.IsNotFound(err) {
		return err
	}
	// One waits for the claim, the provisioner's for a node that is gone.
	patch = `{"metadata":{"finalizers":null,"uid":"` + string(l.pv.UID) + `"}}`
	_, err = volumes.Patch(ctx, l.pv.Name, types.MergePatchType, []byte(patch), metav1.PatchOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		return err
	}
	return nil
}
