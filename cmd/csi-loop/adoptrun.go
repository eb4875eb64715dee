package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/csi-loop/csi-loop/internal/kubeapi"
)

// step is one PersistentVolume to replace.
type step struct {
	pv      *corev1.PersistentVolume // as it was, with the policy that the new one gets
	missing bool                     // an attempt that was interrupted deleted it
	note    string
}

// run replaces the PersistentVolumes in the cluster, or says that it would.
func (a *adoption) run(ctx context.Context, client kubeapi.Interface, out io.Writer) error {
	listed, err := client.PersistentVolumes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	r, over, err := a.findRecord(listed.Items)
	if err != nil {
		return err
	}
	resumed := r != nil
	if !resumed {
		r = &record{}
	}
	steps, err := a.restore(ctx, client, r.missing(names(listed.Items)))
	if err != nil {
		return err
	}
	steps = append(steps, a.replacements(listed.Items, r, out)...)
	for _, s := range steps {
		fmt.Fprintf(out, "%s\t%s\t-> node %s%s\n", s.pv.Name, s.pv.Spec.CSI.VolumeHandle, a.node, s.note)
	}
	switch {
	case len(steps) == 0:
		fmt.Fprintln(out, "Nothing to do.")
		if resumed {
			over = append(over, r)
		}
		return a.end(over)
	case !resumed:
		if r, err = a.newRecord(); err != nil {
			return err
		}
	}
	if !a.apply {
		fmt.Fprintf(out, "%d PersistentVolumes would be replaced; --apply does it.\n", len(steps))
		return nil
	}
	if err := a.end(over); err != nil {
		return err
	}
	if err := a.carryOut(ctx, client, r, steps); err != nil {
		return err
	}
	fmt.Fprintf(out, "%d PersistentVolumes replaced. The old ones are in %s.\n", len(steps), r.path)
	return nil
}

// end has nothing go on with these records any more: what is missing after a later move
// was taken away on purpose.
func (a *adoption) end(over []*record) error {
	for _, r := range over {
		if !a.apply {
			return nil
		}
		if err := r.finish(); err != nil {
			return err
		}
	}
	return nil
}

// replacements chooses among what the cluster has.
func (a *adoption) replacements(listed []corev1.PersistentVolume, r *record, out io.Writer) []step {
	var steps []step
	for i := range listed {
		pv := &listed[i]
		switch {
		case !a.mine(pv) || a.there(pv):
		case pv.DeletionTimestamp != nil && !r.begun[pv.UID]:
			fmt.Fprintf(out, "%s\t%s\tpassed over: somebody else deletes it\n", pv.Name, pv.Spec.CSI.VolumeHandle)
		default:
			steps = append(steps, step{pv: a.original(pv)})
		}
	}
	return steps
}

// restore is what is to be done for PersistentVolumes that adopt deleted. The provisioner
// deletes the image of one that has no claim and is not retained: without its claim it
// may be missing because an administrator took it away, to keep the data.
func (a *adoption) restore(ctx context.Context, client kubeapi.Interface, missing []corev1.PersistentVolume) ([]step, error) {
	var steps []step
	for i := range missing {
		s := step{pv: &missing[i], missing: true}
		if ref := s.pv.Spec.ClaimRef; ref != nil && ref.UID != "" {
			claim, err := client.PersistentVolumeClaims(ref.Namespace).Get(ctx, ref.Name, metav1.GetOptions{})
			if err != nil && !apierrors.IsNotFound(err) {
				return nil, err
			}
			if err != nil || claim.UID != ref.UID || claim.Spec.VolumeName != s.pv.Name {
				s.pv.Spec.PersistentVolumeReclaimPolicy = corev1.PersistentVolumeReclaimRetain
				s.note = ", with the policy Retain: its claim is gone"
			}
		}
		steps = append(steps, s)
	}
	return steps, nil
}

// carryOut replaces, and completes the record.
func (a *adoption) carryOut(ctx context.Context, client kubeapi.Interface, r *record, steps []step) error {
	if err := r.start(steps); err != nil {
		return err
	}
	for _, s := range steps {
		do := a.replace
		if s.missing {
			do = a.create
		}
		if err := do(ctx, client, r, s.pv); err != nil {
			return fmt.Errorf("PersistentVolume %s: %w (repeat the command to go on; the old ones are in %s)", s.pv.Name, err, r.path)
		}
	}
	return r.finish()
}

// replace puts the new PersistentVolume in the place of the old one.
func (a *adoption) replace(ctx context.Context, client kubeapi.Interface, r *record, old *corev1.PersistentVolume) error {
	volumes := client.PersistentVolumes()
	// With Retain in force no deletion of the object reaches the data. If it is not as it
	// was listed any more, its policy may be another too, and nothing is changed.
	patch, err := json.Marshal(map[string]any{
		"metadata": map[string]any{
			"uid": old.UID, "resourceVersion": old.ResourceVersion,
			"annotations": map[string]any{a.nodeKey(): a.node, a.policyKey(): old.Spec.PersistentVolumeReclaimPolicy},
		},
		"spec": map[string]any{"persistentVolumeReclaimPolicy": corev1.PersistentVolumeReclaimRetain},
	})
	if err != nil {
		return err
	}
	if _, err := volumes.Patch(ctx, old.Name, types.MergePatchType, patch, metav1.PatchOptions{}); err != nil {
		return err
	}
	if err := r.deleting(old); err != nil {
		return err
	}
	err = volumes.Delete(ctx, old.Name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &old.UID}})
	if err != nil && !apierrors.IsNotFound(err) {
		return err
	}
	// Its protection waits for the claim, which is to keep it.
	patch = []byte(`{"metadata":{"finalizers":null,"uid":"` + string(old.UID) + `"}}`)
	_, err = volumes.Patch(ctx, old.Name, types.MergePatchType, patch, metav1.PatchOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		return err
	}
	return a.create(ctx, client, r, old)
}

// create makes the successor of a PersistentVolume that is deleted.
func (a *adoption) create(ctx context.Context, client kubeapi.Interface, r *record, old *corev1.PersistentVolume) error {
	if _, err := client.PersistentVolumes().Create(ctx, a.moved(old), metav1.CreateOptions{}); err != nil {
		return err
	}
	return r.created(old)
}
