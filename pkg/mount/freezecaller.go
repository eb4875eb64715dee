package mount

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"
)

// helperName is the name under which this program is the helper of Freeze.
const helperName = "csi-loop-freeze-helper"

// Any program that uses this package is its helper, too, when it is started under
// that name. Were it for main to call, one that forgot would start itself again
// and again.
func init() { //nolint:gochecknoinits // see above
	if len(os.Args) == 1 && os.Args[0] == helperName {
		os.Exit(beHelper())
	}
}

func helperCommand() *exec.Cmd {
	// Outlives its caller by design, hence no context.
	cmd := exec.CommandContext(context.Background(), "/proc/self/exe")
	cmd.Args = []string{helperName}
	cmd.Env = []string{"GOMAXPROCS=1"}
	cmd.Dir = "/"
	// Away from our process group: a Ctrl-C for us must not end it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	return cmd
}

// helpers keeps one helper process for the next freeze: to start one takes longer than
// all else that this program does for a freeze. It costs a few megabytes, and only
// where something was frozen before. Its socket ends when this process does, whatever
// that was doing, and then it exits.
type helpers struct {
	mu   sync.Mutex
	idle *helperProcess // guarded by mu
}

// take returns the helper that was kept, which may be dead, or starts one.
func (h *helpers) take() (p *helperProcess, kept bool, err error) {
	h.mu.Lock()
	p, h.idle = h.idle, nil
	h.mu.Unlock()
	if p != nil {
		return p, true, nil
	}
	p, err = startHelper()
	return p, false, err
}

// put keeps a helper that holds nothing, if none is kept yet; otherwise it ends it.
func (h *helpers) put(p *helperProcess) error {
	h.mu.Lock()
	if h.idle == nil {
		h.idle, p = p, nil
	}
	h.mu.Unlock()
	if p == nil {
		return nil
	}
	return p.end()
}

// EndHelper ends the process that Freeze keeps for the next time, if there is one. The
// error is that of its exit. The Mounter can be used on.
func (m *Mounter) EndHelper() error {
	m.helpers.mu.Lock()
	p := m.helpers.idle
	m.helpers.idle = nil
	m.helpers.mu.Unlock()
	if p == nil {
		return nil
	}
	return p.end()
}

// helperProcess is a running helper. One goroutine uses it at a time.
type helperProcess struct {
	cmd    *exec.Cmd
	socket *net.UnixConn
}

func startHelper() (*helperProcess, error) {
	ours, theirs, err := socketPair()
	if err != nil {
		return nil, err
	}
	defer theirs.Close()
	cmd := helperCommand()
	cmd.ExtraFiles = []*os.File{theirs}
	if err := cmd.Start(); err != nil {
		return nil, errors.Join(err, ours.Close())
	}
	return &helperProcess{cmd: cmd, socket: ours}, nil
}

// filesPerMessage is how many open files go with one message; the kernel takes 253.
const filesPerMessage = 128

// hold gives the helper copies of open files, to keep until it has thawed them.
func (p *helperProcess) hold(files []*os.File, limit time.Duration) error {
	for sent := 0; sent < len(files); {
		n := min(filesPerMessage, len(files)-sent)
		answer, err := p.ask("hold", files[sent:sent+n], limit)
		if err != nil {
			return err
		}
		sent += n
		if want := fmt.Sprintf("held %d", sent); answer != want {
			return fmt.Errorf("it says %q instead of %q", answer, want)
		}
	}
	return nil
}

// ask sends a command, with open files, and waits for the answer: for the limit, and
// graceTime more.
func (p *helperProcess) ask(command string, files []*os.File, limit time.Duration) (string, error) {
	if err := p.socket.SetDeadline(time.Now().Add(limit + graceTime)); err != nil {
		return "", err
	}
	var rights []byte
	if len(files) > 0 {
		numbers := make([]int, 0, len(files))
		for _, f := range files {
			numbers = append(numbers, int(f.Fd()))
		}
		rights = syscall.UnixRights(numbers...)
	}
	if _, _, err := p.socket.WriteMsgUnix([]byte(command), rights, nil); err != nil {
		return "", err
	}
	answer := make([]byte, messageSize)
	n, err := p.socket.Read(answer)
	return string(answer[:n]), err
}

// end ends the input of the helper, and waits until it has exited. It thaws before
// what it has frozen; an error may mean that it could not.
func (p *helperProcess) end() error {
	return errors.Join(p.socket.Close(), p.cmd.Wait())
}

// kill ends it whatever it does.
func (p *helperProcess) kill() {
	_ = p.cmd.Process.Kill()
	_ = p.end() // its status tells nothing
}
