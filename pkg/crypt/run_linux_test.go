package crypt

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// pretend puts a program in the place of cryptsetup that notes how it is called, and ends
// with a status.
func pretend(t *testing.T, status int) (notes string) {
	t.Helper()
	dir := t.TempDir()
	notes = filepath.Join(dir, "notes")
	script := fmt.Sprintf("#!/bin/sh\n{ echo \"arguments: $*\"; env; echo; cat; } >>%s\necho it said so >&2\nexit %d\n", notes, status)
	if err := os.WriteFile(filepath.Join(dir, program), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir)
	return notes
}

// The passphrase is seen by nobody who lists processes, their environment or open files:
// it goes in by standard input, as it is and once.
func TestPassphraseGoesInByStandardInput(t *testing.T) {
	const passphrase = "secret with $HOME\nand two lines"
	c, err := New(Options{})
	if err != nil {
		t.Fatal(err)
	}
	for name, call := range map[string]func() error{
		"format": func() error {
			return c.Format(t.Context(), "/dev/null", []byte(passphrase), FormatSpec{Offset: 16 << 20, BlockSize: 4096})
		},
		"verify": func() error { return c.Verify(t.Context(), "/dev/null", []byte(passphrase)) },
		"open": func() error {
			_, err := c.Open(t.Context(), "/dev/null", []byte(passphrase), OpenSpec{Name: "csi-loop-none"})
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			notes := pretend(t, 0)
			if err := call(); err != nil && name != "open" { // which looks for the mapping
				t.Fatal(err)
			}
			b, err := os.ReadFile(notes)
			if err != nil {
				t.Fatal(err)
			}
			called, given, _ := strings.Cut(string(b), "\n\n")
			if strings.Contains(called, "secret") || strings.Contains(called, "two lines") {
				t.Errorf("it shows in what others see: %s", called)
			}
			if given != passphrase {
				t.Errorf("it got %q", given)
			}
			if !strings.Contains(called, "--key-file -") || strings.Contains(called, "HOME=") {
				t.Errorf("called with %s", called)
			}
		})
	}
}

func TestExitCodes(t *testing.T) {
	c, err := New(cheap)
	if err != nil {
		t.Fatal(err)
	}
	open := func() error {
		_, err := c.Open(t.Context(), "/dev/null", []byte("secret passphrase"), OpenSpec{Name: "csi-loop-none"})
		return err
	}
	for _, test := range []struct {
		status int
		want   error
		words  string
	}{
		{1, nil, "it said so"},
		{2, ErrPassphrase, ""},
		{3, nil, "not enough memory"},
		{5, ErrBusy, "it said so"},
	} {
		pretend(t, test.status)
		err := open()
		if err == nil || test.want != nil && !errors.Is(err, test.want) || !strings.Contains(err.Error(), test.words) || strings.Contains(err.Error(), "secret passphrase") {
			t.Errorf("status %d: %v", test.status, err)
		}
	}
	// A header that cannot be written is no wrong passphrase.
	pretend(t, 2)
	if err := c.Format(t.Context(), "/dev/null", []byte("secret passphrase"), FormatSpec{Offset: 16 << 20, BlockSize: 512}); err == nil || errors.Is(err, ErrPassphrase) {
		t.Errorf("format: %v", err)
	}
}

// A program that is left over would write while the next process does.
func TestProgramEndsWithItsStarter(t *testing.T) {
	if os.Getenv("CSI_LOOP_STARTER") != "" {
		c, err := New(cheap)
		if err != nil {
			t.Fatal(err)
		}
		t.Fatal(c.Format(t.Context(), "/dev/null", []byte("0123456789abcdef"), FormatSpec{Offset: 16 << 20, BlockSize: 512}))
	}
	notes := pretend(t, 0)
	dir := filepath.Dir(notes)
	if err := os.WriteFile(filepath.Join(dir, program), []byte("#!/bin/sh\necho $$ >"+notes+".new\n/bin/mv "+notes+".new "+notes+"\nexec /bin/sleep 600\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	starter := exec.Command(self, "-test.run=^TestProgramEndsWithItsStarter$")
	starter.Env = append(os.Environ(), "CSI_LOOP_STARTER=1")
	if err := starter.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = starter.Wait() }()
	defer func() { _ = starter.Process.Kill() }()
	var pid string
	eventually(t, "no program is started", func() bool {
		b, err := os.ReadFile(notes)
		pid = strings.TrimSpace(string(b))
		return err == nil
	})
	if !runs(pid) {
		t.Fatal("the program ended by itself")
	}
	defer func() { // where it did not end with its starter
		if n, err := strconv.Atoi(pid); err == nil && runs(pid) {
			_ = syscall.Kill(n, syscall.SIGKILL)
		}
	}()
	if err := starter.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the program goes on", func() bool { return !runs(pid) })
}

// runs says whether there is a process that can still do something.
func runs(pid string) bool {
	b, err := os.ReadFile(filepath.Join("/proc", pid, "stat"))
	_, state, _ := strings.Cut(string(b), ") ")
	return err == nil && !strings.HasPrefix(state, "Z")
}

func eventually(t *testing.T, problem string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !done(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal(problem)
		}
	}
}
