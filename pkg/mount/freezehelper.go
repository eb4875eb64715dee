package mount

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"time"
)

// helper is the process that freezes and thaws. Its parent's death ends its input,
// whatever the parent was doing.
type helper struct {
	dirs    []*os.File
	frozen  []*os.File
	answers io.Writer
	late    bool // something was thawed before it was asked for
	limit   time.Duration
	freeze  func(*os.File) error
	thaw    func(*os.File) error
}

// beHelper is the helper's main function. Descriptors 3 and 4 are its input and
// output; the directories follow.
func beHelper(limit, dirs string) int {
	signal.Ignore(syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGPIPE)
	d, err := time.ParseDuration(limit)
	n, countErr := strconv.Atoi(dirs)
	if err != nil || countErr != nil {
		return 2
	}
	h := &helper{limit: d, answers: os.NewFile(4, "answers"), freeze: freezeFilesystem, thaw: thawFilesystem}
	for i := range n {
		h.dirs = append(h.dirs, os.NewFile(uintptr(5+i), "directory "+strconv.Itoa(i)))
	}
	if h.run(os.NewFile(3, "control")) != nil {
		return 1
	}
	return 0
}

// run obeys until its input ends. The error is that of thawing at the end.
func (h *helper) run(control io.Reader) error {
	commands := make(chan string)
	go func() {
		defer close(commands)
		for lines := bufio.NewScanner(control); lines.Scan(); {
			commands <- lines.Text()
		}
	}()
	h.say("ready")
	var deadline <-chan time.Time
	for {
		select {
		case <-deadline:
			h.late = true
			_ = h.thawAll() // again when the input ends
		case command, ok := <-commands:
			switch {
			case !ok:
				return h.thawAll()
			case command == "freeze":
				started := time.Now()
				h.say(h.freezeAll())
				// Freezing, which cannot be interrupted, counts.
				deadline = time.After(h.limit - time.Since(started))
			default:
				deadline = nil
				h.say(h.thawed(h.thawAll()))
			}
		}
	}
}

func (h *helper) say(answer string) { _, _ = io.WriteString(h.answers, answer+"\n") } // gone: the input ends too

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
func (h *helper) freezeAll() string {
	for i, dir := range h.dirs {
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

func (h *helper) thawed(err error) string {
	switch {
	case err != nil:
		return err.Error()
	case h.late:
		return "late"
	}
	return "thawed"
}
