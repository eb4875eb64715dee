package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"time"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/csi-loop/csi-loop/internal/kubeapi"
	"github.com/csi-loop/csi-loop/pkg/driver"
)

const forgetHelp = `Delete the PersistentVolumes of a node that is gone for ever, and with --claims the
claims that are bound to them, so that a StatefulSet makes new ones elsewhere.

It refuses while Kubernetes has the Node object: a node that is only away comes back,
and everything goes on by itself. Delete the Node object first (kubectl delete node
NAME), which ends its pods; for the CSINode, which Kubernetes deletes after it, forget
waits a minute. Without --apply it says what it would do, and does nothing.

With --apply all PersistentVolumes, with the policy Retain, and their claims are
written to the file --save, which must not be there; without --save to the next free
name. After an interruption the next run saves what is left then: keep each file. Then,
for one volume after the other:

  1. nobody has changed it since it was listed, or forget ends;
  2. its policy becomes Retain, so that no deletion reaches the data, should the disk
     turn up again;
  3. the claim is deleted, if --claims is given; a volume that has a claim is passed
     over otherwise;
  4. the PersistentVolume is deleted, with its finalizers.

No image is deleted. If the node or its disk comes back after all, csi-loop orphans
lists the volumes, and kubectl create -f FILE makes again what the saved file has: a
volume and its claim bound to each other, with the policy Retain. Delete first a claim
of the same name that was made meanwhile. A volume that had lost its claim is Released
again. A disk that is on another node is for csi-loop adopt, after that.

The cluster is found as kubectl finds it, but for the service account of a pod, which
is never used.`

// forgetting is what forget was told.
type forgetting struct {
	node, driver, save string
	cluster            clusterFlags
	claims, apply      bool
	patience           time.Duration // how long the CSINode of a node that is gone may stay
}

func newForgetCommand() *cobra.Command {
	f := forgetting{patience: time.Minute}
	c := &cobra.Command{Use: "forget NODE", Short: "Delete the PersistentVolumes of a node that is gone for ever", Long: forgetHelp, Args: cobra.ExactArgs(1)}
	f.cluster.register(c.Flags())
	c.Flags().StringVar(&f.driver, "driver-name", driver.DefaultName, "name of the driver")
	c.Flags().StringVar(&f.save, "save", "", "file for what is deleted (default: csi-loop-forget-<NODE>.yaml, or -2.yaml and so on)")
	c.Flags().BoolVar(&f.claims, "claims", false, "delete the claims of the volumes too")
	c.Flags().BoolVar(&f.apply, "apply", false, "do it")
	c.RunE = func(c *cobra.Command, args []string) error {
		f.node = args[0]
		client, err := f.cluster.client()
		if err != nil {
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

// run deletes, or says what would be deleted.
func (f *forgetting) run(ctx context.Context, client kubeapi.Interface, out io.Writer) error {
	if err := f.gone(ctx, client); err != nil {
		return err
	}
	all, err := f.volumes(ctx, client)
	if err != nil {
		return err
	}
	var chosen []lost
	for _, l := range all {
		what := "no claim"
		if l.claim != nil {
			what = "claim " + l.claim.Namespace + "/" + l.claim.Name
		}
		if l.claim != nil && !f.claims {
			fmt.Fprintf(out, "%s\t%s\tpassed over: --claims deletes the claim too\n", l.pv.Name, what)
			continue
		}
		fmt.Fprintf(out, "%s\t%s\n", l.pv.Name, what)
		chosen = append(chosen, l)
	}
	switch {
	case len(chosen) == 0:
		fmt.Fprintln(out, "Nothing to do.")
		return nil
	case !f.apply:
		fmt.Fprintf(out, "%d PersistentVolumes would be deleted; --apply does it.\n", len(chosen))
		return nil
	}
	saved, err := f.keep(chosen)
	if err != nil {
		return err
	}
	for _, l := range chosen {
		if err := f.delete(ctx, client, l); err != nil {
			return fmt.Errorf("PersistentVolume %s: %w (what was to be deleted is in %s)", l.pv.Name, err, saved)
		}
	}
	fmt.Fprintf(out, "%d PersistentVolumes deleted. They are in %s.\n", len(chosen), saved)
	return nil
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

// volumes lists those that can be on the node only.
func (f *forgetting) volumes(ctx context.Context, client kubeapi.Interface) ([]lost, error) {
	list, err := client.PersistentVolumes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, err
	}
	a := adoption{node: f.node, driver: f.driver}
	var all []lost
	for i := range list.Items {
		pv := &list.Items[i]
		if pv.Spec.CSI == nil || pv.Spec.CSI.Driver != f.driver || !a.there(pv) {
			continue
		}
		l := lost{pv: pv}
		if ref := pv.Spec.ClaimRef; ref != nil {
			claim, err := client.PersistentVolumeClaims(ref.Namespace).Get(ctx, ref.Name, metav1.GetOptions{})
			switch {
			case err == nil && claim.UID == ref.UID && claim.Spec.VolumeName == pv.Name:
				l.claim = claim
			case err != nil && !apierrors.IsNotFound(err):
				return nil, err
			}
		}
		all = append(all, l)
	}
	return all, nil
}

// keep saves what is to be deleted, durably, and tells where. An earlier file is never
// written over.
func (f *forgetting) keep(all []lost) (path string, err error) {
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
	err = printManifests(file, objects...)
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
