package main

import (
	"context"
	"fmt"
	"io"
	"regexp"
	"strings"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/csi-loop/csi-loop/internal/yamltext"
	"github.com/csi-loop/csi-loop/pkg/driver"
)

const importHelp = `Make a volume of the content of an image file, and print the PersistentVolume and the
claim that Kubernetes needs for it:

  csi-loop import --claim=shop/data /srv/old.img | kubectl apply -f -

The content is a filesystem (ext2, ext3, ext4, XFS or btrfs), which is recognised and
left as it is, or with --raw anything. It keeps its UUID. It is the whole file, a range
(--offset, --length), or a partition. The volume is at least as large, and its
filesystem grows to that when it is mounted.

The method is auto (reflink for thin volumes where that works, else copy), copy,
reflink (the pool and the file are on one filesystem that can) or move (the file itself
becomes the image and loses its name; a whole file on the mount of the pool, as is one in
the pool's directory "incoming"). Nobody may use the file meanwhile. A command that was
interrupted has changed nothing, or is completed by repeating it. A name that exists is
refused, unless the same bytes of the same unchanged file were taken in.`

// importFlags are those of import alone.
type importFlags struct {
	content      contentFlags
	name         string
	claim        string
	storageClass string
	reclaim      string
	allocation   string
	directIO     string
}

func newImportCommand() *cobra.Command {
	var f importFlags
	c := &cobra.Command{Use: "import FILE", Short: "Make a volume of an image file", Long: importHelp, Args: cobra.ExactArgs(1)}
	s := newStewardCommand(c, "import FILE")
	f.content.register(c.Flags(), "auto, copy, reflink or move")
	c.Flags().StringVar(&f.name, "name", "", "name of the volume and the PersistentVolume (default: of the claim)")
	c.Flags().StringVar(&f.claim, "claim", "", "NAMESPACE/NAME of the claim that the volume is for")
	c.Flags().StringVar(&f.storageClass, "storage-class", "", "StorageClass to write into both (default: none)")
	c.Flags().StringVar(&f.reclaim, "reclaim", "Retain", "Retain or Delete: what becomes of the volume without its claim")
	c.Flags().StringVar(&f.allocation, "allocation", "thick", "thick or thin")
	c.Flags().StringVar(&f.directIO, "direct-io", "auto", "auto, on or off")
	c.RunE = func(c *cobra.Command, args []string) error {
		namespace, claim, err := f.check()
		if err != nil {
			return err
		}
		r, err := f.content.request(args[0])
		if err != nil {
			return err
		}
		r.Name, r.Pool, r.Allocation, r.DirectIO = f.name, s.pool, f.allocation, f.directIO
		return failed(s.with(c.Context(), func(ctx context.Context, who steward) error {
			p, err := takeIn(ctx, who, r, c.ErrOrStderr())
			if err != nil {
				return err
			}
			return printManifests(c.OutOrStdout(), f.volume(p.Volume, namespace, claim), f.claimFor(p.Volume, namespace, claim))
		}))
	}
	return c
}

// check completes the names.
func (f *importFlags) check() (namespace, claim string, err error) {
	namespace, claim, ok := strings.Cut(f.claim, "/")
	switch {
	case f.claim == "" && f.name == "":
		return "", "", usagef("no name: give --claim=NAMESPACE/NAME, --name=NAME or both")
	case f.claim == "":
		namespace, claim = metav1.NamespaceDefault, f.name
	case !ok || len(validation.IsDNS1123Label(namespace)) > 0 || len(validation.IsDNS1123Subdomain(claim)) > 0:
		return "", "", usagef("--claim %q: is not NAMESPACE/NAME", f.claim)
	case f.name == "":
		f.name = namespace + "." + claim // no namespace has a dot: no two claims have one name
	}
	switch {
	case len(validation.IsDNS1123Subdomain(f.name)) > 0 || len(f.name) > 128:
		return "", "", usagef("--name %q: is no name of a PersistentVolume of at most 128 bytes: a to z, 0 to 9, '-' and '.'", f.name)
	case f.reclaim != string(corev1.PersistentVolumeReclaimRetain) && f.reclaim != string(corev1.PersistentVolumeReclaimDelete):
		return "", "", usagef("--reclaim %q: is neither Retain nor Delete", f.reclaim)
	}
	return namespace, claim, nil
}

func mode(v *driver.TakenIn) *corev1.PersistentVolumeMode {
	if v.Filesystem == "" {
		return new(corev1.PersistentVolumeBlock)
	}
	return new(corev1.PersistentVolumeFilesystem)
}

func capacity(v *driver.TakenIn) corev1.ResourceList {
	return corev1.ResourceList{corev1.ResourceStorage: *resource.NewQuantity(v.Size, resource.BinarySI)}
}

// volume is the PersistentVolume of an imported volume.
func (f *importFlags) volume(v *driver.TakenIn, namespace, claim string) *corev1.PersistentVolume {
	return &corev1.PersistentVolume{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "PersistentVolume"},
		// As if it had been provisioned, so that the provisioner deletes it if asked to.
		ObjectMeta: metav1.ObjectMeta{Name: f.name, Annotations: map[string]string{"pv.kubernetes.io/provisioned-by": v.Driver}},
		Spec: corev1.PersistentVolumeSpec{
			Capacity: capacity(v), AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce}, VolumeMode: mode(v),
			PersistentVolumeReclaimPolicy: corev1.PersistentVolumeReclaimPolicy(f.reclaim), StorageClassName: f.storageClass,
			ClaimRef: &corev1.ObjectReference{APIVersion: "v1", Kind: "PersistentVolumeClaim", Namespace: namespace, Name: claim},
			PersistentVolumeSource: corev1.PersistentVolumeSource{CSI: &corev1.CSIPersistentVolumeSource{
				Driver: v.Driver, VolumeHandle: v.ID, FSType: v.Filesystem,
			}},
			NodeAffinity: onNode(v.Topology, v.Node),
		},
	}
}

// onNode says that a volume is on one node.
func onNode(key, node string) *corev1.VolumeNodeAffinity {
	return &corev1.VolumeNodeAffinity{Required: &corev1.NodeSelector{NodeSelectorTerms: []corev1.NodeSelectorTerm{{
		MatchExpressions: []corev1.NodeSelectorRequirement{{Key: key, Operator: corev1.NodeSelectorOpIn, Values: []string{node}}},
	}}}}
}

// claimFor is the claim for an imported volume.
func (f *importFlags) claimFor(v *driver.TakenIn, namespace, claim string) *corev1.PersistentVolumeClaim {
	return &corev1.PersistentVolumeClaim{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "PersistentVolumeClaim"},
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: claim},
		Spec: corev1.PersistentVolumeClaimSpec{
			AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce}, VolumeMode: mode(v),
			Resources:  corev1.VolumeResourceRequirements{Requests: capacity(v)},
			VolumeName: f.name, StorageClassName: new(f.storageClass),
		},
	}
}

// unfilled are fields that the API server fills in.
var unfilled = regexp.MustCompile(`(?m)^(status: \{\}|  creationTimestamp: null)\n`)

// printManifests writes objects for kubectl apply.
func printManifests(out io.Writer, objects ...any) error {
	for i, o := range objects {
		b, err := yamltext.Marshal(o)
		if err != nil {
			return err
		}
		b = unfilled.ReplaceAll(b, nil)
		if i > 0 {
			fmt.Fprintln(out, "---")
		}
		if _, err := out.Write(b); err != nil {
			return err
		}
	}
	return nil
}
