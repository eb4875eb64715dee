package loop

import (
	"cmp"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// LOOP_GET_STATUS64 asks the filesystem of the backing file for its inode, and does not
// return while that hangs (an NFS server that is gone, a FUSE process that stopped). The
// device itself, its other ioctls and sysfs are not concerned. Anybody's such device is
// among those that have to be looked at, so the question has a bounded time.

// answerTime is how long a device may take to say what it shows.
const answerTime = 3 * time.Second

// question is a LOOP_GET_STATUS64 under way.
type question struct {
	done   chan struct{} // closed when it was answered
	silent bool          // it took too long; guarded by Manager.mu
}

// ask begins a question to a device. There is one at a time for each binding: whoever comes
// while it is under way waits for it, and not at all once it took too long; then q is nil.
func (m *Manager) ask(ref Ref) (q *question) {
	deadline := time.NewTimer(m.answerTime())
	defer deadline.Stop()
	for {
		m.mu.Lock()
		before := m.questions[ref]
		if before == nil {
			if m.questions == nil {
				m.questions = map[Ref]*question{}
			}
			q = &question{done: make(chan struct{})}
			m.questions[ref] = q
			m.mu.Unlock()
			return q
		}
		silent := before.silent
		m.mu.Unlock()
		if silent {
			return nil
		}
		select {
		case <-before.done:
		case <-deadline.C:
			return nil
		}
	}
}

func (m *Manager) answered(ref Ref, q *question) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.questions, ref)
	close(q.done)
	if q.silent {
		m.silent--
	}
}

// gaveUp returns false if it was answered meanwhile.
func (m *Manager) gaveUp(ref Ref, q *question) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.questions[ref] != q {
		return false
	}
	q.silent = true
	m.silent++
	return true
}

// answerTime is shorter while some device is silent: a filesystem that hangs may have many,
// each of which is waited for once.
func (m *Manager) answerTime() time.Duration {
	m.mu.Lock()
	defer m.mu.Unlock()
	t := cmp.Or(m.retry.Answer, answerTime)
	if m.silent > 0 {
		t /= 3
	}
	return t
}

// answeredImage is the file of a number's binding, when it last said so. While it is bound
// that does not change.
type answeredImage struct {
	seq   uint64
	image FileID
}

func (m *Manager) remember(ref Ref, image FileID) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.shown == nil {
		m.shown = map[int]answeredImage{}
	}
	m.shown[ref.Number] = answeredImage{ref.DiskSeq, image}
}

func (m *Manager) remembered(ref Ref) (image FileID, ok bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	a, ok := m.shown[ref.Number]
	return a.image, ok && a.seq == ref.DiskSeq
}

// patient is a handle whose Status returns ErrSilent when it takes too long. The kernel's
// call goes on in a goroutine then, which owns the handle from its Close on.
type patient struct {
	handle
	m      *Manager
	number int

	mu     sync.Mutex
	asking bool // guarded by mu
	closed bool // while asking; guarded by mu
}

func (h *patient) Status() (status, error) {
	seq, err := h.DiskSeq()
	if err != nil {
		return status{}, err
	}
	ref := Ref{Number: h.number, DiskSeq: seq}
	q := h.m.ask(ref)
	if q == nil {
		return status{}, ErrSilent
	}
	type answer struct {
		st  status
		err error
	}
	h.mu.Lock()
	h.asking = true
	h.mu.Unlock()
	answers := make(chan answer, 1)
	go func() {
		st, err := h.handle.Status()
		h.mu.Lock()
		h.asking = false
		closed := h.closed
		h.mu.Unlock()
		if closed {
			_ = h.handle.Close()
		}
		if err == nil {
			h.m.remember(ref, st.Image)
		}
		h.m.answered(ref, q)
		answers <- answer{st, err}
	}()
	timer := time.NewTimer(h.m.answerTime())
	defer timer.Stop()
	select {
	case a := <-answers:
		return a.st, a.err
	case <-timer.C:
		if h.m.gaveUp(ref, q) {
			return status{}, ErrSilent
		}
		a := <-answers
		return a.st, a.err
	}
}

func (h *patient) Close() error {
	h.mu.Lock()
	if h.asking {
		h.closed = true
		h.mu.Unlock()
		return nil
	}
	h.mu.Unlock()
	return h.handle.Close()
}

// MayBe says whether a device that does not say what it shows may show a file of this name.
// The kernel knows the name without asking the file's filesystem. The rest of the path says
// nothing, for it depends on mounts (fact 25).
func (i Info) MayBe(name string) bool {
	if i.BackingPath == "" {
		return true
	}
	plain := func(path string) string { return strings.TrimSuffix(filepath.Base(path), " (deleted)") }
	return plain(i.BackingPath) == plain(name)
}

// mayShow says whether a silent device may show the file: it may have said before what it
// shows, and else its file's name counts. Of a file with several names none says that it is
// another.
func (m *Manager) mayShow(number int, h handle, backing *os.File, image FileID) (bool, error) {
	seq, err := h.DiskSeq()
	if err != nil {
		return true, err
	}
	if shows, ok := m.remembered(Ref{Number: number, DiskSeq: seq}); ok {
		return shows == image, nil
	}
	path, err := m.kernel.Attr(number, attrBackingFile)
	if absent(err) {
		return false, nil // unbound meanwhile
	} else if err != nil {
		return true, err
	}
	st, err := backing.Stat()
	if err != nil {
		return true, err
	}
	if sys, ok := st.Sys().(*syscall.Stat_t); !ok || sys.Nlink > 1 {
		return true, nil
	}
	raw, err := backing.SyscallConn()
	if err != nil {
		return true, err
	}
	var name string
	if cerr := raw.Control(func(fd uintptr) { name, err = os.Readlink("/proc/self/fd/" + strconv.Itoa(int(fd))) }); cerr != nil || err != nil {
		return true, errors.Join(cerr, err)
	}
	return Info{BackingPath: path}.MayBe(name), nil
}
