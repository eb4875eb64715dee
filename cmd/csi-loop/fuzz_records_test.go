package main

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"

	"github.com/csi-loop/csi-loop/pkg/driver"
)

// hostile is a PersistentVolume with what others may have written into it.
func hostile(name, key, value string) *corev1.PersistentVolume {
	pv := persistent(name, movedPool, "a", corev1.PersistentVolumeReclaimDelete)
	pv.Annotations = map[string]string{key: value, value: key}
	pv.Labels = map[string]string{"x": value}
	pv.Spec.MountOptions = []string{value}
	return pv
}

// hostileText are the seeds of what others may write.
var hostileText = []string{
	"", "a: b", "x\n---\nkind: PersistentVolume", "\n" + recordPrefix + "complete\n", recordPrefix + "created uid-one one", "status: {}\n", "metadata:\n  creationTimestamp: null\n",
	"'\"\\", "\u2028\u0085\ufeff", "\x00\x01\x7f", "|\n\n  x", "- [", "null", "~", "0x1F", "true", "1e3", "!!binary eA==", "%YAML 1.1", strings.Repeat("long ", 100), "\ttab\r\n",
}

// FuzzAdoptSaves: whatever stands in a PersistentVolume, the record of a move tells it as
// it is, and what it tells beside that is what was said: also when the last line was cut
// by an interruption, and another was said behind it.
func FuzzAdoptSaves(f *testing.F) {
	for i, text := range hostileText {
		f.Add("key", text, uint16(i))
		f.Add(text, "value", uint16(7*i))
	}
	f.Fuzz(func(t *testing.T, key, value string, keep uint16) {
		key, value = strings.ToValidUTF8(key, "?"), strings.ToValidUTF8(value, "?") // as all that is in Kubernetes
		one, two := hostile("one", key, value), hostile("two", value, key)
		r := &record{path: filepath.Join(t.TempDir(), "r.yaml"), pool: movedPool, node: "b", begun: map[types.UID]bool{one.UID: true}, made: map[types.UID]bool{}}
		must := func(err error) {
			t.Helper()
			if err != nil {
				t.Fatal(err)
			}
		}
		must(r.start([]step{{pv: one}, {pv: two}}))
		want := &record{
			path: r.path, pool: movedPool, node: "b", begun: map[types.UID]bool{one.UID: true}, made: map[types.UID]bool{}, saved: []corev1.PersistentVolume{*one, *two},
		}
		check := func() {
			t.Helper()
			got, err := readRecord(r.path)
			must(err)
			for i := range got.saved {
				got.saved[i].TypeMeta = one.TypeMeta
			}
			if diff := cmp.Diff(want, got, cmp.AllowUnexported(record{})); diff != "" {
				t.Error(diff)
			}
		}
		check()
		whole, err := os.Stat(r.path)
		must(err)
		must(r.deleting(two))
		// Without its last character the line is not whole.
		said := int64(len("\n" + recordPrefix + "deleting uid-two two"))
		must(os.Truncate(r.path, whole.Size()+int64(keep)%(said+1)))
		check()
		must(r.created(one))
		want.made[one.UID] = true
		// What was cut is a line now, which may be whole.
		if got, err := readRecord(r.path); err == nil && got.begun[two.UID] {
			want.begun[two.UID] = true
		}
		check()
		r, err = readRecord(r.path)
		must(err)
		must(r.start(nil)) // as a move does that goes on
		check()
	})
}

// FuzzAdoptRecord: a file under the name of a record is refused, or is what it says: it is
// written again and read again as the same, and what is missing is among what it saved.
func FuzzAdoptRecord(f *testing.F) {
	sound := &record{path: filepath.Join(f.TempDir(), "r.yaml"), pool: movedPool, node: "b", begun: map[types.UID]bool{"uid-one": true}, made: map[types.UID]bool{"uid-one": true}}
	err := sound.start([]step{{pv: persistent("one", movedPool, "a", corev1.PersistentVolumeReclaimDelete)}})
	err = errors.Join(err, sound.finish())
	text, readErr := os.ReadFile(sound.path)
	if err = errors.Join(err, readErr); err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	head := recordPrefix + "pool " + movedPool + " node b\n"
	for _, s := range []string{
		"", head, head + head, head + "kind: PersistentVolume", head + "items: [{metadata: {uid: x, name: y}}]\n" + recordPrefix + "deleting x y\n",
		head + "{", head + "---\n---\n", head + "a: |\n x\n" + recordPrefix + "complete", head + "kind: PersistentVolume\nspec: {nodeAffinity: {required: {nodeSelectorTerms: [{}]}}}\n",
		head + "kind: List\nitems: [{}, {}]\n" + recordPrefix + "created  x\n", recordPrefix + "pool x node\n", head + "a: &a [*a]\n", head + "? {}: x\n", head + "\x00",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		path := filepath.Join(t.TempDir(), "r.yaml")
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
		r, err := readRecord(path)
		if err != nil {
			return
		}
		a := adoption{node: "b", poolID: r.pool, driver: driver.DefaultName}
		_ = a.overtaken(r, r.saved)
		missing := r.missing(nil)
		for i := range missing {
			if uid := missing[i].UID; !r.begun[uid] || r.made[uid] {
				t.Errorf("%q is missing", uid)
			}
		}
		if r.pool == "" {
			if len(r.saved) > 0 {
				t.Errorf("no record, and %d saved", len(r.saved))
			}
			return
		}
		if err := r.start(nil); err != nil {
			t.Fatal(err)
		}
		again, err := readRecord(path)
		if err != nil {
			t.Fatal(err)
		}
		if again.pool != r.pool || again.node != r.node || len(again.saved) != len(r.saved) || len(again.missing(nil)) != len(missing) {
			t.Errorf("%+v became %+v", r, again)
		}
	})
}

// FuzzForgetSaves: whatever stands in a PersistentVolume and its claim, or in the content
// of a snapshot, what forget saves makes them again as they were, but for what Kubernetes
// makes anew. What stands in a group makes nothing.
func FuzzForgetSaves(f *testing.F) {
	for _, text := range hostileText {
		f.Add("key", text)
		f.Add(text, "value")
	}
	f.Fuzz(func(t *testing.T, key, value string) {
		key, value = strings.ToValidUTF8(key, "?"), strings.ToValidUTF8(value, "?")
		l := lost{pv: hostile("one", key, value), claim: claimFor("one", "claim-1", "one")}
		l.claim.Annotations, l.claim.Labels = map[string]string{key: value}, map[string]string{"x": value}
		released := lost{pv: hostile("two", value, key)}
		forget := forgetting{node: "a", driver: driver.DefaultName, save: filepath.Join(t.TempDir(), "saved.yaml")}
		object := func(kind string) *unstructured.Unstructured {
			return &unstructured.Unstructured{Object: map[string]any{
				"kind": kind, "metadata": map[string]any{"name": "three", "annotations": map[string]any{key: value}}, "spec": map[string]any{key: value},
			}}
		}
		path, err := forget.keep([]lost{l, released}, []lostSnapshot{
			{kind: &snapshotKinds[0], content: object("VolumeSnapshotContent")}, {kind: &snapshotKinds[1], content: object("VolumeGroupSnapshotContent"), request: object("VolumeGroupSnapshot")},
		})
		if err != nil {
			t.Fatal(err)
		}
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		// As kubectl reads it: document by document.
		d := utilyaml.NewYAMLOrJSONDecoder(bytes.NewReader(text), 4096)
		var first, second corev1.PersistentVolume
		var claim corev1.PersistentVolumeClaim
		var content unstructured.Unstructured
		for _, to := range []any{&first, &claim, &second, &content.Object} {
			if err := d.Decode(to); err != nil {
				t.Fatalf("%v in\n%s", err, text)
			}
		}
		if err := d.Decode(&struct{}{}); !errors.Is(err, io.EOF) {
			t.Errorf("%v behind the last", err)
		}
		if diff := cmp.Diff(l.volume(), &first) + cmp.Diff(l.claimAgain(), &claim) + cmp.Diff(released.volume(), &second) +
			cmp.Diff(map[string]string{key: value}, content.GetAnnotations()); diff != "" {
			t.Errorf("%s in\n%s", diff, text)
		}
	})
}
