package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

// asMain makes the test binary behave as csi-loop, for its children.
const asMain = "CSI_LOOP_TEST_AS_MAIN"

func TestMain(m *testing.M) {
	if spec := os.Getenv(asController); spec != "" {
		if err := runController(spec); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	// A fuzz target's workers are this binary too.
	if os.Getenv(asMain) == "1" && !slices.Contains(os.Args, "-test.fuzzworker") {
		main()
		os.Exit(0)
	}
	if err := errors.Join(roottest.OwnMounts(), os.Setenv(asMain, "1")); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	// A configuration in the developer's environment is not the tests'.
	for _, pair := range os.Environ() {
		if name, _, _ := strings.Cut(pair, "="); strings.HasPrefix(name, envPrefix) || name == "CSI_ENDPOINT" {
			os.Unsetenv(name)
		}
	}
	roottest.Main(m)
}

// child is a csi-loop process.
type child struct {
	t    *testing.T
	cmd  *exec.Cmd
	done chan struct{}

	mu     sync.Mutex
	stderr bytes.Buffer // guarded by mu
	stdout bytes.Buffer // read after done
}

// Write collects standard error.
func (c *child) Write(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.stderr.Write(b)
}

func (c *child) errors() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.stderr.String()
}

// spawn starts csi-loop. It is killed at the end of the test if it still runs.
func spawn(t *testing.T, env []string, args ...string) *child {
	t.Helper()
	return spawnCommand(t, exec.Command("/proc/self/exe", args...), env)
}

func spawnCommand(t *testing.T, cmd *exec.Cmd, env []string) *child {
	t.Helper()
	c := &child{t: t, cmd: cmd, done: make(chan struct{})}
	cmd.Env = append(os.Environ(), env...)
	cmd.Stdout, cmd.Stderr = &c.stdout, c
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Setpgid = true
	cmd.WaitDelay = 5 * time.Second
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		_ = cmd.Wait() // ProcessState tells
		close(c.done)
	}()
	t.Cleanup(func() {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		<-c.done
	})
	return c
}

// wait returns the exit status, -1 when a signal ended it.
func (c *child) wait() int {
	c.t.Helper()
	limit := 2 * time.Minute // a demo that fails may clean up for a minute
	if os.Getenv("CSI_LOOP_VM") != "" {
		limit = 20 * time.Minute // on an emulated processor (test/vm)
	}
	select {
	case <-c.done:
		return c.cmd.ProcessState.ExitCode()
	case <-time.After(limit):
		c.t.Fatalf("still running; its errors: %s", c.errors())
		return 0
	}
}

// waitFor returns when standard error contains text.
func (c *child) waitFor(text string) {
	c.t.Helper()
	deadline := time.Now().Add(60 * time.Second)
	for !strings.Contains(c.errors(), text) {
		select {
		case <-c.done:
			c.t.Fatalf("ended without %q; its errors: %s", text, c.errors())
		case <-time.After(2 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			c.t.Fatalf("no %q; its errors: %s", text, c.errors())
		}
	}
}

func (c *child) signal(s syscall.Signal) {
	c.t.Helper()
	if err := c.cmd.Process.Signal(s); err != nil && !errors.Is(err, os.ErrProcessDone) {
		c.t.Fatal(err)
	}
}

// stop ends the process the orderly way.
func (c *child) stop() {
	c.t.Helper()
	c.signal(syscall.SIGTERM)
	if code := c.wait(); code != 0 {
		c.t.Errorf("exit status %d after SIGTERM; its errors: %s", code, c.errors())
	}
}

// complaint is the line that says why it failed. There must be exactly one, and
// nothing else but log lines of lesser severity.
func (c *child) complaint() string {
	c.t.Helper()
	var found []string
	for line := range strings.Lines(c.errors()) {
		line = strings.TrimSuffix(line, "\n")
		switch {
		case strings.HasPrefix(line, "csi-loop: "):
			found = append(found, strings.TrimPrefix(line, "csi-loop: "))
		case strings.HasPrefix(line, "I"): // klog's information
		default:
			c.t.Errorf("unexpected line on standard error: %q", line)
		}
	}
	if len(found) != 1 {
		c.t.Errorf("%d lines say why it failed, want 1: %q", len(found), c.errors())
		return ""
	}
	return found[0]
}

func TestUsageErrorsAreOneLine(t *testing.T) {
	for name, c := range map[string]struct {
		args []string
		want string
	}{
		"unknown command":   {[]string{"frobnicate"}, `unknown command "frobnicate"`},
		"unknown flag":      {[]string{"serve", "--node=x"}, "unknown flag: --node (csi-loop serve --help lists the flags)"},
		"malformed flag":    {[]string{"serve", "--loop-devices-max=x"}, "--loop-devices-max"},
		"stray argument":    {[]string{"serve", "x"}, `unknown command "x"`},
		"no node ID":        {[]string{"serve"}, "no node ID: give --node-id=NAME"},
		"node ID":           {append([]string{"serve"}, minimal("--node-id=my node")...), `node ID "my node": it is a topology value and needs 1 to 63 letters, digits`},
		"driver name":       {append([]string{"serve", "--driver-name=My_Driver"}, minimal()...), `driver name "My_Driver": need at most 63 lower-case letters`},
		"logging format":    {append([]string{"serve", "--logging-format=xml"}, minimal()...), "logging"},
		"version in French": {[]string{"version", "-o", "fr"}, "use text or json"},
	} {
		t.Run(name, func(t *testing.T) {
			p := spawn(t, nil, c.args...)
			if code := p.wait(); code != exitUsage {
				t.Errorf("exit status %d, want %d", code, exitUsage)
			}
			if got := p.complaint(); !strings.Contains(got, c.want) {
				t.Errorf("it says %q, want %q in it", got, c.want)
			}
		})
	}
}

func TestExampleConfigIsPrinted(t *testing.T) {
	p := spawn(t, nil, "serve", "--example-config")
	if code := p.wait(); code != 0 || p.stdout.String() != exampleConfig {
		t.Errorf("exit status %d, output %q, errors %q", code, p.stdout.String(), p.errors())
	}
}

func TestCheckConfig(t *testing.T) {
	for name, args := range map[string][]string{"node": nodeArgs(), "controller": controllerArgs()} {
		t.Run(name, func(t *testing.T) {
			p := spawn(t, nil, append([]string{"serve", "--check-config"}, args...)...)
			if code := p.wait(); code != 0 || p.stdout.String() != "the configuration is good\n" {
				t.Errorf("exit status %d, output %q, errors %q", code, p.stdout.String(), p.errors())
			}
			p = spawn(t, nil, append([]string{"serve", "--check-config", "--logging-format=xml"}, args...)...)
			if code := p.wait(); code != 2 || p.stdout.String() != "" {
				t.Errorf("exit status %d, output %q, errors %q", code, p.stdout.String(), p.errors())
			}
		})
	}
}

func TestHelpTellsThePrecedence(t *testing.T) {
	var out bytes.Buffer
	c := newCommand(&out, &out)
	c.SetArgs([]string{"serve", "--help"})
	if err := c.ExecuteContext(context.Background()); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"CSILOOP_NODE_ID", "CSI_ENDPOINT", "A flag wins over the environment", "--stop-timeout", "--logging-format"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("help lacks %q", want)
		}
	}
}

// ordinary makes cmd run without root.
func ordinary(cmd *exec.Cmd) *exec.Cmd {
	if os.Geteuid() == 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	}
	return cmd
}

func TestWithoutRoot(t *testing.T) {
	for name, c := range map[string]struct {
		args []string
		want string
	}{
		"serve": {append([]string{"serve"}, minimal()...), "serve needs root"},
		"demo":  {[]string{"demo"}, "the demo needs root"},
	} {
		t.Run(name, func(t *testing.T) {
			p := spawnCommand(t, ordinary(exec.Command("/proc/self/exe", c.args...)), nil)
			if code := p.wait(); code != exitFailure {
				t.Errorf("exit status %d, want %d", code, exitFailure)
			}
			if got := p.complaint(); !strings.Contains(got, c.want) || !strings.Contains(got, "sudo") {
				t.Errorf("it says %q, want %q in it", got, c.want)
			}
		})
	}
}

func TestOneLine(t *testing.T) {
	err := errors.Join(fmt.Errorf("first:\n  %s\n\n  line 3", "line 2: bad"), errors.New("second"))
	if got, want := oneLine(err), "first: line 2: bad; line 3; second"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}
