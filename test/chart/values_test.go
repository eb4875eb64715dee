package chart

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// The schema and values.yaml have the same keys: none is undocumented, none is
// refused.
func TestSchemaAndValuesHaveTheSameKeys(t *testing.T) {
	type schema struct {
		Ref                  string            `json:"$ref"`
		Properties           map[string]schema `json:"properties"`
		AdditionalProperties any               `json:"additionalProperties"`
		Definitions          map[string]schema `json:"definitions"`
	}
	read := func(name string) []byte {
		b, err := os.ReadFile(filepath.Join(Dir(), name))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	var root schema
	if err := json.Unmarshal(read("values.schema.json"), &root); err != nil {
		t.Fatal(err)
	}
	var compare func(at string, s schema, values map[string]any)
	compare = func(at string, s schema, values map[string]any) {
		if s.AdditionalProperties != false {
			t.Errorf("%q: the schema allows any key", at)
		}
		for key, property := range s.Properties {
			here := at + "." + key
			value, ok := values[key]
			if !ok {
				if here != ".global" && here != ".snapshot-crds" { // Helm's own
					t.Errorf("values.yaml does not have %s", here)
				}
				continue
			}
			if property.Ref == "#/definitions/image" {
				property = root.Definitions["image"]
			}
			if below, ok := value.(map[string]any); ok && property.Properties != nil {
				compare(here, property, below)
			}
		}
	}
	compare("", root, parse(t, string(read("values.yaml"))))
}

// Numbers are the same in all ways to say them: --set, which has whole numbers, a file,
// and what an earlier release has stored.
func TestNumbersAreWrittenAsTheyAre(t *testing.T) {
	whole := parse(t, cases["numbers"])
	var turn func(v any) any
	turn = func(v any) any {
		switch x := v.(type) {
		case map[string]any:
			for k := range x {
				x[k] = turn(x[k])
			}
		case []any:
			for i := range x {
				x[i] = turn(x[i])
			}
		case float64:
			return int64(x)
		}
		return v
	}
	turn(whole)
	b, err := json.Marshal(whole)
	if err != nil {
		t.Fatal(err)
	}
	var stored map[string]any
	if err := json.Unmarshal(b, &stored); err != nil {
		t.Fatal(err)
	}
	want, err := Render(whole, "Helm")
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{
		"reserve: 10737418240", `ephemeralMaxSize: "21474836480"`, `transferRate: "104857600"`, `luksPbkdfMemory: "134217728"`, "loopDevicesWarm: 1000000",
		"loopDevicesMax: 1048576", "volumeMetrics: 2000000", "maxUnavailable: 1000000",
	} {
		if !strings.Contains(want["node.yaml"], line+"\n") {
			t.Errorf("there is no %s", line)
		}
	}
	if !strings.Contains(want["controller.yaml"], "--transfer-rate=1073741824\n") || !strings.Contains(want["NOTES.txt"], " up to 21474836480.") {
		t.Errorf("the controller's rate, or the notes: %s", want["NOTES.txt"])
	}
	for how, values := range map[string]map[string]any{"file": parse(t, cases["numbers"]), "stored": stored} {
		got, err := Render(values, "Helm")
		if err != nil {
			t.Errorf("%s: %v", how, err)
			continue
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s: %s", how, diff)
		}
	}
}

// In Helm a value is taken away with null. Then it is missed by name, or it is not
// needed: no template stumbles over it.
func TestNull(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(Dir(), "values.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	tried := 0
	var try func(path []string, values map[string]any)
	try = func(path []string, values map[string]any) {
		for key, value := range values {
			here := append(slices.Clone(path), key)
			if below, ok := value.(map[string]any); ok {
				try(here, below)
			}
			// Everything else that is optional is on, so that its templates are there too.
			all := parse(t, everything)
			at := all
			for _, k := range path {
				if _, ok := at[k].(map[string]any); !ok {
					at[k] = map[string]any{}
				}
				at, _ = at[k].(map[string]any)
			}
			at[key] = nil
			tried++
			rendered, err := Render(all, "Helm")
			switch {
			case err != nil:
				if want := "missing property '" + key + "'"; !strings.Contains(err.Error(), want) {
					t.Errorf("%s: %v\nwant %q in it", strings.Join(here, "."), err, want)
				}
			default:
				for name, text := range rendered {
					if strings.Contains(text, "<nil>") || strings.Contains(text, "<no value>") {
						t.Errorf("%s: nothing is written into %s", strings.Join(here, "."), name)
					}
					if name != "NOTES.txt" {
						decode(t, name, text)
					}
				}
			}
		}
	}
	try(nil, parse(t, string(text)))
	if tried < 100 {
		t.Errorf("only %d values", tried)
	}
}
