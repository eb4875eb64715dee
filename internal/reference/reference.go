// Package reference writes pages of docs/reference from what the code knows. It is for
// the generators that "make generate" runs.
package reference

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// Note says on each page that it is generated.
const Note = "<!-- Written by make generate from the code; edit that instead. -->\n\n"

// Page collects the Markdown of one page.
type Page struct {
	b strings.Builder
}

// NewPage begins a page. The text follows its title.
func NewPage(title, text string) *Page {
	p := &Page{}
	p.Printf("# %s\n\n%s%s\n", title, Note, strings.TrimSpace(text))
	return p
}

// Printf adds to the page.
func (p *Page) Printf(format string, args ...any) { fmt.Fprintf(&p.b, format, args...) }

// Table adds a table with a blank line before it. In cells a bar is escaped and lines
// are joined.
func (p *Page) Table(head []string, rows [][]string) {
	escape := strings.NewReplacer("|", `\|`, "<", "&lt;")
	line := func(cells []string) {
		p.b.WriteString("|")
		for _, c := range cells {
			p.b.WriteString(" " + escape.Replace(strings.Join(strings.Fields(c), " ")) + " |")
		}
		p.b.WriteString("\n")
	}
	p.b.WriteString("\n")
	line(head)
	p.b.WriteString(strings.Repeat("|---", len(head)) + "|\n")
	for _, r := range rows {
		line(r)
	}
}

// Write writes the page to a file of dir.
func (p *Page) Write(dir, name string) error {
	return os.WriteFile(filepath.Join(dir, name), []byte(p.b.String()), 0o644) //nolint:gosec // a page for everybody
}

// Code is text as code, "" for none.
func Code(text string) string {
	if text == "" {
		return ""
	}
	return "`" + text + "`"
}

// Commands adds each command below c with its flags. environment names the variable
// that a flag of a command may be given by, "" for none.
func (p *Page) Commands(c *cobra.Command, environment func(*cobra.Command, *pflag.Flag) string) {
	p.command(c, environment)
	for _, sub := range c.Commands() {
		if sub.IsAvailableCommand() && sub.Name() != "help" && sub.Name() != "completion" {
			p.Commands(sub, environment)
		}
	}
}

func (p *Page) command(c *cobra.Command, environment func(*cobra.Command, *pflag.Flag) string) {
	text := c.Long
	if text == "" {
		text = c.Short + "."
	}
	p.Printf("\n## %s\n\n```text\n%s\n```\n", c.CommandPath(), strings.TrimSpace(text))
	if c.Runnable() {
		p.Printf("\n    %s\n", c.UseLine())
	}
	var rows [][]string
	variables := false
	c.NonInheritedFlags().VisitAll(func(f *pflag.Flag) {
		if f.Hidden || f.Name == "help" {
			return
		}
		name := "`--" + f.Name + "`"
		if f.Shorthand != "" {
			name = "`-" + f.Shorthand + "`, " + name
		}
		variable := environment(c, f)
		variables = variables || variable != ""
		rows = append(rows, []string{name, preset(f), Code(variable), f.Usage})
	})
	if len(rows) == 0 {
		return
	}
	head := []string{"Flag", "Default", "Environment", ""}
	if !variables {
		head = slices.Delete(head, 2, 3)
		for i, r := range rows {
			rows[i] = slices.Delete(r, 2, 3)
		}
	}
	p.Table(head, rows)
}

// preset shows a flag's default, if it is worth showing.
func preset(f *pflag.Flag) string {
	if slices.Contains([]string{"", "[]", "false"}, f.DefValue) {
		return ""
	}
	return Code(f.DefValue)
}
