package main

import (
	"os"
	"path/filepath"
	"testing"
)

func TestColour(t *testing.T) {
	file, err := os.Create(filepath.Join(t.TempDir(), "out"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0) // a character device, as terminals are
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	for name, c := range map[string]struct {
		out  *os.File
		env  map[string]string
		want bool
	}{
		"terminal":           {null, map[string]string{"TERM": "xterm"}, true},
		"terminal, NO_COLOR": {null, map[string]string{"TERM": "xterm", "NO_COLOR": "1"}, false},
		"empty NO_COLOR":     {null, map[string]string{"TERM": "xterm", "NO_COLOR": ""}, true},
		"dumb terminal":      {null, map[string]string{"TERM": "dumb"}, false},
		"file":               {file, map[string]string{"TERM": "xterm"}, false},
	} {
		t.Run(name, func(t *testing.T) {
			lookup := func(name string) (string, bool) { v, ok := c.env[name]; return v, ok }
			if got := wantsColour(c.out, lookup); got != c.want {
				t.Errorf("got %v", got)
			}
		})
	}
}
