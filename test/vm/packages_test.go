package main

import (
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// rootTests is what tests that need root import, and is tested by such tests itself.
const rootTests = "internal/roottest"

// packageLists finds what the Makefile runs on other kernels, with lines that go on joined.
var packageLists = regexp.MustCompile(`(?m)^(?:test-vm-driver: )?VM_PKGS +\??= (.*)$`)

// listed are the packages that make test-vm and make test-vm-driver run, by their directories.
func listed(t *testing.T, root string) []string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, "Makefile"))
	if err != nil {
		t.Fatal(err)
	}
	lists := packageLists.FindAllStringSubmatch(strings.ReplaceAll(string(text), "\\\n", " "), -1)
	if len(lists) != 2 {
		t.Fatalf("%d lists of packages in the Makefile, want those of test-vm and test-vm-driver", len(lists))
	}
	var all []string
	for _, l := range lists {
		for p := range strings.FieldsSeq(l[1]) {
			all = append(all, strings.TrimPrefix(p, "./"))
		}
	}
	return all
}

// withRootTests are the directories of tests that need root, on any system.
func withRootTests(t *testing.T, root string) []string {
	t.Helper()
	var all []string
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, "_test.go") {
			if d != nil && d.IsDir() && path != root && strings.HasPrefix(d.Name(), ".") {
				return fs.SkipDir
			}
			return err
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		dir, err := filepath.Rel(root, filepath.Dir(path))
		if err != nil {
			return err
		}
		for _, i := range file.Imports {
			name, err := strconv.Unquote(i.Path.Value)
			if err != nil {
				return err
			}
			if strings.HasSuffix(name, "/"+rootTests) || dir == rootTests {
				all = append(all, filepath.ToSlash(dir))
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(all)
	return slices.Compact(all)
}

func TestEveryPackageWithRootTestsIsRun(t *testing.T) {
	const root = "../.."
	run, want := listed(t, root), withRootTests(t, root)
	if !slices.Contains(want, "pkg/loop") || !slices.Contains(want, "test/integration") || len(want) < 15 {
		t.Fatalf("only these packages have root tests: %q", want)
	}
	for _, p := range want {
		if !slices.Contains(run, p) {
			t.Errorf("%s has root tests, and neither make test-vm nor make test-vm-driver runs it", p)
		}
	}
	for _, p := range run {
		if !slices.Contains(want, p) && p != "test/vm/guest" { // which is there for the machines
			t.Errorf("%s is run, and has no root tests", p)
		}
	}
}
