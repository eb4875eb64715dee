package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"golang.org/x/term"

	"github.com/csi-loop/csi-loop/cmd/csi-loop/survey"
)

// progress is a bar on a terminal, and a line now and then elsewhere.
type progress struct {
	out      io.Writer
	terminal bool
	shown    bool      // there is a bar
	said     time.Time // when the last line was written
}

func newProgress(out io.Writer) *progress {
	f, ok := out.(*os.File)
	return &progress{out: out, terminal: ok && term.IsTerminal(int(f.Fd())), said: time.Now()}
}

const (
	barWidth = 30 // characters
	// lineEvery is how often there is a line where there is no bar.
	lineEvery = 10 * time.Second
)

// show says how far a copy of so many bytes is.
func (p *progress) show(done, all int64) {
	if all <= 0 {
		return
	}
	if !p.terminal {
		if now := time.Now(); now.Sub(p.said) >= lineEvery {
			p.said = now
			fmt.Fprintf(p.out, "copied %s of %s\n", survey.Bytes(done), survey.Bytes(all))
		}
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
