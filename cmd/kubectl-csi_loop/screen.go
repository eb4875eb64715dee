package main

import (
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"golang.org/x/term"
)

// wipe empties a terminal, and goes to its upper left.
const wipe = "\x1b[H\x1b[2J"

// screen is where a command draws one picture after the other.
type screen struct {
	out, errOut io.Writer
	// size of the terminal, in characters; nil where there is none.
	size func() (width, height int, err error)
	// redraw: a picture takes the place of the last one. A dumb terminal cannot, and gets
	// them one below the other, as a file does.
	redraw bool
	// colours are a matter of taste (NO_COLOR), and of what the terminal can.
	colours bool
	told    []string
}

// screenOf is the screen of a command.
func screenOf(c *cobra.Command) *screen {
	var size func() (int, int, error)
	if f, is := c.OutOrStdout().(*os.File); is && term.IsTerminal(int(f.Fd())) {
		size = func() (int, int, error) { return term.GetSize(int(f.Fd())) }
	}
	return newScreen(c.OutOrStdout(), c.ErrOrStderr(), size, os.Getenv)
}

func newScreen(out, errOut io.Writer, size func() (width, height int, err error), env func(string) string) *screen {
	able := size != nil && env("TERM") != "dumb"
	// https://no-color.org: any value but the empty one.
	return &screen{out: out, errOut: errOut, size: size, redraw: able, colours: able && env("NO_COLOR") == ""}
}

// picture is what is shown at one time.
type picture struct {
	rows  [][]cell // of a table
	notes []string
	more  string // what rows are that have no room
}

// show draws a table, as much of it as a terminal shows at once: what scrolls off would be
// its first rows. Notes are below it where pictures are redrawn, and else on standard error,
// when they are new.
func (s *screen) show(p picture) error {
	all, notes := lines(s.colours, p.rows), []line(nil)
	if s.redraw {
		for _, n := range p.notes {
			n = "note: " + printable(n)
			notes = append(notes, line{n, utf8.RuneCountInString(n)})
		}
	} else {
		s.tell(p.notes)
	}
	if s.size != nil {
		if width, height, err := s.size(); err == nil && width > 0 && height > 0 {
			all, notes = fit(all, notes, width, height, p.more)
		}
	}
	var out strings.Builder
	if s.redraw {
		out.WriteString(wipe)
	}
	for _, l := range slices.Concat(all, notes) {
		out.WriteString(l.text + "\n")
	}
	_, err := io.WriteString(s.out, out.String())
	return err
}

// tell writes notes to standard error if they are not those of the last time.
func (s *screen) tell(notes []string) {
	if slices.Equal(notes, s.told) {
		return
	}
	s.told = notes
	for _, n := range notes {
		fmt.Fprintln(s.errOut, "note: "+printable(n))
	}
}

// fit leaves out what does not fit on a terminal, and says how many rows that are. A line
// that is wider than the terminal takes several of its own. Notes get half of it at most,
// two lines each. The last line is the cursor's.
func fit(rows, notes []line, width, height int, more string) (shown, told []line) {
	room := max(2, height-1)
	heightOf := func(l line) int { return max(1, (l.width+width-1)/width) }
	take := func(all []line, room int) (n, used int) {
		for ; n < len(all) && used+heightOf(all[n]) <= room; n++ {
			used += heightOf(all[n])
		}
		return n, used
	}
	for i, n := range notes {
		if most := 2 * width; n.width > most {
			notes[i] = line{string([]rune(n.text)[:most]), most}
		}
	}
	n, used := take(notes, room/2)
	notes, room = notes[:n], room-used
	if n, _ = take(rows, room); n == len(rows) {
		return rows, notes
	}
	n, _ = take(rows, room-1)
	n = min(max(n, 1), len(rows)) // the head at least
	text := strings.TrimSpace(fmt.Sprintf("and %d more %s", len(rows)-n, more))
	return append(slices.Clone(rows[:n]), line{text, len(text)}), notes
}
