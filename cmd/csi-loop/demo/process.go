package demo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"
)

// process is the driver as a child.
type process struct {
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended
	err  error         // how it ended; set before done is closed
}

// startTime bounds how long the driver may take until it answers.
const startTime = 30 * time.Second

// startProcess runs the driver. Its output goes to the end of the log file.
func startProcess(ctx context.Context, argv []string, log string) (*process, error) {
	out, err := os.OpenFile(log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	// Not ended with the context: it is needed to clean up.
	cmd := exec.CommandContext(context.WithoutCancel(ctx), argv[0], argv[1:]...)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.Env = ownEnvironment(os.Environ())
	apart(cmd)
	p := &process{cmd: cmd, done: make(chan struct{})}
	started := make(chan error, 1)
	go func() {
		// The child is told of its parent's death when the thread that started it
		// ends, so that thread has to stay.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			p.err = cmd.Wait()
		}
		close(p.done)
	}()
	return p, <-started
}

// ownEnvironment drops the variables that would configure the driver.
func ownEnvironment(environ []string) []string {
	var kept []string
	for _, pair := range environ {
		if !strings.HasPrefix(pair, "CSILOOP_") && !strings.HasPrefix(pair, "CSI_ENDPOINT=") {
			kept = append(kept, pair)
		}
	}
	return kept
}

func (p *process) alive() bool {
	if p == nil {
		return false
	}
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// kill ends the process with SIGKILL and waits.
func (p *process) kill() error {
	if err := p.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	<-p.done
	return nil
}

// stopTime is longer than the driver's own grace.
const stopTime = 15 * time.Second

// stop ends the process with SIGTERM, and returns how it ended.
func (p *process) stop(ctx context.Context) error {
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, stopTime)
	defer cancel()
	select {
	case <-p.done:
		return p.err
	case <-ctx.Done():
		return errors.Join(errors.New("the driver did not stop"), p.kill())
	}
}

// waitListening returns when the driver accepts connections, or has ended.
func (p *process) waitListening(ctx context.Context, socket string) error {
	ctx, cancel := context.WithTimeout(ctx, startTime)
	defer cancel()
	for {
		conn, err := (&net.Dialer{}).DialContext(ctx, "unix", socket)
		if err == nil {
			return conn.Close()
		}
		select {
		case <-p.done:
			return fmt.Errorf("the driver ended while starting: %w", p.err)
		default:
		}
		if err := pause(ctx, 2*time.Millisecond); err != nil {
			return fmt.Errorf("the driver does not answer: %w", err)
		}
	}
}

// pause waits, unless ctx ends first.
func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (d *demo) logFile() string { return filepath.Join(d.dir, "driver.log") }

// logTail is the end of the driver's log.
func (d *demo) logTail(lines int) []string {
	text, err := os.ReadFile(d.logFile())
	if err != nil {
		return nil
	}
	all := strings.Split(string(bytes.TrimSpace(text)), "\n")
	return all[max(0, len(all)-lines):]
}

// startDriver starts the driver and connects to it.
func (d *demo) startDriver(ctx context.Context) error {
	argv := append([]string{}, d.opts.Driver...)
	argv = append(argv, "--config="+d.configFile(), "--endpoint=unix://"+d.socket(),
		"--pool=default="+d.poolDir(), "--image-dir="+d.imageDir(), "--state-dir="+d.stateDir())
	var err error
	if d.driver, err = startProcess(ctx, argv, d.logFile()); err != nil {
		return err
	}
	if err := d.driver.waitListening(ctx, d.socket()); err != nil {
		return err
	}
	if d.client, err = connect(d.socket(), d.out); err != nil {
		return err
	}
	return d.client.waitReady(ctx)
}

// disconnect forgets the connection to a driver that is gone.
func (d *demo) disconnect() error {
	if d.client == nil {
		return nil
	}
	err := d.client.conn.Close()
	d.client = nil
	return err
}
