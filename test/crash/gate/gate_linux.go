package gate

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// variable tells a process that it is to become the program given by its
// arguments.
const variable = "CSI_LOOP_GATE"

// Call is a system call that waits for its verdict.
type Call struct {
	TID  int
	Own  bool   // made by the program itself, not by a child
	Name string // "fallocate", "ioctl LOOP_CONFIGURE"
	Path string // of the file, as far as it can be told
	To   string // of a rename and a link: the new name

	Length int64 // of a truncate: the file's length to be, in bytes
}

func (c Call) String() string { return c.Name + " " + c.Path }

// Verdict says what becomes of a call.
type Verdict struct {
	// Errno other than 0 makes the call fail without being run.
	Errno syscall.Errno
	// Lie makes it return 0 without being run.
	Lie bool
	// Kill ends the program with SIGKILL before the call is run. Children go on.
	Kill bool
}

// Process is a program under a gate.
type Process struct {
	cmd   *exec.Cmd
	judge func(Call) Verdict
	fd    int

	ended chan struct{} // closed when the program has ended
	err   error         // of its end; read after ended
	work  sync.WaitGroup
}

// Launch must be the first call of TestMain. In a process that Start made it does
// not return: the process becomes the program.
func Launch() {
	if os.Getenv(variable) == "" {
		return
	}
	err := launch()
	fmt.Fprintln(os.Stderr, "gate:", err)
	os.Exit(127)
}

func launch() error {
	// The filter is the thread's, and the thread that calls exec becomes the program.
	runtime.LockOSThread()
	if err := os.Unsetenv(variable); err != nil {
		return err
	}
	program := filter()
	prog := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	listener, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER,
		unix.SECCOMP_FILTER_FLAG_NEW_LISTENER|unix.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV, uintptr(unsafe.Pointer(&prog)))
	if errno != 0 {
		return fmt.Errorf("seccomp: %w", errno)
	}
	if err := unix.Sendmsg(3, []byte{0}, unix.UnixRights(int(listener)), nil, 0); err != nil {
		return fmt.Errorf("hand over: %w", err)
	}
	unix.CloseOnExec(3)
	return fmt.Errorf("exec: %w", syscall.Exec(os.Args[1], os.Args[1:], os.Environ()))
}

// Start runs cmd, whose Path and Args name the program. From its first instruction
// on each Call is put before judge, one at a time; the call waits meanwhile.
// Precondition: cmd has no ExtraFiles.
func Start(cmd *exec.Cmd, judge func(Call) Verdict) (_ *Process, err error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	theirs, ours := os.NewFile(uintptr(pair[0]), "gate"), os.NewFile(uintptr(pair[1]), "gate")
	defer ours.Close()
	self, err := os.Executable()
	if err != nil {
		return nil, errors.Join(err, theirs.Close())
	}
	cmd.Args = append([]string{"gate", cmd.Path}, cmd.Args[1:]...)
	cmd.Path = self
	cmd.Env = append(cmd.Environ(), variable+"=1")
	cmd.ExtraFiles = []*os.File{theirs}
	err = errors.Join(cmd.Start(), theirs.Close())
	if err != nil {
		return nil, err
	}
	p := &Process{cmd: cmd, judge: judge, ended: make(chan struct{})}
	if p.fd, err = receive(ours); err != nil {
		return nil, errors.Join(err, cmd.Process.Kill(), cmd.Wait())
	}
	go func() {
		p.err = cmd.Wait()
		close(p.ended)
	}()
	p.work.Go(p.supervise)
	return p, nil
}

// receive takes a descriptor from the other end of a socket.
func receive(f *os.File) (int, error) {
	c, err := net.FileConn(f)
	if err != nil {
		return -1, err
	}
	defer func() { _ = c.Close() }()
	u, ok := c.(*net.UnixConn)
	if !ok {
		return -1, errors.New("not a UNIX socket")
	}
	rights := make([]byte, unix.CmsgSpace(4))
	//nolint:dogsled // the byte that carries the descriptor has no meaning
	_, n, _, _, err := u.ReadMsgUnix(make([]byte, 1), rights)
	if err != nil {
		return -1, err
	}
	messages, err := unix.ParseSocketControlMessage(rights[:n])
	if err != nil || len(messages) != 1 {
		return -1, errors.Join(errors.New("the program did not get under its filter"), err)
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil {
		return -1, err
	}
	return fds[0], nil
}

// Ended is closed when the program has ended; its children may still run.
func (p *Process) Ended() <-chan struct{} { return p.ended }

// PID is the program's.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// State is how the program ended, nil before.
func (p *Process) State() *os.ProcessState {
	select {
	case <-p.ended:
		return p.cmd.ProcessState
	default:
		return nil
	}
}

// Signal sends the program a signal.
func (p *Process) Signal(s syscall.Signal) error { return p.cmd.Process.Signal(s) }

// Wait waits for the end of the program and all of its children.
func (p *Process) Wait() {
	<-p.ended
	p.work.Wait()
}

// The kernel's structures and calls for a supervisor.
type (
	notification struct {
		id     uint64
		tid    uint32
		flags  uint32
		number int32
		arch   uint32
		ip     uint64
		args   [6]uint64
	}
	response struct {
		id    uint64
		value int64
		errno int32
		flags uint32
	}
)

const (
	recvNotification = 0xc0502100
	sendResponse     = 0xc0182101
	run              = 1 // SECCOMP_USER_NOTIF_FLAG_CONTINUE
)

// supervise answers until the program and all of its children have ended.
func (p *Process) supervise() {
	defer unix.Close(p.fd)
	for {
		poll := []unix.PollFd{{Fd: int32(p.fd), Events: unix.POLLIN}}
		if _, err := unix.Poll(poll, -1); err != nil {
			continue // EINTR
		}
		if poll[0].Revents&unix.POLLIN == 0 {
			return // nobody is left
		}
		var n notification
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(p.fd), recvNotification, uintptr(unsafe.Pointer(&n))); errno != 0 {
			continue // killed meanwhile
		}
		p.answer(n)
	}
}

func (p *Process) answer(n notification) {
	var v Verdict
	if c, ok := calls[int(n.number)].read(int(n.tid), n.args); ok {
		c.Own = p.owns(c.TID)
		v = p.judge(c)
	}
	if v.Kill {
		_ = p.cmd.Process.Kill()
		<-p.ended
	}
	r := response{id: n.id, flags: run}
	if v.Errno != 0 || v.Lie {
		r.errno, r.flags = -int32(v.Errno), 0
	}
	// The only error, ENOENT, says that the caller was killed.
	unix.Syscall(unix.SYS_IOCTL, uintptr(p.fd), sendResponse, uintptr(unsafe.Pointer(&r))) //nolint:errcheck // as said
}

// owns says whether a thread is one of the program.
func (p *Process) owns(tid int) bool {
	_, err := os.Stat("/proc/" + strconv.Itoa(p.PID()) + "/task/" + strconv.Itoa(tid))
	return err == nil
}
