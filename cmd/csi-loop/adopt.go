package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/csi-loop/csi-loop/internal/kubeapi"
	"github.com/csi-loop/csi-loop/pkg/driver"
	"github.com/csi-loop/csi-loop/pkg/image"
)

const adoptHelp = `Make the PersistentVolumes of a pool say that it is on another node, after its disk was
moved there. What says where a volume is cannot be changed in Kubernetes, so each
PersistentVolume is replaced by an equal one: it keeps its name and its claim.

The pool is named by its directory, or by --pool-id. The PersistentVolumes are read
from the cluster (--kubeconfig), or from a file (--file, as kubectl get pv -o yaml
prints it); then the new ones are printed, and nothing else is done.

With --kubeconfig it says what it would do, and with --apply does it, one volume after
the other:

  1. all old ones are written to the file --save, unless that is there from before;
  2. the policy becomes Retain, so that no deletion reaches the data;
  3. the old one is deleted, with its finalizers;
  4. the new one is created, with the policy that the old one had.

Between 3 and 4 the claim is shown as Lost, and recovers. A command that was
interrupted is completed by the same command: it finds in the saved file what is
missing in the cluster. Stop the pods that use the volumes first, and have csi-loop
on the new node serve the pool.`

// adoption is what adopt was told.
type adoption struct {
	node, poolID, driver string
	kubeconfig, file     string
	save                 string
	apply                bool
}

func newAdoptCommand() *cobra.Command {
	var a adoption
	c := &cobra.Command{Use: "adopt [DIR]", Short: "Move the PersistentVolumes of a pool to the node that has its disk now", Long: adoptHelp, Args: cobra.MaximumNArgs(1)}
	c.Flags().StringVar(&a.node, "node", "", "name of the node that has the pool now")
	c.Flags().StringVar(&a.poolID, "pool-id", "", "ID of the pool, instead of its directory")
	c.Flags().StringVar(&a.driver, "driver-name", driver.DefaultName, "name of the driver")
	c.Flags().StringVar(&a.kubeconfig, "kubeconfig", "", "how to reach the cluster")
	c.Flags().StringVar(&a.file, "file", "", "file with the PersistentVolumes, instead of a cluster; - is standard input")
	c.Flags().StringVar(&a.save, "save", "", "file for the old PersistentVolumes (default: csi-loop-adopt-<pool ID>.yaml)")
	c.Flags().BoolVar(&a.apply, "apply", false, "do it")
	c.RunE = func(c *cobra.Command, args []string) error {
		if err := a.check(args); err != nil {
			return err
		}
		if a.file != "" {
			return failed(a.print(c.InOrStdin(), c.OutOrStdout()))
		}
		cfg, err := clientcmd.BuildConfigFromFlags("", a.kubeconfig)
		if err != nil {
			return usagef("--kubeconfig: %w", err)
		}
		client, err := kubeapi.NewForConfig(cfg)
		if err != nil {
			return failed(err)
		}
		return failed(a.run(c.Context(), client, c.OutOrStdout()))
	}
	return c
}

func (a *adoption) check(args []string) error {
	if len(args) == 1 {
		s, err := inspect(args[0])
		if err != nil {
			return failed(err)
		}
		if a.poolID != "" && a.poolID != s.ID {
			return usagef("--pool-id %q: %s has the pool %s", a.poolID, args[0], s.ID)
		}
		a.poolID = s.ID
	}
	_, _, ok := image.ParseID(image.VolumeID(a.poolID, "x"))
	switch {
	case a.poolID == "":
		return usagef("no pool: give its directory or --pool-id")
	case !ok:
		return usagef("--pool-id %q: is not the ID of a pool", a.poolID)
	case a.node == "":
		return usagef("no node: give --node=NAME, the node that has the pool now")
	case (a.file == "") == (a.kubeconfig == ""):
		return usagef("give --kubeconfig or --file")
	case a.file != "" && a.apply:
		return usagef("--apply needs --kubeconfig")
	}
	if a.save == "" {
		a.save = "csi-loop-adopt-" + a.poolID + ".yaml"
	}
	return nil
}

func (a *adoption) topologyKey() string { return "topology." + a.driver + "/node" }

// mine tells whether a PersistentVolume is of the pool.
func (a *adoption) mine(pv *corev1.PersistentVolume) bool {
	return pv.Spec.CSI != nil && pv.Spec.CSI.Driver == a.driver && strings.HasPrefix(pv.Spec.CSI.VolumeHandle, a.poolID+".")
}

// there tells whether a PersistentVolume says the new node already.
func (a *adoption) there(pv *corev1.PersistentVolume) bool {
	if pv.Spec.NodeAffinity == nil || pv.Spec.NodeAffinity.Required == nil || len(pv.Spec.NodeAffinity.Required.NodeSelectorTerms) != 1 {
		return false
	}
	e := pv.Spec.NodeAffinity.Required.NodeSelectorTerms[0].MatchExpressions
	return len(e) == 1 && e[0].Key == a.topologyKey() && e[0].Operator == corev1.NodeSelectorOpIn && len(e[0].Values) == 1 && e[0].Values[0] == a.node
}

// moved is the new PersistentVolume for an old one.
func (a *adoption) moved(old *corev1.PersistentVolume) *corev1.PersistentVolume {
	pv := &corev1.PersistentVolume{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "PersistentVolume"},
		ObjectMeta: metav1.ObjectMeta{Name: old.Name, Labels: old.Labels, Annotations: old.Annotations},
		Spec:       *old.Spec.DeepCopy(),
	}
	pv.Spec.NodeAffinity = onNode(a.topologyKey(), a.node)
	if pv.Spec.ClaimRef != nil {
		pv.Spec.ClaimRef.ResourceVersion = "" // its name and UID are what binds
	}
	return pv
}

// print prints the new PersistentVolumes for those in the file.
func (a *adoption) print(in io.Reader, out io.Writer) error {
	if a.file != "-" {
		f, err := os.Open(a.file)
		if err != nil {
			return err
		}
		defer f.Close()
		in = f
	}
	all, err := readVolumes(in)
	if err != nil {
		return fmt.Errorf("%s: %w", a.file, err)
	}
	var moved []any
	for i := range all {
		if a.mine(&all[i]) {
			moved = append(moved, a.moved(&all[i]))
		}
	}
	if len(moved) == 0 {
		return fmt.Errorf("%s has no PersistentVolume of pool %s", a.file, a.poolID)
	}
	return printManifests(out, moved...)
}

// readVolumes reads PersistentVolumes, or lists of them, in YAML or JSON.
func readVolumes(in io.Reader) ([]corev1.PersistentVolume, error) {
	var all []corev1.PersistentVolume
	for d := utilyaml.NewYAMLOrJSONDecoder(in, 4096); ; {
		var one struct {
			corev1.PersistentVolume `json:",inline"`

			Items []corev1.PersistentVolume `json:"items"`
		}
		err := d.Decode(&one)
		switch {
		case errors.Is(err, io.EOF):
			return all, nil
		case err != nil:
			return nil, err
		case one.Kind == "PersistentVolume":
			all = append(all, one.PersistentVolume)
		default:
			all = append(all, one.Items...)
		}
	}
}

// run replaces the PersistentVolumes in the cluster, or says that it would.
func (a *adoption) run(ctx context.Context, client kubeapi.Interface, out io.Writer) error {
	listed, err := client.PersistentVolumes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	inCluster := map[string]*corev1.PersistentVolume{}
	var old []corev1.PersistentVolume
	for i := range listed.Items {
		pv := &listed.Items[i]
		inCluster[pv.Name] = pv
		if a.mine(pv) && !a.there(pv) {
			old = append(old, *pv)
		}
	}
	saved, err := a.saved()
	if err != nil {
		return err
	}
	policy := map[string]corev1.PersistentVolumeReclaimPolicy{}
	known := map[string]bool{}
	var missing []corev1.PersistentVolume
	for _, pv := range saved {
		policy[pv.Name], known[pv.Name] = pv.Spec.PersistentVolumeReclaimPolicy, true
		if a.mine(&pv) && inCluster[pv.Name] == nil {
			missing = append(missing, pv)
		}
	}
	for _, pv := range append(missing, old...) {
		fmt.Fprintf(out, "%s\t%s\t-> node %s\n", pv.Name, pv.Spec.CSI.VolumeHandle, a.node)
	}
	switch {
	case len(missing)+len(old) == 0:
		fmt.Fprintln(out, "Nothing to do.")
		return nil
	case !a.apply:
		fmt.Fprintf(out, "%d PersistentVolumes would be replaced; --apply does it.\n", len(missing)+len(old))
		return nil
	}
	if err := a.keep(saved, old, known); err != nil {
		return err
	}
	for i := range missing {
		if err := a.create(ctx, client, &missing[i]); err != nil {
			return err
		}
	}
	for i := range old {
		if p, ok := policy[old[i].Name]; ok { // an earlier attempt may have changed it
			old[i].Spec.PersistentVolumeReclaimPolicy = p
		}
		if err := a.replace(ctx, client, &old[i]); err != nil {
			return fmt.Errorf("PersistentVolume %s: %w (repeat the command to go on; the old ones are in %s)", old[i].Name, err, a.save)
		}
	}
	fmt.Fprintf(out, "%d PersistentVolumes replaced. The old ones are in %s.\n", len(missing)+len(old), a.save)
	return nil
}

// saved reads what an earlier attempt saved.
func (a *adoption) saved() ([]corev1.PersistentVolume, error) {
	b, err := os.ReadFile(a.save)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	all, err := readVolumes(bytes.NewReader(b))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", a.save, err)
	}
	return all, nil
}

// keep saves the old PersistentVolumes, durably, beside those that an earlier attempt
// saved.
func (a *adoption) keep(saved, old []corev1.PersistentVolume, known map[string]bool) error {
	var objects []any
	for i := range saved {
		objects = append(objects, &saved[i])
	}
	for i := range old {
		if !known[old[i].Name] {
			pv := old[i].DeepCopy()
			pv.TypeMeta = metav1.TypeMeta{APIVersion: "v1", Kind: "PersistentVolume"}
			objects = append(objects, pv)
		}
	}
	f, err := os.OpenFile(a.save+".new", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	err = printManifests(f, objects...)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	return os.Rename(a.save+".new", a.save)
}

// replace puts the new PersistentVolume in the place of the old one.
func (a *adoption) replace(ctx context.Context, client kubeapi.Interface, old *corev1.PersistentVolume) error {
	volumes := client.PersistentVolumes()
	// With it in force no deletion of the object reaches the data.
	patch := `{"spec":{"persistentVolumeReclaimPolicy":"Retain"}}`
	if _, err := volumes.Patch(ctx, old.Name, types.MergePatchType, []byte(patch), metav1.PatchOptions{}); err != nil {
		return err
	}
	err := volumes.Delete(ctx, old.Name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &old.UID}})
	if err != nil && !apierrors.IsNotFound(err) {
		return err
	}
	// Its protection waits for the claim, which is to keep it.
	patch = `{"metadata":{"finalizers":null,"uid":"` + string(old.UID) + `"}}`
	_, err = volumes.Patch(ctx, old.Name, types.MergePatchType, []byte(patch), metav1.PatchOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		return err
	}
	return a.create(ctx, client, old)
}

func (a *adoption) create(ctx context.Context, client kubeapi.Interface, old *corev1.PersistentVolume) error {
	_, err := client.PersistentVolumes().Create(ctx, a.moved(old), metav1.CreateOptions{})
	return err
}
