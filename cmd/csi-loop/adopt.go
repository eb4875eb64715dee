package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"

	"github.com/csi-loop/csi-loop/pkg/driver"
	"github.com/csi-loop/csi-loop/pkg/image"
)

const adoptHelp = `Make the PersistentVolumes of a pool say that it is on another node, after its disk was
moved there. What says where a volume is cannot be changed in Kubernetes, so each
PersistentVolume is replaced by an equal one: it keeps its name and its claim.

The pool is named by its directory, or by --pool-id. The cluster is found as kubectl
finds it, but for the service account of a pod, which is never used. With --file the
PersistentVolumes are read from a file instead (as kubectl get pv -o yaml prints it);
then the new ones are printed, and nothing else is done.

It says what it would do, and with --apply does it. All old ones are written to the
file --save. Then, for one after the other:

  1. the policy becomes Retain, so that no deletion reaches the data; two annotations
     say which node it moves to, and which policy it had;
  2. the file says that the deletion begins;
  3. the old one is deleted, with its finalizers;
  4. the new one is created, with the policy that the old one had.

Between 3 and 4 the claim is shown as Lost, and recovers. A command that was
interrupted is completed by the same command in the same directory: it finds in the
file what is missing in the cluster. If the claim of such a volume was deleted
meanwhile, its policy stays Retain. A file of a move that is complete, or to another
node, is left alone: without --save the next free name is taken. A PersistentVolume
that somebody else deletes is passed over.

Stop the pods that use the volumes first, and have csi-loop on the new node serve the
pool.`

// adoption is what adopt was told.
type adoption struct {
	node, poolID, driver string
	cluster              clusterFlags
	file                 string
	save                 string
	apply                bool
}

func newAdoptCommand() *cobra.Command {
	var a adoption
	c := &cobra.Command{Use: "adopt [DIR]", Short: "Move the PersistentVolumes of a pool to the node that has its disk now", Long: adoptHelp, Args: cobra.MaximumNArgs(1)}
	c.Flags().StringVar(&a.node, "node", "", "name of the node that has the pool now")
	c.Flags().StringVar(&a.poolID, "pool-id", "", "ID of the pool, instead of its directory")
	c.Flags().StringVar(&a.driver, "driver-name", driver.DefaultName, "name of the driver")
	a.cluster.register(c.Flags())
	c.Flags().StringVar(&a.file, "file", "", "file with the PersistentVolumes, instead of a cluster; - is standard input")
	c.Flags().StringVar(&a.save, "save", "", "file for the old PersistentVolumes (default: csi-loop-adopt-<pool ID>.yaml, or -2.yaml and so on)")
	c.Flags().BoolVar(&a.apply, "apply", false, "do it")
	c.RunE = func(c *cobra.Command, args []string) error {
		if err := a.check(args); err != nil {
			return err
		}
		if a.file != "" {
			return failed(a.print(c.InOrStdin(), c.OutOrStdout()))
		}
		client, err := a.cluster.client()
		if err != nil {
			return err
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
	case a.file != "" && a.cluster.given():
		return usagef("--file is instead of a cluster: give no --kubeconfig and --context with it")
	case a.file != "" && a.apply:
		return usagef("--apply changes a cluster: give no --file with it")
	}
	return nil
}

func (a *adoption) topologyKey() string { return "topology." + a.driver + "/node" }

// The annotations of a PersistentVolume that is about to be replaced: the node that it
// moves to, and the policy that its successor is to have.
func (a *adoption) nodeKey() string   { return a.driver + "/adopt-node" }
func (a *adoption) policyKey() string { return a.driver + "/adopt-policy" }

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

// original is a PersistentVolume as it was before an attempt to move it to the node that
// was interrupted. What it became after an attempt for another node, it is: nobody knows
// what it was left so for.
func (a *adoption) original(pv *corev1.PersistentVolume) *corev1.PersistentVolume {
	old := pv.DeepCopy()
	policy, same := old.Annotations[a.policyKey()], old.Annotations[a.nodeKey()] == a.node
	delete(old.Annotations, a.policyKey())
	delete(old.Annotations, a.nodeKey())
	if policy != "" && same && old.Spec.PersistentVolumeReclaimPolicy == corev1.PersistentVolumeReclaimRetain {
		old.Spec.PersistentVolumeReclaimPolicy = corev1.PersistentVolumeReclaimPolicy(policy)
	}
	return old
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
			moved = append(moved, a.moved(a.original(&all[i])))
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
