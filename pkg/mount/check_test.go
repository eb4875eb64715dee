package mount

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestTailKeepsTheEnd(t *testing.T) {
	for name, c := range map[string]struct {
		pieces []string
		want   string
	}{
		"nothing":       {nil, ""},
		"little":        {[]string{"one ", "two"}, "one two"},
		"just fits":     {[]string{strings.Repeat("x", mostSaid-1), "y"}, strings.Repeat("x", mostSaid-1) + "y"},
		"one too many":  {[]string{strings.Repeat("x", mostSaid), "y"}, "..." + strings.Repeat("x", mostSaid-4) + "y"},
		"one huge":      {[]string{strings.Repeat("x", 10*mostSaid) + "end"}, "..." + strings.Repeat("x", mostSaid-6) + "end"},
		"huge, and end": {[]string{strings.Repeat("x", 10*mostSaid), "end"}, "..." + strings.Repeat("x", mostSaid-6) + "end"},
		"bytes":         {strings.Split(strings.Repeat("x", 5*mostSaid)+"end", ""), "..." + strings.Repeat("x", mostSaid-6) + "end"},
	} {
		var w tail
		for _, p := range c.pieces {
			if n, err := w.Write([]byte(p)); n != len(p) || err != nil {
				t.Fatalf("%s: wrote %d of %d, %v", name, n, len(p), err)
			}
			if len(w.kept) > 2*mostSaid || cap(w.kept) > 4*mostSaid {
				t.Fatalf("%s: it keeps %d bytes in %d", name, len(w.kept), cap(w.kept))
			}
		}
		if got := w.String(); got != c.want {
			t.Errorf("%s: %d bytes %q", name, len(got), got)
		}
	}
}

func TestRunWholeKeepsBothStreamsAndTheCode(t *testing.T) {
	device := filepath.Join(t.TempDir(), "device")
	if err := os.WriteFile(device, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	out, code, err := runWhole(context.Background(), device, "sh", "-c", "head -c 1000000 /dev/zero | tr '\\0' x; echo oops >&2; exit 3")
	if err != nil || code != 3 || len(out) > mostSaid || !strings.HasPrefix(out, "...x") || !strings.HasSuffix(out, "xoops") {
		t.Fatalf("%d bytes, status %d, %v", len(out), code, err)
	}
	if _, _, err := runWhole(context.Background(), device, "/nonexistent"); err == nil {
		t.Fatal("a program that does not exist was run")
	}
}
