package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/csi-loop/csi-loop/cmd/csi-loop/demo"
	"github.com/csi-loop/csi-loop/internal/roottest"
)

// nothingLeft checks that a demo in dir left no file, device, mount or process.
func nothingLeft(t *testing.T, dir string) {
	t.Helper()
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 0 {
		t.Errorf("files: %v, %v", entries, err)
	}
	if left := roottest.Loops(dir); len(left) != 0 {
		t.Errorf("loop devices: %v", left)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil || strings.Contains(string(mounts), dir+"/") {
		t.Errorf("mounts: %s, %v", mounts, err)
	}
	processes, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range processes {
		if text, err := os.ReadFile(p); err == nil && bytes.Contains(text, []byte("unix://"+dir)) {
			t.Errorf("process: %s", bytes.ReplaceAll(text, []byte{0}, []byte{' '}))
		}
	}
}

// demoDir has a short path, for the socket.
func demoDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "d") //nolint:usetesting // its path is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(dir) })
	return dir
}

func TestDemo(t *testing.T) {
	roottest.Require(t)
	dir := demoDir(t)
	c := spawn(t, nil, "demo", "--dir="+dir)
	if code := c.wait(); code != 0 {
		t.Fatalf("exit status %d; errors: %s\n%s", code, c.errors(), c.stdout.String())
	}
	nothingLeft(t, dir)
	out := c.stdout.String()
	t.Log("\n" + out)
	if strings.Contains(out, "\x1b") {
		t.Error("colours without a terminal")
	}
	for _, want := range []string{"no space left on device", "read-only file system", "allocated 300", "600 MiB", "offset", "nothing is left"} {
		if !strings.Contains(out, want) {
			t.Errorf("the story lacks %q", want)
		}
	}
}

// A step that fails, at points where different things have to be taken back.
func TestDemoCleansUpAfterAFailure(t *testing.T) {
	roottest.Require(t)
	for _, step := range []int{1, 4, 7, 10, 11} {
		t.Run(fmt.Sprint("step ", step), func(t *testing.T) {
			dir := demoDir(t)
			var out bytes.Buffer
			reason := errors.New("told to fail")
			err := demo.Run(t.Context(), demo.Options{
				Driver: []string{"/proc/self/exe", "serve"}, Dir: dir, Out: &out,
				After: func(n int) error {
					if n == step {
						return reason
					}
					return nil
				},
			})
			if !errors.Is(err, reason) || strings.Contains(err.Error(), "cleaning up") {
				t.Errorf("%v\n%s", err, out.String())
			}
			nothingLeft(t, dir)
		})
	}
}

// The driver dies and cannot be started again: the demo cleans up by itself.
func TestDemoCleansUpWithoutADriver(t *testing.T) {
	roottest.Require(t)
	dir := demoDir(t)
	var out bytes.Buffer
	reason := errors.New("told to fail")
	err := demo.Run(t.Context(), demo.Options{
		Driver: []string{"/proc/self/exe", "serve"}, Dir: dir, Out: &out,
		After: func(n int) error {
			if n < 9 {
				return nil
			}
			// What makes every later start fail.
			configs, err := filepath.Glob(dir + "/*/demo.yaml")
			if err != nil || len(configs) != 1 {
				return errors.Join(errors.New("no configuration"), err)
			}
			if err := os.WriteFile(configs[0], []byte("nonsense: true\n"), 0o600); err != nil {
				return err
			}
			pids, err := filepath.Glob("/proc/[0-9]*/cmdline")
			if err != nil {
				return err
			}
			for _, p := range pids {
				text, err := os.ReadFile(p)
				if err != nil || !bytes.Contains(text, []byte("unix://"+dir)) {
					continue
				}
				var pid int
				if _, err := fmt.Sscanf(p, "/proc/%d/cmdline", &pid); err != nil {
					return err
				}
				if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
					return err
				}
			}
			return reason
		},
	})
	if !errors.Is(err, reason) || strings.Contains(err.Error(), "cleaning up") {
		t.Errorf("%v\n%s", err, out.String())
	}
	nothingLeft(t, dir)
}

func TestDemoCleansUpAfterCtrlC(t *testing.T) {
	roottest.Require(t)
	dir := demoDir(t)
	c := spawn(t, nil, "demo", "--dir="+dir)
	// In the middle of something: as soon as there is a loop device.
	for len(roottest.Loops(dir)) == 0 {
		select {
		case <-c.done:
			t.Fatalf("ended early: %s", c.errors())
		default:
		}
	}
	c.signal(syscall.SIGINT)
	if code := c.wait(); code != exitFailure {
		t.Errorf("exit status %d, want %d", code, exitFailure)
	}
	if got := c.complaint(); !strings.Contains(got, "signal") {
		t.Errorf("it says %q", got)
	}
	nothingLeft(t, dir)
}

func TestDemoWantsRoom(t *testing.T) {
	roottest.Require(t)
	small := roottest.Pool(t, "ext4", 64<<20)
	for dir, want := range map[string]string{
		small:                    "choose another directory with --dir",
		"/nonexistent/directory": "choose another place with --dir",
	} {
		c := spawn(t, nil, "demo", "--dir="+dir)
		if code := c.wait(); code != exitFailure {
			t.Errorf("%s: exit status %d, want %d", dir, code, exitFailure)
		}
		if got := c.complaint(); !strings.Contains(got, want) {
			t.Errorf("%s: it says %q, want %q in it", dir, got, want)
		}
		if left, err := filepath.Glob(dir + "/csi-loop-demo-*"); err != nil || len(left) > 0 {
			t.Errorf("left: %v, %v", left, err)
		}
	}
}
