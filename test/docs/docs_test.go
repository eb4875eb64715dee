package docs

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// root is the repository.
const root = "../.."

// block is a block of a page that may have commands, and the comment that is about it.
type block struct {
	line int
	text []string
	mark string
}

var (
	mark     = regexp.MustCompile(`^<!-- (run by |not run: |no commands: )(.*) -->$`)
	item     = regexp.MustCompile(`^(- |[0-9]{2,}\. )`) // whose text is indented by as much as a block, or less
	runBy    = regexp.MustCompile(`^(Test\w+) in (\S+_test\.go)$`)
	makeLine = regexp.MustCompile(`^(?:[A-Z_]+=\S+ )*make(?: -s)? ([a-z0-9-]+)`)
)

// blocksOf finds the indented blocks of a page, and the fenced ones that are marked sh
// or nothing.
func blocksOf(page string) []block {
	var all []block
	now, list := "", false
	lines := strings.Split(page, "\n")
	for i := 0; i < len(lines); i++ {
		line := lines[i]
		word, fence := strings.CutPrefix(line, "```")
		switch {
		case fence:
			end := i + 1
			for end < len(lines) && !strings.HasPrefix(lines[end], "```") {
				end++
			}
			if word == "" || word == "sh" {
				all = append(all, block{i + 1, lines[min(i+1, end):end], now})
			}
			i = end
		case strings.HasPrefix(line, "    ") && !list && i > 0 && lines[i-1] == "":
			end := i
			for end < len(lines) && strings.HasPrefix(lines[end], "    ") {
				end++
			}
			all = append(all, block{i + 1, lines[i:end], now})
			i = end - 1
		case strings.HasPrefix(line, "#"):
			now, list = "", false
		case mark.MatchString(line):
			now = strings.TrimSuffix(strings.TrimPrefix(line, "<!-- "), " -->")
		case line != "" && !strings.HasPrefix(line, " "):
			list = item.MatchString(line)
		}
	}
	return all
}

// judge says what is wrong with a block, "" for nothing. exists tells of a test in a
// file, targets are those of the Makefile.
func judge(b block, exists func(test, file string) bool, targets []string) string {
	others := false
	for _, line := range b.text {
		line = strings.TrimSpace(line)
		m := makeLine.FindStringSubmatch(line)
		switch {
		case m == nil:
			others = others || line != ""
		case !slices.Contains(targets, m[1]):
			return "make has no target " + m[1]
		}
	}
	if tests, ok := strings.CutPrefix(b.mark, "run by "); ok {
		for test := range strings.SplitSeq(tests, ", ") {
			run := runBy.FindStringSubmatch(test)
			switch {
			case run == nil:
				return fmt.Sprintf("%q is not \"run by TestName in path_test.go\"", b.mark)
			case !exists(run[1], run[2]):
				return fmt.Sprintf("there is no %s in %s", run[1], run[2])
			}
		}
		return ""
	}
	if others && b.mark == "" {
		return `nothing says who runs it: put <!-- run by TestName in path/of/the_test.go -->, <!-- not run: why --> or <!-- no commands: what it is --> above it`
	}
	return ""
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
	pages, err := filepath.Glob(root + "/docs/*.md")
	if err != nil || len(pages) < 5 {
		t.Fatal(pages, err)
	}
	pages = append(pages, root+"/README.md", root+"/CONTRIBUTING.md", root+"/charts/csi-loop/README.md", root+"/test/e2e/README.md")
	all := targets(t)
	count := map[string]int{}
	for _, page := range pages {
		text, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		for _, b := range blocksOf(string(text)) {
			if wrong := judge(b, inFile(t), all); wrong != "" {
				t.Errorf("%s, line %d: %s", strings.TrimPrefix(page, root+"/"), b.line, wrong)
			}
			kind, _, _ := strings.Cut(b.mark, ":")
			if strings.HasPrefix(kind, "run by") {
				kind = "run"
			}
			count[kind]++
			if kind == "not run" {
				t.Logf("not run: %s, line %d: %s", strings.TrimPrefix(page, root+"/"), b.line, strings.TrimPrefix(b.mark, "not run: "))
			}
		}
	}
	t.Logf("blocks: %d run by a test, %d of make, %d not run, %d without commands", count["run"], count[""], count["not run"], count["no commands"])
	if count["run"] < 10 {
		t.Error("hardly any block is run")
	}
}

// inFile looks for a test in a file of the repository.
func inFile(t *testing.T) func(test, file string) bool {
	t.Helper()
	return func(test, file string) bool {
		text, err := os.ReadFile(filepath.Join(root, filepath.Clean("/"+file)))
		return err == nil && strings.Contains(string(text), "\nfunc "+test+"(")
	}
}

func TestJudge(t *testing.T) {
	exists := func(test, file string) bool { return test == "TestA" && file == "a_test.go" }
	for name, c := range map[string]struct {
		page, want string
	}{
		"nothing is said":         {"text\n\n    rm -r x\n", "nothing says who runs it"},
		"a fence":                 {"```sh\nrm -r x\n```\n", "nothing says who runs it"},
		"another language":        {"```yaml\na: b\n```\n", ""},
		"a test runs it":          {"<!-- run by TestA in a_test.go -->\n\n    rm -r x\n", ""},
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
		for _, b := range blocksOf(c.page) {
			if wrong := judge(b, exists, []string{"build"}); wrong != "" {
				got = wrong
			}
		}
		if (c.want == "") != (got == "") || !strings.Contains(got, c.want) {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}
