package driver

import (
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/csi-loop/csi-loop/pkg/image"
)

// goodValues are values that a key takes, if they are not the first that its
// description shows.
var goodValues = map[string]string{
	paramPool: "default", paramMkfsOptions: "-m 1", paramTemplate: "golden", paramFreezeTimeout: "1m", paramReadAhead: "0",
	attrImage: "/images/a.img", attrOffset: "512", attrSizeLimit: "1Mi", attrPartition: "1", paramSize: "1Gi",
	paramEncryptedDiscard: "false", // true needs others with it
}

// goodValue is one that a description says is taken.
func goodValue(t *testing.T, p Parameter) string {
	t.Helper()
	if v, ok := goodValues[p.Name]; ok {
		return v
	}
	parts := strings.Split(p.Values, "`")
	if len(parts) < 3 {
		t.Fatalf("%s: which of %q is a value?", p.Name, p.Values)
	}
	return parts[1]
}

// readers read the keys of a place.
func readers(t *testing.T) map[Where]func(map[string]string) (any, error) {
	t.Helper()
	d := &Driver{cfg: Config{DefaultPool: "default", EphemeralMaxSize: 4 << 30}}
	return map[Where]func(map[string]string) (any, error){
		StorageClass:    func(m map[string]string) (any, error) { return parseParams(m) },
		AttributesClass: func(m map[string]string) (any, error) { return parseMutable(m) },
		SnapshotClass:   func(m map[string]string) (any, error) { return parseSnapshotParams(m) },
		MappedVolume: func(m map[string]string) (any, error) {
			if _, ok := m[attrImage]; !ok {
				m[attrImage] = goodValues[attrImage]
			}
			return parseMapped(m)
		},
		EphemeralVolume: func(m map[string]string) (any, error) {
			p, size, err := d.parseEphemeral(m, access{fsType: "ext4"})
			return []any{p, size}, err
		},
	}
}

// Every key that is told of works where it is said to, and no other does.
func TestParametersAreRead(t *testing.T) {
	for where, read := range readers(t) {
		for _, p := range Parameters(where) {
			if p.Text == "" || p.Values == "" {
				t.Errorf("%d %s: nothing is told of it", where, p.Name)
			}
			if _, err := read(map[string]string{p.Name: goodValue(t, p)}); err != nil {
				t.Errorf("%d %s: %v", where, p.Name, err)
			}
		}
		if _, err := read(map[string]string{"no-such-key": "1"}); err == nil || !strings.Contains(err.Error(), `"no-such-key" is not known`) {
			t.Errorf("%d: %v", where, err)
		}
		for other := range readers(t) {
			for _, p := range Parameters(other) {
				mutable := where == StorageClass && other == AttributesClass
				told := slices.ContainsFunc(Parameters(where), func(q Parameter) bool { return q.Name == p.Name })
				if _, err := read(map[string]string{p.Name: goodValue(t, p)}); !mutable && !told && err == nil && !strings.HasPrefix(p.Name, kubernetesPrefix) {
					t.Errorf("%d takes %s, and does not say so", where, p.Name)
				}
			}
		}
	}
}

// What is told to be the default is what an empty class gets.
func TestParametersDefaults(t *testing.T) {
	for where, read := range readers(t) {
		said := map[string]string{}
		for _, p := range Parameters(where) {
			if p.Default != "" {
				said[p.Name] = p.Default
			}
		}
		got, err := read(said)
		if err != nil {
			t.Errorf("%d: %v", where, err)
			continue
		}
		if p, ok := got.(params); ok {
			p.hasBlockSize = false // it was named here
			got = p
		}
		want, err := read(map[string]string{})
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got, cmp.AllowUnexported(params{}, snapshotParams{}), cmp.Comparer(func(a, b image.Tuning) bool { return a == b })); diff != "" {
			t.Errorf("%d: %s", where, diff)
		}
	}
}
