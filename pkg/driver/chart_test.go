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

// keysOf are the parameters of a place that are not Kubernetes' own.
func keysOf(places ...Where) []string {
	var keys []string
	for _, w := range places {
		for _, p := range Parameters(w) {
			if !strings.HasPrefix(p.Name, kubernetesPrefix) {
				keys = append(keys, p.Name)
			}
		}
	}
	slices.Sort(keys)
	return keys
}

// The chart takes the parameters that the driver takes, and says so before a claim waits.
func TestChartKnowsTheParameters(t *testing.T) {
	if diff := cmp.Diff(keysOf(StorageClass, AttributesClass), schemaKeys(t, "storageClass")); diff != "" {
		t.Errorf("StorageClass: %s", diff)
	}
	if diff := cmp.Diff(keysOf(AttributesClass), schemaKeys(t, "attributesClass")); diff != "" {
		t.Errorf("VolumeAttributesClass: %s", diff)
	}
}
