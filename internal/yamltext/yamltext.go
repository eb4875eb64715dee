// Package yamltext writes values as YAML, whatever text is in them.
package yamltext

import (
	"encoding/json"
	"fmt"
	"unicode/utf8"

	"sigs.k8s.io/yaml"
)

// Marshal is yaml.Marshal of a value with JSON tags, also of one whose strings have
// characters that YAML does not take as they are, such as DEL, or takes for the end of a
// line, such as NEL: annotations of Kubernetes may have them. Reading the YAML gives them
// again.
func Marshal(v any) ([]byte, error) {
	text, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	return yaml.JSONToYAML(escaped(text))
}

// escaped is the same JSON with those characters, and more, by their numbers.
func escaped(text []byte) []byte {
	var out []byte
	for _, r := range string(text) {
		if r >= 0x7f && r <= 0xffff {
			out = fmt.Appendf(out, "\\u%04x", r)
		} else {
			out = utf8.AppendRune(out, r)
		}
	}
	return out
}
