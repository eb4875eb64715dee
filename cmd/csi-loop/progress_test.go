package main

import (
	"bytes"
	"testing"
	"time"
)

// Where there is no terminal a copy that takes long is told of by lines, not too often.
func TestProgressByLines(t *testing.T) {
	var out bytes.Buffer
	p := newProgress(&out)
	p.show(1<<20, 4<<20)
	if out.Len() > 0 {
		t.Errorf("at once: %q", out.String())
	}
	p.said = p.said.Add(-lineEvery)
	p.show(2<<20, 4<<20)
	p.show(3<<20, 4<<20)
	p.end()
	if got, want := out.String(), "copied 2.0 MiB of 4.0 MiB\n"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	if time.Since(p.said) > lineEvery {
		t.Error("the next line comes at once")
	}
}

// On a terminal it is one line, drawn over and over.
func TestProgressBar(t *testing.T) {
	var out bytes.Buffer
	p := &progress{out: &out, terminal: true}
	p.show(0, 0) // nothing is known yet
	p.show(1<<20, 4<<20)
	if got, want := out.String(), "\r[#######                       ] 1.0 MiB of 4.0 MiB "; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}
