package plan

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParse(t *testing.T) {
	ended := Report{Event: Ended, Number: 3, Status: 1}
	broken := Report{Event: Broken, Text: "mount /dev/vda: no such device; really"}
	for _, c := range []struct {
		name, line, before string
		want               Report
		ok                 bool
	}{
		{"a report", ended.Line("t0k"), "", ended, true},
		{"a report with words", broken.Line("t0k"), "", broken, true},
		{"a report behind an unfinished line", "PASS" + ended.Line("t0k"), "PASS", ended, true},
		{"output of a test", "ok", "ok", Report{}, false},
		{"a report with another token", ended.Line("other"), ended.Line("other"), Report{}, false},
		{"a cut report", "@@t0k ended 3", "@@t0k ended 3", Report{}, false},
		{"a status that is no number", "@@t0k ended 3 x ", "@@t0k ended 3 x ", Report{}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			before, got, ok := Parse("t0k", c.line)
			if before != c.before || ok != c.ok {
				t.Errorf("before %q, ok %v; want %q, %v", before, ok, c.before, c.ok)
			}
			if diff := cmp.Diff(c.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}
