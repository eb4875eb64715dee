package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	chart "github.com/csi-loop/csi-loop/test/chart"
)

const (
	begin = "<!-- values: begin; written by make generate from values.yaml -->\n"
	end   = "<!-- values: end -->\n"
)

// readme writes the table of values into the chart's README.
func readme() error {
	all, err := readValues()
	if err != nil {
		return err
	}
	var b bytes.Buffer
	b.WriteString("| Value | Default | |\n|---|---|---|\n")
	for _, v := range all {
		fmt.Fprintf(&b, "| `%s` | %s | %s |\n", strings.Join(v.path, "."), v.preset, v.text)
	}
	file := filepath.Join(chart.Dir(), "README.md")
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	before, rest, ok := bytes.Cut(text, []byte(begin))
	_, after, ok2 := bytes.Cut(rest, []byte(end))
	if !ok || !ok2 {
		return errors.New(file + ": where does the table go?")
	}
	text = bytes.Join([][]byte{before, []byte(begin), b.Bytes(), []byte(end), after}, nil)
	return os.WriteFile(file, text, 0o644)
}

// value is one value of the chart that is explained.
type value struct {
	path         []string
	preset, text string
}

// readValues reads values.yaml.
func readValues() ([]value, error) {
	text, err := os.ReadFile(filepath.Join(chart.Dir(), "values.yaml"))
	if err != nil {
		return nil, err
	}
	var doc yaml.Node
	if err := yaml.Unmarshal(text, &doc); err != nil {
		return nil, err
	}
	return valuesOf(nil, doc.Content[0])
}

// valuesOf lists each value that has a comment. A value without one must have below
// it only values with one.
func valuesOf(path []string, m *yaml.Node) ([]value, error) {
	var all []value
	for i := 0; i+1 < len(m.Content); i += 2 {
		key, node := m.Content[i], m.Content[i+1]
		at := append(slices.Clone(path), key.Value)
		text, ok := comment(key.HeadComment)
		switch {
		case ok:
			preset, err := inline(node)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", strings.Join(at, "."), err)
			}
			all = append(all, value{at, preset, text})
		case node.Kind == yaml.MappingNode && len(node.Content) > 0:
			below, err := valuesOf(at, node)
			if err != nil {
				return nil, err
			}
			all = append(all, below...)
		default:
			return nil, fmt.Errorf("values.yaml: %s has no comment that begins with \"# --\"", strings.Join(at, "."))
		}
	}
	return all, nil
}

// comment takes the text out of a comment in values.yaml.
func comment(head string) (string, bool) {
	_, text, ok := strings.Cut(head, "# -- ")
	if !ok {
		return "", false
	}
	lines := strings.Split(text, "\n")
	for i, l := range lines {
		lines[i] = strings.TrimSpace(strings.TrimPrefix(l, "#"))
	}
	return strings.ReplaceAll(strings.Join(lines, " "), "|", `\|`), true
}

// inline shows a default.
func inline(n *yaml.Node) (string, error) {
	var v any
	if err := n.Decode(&v); err != nil {
		return "", err
	}
	text, err := json.Marshal(v)
	if err != nil {
		return "", err
	}
	return "`" + string(text) + "`", nil
}
