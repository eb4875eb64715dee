package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
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
	values, err := os.ReadFile(filepath.Join(chart.Dir(), "values.yaml"))
	if err != nil {
		return err
	}
	var doc yaml.Node
	if err := yaml.Unmarshal(values, &doc); err != nil {
		return err
	}
	var b bytes.Buffer
	b.WriteString("| Value | Default | |\n|---|---|---|\n")
	if err := rows(&b, "", doc.Content[0]); err != nil {
		return err
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

// rows writes one row for each value that has a comment. A value without one must
// have below it only values with one.
func rows(b *bytes.Buffer, prefix string, m *yaml.Node) error {
	for i := 0; i+1 < len(m.Content); i += 2 {
		key, value := m.Content[i], m.Content[i+1]
		name := prefix + key.Value
		text, ok := comment(key.HeadComment)
		switch {
		case ok:
			preset, err := inline(value)
			if err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			fmt.Fprintf(b, "| `%s` | %s | %s |\n", name, preset, text)
		case value.Kind == yaml.MappingNode && len(value.Content) > 0:
			if err := rows(b, name+".", value); err != nil {
				return err
			}
		default:
			return fmt.Errorf("values.yaml: %s has no comment that begins with \"# --\"", name)
		}
	}
	return nil
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
