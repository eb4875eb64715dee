package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	chart "github.com/csi-loop/csi-loop/test/chart"
)

const referenceHead = `# Values of the chart

<!-- Written by make generate from values.yaml and values.schema.json; edit those instead. -->

"Takes" is what the chart's schema allows; anything else is refused before something is changed. How the values are used is in the
[chart's README](../../charts/csi-loop/README.md).

| Value | Takes | Default | |
|---|---|---|---|
`

// schema is a part of the chart's schema.
type schema struct {
	Ref         string             `json:"$ref"`
	Type        any                `json:"type"` // a name, or several
	Enum        []any              `json:"enum"`
	Pattern     string             `json:"pattern"`
	Minimum     *json.Number       `json:"minimum"`
	Maximum     *json.Number       `json:"maximum"`
	MinLength   int                `json:"minLength"`
	Items       *schema            `json:"items"`
	AnyOf       []*schema          `json:"anyOf"`
	OneOf       []*schema          `json:"oneOf"`
	Properties  map[string]*schema `json:"properties"`
	Definitions map[string]*schema `json:"definitions"`
}

// reference writes the page about the values.
func reference() error {
	text, err := os.ReadFile(filepath.Join(chart.Dir(), "values.schema.json"))
	if err != nil {
		return err
	}
	var root schema
	if err := json.Unmarshal(text, &root); err != nil {
		return err
	}
	all, err := readValues()
	if err != nil {
		return err
	}
	var b bytes.Buffer
	b.WriteString(referenceHead)
	for _, v := range all {
		s := &root
		for _, key := range v.path {
			if s = root.follow(s).Properties[key]; s == nil {
				return fmt.Errorf("values.schema.json has nothing about %s", strings.Join(v.path, "."))
			}
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s |\n", strings.Join(v.path, "."), strings.ReplaceAll(root.takes(s), "|", `\|`), v.preset, v.text)
	}
	return os.WriteFile(filepath.Join(chart.Root(), "docs", "reference", "chart.md"), b.Bytes(), 0o644)
}

// follow replaces a reference by what it is to.
func (s *schema) follow(at *schema) *schema {
	for at.Ref != "" {
		at = s.Definitions[strings.TrimPrefix(at.Ref, "#/definitions/")]
	}
	return at
}

// takes says what a schema allows, in a few words.
func (s *schema) takes(at *schema) string {
	at = s.follow(at)
	switch {
	case len(at.Enum) > 0:
		var words []string
		for _, e := range at.Enum {
			words = append(words, fmt.Sprintf("`%v`", e))
		}
		return strings.Join(words, ", ")
	case len(at.AnyOf)+len(at.OneOf) > 0:
		var words []string
		for _, a := range slices.Concat(at.AnyOf, at.OneOf) {
			if w := s.takes(a); w != "" && !slices.Contains(words, w) {
				words = append(words, w)
			}
		}
		return strings.Join(words, " or ")
	case at.Items != nil:
		return strings.TrimSpace("list: " + s.takes(at.Items))
	}
	var words []string
	switch kind := at.Type.(type) {
	case string:
		words = append(words, kind)
	case []any:
		var kinds []string
		for _, k := range kind {
			kinds = append(kinds, fmt.Sprint(k))
		}
		words = append(words, strings.Join(kinds, " or "))
	}
	switch {
	case at.Minimum != nil && at.Maximum != nil:
		words = append(words, fmt.Sprintf("%s to %s", *at.Minimum, *at.Maximum))
	case at.Minimum != nil:
		words = append(words, fmt.Sprintf("%s or more", *at.Minimum))
	}
	if at.MinLength > 0 {
		words = append(words, "not empty")
	}
	if at.Pattern != "" {
		words = append(words, "`"+at.Pattern+"`")
	}
	return strings.Join(words, ", ")
}
