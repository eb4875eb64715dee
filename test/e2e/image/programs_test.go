package image

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// sources is where the driver's code is, from here.
const sources = "../../../pkg"

// programs is all that the driver calls, which TestProgramsAreAllThatTheDriverCalls
// checks, and how each is made to say its version.
var programs = map[string][]string{
	"mkfs.ext2":  {"-V"},
	"mkfs.ext3":  {"-V"},
	"mkfs.ext4":  {"-V"},
	"mkfs.xfs":   {"-V"},
	"mkfs.btrfs": {"--version"},
	"e2fsck":     {"-V"},
	"resize2fs":  nil, // its usage, which names the version
	"tune2fs":    nil, // likewise
	"btrfstune":  {"--version"},
	"cryptsetup": {"--version"},
}

// runners are the only functions that may start a program, and where the name
// of it comes from: "mkfs." and a filesystem, or a literal in their calls.
// helperCommand starts the driver itself.
var runners = map[string]string{
	"image/format.go": "command", "mount/check.go": "runWhole", "mount/freezecaller.go": "helperCommand", "crypt/crypt.go": "run",
}

func TestProgramsAreAllThatTheDriverCalls(t *testing.T) {
	called := map[string]bool{}
	err := filepath.WalkDir(sources, func(path string, _ fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, 0)
		if err != nil {
			return err
		}
		name, err := filepath.Rel(sources, path)
		if err != nil {
			return err
		}
		for _, d := range file.Decls {
			inspect(t, filepath.ToSlash(name), d, called)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for program := range programs {
		if !called[program] {
			t.Errorf("%s is in the image's list, and the driver does not call it", program)
		}
	}
	for program := range called {
		if _, ok := programs[program]; !ok {
			t.Errorf("the driver calls %s, which is not in the image's list: add it here and to the Dockerfile", program)
		}
	}
}

// inspect notes the programs that one declaration calls.
func inspect(t *testing.T, file string, d ast.Decl, called map[string]bool) {
	t.Helper()
	ast.Inspect(d, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.CallExpr:
			if s, ok := n.Fun.(*ast.SelectorExpr); ok && isPackage(s.X, "exec") && strings.HasPrefix(s.Sel.Name, "Command") {
				f, ok := d.(*ast.FuncDecl)
				if !ok || runners[file] != f.Name.Name {
					t.Errorf("%s starts a program outside of %v: this test cannot see which", file, runners)
				}
			}
			if f, ok := n.Fun.(*ast.Ident); ok && f.Name == "runWhole" {
				name, ok := literal(n.Args[2])
				if !ok {
					t.Errorf("%s: the program that runWhole gets is not a literal: this test cannot see which", file)
				}
				called[name] = true
			}
		case *ast.ValueSpec:
			// The one program for mappings.
			if file == "crypt/crypt.go" && len(n.Names) == 1 && n.Names[0].Name == "program" {
				if name, ok := literal(n.Values[0]); ok {
					called[name] = true
				}
			}
			// The one list of programs for images of copies.
			if file == "image/renew.go" && slices.ContainsFunc(n.Names, func(i *ast.Ident) bool { return i.Name == "programs" }) {
				for _, name := range keys(n) {
					called[name] = true
				}
			}
			// The one list of filesystems that can be made.
			if file == "image/format.go" && slices.ContainsFunc(n.Names, func(i *ast.Ident) bool { return i.Name == "packages" }) {
				for _, name := range keys(n) {
					called["mkfs."+name] = true
				}
			}
		}
		return true
	})
}

func isPackage(e ast.Expr, name string) bool {
	i, ok := e.(*ast.Ident)
	return ok && i.Name == name
}

func literal(e ast.Expr) (string, bool) {
	l, ok := e.(*ast.BasicLit)
	if !ok || l.Kind != token.STRING {
		return "", false
	}
	s, err := strconv.Unquote(l.Value)
	return s, err == nil
}

// keys are those of a map that is written out.
func keys(spec *ast.ValueSpec) []string {
	var found []string
	for _, v := range spec.Values {
		m, ok := v.(*ast.CompositeLit)
		if !ok {
			continue
		}
		for _, e := range m.Elts {
			if kv, ok := e.(*ast.KeyValueExpr); ok {
				if name, ok := literal(kv.Key); ok {
					found = append(found, name)
				}
			}
		}
	}
	return found
}
