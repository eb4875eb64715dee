// Package fuzz holds the fuzz targets against their corpora: inputs that are checked in,
// which every go test tries.
package fuzz

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const (
	root = "../.."
	// A corpus has that many files, and each at most that many bytes: it is for what tells
	// something, and what fuzzing finds by itself stays where go test keeps it.
	fewest, most, largest = 4, 40, 16 << 10
	header                = "go test fuzz v1\n"
)

// Every fuzz target has a corpus, and every corpus a target.
func TestEveryTargetHasItsCorpus(t *testing.T) {
	targets, corpora := map[string]bool{}, map[string][]string{}
	err := filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case e.IsDir() && (e.Name() == "bin" || e.Name() == "node_modules" || e.Name() == ".git"):
			return fs.SkipDir
		case strings.HasSuffix(path, "_test.go"):
			for _, name := range targetsOf(t, path) {
				targets[filepath.Join(filepath.Dir(path), "testdata", "fuzz", name)] = true
			}
		case !e.IsDir() && filepath.Base(filepath.Dir(filepath.Dir(path))) == "fuzz" && strings.Contains(path, "/testdata/fuzz/"):
			corpora[filepath.Dir(path)] = append(corpora[filepath.Dir(path)], path)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(targets) < 30 {
		t.Errorf("%d targets were found", len(targets))
	}
	for dir := range targets {
		if n := len(corpora[dir]); n < fewest || n > most {
			t.Errorf("%s has %d files, not %d to %d", dir, n, fewest, most)
		}
	}
	for dir, files := range corpora {
		if !targets[dir] {
			t.Errorf("%s is of no target", dir)
		}
		seen := map[string]string{}
		for _, path := range files {
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if text := string(b); !strings.HasPrefix(text, header) || len(text) > largest {
				t.Errorf("%s has %d bytes, and begins %.20q", path, len(text), text)
			}
			if other := seen[string(b)]; other != "" {
				t.Errorf("%s is as %s", path, other)
			}
			seen[string(b)] = path
		}
	}
}

// targetsOf lists the fuzz targets in a file.
func targetsOf(t *testing.T, path string) (names []string) {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range file.Decls {
		if f, ok := d.(*ast.FuncDecl); ok && f.Recv == nil && strings.HasPrefix(f.Name.Name, "Fuzz") {
			names = append(names, f.Name.Name)
		}
	}
	return names
}
