package main

import (
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/term"

	"github.com/csi-loop/csi-loop/cmd/csi-loop/survey"
)

// progress is a bar on a terminal, and nothing elsewhere.
type progress struct {
	out   io.Writer // nil when it is no terminal
	shown bool
}

func newProgress(out io.Writer) *progress {
	if f, ok := out.(*os.File); !ok || !term.IsTerminal(int(f.Fd())) {
		return &progress{}
	}
	return &progress{out: out}
}

// barWidth is in characters.
const barWidth = 30

// show draws how far a copy of so many bytes is.
func (p *progress) show(done, all int64) {
	if p.out == nil || all <= 0 {
		return
	}
	p.shown = true
	full := int(min(done, all) * barWidth / all)
	fmt.Fprintf(p.out, "\r[%s%s] %s of %s ", strings.Repeat("#", full), strings.Repeat(" ", barWidth-full), survey.Bytes(done), survey.Bytes(all))
}

// end clears the line.
func (p *progress) end() {
	if p.shown {
		fmt.Fprintf(p.out, "\r%s\r", strings.Repeat(" ", barWidth+40))
	}
}
