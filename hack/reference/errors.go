package main

import (
	"cmp"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"google.golang.org/grpc/codes"

	"github.com/csi-loop/csi-loop/internal/reference"
	"github.com/csi-loop/csi-loop/pkg/driver"
	"github.com/csi-loop/csi-loop/pkg/image"
)

// makers are the functions that make an error with a code of its own.
var makers = map[string]codes.Code{
	"invalidf": codes.InvalidArgument, "notFoundf": codes.NotFound, "preconditionf": codes.FailedPrecondition, "existsf": codes.AlreadyExists,
	"outOfRangef": codes.OutOfRange, "exhaustedf": codes.ResourceExhausted, "abortedf": codes.Aborted, "unavailablef": codes.Unavailable,
}

// usage stands for errors of the command line, which have no code.
const usage = codes.Code(100)

// about says what a code means to whoever sees it.
var about = []struct {
	code codes.Code
	text string
}{
	{codes.InvalidArgument, "The request cannot be meant, and is wrong whenever it is repeated: change the class, the claim or the PersistentVolume. Parameters of a class cannot be changed; give a new class."},
	{codes.NotFound, "What the request is about is not there."},
	{codes.AlreadyExists, "The name is taken by something else."},
	{codes.FailedPrecondition, "The request is right and something stands in its way that a person removes; until then it is refused again."},
	{codes.OutOfRange, "A size is not possible."},
	{codes.ResourceExhausted, "The node has no room. In Kubernetes the scheduler chooses another one if the volume is not made yet."},
	{codes.Aborted, "Something else is under way with the volume, or was in between. It is tried again by itself; nothing has to be done unless it goes on for long."},
	{codes.Unavailable, "The node or its pool cannot be reached for now. It is tried again by itself."},
	{codes.Unimplemented, "csi-loop, or the version of it on the node, does not know the call."},
	{usage, "`csi-loop` was told something that cannot be meant: exit status 2. The message names the flag, the variable or the key."},
}

// errorPage writes the page about errors.
func errorPage(dir string) error {
	root, err := repository()
	if err != nil {
		return err
	}
	found := map[codes.Code][]string{}
	for _, sub := range []string{"pkg/driver", "pkg/router", "cmd/csi-loop"} {
		if err := messages(filepath.Join(root, sub), found); err != nil {
			return err
		}
	}
	p := reference.NewPage("Error messages", `
What calls end with, and what to do. The first table is of what the pool, the devices, the mounts and the kernel answer: look for the text in the message,
which also says what was being done. Then come all messages about requests, by their gRPC code; "…" stands for what differs. Problems of volumes that were
made are in [operations](../operations.md#csiloopvolumeunhealthy).`)
	p.Printf("\n## By what is in the message\n")
	var rows [][]string
	for _, k := range driver.ErrorKinds() {
		if k.Advice == "" {
			return fmt.Errorf("pkg/driver/status.go: nothing is said about %q", k.Text)
		}
		rows = append(rows, []string{k.Text, reference.Code(k.Code.String()), k.Advice})
	}
	p.Table([]string{"Text", "Code", "What to do"}, rows)
	for _, a := range about {
		title := a.code.String()
		if a.code == usage {
			title = "The command line"
		}
		texts := found[a.code]
		delete(found, a.code)
		if len(texts) == 0 {
			return fmt.Errorf("no message has code %s", title)
		}
		p.Printf("\n## %s\n\n%s\n\n", title, a.text)
		slices.SortFunc(texts, func(a, b string) int {
			return cmp.Or(cmp.Compare(strings.ToLower(a), strings.ToLower(b)), cmp.Compare(a, b))
		})
		for _, text := range slices.Compact(texts) {
			p.Printf("- %s\n", text)
		}
	}
	if err := reasons(p); err != nil {
		return err
	}
	p.Printf("\nA message that begins with `BUG:` is one: please report it, with the log around it.\n")
	for code := range found {
		if code != codes.Internal {
			return fmt.Errorf("hack/reference says nothing about code %s", code)
		}
	}
	return p.Write(dir, "errors.md")
}

// reasons writes what can be wrong with nodes, pools and volumes, by its word.
func reasons(p *reference.Page) error {
	p.Printf("\n## Health\n\n%s\n", strings.TrimSpace(`
What is wrong with a node, a pool or a volume has one of these words. CSI's health calls, the events on claims, `+"`kubectl csi-loop`, `csi-loop doctor`"+` and the label
`+"`reason`"+` of the metrics `+"`csi_loop_node_problem`, `csi_loop_pool_problem` and `csi_loop_volume_problem`"+` have the word, and all but the metrics say what to do. Some words stand
for several things.`))
	all := driver.Reasons()
	slices.SortStableFunc(all, func(a, b image.ReasonKind) int { return cmp.Compare(a.Word, b.Word) })
	var rows [][]string
	for _, r := range all {
		if r.Action == "" {
			return fmt.Errorf("nothing is said about reason %q", r.Word)
		}
		rows = append(rows, []string{reference.Code(r.Word), r.Action})
	}
	p.Table([]string{"Reason", "What to do"}, rows)
	return nil
}

// repository is the directory of go.mod.
func repository() (string, error) {
	_, file, _, ok := runtime.Caller(0)
	if !ok {
		return "", errors.New("BUG: built without paths")
	}
	return filepath.Join(filepath.Dir(file), "..", ".."), nil
}

// messages collects the texts of errors that a directory's code makes, by code.
func messages(dir string, found map[codes.Code][]string) error {
	files := token.NewFileSet()
	return filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		file, err := parser.ParseFile(files, path, nil, 0)
		if err != nil {
			return err
		}
		ast.Inspect(file, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			code, format := made(call)
			if text, ok := literal(format); ok && readable(text) != "" {
				found[code] = append(found[code], readable(text))
			}
			return true
		})
		return nil
	})
}

// made is the code that a call gives an error, and the argument that is its text.
func made(call *ast.CallExpr) (codes.Code, ast.Expr) {
	switch f := call.Fun.(type) {
	case *ast.Ident:
		if code, ok := makers[f.Name]; ok && len(call.Args) > 0 {
			return code, call.Args[0]
		}
		if f.Name == "usagef" && len(call.Args) > 0 {
			return usage, call.Args[0]
		}
	case *ast.SelectorExpr:
		of, ok := f.X.(*ast.Ident)
		if !ok || of.Name != "status" || f.Sel.Name != "Errorf" && f.Sel.Name != "Error" || len(call.Args) < 2 {
			break
		}
		if name, ok := call.Args[0].(*ast.SelectorExpr); ok {
			for code := codes.OK; code <= codes.Unauthenticated; code++ {
				if code.String() == name.Sel.Name {
					return code, call.Args[1]
				}
			}
		}
	}
	return codes.Internal, nil
}

// literal is the text of a constant that stands in the call, or of several joined by +.
func literal(e ast.Expr) (string, bool) {
	switch e := e.(type) {
	case *ast.BasicLit:
		text, err := strconv.Unquote(e.Value)
		return text, err == nil
	case *ast.BinaryExpr:
		a, ok := literal(e.X)
		b, ok2 := literal(e.Y)
		return a + b, ok && ok2
	}
	return "", false
}

var verb = regexp.MustCompile(`"?%[-+#0-9.*]*[a-zA-Z]"?`)

// readable shows a format to people; "" for one that has no text of its own.
func readable(format string) string {
	text := verb.ReplaceAllString(format, "…")
	text = strings.ReplaceAll(text, "%%", "%")
	if strings.Trim(text, "…:;, ") == "" || strings.HasPrefix(text, "BUG") {
		return ""
	}
	return strings.NewReplacer("<", "&lt;", "*", `\*`, "_", `\_`, "[", `\[`).Replace(text)
}
