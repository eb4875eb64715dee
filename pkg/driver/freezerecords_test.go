package driver

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// Who looks from outside sees the records that the next start would thaw by, and no
// others: not those of another boot, of a freeze under way or thawed by a helper, nor
// what is none.
func TestFreezeRecords(t *testing.T) {
	s := &nodeState{dir: t.TempDir(), bootID: bootID()}
	left, err := s.putFreeze(nil, false)
	if err != nil {
		t.Fatal(err)
	}
	if err := left.keep(); err != nil {
		t.Fatal(err)
	}
	underWay, err := s.putFreeze(nil, true)
	if err != nil {
		t.Fatal(err)
	}
	earlier, err := (&nodeState{dir: s.dir, bootID: "another"}).putFreeze(nil, false)
	if err != nil {
		t.Fatal(err)
	}
	if err := earlier.keep(); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"torn.freeze", ".new-x.freeze", "x.json"} {
		if err := os.WriteFile(filepath.Join(s.dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if got := FreezeRecords(s.dir); !slices.Equal(got, []string{left.path}) {
		t.Errorf("found %q, want %q", got, left.path)
	}
	if err := underWay.drop(); err != nil {
		t.Error(err)
	}
	if got := FreezeRecords(filepath.Join(s.dir, "missing")); len(got) > 0 {
		t.Errorf("found %q", got)
	}
}
