package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"

	"github.com/csi-loop/csi-loop/pkg/image"
)

// snapshotKind is one of two kinds of snapshots. What Kubernetes knows of the snapshot is
// its content, as a PersistentVolume is; what a user asked for is the request, as a claim.
type snapshotKind struct {
	what               string
	group              string
	versions           []string // the first that the cluster serves is used
	contents, requests string   // resources
	ref                []string // in a content: its request
	name               []string // in a request: the content that it was made for
	// In a content: its handle, or that of a volume that it is to be taken of. The first
	// that is there counts.
	handles, volumes [][]string
}

var snapshotKinds = []snapshotKind{
	{
		what: "snapshot", group: "snapshot.storage.k8s.io", versions: []string{"v1"}, contents: "volumesnapshotcontents", requests: "volumesnapshots",
		ref: []string{"spec", "volumeSnapshotRef"}, name: []string{"spec", "source", "volumeSnapshotContentName"},
		handles: [][]string{{"status", "snapshotHandle"}, {"spec", "source", "snapshotHandle"}}, volumes: [][]string{{"spec", "source", "volumeHandle"}},
	},
	// After the others: where a request of a group is deleted, those of its members are, and
	// their contents change.
	{
		what: "group snapshot", group: "groupsnapshot.storage.k8s.io", versions: []string{"v1", "v1beta2", "v1beta1"},
		contents: "volumegroupsnapshotcontents", requests: "volumegroupsnapshots",
		ref: []string{"spec", "volumeGroupSnapshotRef"}, name: []string{"spec", "source", "volumeGroupSnapshotContentName"},
		handles: [][]string{{"status", "volumeGroupSnapshotHandle"}, {"spec", "source", "groupSnapshotHandles", "volumeGroupSnapshotHandle"}},
		volumes: [][]string{{"spec", "source", "volumeHandles"}},
	},
}

// lostSnapshot is a snapshot of a lost pool.
type lostSnapshot struct {
	kind             *snapshotKind
	version          string
	content, request *unstructured.Unstructured // the request is nil where there is none
	handle           string                     // "": it was never taken
	pool             string                     // ID
}

func (s *lostSnapshot) resource(name string) schema.GroupVersionResource {
	return schema.GroupVersionResource{Group: s.kind.group, Version: s.version, Resource: name}
}

// String says whose it is.
func (s *lostSnapshot) String() string {
	if s.request == nil {
		return "no " + s.kind.what
	}
	return s.kind.what + " " + s.request.GetNamespace() + "/" + s.request.GetName()
}

// lostPools are those that were named, and otherwise those of the volumes. Of the volumes
// it returns those that are in them, and says which are not.
func (f *forgetting) lostPools(all []lost, elsewhere map[string]string, out io.Writer) (volumes []lost, pools []string, err error) {
	here := map[string]bool{}
	for _, l := range all {
		here[l.pool()] = true
	}
	if len(f.pools) == 0 {
		return all, slices.Sorted(maps.Keys(here)), nil
	}
	for _, id := range f.pools {
		if _, _, ok := image.ParseID(image.VolumeID(id, "x")); !ok && id != noPool {
			return nil, nil, usagef("--pool-id %q: is not the ID of a pool", id)
		}
		if pv, ok := elsewhere[id]; ok && !here[id] {
			return nil, nil, fmt.Errorf("--pool-id %s: the pool is not lost: PersistentVolume %s of it is not on node %s", id, pv, f.node)
		}
	}
	for _, l := range all {
		if slices.Contains(f.pools, l.pool()) {
			volumes = append(volumes, l)
		} else {
			fmt.Fprintf(out, "%s\t%s\tpassed over: of another pool\n", l.pv.Name, l.pool())
		}
	}
	return volumes, f.pools, nil
}

// withoutMoved leaves out, and says, of which pools the snapshots are not lost: one that
// has volumes elsewhere was moved with its disk.
func (f *forgetting) withoutMoved(pools []string, elsewhere map[string]string, out io.Writer) []string {
	return slices.DeleteFunc(slices.Clone(pools), func(id string) bool {
		pv, ok := elsewhere[id]
		if ok {
			fmt.Fprintf(out, "pool %s\tits snapshots are passed over: PersistentVolume %s of it is not on node %s\n", id, pv, f.node)
		}
		return ok
	})
}

// lostSnapshots lists the snapshots of pools. A cluster that does not know a kind has none.
func (f *forgetting) lostSnapshots(ctx context.Context, pools []string) ([]lostSnapshot, error) {
	var all []lostSnapshot
	for i := range snapshotKinds {
		k := &snapshotKinds[i]
		list, version, err := f.contents(ctx, k)
		if err != nil {
			return nil, err
		}
		for j := range list {
			s := lostSnapshot{kind: k, version: version, content: &list[j]}
			s.handle = stringAt(s.content, k.handles...)
			of := s.handle
			if of == "" {
				of = stringAt(s.content, k.volumes...)
			}
			var ok bool
			if s.pool, _, ok = image.ParseID(of); stringAt(s.content, []string{"spec", "driver"}) != f.driver || !ok || !slices.Contains(pools, s.pool) {
				continue
			}
			if s.request, err = f.request(ctx, &s); err != nil {
				return nil, err
			}
			all = append(all, s)
		}
	}
	return all, nil
}

// choose says which there are, and keeps those that are to be ended.
func (f *forgetting) choose(all []lostSnapshot, out io.Writer) []lostSnapshot {
	var chosen []lostSnapshot
	for i := range all {
		s := &all[i]
		if s.request != nil && !f.claims {
			fmt.Fprintf(out, "%s\t%s\t%s\tpassed over: --claims deletes the %s too\n", s.content.GetName(), s.pool, s, s.kind.what)
			continue
		}
		fmt.Fprintf(out, "%s\t%s\t%s\n", s.content.GetName(), s.pool, s)
		chosen = append(chosen, *s)
	}
	return chosen
}

// contents lists those of a kind, in the first version that there is.
func (f *forgetting) contents(ctx context.Context, k *snapshotKind) ([]unstructured.Unstructured, string, error) {
	for _, version := range k.versions {
		list, err := f.dynamic.Resource(schema.GroupVersionResource{Group: k.group, Version: version, Resource: k.contents}).List(ctx, metav1.ListOptions{})
		switch {
		case err == nil:
			return list.Items, version, nil
		case !apierrors.IsNotFound(err):
			return nil, "", fmt.Errorf("%s: %w", k.contents, err)
		}
	}
	return nil, "", nil
}

// request finds who a content is for, nil if it is gone: one that only has its name is
// another.
func (f *forgetting) request(ctx context.Context, s *lostSnapshot) (*unstructured.Unstructured, error) {
	ref := func(field string) string { return stringAt(s.content, append(slices.Clone(s.kind.ref), field)) }
	if ref("namespace") == "" || ref("name") == "" {
		return nil, nil //nolint:nilnil // there is none
	}
	r, err := f.dynamic.Resource(s.resource(s.kind.requests)).Namespace(ref("namespace")).Get(ctx, ref("name"), metav1.GetOptions{})
	switch uid := ref("uid"); {
	case apierrors.IsNotFound(err):
		return nil, nil //nolint:nilnil // as above
	case err != nil:
		return nil, err
	case uid == string(r.GetUID()), uid == "" && stringAt(r, s.kind.name) == s.content.GetName():
		return r, nil
	default:
		return nil, nil //nolint:nilnil // as above
	}
}

// stringAt is the first string that is there, or first of strings.
func stringAt(o *unstructured.Unstructured, paths ...[]string) string {
	for _, path := range paths {
		v, ok, err := unstructured.NestedFieldNoCopy(o.Object, path...)
		if many, is := v.([]any); is && len(many) > 0 {
			v = many[0]
		}
		if s, is := v.(string); is && ok && err == nil && s != "" {
			return s
		}
	}
	return ""
}

// again is what can be created again: the content as one of a snapshot that is there, and
// its request for that content. What was never taken is asked for again, and its content
// is made by Kubernetes.
func (s *lostSnapshot) again() []any {
	var objects []any
	if s.handle != "" || s.request == nil {
		content := bare(s.content, "snapshot.storage.kubernetes.io/volumesnapshot-being-created", "snapshot.storage.kubernetes.io/volumesnapshot-being-deleted")
		set(content, "Retain", "spec", "deletionPolicy")
		if s.handle != "" {
			set(content, map[string]any{"snapshotHandle": s.handle}, "spec", "source")
		}
		unstructured.RemoveNestedField(content, append(slices.Clone(s.kind.ref), "resourceVersion")...)
		if s.request != nil {
			unstructured.RemoveNestedField(content, append(slices.Clone(s.kind.ref), "uid")...)
		}
		objects = append(objects, content)
	}
	if s.request != nil {
		request := bare(s.request)
		if s.handle != "" {
			set(request, map[string]any{s.kind.name[2]: s.content.GetName()}, "spec", "source")
		}
		objects = append(objects, request)
	}
	return objects
}

// bare is an object without what Kubernetes sets.
func bare(o *unstructured.Unstructured, annotations ...string) map[string]any {
	metadata := map[string]any{"name": o.GetName()}
	if ns := o.GetNamespace(); ns != "" {
		metadata["namespace"] = ns
	}
	if labels := o.GetLabels(); len(labels) > 0 {
		metadata["labels"] = labels
	}
	if a := without(o.GetAnnotations(), annotations...); len(a) > 0 {
		metadata["annotations"] = a
	}
	c := o.DeepCopy()
	return map[string]any{"apiVersion": c.GetAPIVersion(), "kind": c.GetKind(), "metadata": metadata, "spec": c.Object["spec"]}
}

func set(o map[string]any, value any, path ...string) {
	if err := unstructured.SetNestedField(o, value, path...); err != nil {
		panic(fmt.Sprintf("BUG: %v", err)) // an object of the API server has a spec
	}
}

// keepSnapshots writes snapshots after what the file has. A group is not made again, or
// Kubernetes would make its snapshots a second time: it is there to be read.
func keepSnapshots(file io.Writer, all []lostSnapshot, separate bool) error {
	var again, groups []any
	for i := range all {
		s := &all[i]
		switch {
		case s.kind == &snapshotKinds[0]:
			again = append(again, s.again()...)
		case s.request != nil:
			groups = append(groups, unmanaged(s.content), unmanaged(s.request))
		default:
			groups = append(groups, unmanaged(s.content))
		}
	}
	if separate && len(again) > 0 {
		fmt.Fprintln(file, "---")
	}
	err := printManifests(file, again...)
	if len(groups) > 0 {
		var text bytes.Buffer
		err = errors.Join(err, printManifests(&text, groups...))
		_, werr := fmt.Fprintf(file, "# Groups that were deleted. Their snapshots are above, each by itself.\n# %s\n",
			bytes.ReplaceAll(bytes.TrimSpace(text.Bytes()), []byte("\n"), []byte("\n# ")))
		err = errors.Join(err, werr)
	}
	return err
}

// unmanaged is an object without who set which field.
func unmanaged(o *unstructured.Unstructured) map[string]any {
	o = o.DeepCopy()
	o.SetManagedFields(nil)
	return o.Object
}

// end deletes what Kubernetes knows of one snapshot, and nothing of what is on a disk.
func (f *forgetting) end(ctx context.Context, s *lostSnapshot) error {
	contents := f.dynamic.Resource(s.resource(s.kind.contents))
	uid := s.content.GetUID()
	// With it in force nobody asks csi-loop to delete the snapshot, and the request does not
	// wait for that. It is refused when somebody changed the object meanwhile.
	patch := `{"spec":{"deletionPolicy":"Retain"},"metadata":{"uid":"` + string(uid) + `","resourceVersion":"` + s.content.GetResourceVersion() + `"}}`
	if _, err := contents.Patch(ctx, s.content.GetName(), types.MergePatchType, []byte(patch), metav1.PatchOptions{}); err != nil {
		return err
	}
	if s.request != nil {
		// The snapshot-controller takes its finalizers away, once the content is gone at the latest.
		of := s.request.GetUID()
		err := f.dynamic.Resource(s.resource(s.kind.requests)).Namespace(s.request.GetNamespace()).
			Delete(ctx, s.request.GetName(), metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &of}})
		if err != nil && !apierrors.IsNotFound(err) {
			return err
		}
	}
	err := contents.Delete(ctx, s.content.GetName(), metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &uid}})
	if err != nil && !apierrors.IsNotFound(err) {
		return err
	}
	// The snapshotter's is for a node that is gone, and it may still wait for that.
	patch = `{"metadata":{"finalizers":null,"uid":"` + string(uid) + `"}}`
	_, err = contents.Patch(ctx, s.content.GetName(), types.MergePatchType, []byte(patch), metav1.PatchOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		return err
	}
	return nil
}

// dynamicClient is for kinds that not every cluster has.
func (k *clusterFlags) dynamicClient() (dynamic.Interface, error) {
	cfg, err := k.config()
	if err != nil {
		return nil, err
	}
	client, err := dynamic.NewForConfig(cfg)
	return client, failed(err)
}
