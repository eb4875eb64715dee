package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
)

func TestMessages(t *testing.T) {
	dir := t.TempDir()
	const source = `package p

func f() {
	_ = invalidf("parameter %q: %.3s is 100%% wrong", key, value)
	_ = status.Errorf(codes.NotFound, "no volume <%s> "+
		"here", id)
	_ = usagef("%w", err)
	_ = status.Error(codes.Internal, "BUG: no")
	_ = fmt.Errorf("nothing to do with calls")
}
`
	if err := os.WriteFile(filepath.Join(dir, "a.go"), []byte(source), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "a_test.go"), []byte("package p\n\nvar _ = invalidf(\"a test's\")\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	got := map[codes.Code][]string{}
	if err := messages(dir, got); err != nil {
		t.Fatal(err)
	}
	want := map[codes.Code][]string{
		codes.InvalidArgument: {"parameter …: … is 100% wrong"},
		codes.NotFound:        {"no volume &lt;…> here"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}
