package mount

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// helper is the process that freezes and thaws. Its parent's death ends its input,
// whatever the parent was doing.
type helper struct {
	held    []*os.File // what it was given: the directories first
	frozen  []*os.File
	answers io.Writer
	late    bool // something was thawed before it was asked for
	freeze  func(*os.File) error
	thaw    func(*os.File) error
	hurry   func(on bool) error
}

// order is what the parent wants: a word and its arguments, and open files.
//
//	hold                          keep these files; the answer is "held" and how many it has
//	freeze LIMIT COUNT [hurried]  freeze the first of them; "frozen", or a failure
//	thaw                          "thawed", "late" or a failure; after "thawed" no file is held
type order struct {
	words []string
	files []*os.File
}

// hurried is the word that has a freeze expedited.
const hurried = "hurried"

// messageSize bounds an order and an answer, in bytes.
const messageSize = 128

// beHelper is the helper's main function. Descriptor 3 is its socket.
func beHelper() int {
	signal.Ignore(syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGPIPE)
	f := os.NewFile(3, "socket")
	conn, err := net.FileConn(f)
	if err != nil {
		return 2
	}
	_ = f.Close()
	socket, ok := conn.(*net.UnixConn)
	if !ok {
		return 2
	}
	orders := make(chan order)
	go receive(socket, orders)
	h := &helper{answers: socket, freeze: freezeFilesystem, thaw: thawFilesystem, hurry: expedite}
	if h.run(orders) != nil {
		return 1
	}
	return 0
}

// receive passes on what comes, until nothing does any more.
func receive(socket *net.UnixConn, orders chan<- order) {
	defer close(orders)
	text, rights := make([]byte, messageSize), make([]byte, syscall.CmsgSpace(4*filesPerMessage))
	for {
		n, rightsLen, _, _, err := socket.ReadMsgUnix(text, rights)
		if err != nil {
			return
		}
		orders <- order{words: strings.Fields(string(text[:n])), files: filesOf(rights[:rightsLen])}
	}
}

// filesOf returns the open files that came with a message. Some missing are noticed by
// whoever counts them.
func filesOf(rights []byte) (files []*os.File) {
	messages, err := syscall.ParseSocketControlMessage(rights)
	if err != nil {
		return nil
	}
	for _, m := range messages {
		numbers, err := syscall.ParseUnixRights(&m)
		if err != nil {
			continue
		}
		for _, fd := range numbers {
			files = append(files, os.NewFile(uintptr(fd), "held "+strconv.Itoa(fd)))
		}
	}
	return files
}

// run obeys until its input ends. The error is that of thawing at the end.
func (h *helper) run(orders <-chan order) error {
	var deadline <-chan time.Time
	for {
		select {
		case <-deadline:
			h.late = true
			_ = h.thawAll() // again when the input ends
		case o, ok := <-orders:
			switch {
			case !ok:
				return h.thawAll()
			case len(o.words) == 1 && o.words[0] == "hold":
				h.held = append(h.held, o.files...)
				h.say("held " + strconv.Itoa(len(h.held)))
			case len(o.words) >= 3 && o.words[0] == "freeze":
				deadline = h.freezeFor(o.words[1], o.words[2], slices.Contains(o.words[3:], hurried))
			default:
				deadline = nil
				h.say(h.thawed(h.thawAll()))
			}
		}
	}
}

// freezeFor freezes the first directories, and returns what tells that the time is up.
func (h *helper) freezeFor(limit, count string, hurry bool) (deadline <-chan time.Time) {
	d, err := time.ParseDuration(limit)
	n, countErr := strconv.Atoi(count)
	if err != nil || countErr != nil || n < 0 || n > len(h.held) {
		h.say("not understood")
		return nil
	}
	started := time.Now()
	if hurry {
		hurry = h.hurry(true) == nil // it may not be allowed; then it takes its time
	}
	answer := h.freezeAll(h.held[:n])
	if hurry {
		_ = h.hurry(false) // it was possible a moment ago
	}
	h.say(answer)
	// Freezing, which cannot be interrupted, counts.
	return time.After(d - time.Since(started))
}

func (h *helper) say(answer string) { _, _ = io.WriteString(h.answers, answer) } // gone: the input ends too

// indexError is a failure for one of the directories.
type indexError struct {
	index int
	err   error
}

func (e *indexError) Error() string {
	var errno syscall.Errno
	if !errors.As(e.err, &errno) {
		errno = syscall.EIO
	}
	return fmt.Sprintf("failed %d %d", e.index, int(errno))
}

// freezeAll freezes all, or none.
func (h *helper) freezeAll(dirs []*os.File) string {
	for i, dir := range dirs {
		if err := h.freeze(dir); err != nil {
			_ = h.thawAll() // at the end once more
			return (&indexError{i, err}).Error()
		}
		h.frozen = append(h.frozen, dir)
	}
	return "frozen"
}

// thawAll thaws what this process froze, and keeps what could not be thawed.
func (h *helper) thawAll() error {
	var left []*os.File
	var failed error
	for i, dir := range h.frozen {
		err := h.thaw(dir)
		if errors.Is(err, syscall.EINVAL) { // somebody else has thawed it
			h.late, err = true, nil
		}
		if err != nil {
			left, failed = append(left, dir), &indexError{i, err}
		}
	}
	h.frozen = left
	return failed
}

// thawed is the answer to an order to thaw. Before the parent hears that all went well
// the files are closed: whoever hears of it may unmount at once.
func (h *helper) thawed(err error) string {
	switch {
	case err != nil:
		return err.Error()
	case h.late:
		return "late"
	}
	for _, f := range h.held {
		_ = f.Close()
	}
	h.held = nil
	return "thawed"
}
