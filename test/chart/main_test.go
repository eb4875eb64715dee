package chart

import (
	"bufio"
	"bytes"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	groupsnapshot "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumegroupsnapshot/v1"
	snapshot "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	monitoring "github.com/prometheus-operator/prometheus-operator/pkg/apis/monitoring/v1"
	apiextensions "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/kubernetes/scheme"
	"sigs.k8s.io/yaml"
)

// binary is csi-loop, which is asked whether it takes what the chart tells it.
var binary string

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "chart-")
	if err == nil {
		binary = filepath.Join(dir, "csi-loop")
		build := exec.Command("go", "build", "-buildvcs=false", "-o", binary, "./cmd/csi-loop")
		build.Dir, build.Stderr = Root(), os.Stderr
		err = build.Run()
	}
	code := 1
	if err == nil {
		code = m.Run()
	} else {
		fmt.Fprintln(os.Stderr, "csi-loop cannot be built:", err)
	}
	_ = os.RemoveAll(dir)
	os.Exit(code)
}

// strict decodes objects, and refuses fields that the API does not have.
var strict = func() runtime.Decoder {
	s := scheme.Scheme
	for _, add := range []func(*runtime.Scheme) error{apiextensions.AddToScheme, snapshot.AddToScheme, groupsnapshot.AddToScheme, monitoring.AddToScheme} {
		if err := add(s); err != nil {
			panic(err)
		}
	}
	return serializer.NewCodecFactory(s, serializer.EnableStrict).UniversalDeserializer()
}()

// object is what all objects have.
type object interface {
	runtime.Object
	meta.Object
}

// parse reads values.
func parse(t *testing.T, text string) map[string]any {
	t.Helper()
	v := map[string]any{}
	if err := yaml.UnmarshalStrict([]byte(text), &v); err != nil {
		t.Fatal(err)
	}
	return v
}

// render renders the chart and decodes all objects.
func render(t *testing.T, values string) []object {
	t.Helper()
	rendered, err := Render(parse(t, values), "Helm")
	if err != nil {
		t.Fatal(err)
	}
	var all []object
	for _, name := range slices.Sorted(maps.Keys(rendered)) {
		if name == "NOTES.txt" {
			continue
		}
		all = append(all, decode(t, name, rendered[name])...)
	}
	return all
}

// decode decodes the documents of a file.
func decode(t *testing.T, name, text string) []object {
	t.Helper()
	var all []object
	r := utilyaml.NewYAMLReader(bufio.NewReader(strings.NewReader(text)))
	for {
		doc, err := r.Read()
		if err != nil {
			return all
		}
		var empty map[string]any
		if err := yaml.UnmarshalStrict(doc, &empty); err != nil {
			t.Fatalf("%s: %v\n%s", name, err, doc)
		}
		if len(empty) == 0 {
			continue
		}
		o, _, err := strict.Decode(doc, nil, nil)
		if err != nil {
			t.Fatalf("%s: %v\n%s", name, err, doc)
		}
		out, ok := o.(object)
		if !ok {
			t.Fatalf("%s: %T is no object", name, o)
		}
		all = append(all, out)
	}
}

// find returns the object of a type and name.
func find[T object](t *testing.T, all []object, name string) T {
	t.Helper()
	var none T
	for _, o := range all {
		if x, ok := o.(T); ok && o.GetName() == name {
			return x
		}
	}
	t.Fatalf("there is no %T with the name %s", none, name)
	return none
}

// has tells whether there is an object of a type.
func has[T object](all []object) bool {
	return slices.ContainsFunc(all, func(o object) bool { _, ok := o.(T); return ok })
}

// run asks csi-loop.
func run(t *testing.T, args ...string) string {
	t.Helper()
	var out bytes.Buffer
	c := exec.Command(binary, args...)
	c.Stdout, c.Stderr, c.Env = &out, &out, []string{}
	if err := c.Run(); err != nil {
		t.Errorf("csi-loop %s: %v\n%s", strings.Join(args, " "), err, out.String())
	}
	return out.String()
}
