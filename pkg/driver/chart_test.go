package driver

import (
	"encoding/json"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// schemaKeys are the parameters that the chart takes for a kind of class.
func schemaKeys(t *testing.T, kind string) []string {
	t.Helper()
	b, err := os.ReadFile("../../charts/csi-loop/values.schema.json")
	if err != nil {
		t.Fatal(err)
	}
	var schema struct {
		Definitions map[string]struct {
			Properties struct {
				Parameters struct {
					Properties map[string]any `json:"properties"`
				} `json:"parameters"`
			} `json:"properties"`
		} `json:"definitions"`
	}
	if err := json.Unmarshal(b, &schema); err != nil {
		t.Fatal(err)
	}
	return slices.Sorted(maps.Keys(schema.Definitions[kind].Properties.Parameters.Properties))
}

// knownKeys are those that an error names.
func knownKeys(t *testing.T, err error) []string {
	t.Helper()
	_, known, ok := strings.Cut(err.Error(), "known are ")
	if !ok {
		t.Fatalf("%v names none", err)
	}
	keys := strings.Split(strings.NewReplacer(" and the mutable ones: ", ", ", " and ", ", ").Replace(known), ", ")
	slices.Sort(keys)
	return keys
}

// The chart takes the parameters that the driver takes, and says so before a claim waits.
func TestChartKnowsTheParameters(t *testing.T) {
	_, err := parseParams(map[string]string{"unheard": "of"})
	if diff := cmp.Diff(knownKeys(t, err), schemaKeys(t, "storageClass")); diff != "" {
		t.Errorf("StorageClass: %s", diff)
	}
	_, err = parseMutable(map[string]string{"unheard": "of"})
	if diff := cmp.Diff(knownKeys(t, err), schemaKeys(t, "attributesClass")); diff != "" {
		t.Errorf("VolumeAttributesClass: %s", diff)
	}
}
