package chart

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
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
