package e2e

import (
	"bufio"
	"cmp"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// tutorials are pages of commands, from this directory.
const tutorials = "../../docs/tutorials"

// step is a block of commands on a page, and what the page says that they print.
type step struct {
	line     int
	commands string
	output   string
	shown    bool // there is an output, perhaps an empty one
}

// TestTutorials runs every command of the tutorials, as a reader does who takes them
// from the page one block after the other, and compares what is printed. Nothing may be left.
// PODS is how many pods get a copy of the data set.
func TestTutorials(t *testing.T) {
	pages, err := filepath.Glob(tutorials + "/*.md")
	if err != nil {
		t.Fatal(err)
	}
	ran := 0
	for _, page := range pages {
		name := strings.TrimSuffix(filepath.Base(page), ".md")
		steps := readSteps(t, page)
		if name == "README" {
			if len(steps) > 0 {
				t.Errorf("the index has commands that nobody runs")
			}
			continue
		}
		if len(steps) == 0 {
			t.Errorf("%s has no commands", page)
			continue
		}
		ran++
		t.Run(name, func(t *testing.T) {
			e := volumes(t)
			e.follow(page, steps)
			e.expectMade(0)
		})
	}
	if ran == 0 {
		t.Error("there is no tutorial")
	}
}

// follow runs a page's blocks in one shell, which stops at the first command that fails.
func (e *env) follow(page string, steps []step) {
	e.Helper()
	const mark = "--- end of block "
	var script strings.Builder
	script.WriteString("set -euo pipefail\n")
	for i, s := range steps {
		fmt.Fprintf(&script, "%s\necho '%s%d'\n", s.commands, mark, i)
	}
	ctx, cancel := context.WithTimeout(e.Context(), 4*patience)
	defer cancel()
	shell := exec.CommandContext(ctx, "bash", "-c", script.String())
	shell.Env = append(os.Environ(), "PODS="+cmp.Or(os.Getenv("PODS"), "6"))
	var errors strings.Builder
	shell.Stderr = &errors
	out, err := shell.Output()
	rest := string(out)
	for i, s := range steps {
		printed, after, found := strings.Cut(rest, fmt.Sprintf("%s%d\n", mark, i))
		if !found {
			e.Fatalf("%s, line %d: %v\n%s\n%s", page, s.line, err, rest, errors.String())
		}
		rest = after
		if s.shown && !matches(s.output, printed) {
			e.Errorf("%s, line %d, says that its commands print\n%s\nand they print\n%s", page, s.line, s.output, printed)
		}
	}
	if err != nil {
		e.Fatalf("%s: %v\n%s", page, err, errors.String())
	}
}

// matches reports whether a text is what a page shows, where "..." is anything.
func matches(shown, printed string) bool {
	parts := strings.Split(strings.TrimSpace(shown), "...")
	for i, p := range parts {
		parts[i] = regexp.QuoteMeta(p)
	}
	return regexp.MustCompile(`(?s)^\s*` + strings.Join(parts, ".*") + `\s*$`).MatchString(printed)
}

// readSteps finds the blocks of a page that are marked sh, each with the one marked text
// behind it, if there is one.
func readSteps(t *testing.T, page string) []step {
	t.Helper()
	f, err := os.Open(page)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	var steps []step
	var block []string
	kind, start, n, last := "", 0, 0, 0
	for s := bufio.NewScanner(f); s.Scan(); {
		n++
		line := s.Text()
		word, fence := strings.CutPrefix(line, "```")
		switch {
		case fence && kind == "":
			kind, start, block = word, n, nil
		case fence:
			text := strings.Join(block, "\n")
			switch {
			case kind == "sh":
				steps = append(steps, step{line: start, commands: text})
			case kind == "text" && len(steps) > 0 && start == last+1:
				steps[len(steps)-1].output, steps[len(steps)-1].shown = text, true
			default:
				t.Errorf("%s, line %d: a block that is neither commands (sh) nor what the ones before it print (text)", page, start)
			}
			kind, last = "", n
		case kind != "":
			block = append(block, line)
		case strings.HasPrefix(line, "    "):
			t.Errorf("%s, line %d: an indented block, which nobody runs: use a fence", page, n)
		}
	}
	if kind != "" {
		t.Errorf("%s, line %d: the block does not end", page, start)
	}
	return steps
}

func TestWhatTutorialsShowIsCompared(t *testing.T) {
	for _, c := range []struct {
		shown, printed string
		same           bool
	}{
		{"42", "42\n", true},
		{"42", "43\n", false},
		{"42", "1\n42\n", false},
		{"...\n42", "pod deleted\n42\n", true},
		{"a...c", "abc\n", true},
		{"a...c", "abcd\n", false},
		{"a.c", "abc\n", false},
	} {
		if got := matches(c.shown, c.printed); got != c.same {
			t.Errorf("%q shown, %q printed: %v", c.shown, c.printed, got)
		}
	}
}
