package yamltext

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"sigs.k8s.io/yaml"
)

// Any text is the same when it is read again, as a key and as a value.
func TestAnyText(t *testing.T) {
	for name, text := range map[string]string{
		"DEL": "a\x7fb", "NEL": "a\u0085b", "a line separator": "a\u2028b\u2029", "a byte order mark": "\ufeffa", "a control character": "\x00\x1b[31m\u009b",
		"no character": "\ufffe\uffff", "a picture": "\U0001f4be", "letters": "Größe", "a document's end": "x\n---\ny", "blanks": " \t ", "a number": "1e3", "nothing": "",
		"long": strings.Repeat("long ", 100),
	} {
		t.Run(name, func(t *testing.T) {
			want := map[string][]string{text: {text, text}}
			b, err := Marshal(want)
			if err != nil {
				t.Fatal(err)
			}
			var got map[string][]string
			if err := yaml.Unmarshal(b, &got); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("%s in\n%s", diff, b)
			}
		})
	}
}
