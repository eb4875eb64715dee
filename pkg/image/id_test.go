package image

import (
	"path/filepath"
	"strings"
	"testing"
)

func TestDirName(t *testing.T) {
	for name, want := range map[string]string{
		"pvc-6f1c":               "pvc-6f1c",
		"a":                      "a",
		strings.Repeat("a", 100): strings.Repeat("a", 100),
	} {
		if got := DirName(name); got != want {
			t.Errorf("DirName(%q) = %q", name, got)
		}
	}
	for name, prefix := range map[string]string{
		"A":                      "a_",
		"../..":                  "_",
		"My Volume":              "my-volume_",
		"-x":                     "x_",
		strings.Repeat("a", 101): strings.Repeat("a", 32) + "_",
	} {
		got := DirName(name)
		if !strings.HasPrefix(got, prefix) || len(got) != len(prefix)+hashLength {
			t.Errorf("DirName(%q) = %q", name, got)
		}
	}
}

func TestParseID(t *testing.T) {
	pool := strings.Repeat("a", 20)
	for id, ok := range map[string]bool{
		pool + ".v": true, pool + "." + DirName("ä"): true, pool + "." + DirName("My Volume"): true,
		"": false, pool: false, pool + ".": false, pool + "..": false, pool + ".a.b": false, pool + "./": false,
		strings.ToUpper(pool) + ".v": false, pool[1:] + ".v": false, pool + ".a/b": false, pool + ".a_b": false,
		pool + ".-a": false, pool + "." + strings.Repeat("a", 101): false, pool + ".v\n": false,
	} {
		if _, _, got := ParseID(id); got != ok {
			t.Errorf("ParseID(%q) = %v", id, got)
		}
	}
}

func FuzzDirName(f *testing.F) {
	for _, s := range []string{"", "pvc-1", "..", "a/b", "日本", strings.Repeat("x", 200), "a_b", "-"} {
		f.Add(s)
	}
	pool := strings.Repeat("a", 20)
	f.Fuzz(func(t *testing.T, name string) {
		dir := DirName(name)
		if dir == "" || len(dir) > 100 || filepath.Base(dir) != dir || strings.HasPrefix(dir, ".") || strings.HasPrefix(dir, "-") {
			t.Fatalf("DirName(%q) = %q", name, dir)
		}
		if name == "" {
			return
		}
		if p, d, ok := ParseID(VolumeID(pool, dir)); !ok || p != pool || d != dir {
			t.Fatalf("%q does not come back from its ID", dir)
		}
	})
}

func TestParseReserve(t *testing.T) {
	for s, want := range map[string]Reserve{
		"": {}, "0": {}, "10%": {Percent: 10}, "2.5%": {Percent: 2.5}, "100%": {Percent: 100},
		"5Gi": {Bytes: 5 << 30}, "5G": {Bytes: 5e9}, "1k": {Bytes: 1000}, "7": {Bytes: 7}, "3Pi": {Bytes: 3 << 50},
		"1.5Gi": {Bytes: 3 << 29}, "0.1k": {Bytes: 100}, "1.0001k": {Bytes: 1001}, "2E": {Bytes: 2e18},
	} {
		if got, err := ParseReserve(s); err != nil || got != want {
			t.Errorf("ParseReserve(%q) = %v, %v", s, got, err)
		}
	}
	for _, s := range []string{"-1", "101%", "-1%", "NaN%", "1e1%", "%", "Gi", "1GiB", "1iG", "9999999Pi", "1 Gi", "1.Gi", ".5Gi", "1e3", "-1.5Gi", "0x1%"} {
		if got, err := ParseReserve(s); err == nil {
			t.Errorf("ParseReserve(%q) = %v", s, got)
		}
	}
}
