package chart

import (
	"encoding/json"
	"os"
	"path/filepath"
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
				if here != ".global" {
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
