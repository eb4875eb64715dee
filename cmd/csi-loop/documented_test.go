package main

import (
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/csi-loop/csi-loop/pkg/router"
)

// commandLine finds a call of csi-loop in a line of a page: by itself, by sudo, or in a pod.
var commandLine = regexp.MustCompile(`^ {4,}(?:.*-- |sudo |.*\| )?(?:bin/)?csi-loop ([^|#]*)`)

// substituted is what a shell replaces by a word.
var substituted = regexp.MustCompile(`"?\$\([^)]*\)"?`)

// What the pages say to type is understood: the command is there, and takes the flags
// and as many arguments.
func TestDocumentedCommandsAreUnderstood(t *testing.T) {
	pages, err := filepath.Glob("../../docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, page := range append(pages, "../../README.md", "../../CONTRIBUTING.md") {
		text, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		for i, line := range strings.Split(string(text), "\n") {
			m := commandLine.FindStringSubmatch(line)
			if m == nil {
				continue
			}
			found++
			if err := understood(strings.Fields(substituted.ReplaceAllString(m[1], "x"))); err != nil {
				t.Errorf("%s, line %d: %q: %v", page, i+1, strings.TrimSpace(line), err)
			}
		}
	}
	if found < 12 {
		t.Errorf("only %d", found)
	}
	for _, wrong := range []string{"forgett NODE", "forget", "forget NODE --claim", "volumes x"} {
		if err := understood(strings.Fields(wrong)); err == nil {
			t.Errorf("%s is understood", wrong)
		}
	}
}

// Whoever is led to the runbook by the alert finds the reason that it names.
func TestReasonsOfRefusedLinksAreDocumented(t *testing.T) {
	text, err := os.ReadFile("../../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, ok := strings.Cut(string(text), "\n### CSILoopLinksRefused\n")
	if !ok {
		t.Fatal("there is no such section")
	}
	section, _, _ = strings.Cut(section, "\n### ")
	for reason := range router.New(router.Config{Self: "a", Roster: noRoster{}}).Stats().Refused {
		if !strings.Contains(section, "\n| `"+reason+"` | ") {
			t.Errorf("nothing says what %s means", reason)
		}
	}
}

// understood parses a command line and runs nothing.
func understood(words []string) error {
	c, rest, err := newCommand(io.Discard, io.Discard).Find(words)
	if err != nil {
		return err
	}
	if err := c.ParseFlags(rest); err != nil {
		return err
	}
	return c.ValidateArgs(c.Flags().Args())
}
