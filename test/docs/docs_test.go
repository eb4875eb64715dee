package docs

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// root is the repository.
const root = "../.."

var makeLine = regexp.MustCompile(`^(?:[A-Z_]+=\S+ )*make(?: -s)? ([a-z0-9-]+)`)

// judge says what is wrong with a block, "" for nothing. source returns a file with
// tests, "" if it is not there; targets are those of the Makefile.
func judge(b Block, source func(file string) string, targets []string) string {
	others := false
	for line := range strings.SplitSeq(b.Text, "\n") {
		line = strings.TrimSpace(line)
		m := makeLine.FindStringSubmatch(line)
		switch {
		case m == nil:
			others = others || line != ""
		case !slices.Contains(targets, m[1]):
			return "make has no target " + m[1]
		}
	}
	runs, err := b.Runs()
	if err != nil {
		return err.Error()
	}
	for _, r := range runs {
		text := source(r.File)
		switch {
		case !strings.Contains(text, "\nfunc "+r.Test+"("):
			return fmt.Sprintf("there is no %s in %s", r.Test, r.File)
		case !takes(text, b):
			return r.File + " has none of its lines, nor its heading, to take it from the page by"
		}
	}
	if others && b.Mark == "" {
		return `nothing says who runs it: put <!-- run by TestName in path/of/the_test.go -->, <!-- not run: why --> or <!-- no commands: what it is --> above it`
	}
	return ""
}

// takes reports whether a file names the block by a line or by its heading, in a string
// literal. That it then runs the block it sees to itself, see Take.
func takes(source string, b Block) bool {
	for line := range strings.SplitSeq(b.Text+"\n"+b.Heading, "\n") {
		if line != "" && (strings.Contains(source, strconv.Quote(line)) || strings.Contains(source, "`"+line+"`")) {
			return true
		}
	}
	return false
}

// targets are those of the Makefile.
func targets(t *testing.T) []string {
	t.Helper()
	text, err := os.ReadFile(root + "/Makefile")
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, m := range regexp.MustCompile(`(?m)^([a-z0-9-]+(?: [a-z0-9-]+)*):(?:[^=]|$)`).FindAllStringSubmatch(string(text), -1) {
		all = append(all, strings.Fields(m[1])...)
	}
	if len(all) < 30 {
		t.Fatalf("only %q", all)
	}
	return all
}

// Every command on a page is run by a test, or the page says why not.
func TestCommandsOfPages(t *testing.T) {
	blocks, err := Read(root)
	if err != nil {
		t.Fatal(err)
	}
	all, sources := targets(t), files{}
	count, pages := map[string]int{}, map[string]bool{}
	for _, b := range blocks {
		pages[b.Page] = true
		if wrong := judge(b, sources.read, all); wrong != "" {
			t.Errorf("%s, line %d: %s", b.Page, b.Line, wrong)
		}
		kind, why, _ := strings.Cut(b.Mark, ": ")
		if strings.HasPrefix(kind, "run by") {
			kind = "run"
		}
		count[kind]++
		if kind == "not run" {
			t.Logf("not run: %s, line %d: %s", b.Page, b.Line, why)
		}
	}
	t.Logf("blocks: %d run by a test, %d of make, %d not run, %d without commands", count["run"], count[""], count["not run"], count["no commands"])
	if count["run"] < 30 || len(pages) < 8 {
		t.Errorf("%d blocks on %d pages are run", count["run"], len(pages))
	}
}

// files are those of the repository that were read.
type files map[string]string

func (f files) read(name string) string {
	text, ok := f[name]
	if !ok {
		b, _ := os.ReadFile(filepath.Join(root, filepath.Clean("/"+name)))
		text = string(b)
		f[name] = text
	}
	return text
}

func TestJudge(t *testing.T) {
	source := func(file string) string {
		return map[string]string{
			"a_test.go": "\nfunc TestA(t *testing.T) {\n\trun(`rm -r x`)\n}\n",
			"b_test.go": "\nfunc TestB(t *testing.T) {\n\tsection(\"## Section\")\n\tother(\"rm -r x y\")\n}\n",
		}[file]
	}
	for name, c := range map[string]struct {
		page, want string
	}{
		"nothing is said":         {"text\n\n    rm -r x\n", "nothing says who runs it"},
		"a fence":                 {"```sh\nrm -r x\n```\n", "nothing says who runs it"},
		"another language":        {"```yaml\na: b\n```\n", ""},
		"a test runs it":          {"<!-- run by TestA in a_test.go -->\n\n    rm -r x\n", ""},
		"by another line":         {"<!-- run by TestA in a_test.go -->\n\n    echo\n    rm -r x\n", ""},
		"by its heading":          {"## Section\n\n<!-- run by TestB in b_test.go -->\n\n    rm -r x\n", ""},
		"a test of another block": {"<!-- run by TestB in b_test.go -->\n\n    rm -r x\n", "none of its lines"},
		"a test that is not":      {"<!-- run by TestB in a_test.go -->\n\n    rm -r x\n", "there is no TestB"},
		"two tests":               {"<!-- run by TestA in a_test.go, TestB in a_test.go -->\n\n    rm -r x\n", "there is no TestB"},
		"a test without a file":   {"<!-- run by TestA -->\n\n    rm -r x\n", "is not \"run by"},
		"a reason":                {"<!-- not run: it needs a cluster -->\n\n    rm -r x\n\ntext\n\n    rm y\n", ""},
		"a reason elsewhere":      {"<!-- not run: why -->\n\n    rm x\n\n## Next\n\n    rm -r x\n", "nothing says who runs it"},
		"make":                    {"text\n\n    make build\n    A=1 make build N=2   # words\n", ""},
		"make without the target": {"text\n\n    make bild\n", "make has no target bild"},
		"make and more":           {"text\n\n    make build\n    rm x\n", "nothing says who runs it"},
		"in a list":               {"- text\n\n    more of it\n", ""},
		"a comment of another":    {"<!-- run it -->\n\n    rm x\n", "nothing says who runs it"},
	} {
		got := ""
		for _, b := range Blocks("page.md", c.page) {
			if wrong := judge(b, source, []string{"build"}); wrong != "" {
				got = wrong
			}
		}
		if (c.want == "") != (got == "") || !strings.Contains(got, c.want) {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}

// looseRow returns the number of the first line that ends a table without an empty line:
// mostly a row that has lost its first bar. 0 is none.
func looseRow(text string) int {
	var inTable, inCode bool
	for i, line := range strings.Split(text, "\n") {
		if strings.HasPrefix(line, "```") {
			inCode = !inCode
		}
		row := !inCode && strings.HasPrefix(line, "|")
		if inTable && !row && line != "" && !strings.HasPrefix(line, "<!--") || row && !strings.HasSuffix(line, "|") {
			return i + 1
		}
		inTable = row
	}
	return 0
}

func TestTablesAreWhole(t *testing.T) {
	for text, want := range map[string]int{
		"| a |\n|---|\n| b |\n\nc": 0, "| a |\nb | c |": 2, "| a |\n| b": 2, "```\n| a\nb\n```": 0,
	} {
		if got := looseRow(text); got != want {
			t.Errorf("%q: line %d, want %d", text, got, want)
		}
	}
	pages, err := filepath.Glob(filepath.Join(root, "docs", "*.md"))
	if err != nil || len(pages) == 0 {
		t.Fatalf("%d pages, %v", len(pages), err)
	}
	for _, page := range append(pages, filepath.Join(root, "README.md"), filepath.Join(root, "charts/csi-loop/README.md")) {
		text, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		if line := looseRow(string(text)); line > 0 {
			t.Errorf("%s:%d: a row without its bars, or no empty line after a table", page, line)
		}
	}
}
