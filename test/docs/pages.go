package docs

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// Block is a block of a page that may have commands, and the comment that is about it.
type Block struct {
	Page    string `json:"page"` // from the repository's root
	Line    int    `json:"line"`
	Heading string `json:"heading"` // of its section, with the #
	Text    string `json:"text"`    // without the indentation
	Mark    string `json:"mark"`
}

// Run is a test that a comment names.
type Run struct{ Test, File string }

var (
	mark  = regexp.MustCompile(`^<!-- (run by |not run: |no commands: )(.*) -->$`)
	item  = regexp.MustCompile(`^(- |[0-9]{2,}\. )`) // whose text is indented by as much as a block, or less
	runBy = regexp.MustCompile(`^(Test\w+) in (\S+_test\.go)$`)
)

// Blocks finds the indented blocks of a page, and the fenced ones that are marked sh
// or nothing.
func Blocks(page, text string) []Block {
	var all []Block
	now, heading, list := "", "", false
	add := func(line int, lines []string) {
		all = append(all, Block{page, line, heading, strings.Join(lines, "\n"), now})
	}
	lines := strings.Split(text, "\n")
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
				add(i+1, lines[min(i+1, end):end])
			}
			i = end
		case strings.HasPrefix(line, "    ") && !list && i > 0 && lines[i-1] == "":
			var block []string
			start := i
			for i < len(lines) && strings.HasPrefix(lines[i], "    ") {
				block = append(block, lines[i][4:])
				i++
			}
			add(start+1, block)
			i--
		case strings.HasPrefix(line, "#"):
			now, heading, list = "", line, false
		case mark.MatchString(line):
			now = strings.TrimSuffix(strings.TrimPrefix(line, "<!-- "), " -->")
		case line != "" && !strings.HasPrefix(line, " "):
			list = item.MatchString(line)
		}
	}
	return all
}

// Runs are the tests that the block's comment names; none for another comment.
func (b Block) Runs() ([]Run, error) {
	tests, ok := strings.CutPrefix(b.Mark, "run by ")
	if !ok {
		return nil, nil
	}
	var all []Run
	for test := range strings.SplitSeq(tests, ", ") {
		m := runBy.FindStringSubmatch(test)
		if m == nil {
			return nil, fmt.Errorf("%q is not \"run by TestName in path_test.go\"", b.Mark)
		}
		all = append(all, Run{m[1], m[2]})
	}
	return all, nil
}

// Read returns the blocks of all pages of a repository but the tutorials, whose blocks
// test/e2e reads by itself. Pages that are not there are passed over: a virtual machine
// has few of them.
func Read(root string) ([]Block, error) {
	pages, err := filepath.Glob(filepath.Join(root, "docs", "*.md"))
	if err != nil {
		return nil, err
	}
	for _, other := range []string{"README.md", "CONTRIBUTING.md", "charts/csi-loop/README.md", "test/e2e/README.md"} {
		pages = append(pages, filepath.Join(root, other))
	}
	var all []Block
	for _, path := range pages {
		text, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		page, err := filepath.Rel(root, path)
		if err != nil {
			return nil, err
		}
		all = append(all, Blocks(page, string(text))...)
	}
	return all, nil
}

// RunBy are the blocks that a test is said to run, in the order of the pages.
func RunBy(root, test string) ([]Block, error) {
	all, err := Read(root)
	if err != nil {
		return nil, err
	}
	var found []Block
	for _, b := range all {
		runs, err := b.Runs()
		if err != nil {
			return nil, err
		}
		if slices.ContainsFunc(runs, func(r Run) bool { return r.Test == test }) {
			found = append(found, b)
		}
	}
	return found, nil
}

// Take returns what gives the test the blocks that pages say it runs, by one of their
// lines. Blocks with the same text are one. The test fails if there is no such block, and
// at its end if it has not taken one of them.
func Take(t testing.TB, root string) func(line string) string {
	t.Helper()
	blocks, err := RunBy(root, t.Name())
	if err != nil {
		t.Fatal(err)
	}
	taken := map[string]bool{}
	t.Cleanup(func() {
		for _, b := range blocks {
			if !taken[b.Text] && !t.Failed() {
				t.Errorf("%s, line %d: the page says that this test runs it", b.Page, b.Line)
			}
		}
	})
	return func(line string) string {
		t.Helper()
		for _, b := range blocks {
			if slices.Contains(strings.Split(b.Text, "\n"), line) {
				taken[b.Text] = true
				return b.Text
			}
		}
		t.Fatalf("no page has a block for %s with the line %q", t.Name(), line)
		return ""
	}
}
