package loop

import (
	"cmp"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// generation is what differs between the kernels that the fake can be.
type generation struct {
	name          string
	clearAtOnce   bool // LOOP_CLR_FD by the only opener unbinds inside the call (fact 31)
	maskResets    bool // a bind takes the discard mask off (fact 63)
	maskRevocable bool // writing a number takes it off
	maskIsWord    bool // nobody heeds the mask (fact 107)
	keyMasks      bool // a key's size does what the mask does not
}

var generations = []generation{
	{name: "6.18"},
	{name: "6.12", maskRevocable: true},
	{name: "6.1", clearAtOnce: true, maskResets: true, maskRevocable: true},
	{name: "5.15", clearAtOnce: true, maskResets: true, maskRevocable: true, maskIsWord: true, keyMasks: true},
}

const (
	fakeDiscardLimit = "4294966784"
	fakeReadAhead    = "128"
)

// fakeStat is as Linux 6.18 prints it.
const fakeStat = "     101        2     3456       17      204        5     6144       40        0       33       57        0        0        0        0        7        0"

// fake is a kernel in memory. It is behaviour, not expectation: the contract suite
// holds it to the facts. Files, leases and locks are real, they need no root.
type fake struct {
	hostFiles
	generation
	dev string

	// before, if set, is called without mu before each call, and its error is the
	// call's answer.
	before func(call string) error
	// after, if set, replaces the answer of a call that was made.
	after func(call string, err error) error

	noConfigure, noDiskSeq, noDirectIO, noDiscard bool
	privateDev                                    bool // no devtmpfs nodes

	mu    sync.Mutex
	loops map[int]*fakeLoop     // guarded by mu
	nodes map[string]string     // path -> "major:minor"; guarded by mu
	seq   uint64                // guarded by mu
	hang  map[int]chan struct{} // Status of these numbers waits; guarded by mu
	open  int                   // handles and locks; guarded by mu
	calls map[string]int        // guarded by mu
}

type fakeState int

const (
	fakeUnbound fakeState = iota
	fakeBound
	fakeRundown // open says ENXIO
)

// fakeLoop is a device; guarded by fake.mu.
type fakeLoop struct {
	number    int
	state     fakeState
	openers   int
	claimed   bool
	file      *os.File // a descriptor of the very open file that was handed in
	status    status
	block     int
	size      int64
	seq       uint64
	masked    bool
	noDiscard bool
	readAhead string // \"\" as it was made
}

type fakeHandle struct {
	k      *fake
	l      *fakeLoop
	how    access
	closed bool
}

func newFake(t testing.TB, g generation) *fake {
	k := &fake{generation: g, dev: "/dev", loops: map[int]*fakeLoop{}, nodes: map[string]string{}, calls: map[string]int{}}
	for range 2 {
		if _, err := k.Add(-1); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		k.before, k.after = nil, nil
		for _, l := range k.loops {
			if l.state != fakeUnbound {
				t.Errorf("loop%d is left bound", l.number)
				l.file.Close()
			}
		}
		if k.open != 0 {
			t.Errorf("%d handles are left open", k.open)
		}
	})
	return k
}

// enter does what every call begins with.
func (k *fake) enter(call string) error {
	k.mu.Lock()
	k.calls[call]++
	k.mu.Unlock()
	if k.before != nil {
		return k.before(call)
	}
	return nil
}

func (k *fake) leave(call string, err error) error {
	if k.after != nil {
		return k.after(call, err)
	}
	return err
}

func (k *fake) count(call string) int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.calls[call]
}

func (k *fake) bound() (numbers []int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for n, l := range k.loops {
		if l.state != fakeUnbound {
			numbers = append(numbers, n)
		}
	}
	slices.Sort(numbers)
	return numbers
}

func (k *fake) openHandles() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.open
}

func (k *fake) Close() error { return nil }

// --- control

func (k *fake) GetFree() (int, error) {
	if err := k.enter("GetFree"); err != nil {
		return 0, err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, n := range slices.Sorted(maps.Keys(k.loops)) {
		if k.loops[n].state == fakeUnbound {
			return n, nil // reserves nothing
		}
	}
	return k.add(-1)
}

func (k *fake) Add(number int) (int, error) {
	if err := k.enter("Add"); err != nil {
		return 0, err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.add(number)
}

// Precondition: mu is held.
func (k *fake) add(number int) (int, error) {
	if number < 0 {
		for number = 0; k.loops[number] != nil; number++ {
		}
	}
	if k.loops[number] != nil {
		return 0, syscall.EEXIST
	}
	k.seq++
	k.loops[number] = &fakeLoop{number: number, seq: k.seq}
	if !k.privateDev {
		k.nodes[filepath.Join(k.dev, fmt.Sprintf("loop%d", number))] = fakeID(number)
	}
	return number, nil
}

func fakeID(number int) string { return "7:" + strconv.Itoa(number) }

func (k *fake) Remove(number int) error {
	if err := k.enter("Remove"); err != nil {
		return err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	l := k.loops[number]
	switch {
	case number < 0:
		return syscall.EINVAL
	case l == nil:
		return syscall.ENODEV
	case l.state != fakeUnbound || l.openers > 0:
		return syscall.EBUSY
	}
	delete(k.loops, number)
	delete(k.nodes, filepath.Join(k.dev, fmt.Sprintf("loop%d", number)))
	return nil
}

// --- devices

func (k *fake) Numbers() ([]int, error) {
	if err := k.enter("Numbers"); err != nil {
		return nil, err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.Collect(maps.Keys(k.loops)), nil
}

func (k *fake) Attr(number int, name string) (string, error) {
	if err := k.enter("Attr " + name); err != nil {
		return "", err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	l := k.loops[number]
	if l == nil {
		return "", syscall.ENOENT
	}
	switch name {
	case attrDev:
		return fakeID(number), nil
	case attrDiskSeq:
		return strconv.FormatUint(l.seq, 10), nil
	case attrStat:
		return fakeStat, nil
	case attrBackingFile: // still there during rundown (fact 27)
		if l.state == fakeUnbound {
			return "", syscall.ENOENT
		}
		return l.file.Name(), nil
	case attrReadOnly, attrAutoclear, attrDirectIO:
		flag := map[string]uint32{attrReadOnly: flagReadOnly, attrAutoclear: flagAutoclear, attrDirectIO: flagDirectIO}[name]
		return strconv.Itoa(min(1, int(l.status.Flags&flag))), nil
	case attrOffset:
		return strconv.FormatUint(l.status.Offset, 10), nil
	case attrSizeLimit:
		return strconv.FormatUint(l.status.SizeLimit, 10), nil
	case attrDiscard:
		if l.masked || k.noDiscard || l.noDiscard && k.keyMasks {
			return "0", nil
		}
		return fakeDiscardLimit, nil
	case attrDiscardLimit:
		if k.noDiscard {
			return "0", nil
		}
		return fakeDiscardLimit, nil
	case attrReadAhead:
		return cmp.Or(l.readAhead, fakeReadAhead), nil
	}
	return "", syscall.ENOENT
}

func (k *fake) SetAttr(number int, name, value string) error {
	if err := k.enter("SetAttr " + name); err != nil {
		return err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	l := k.loops[number]
	if l == nil {
		return syscall.ENOENT
	}
	if name == attrReadAhead {
		l.readAhead = value // also for the next binding, as on older kernels
		return nil
	}
	if name != attrDiscard {
		return syscall.EACCES
	}
	if value == "0" {
		l.masked = true
	} else if k.maskRevocable {
		l.masked = false
	} // later kernels do not let it go
	return nil
}

func (k *fake) MakeNode(path, id string) error {
	if err := k.enter("MakeNode"); err != nil {
		return err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.nodes[path] = id
	return nil
}

func (k *fake) Open(path, id string, how access) (handle, error) {
	if err := k.enter("Open"); err != nil {
		return nil, err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	node, ok := k.nodes[path]
	if !ok {
		return nil, syscall.ENOENT
	}
	number, err := strconv.Atoi(node[len("7:"):])
	if err != nil {
		return nil, err
	}
	l := k.loops[number]
	switch {
	case node != id:
		return nil, errNotNode
	case l == nil, l.state == fakeRundown:
		return nil, syscall.ENXIO
	case how == forClaim && l.claimed:
		return nil, syscall.EBUSY
	}
	l.openers++
	l.claimed = l.claimed || how == forClaim
	k.open++
	return &fakeHandle{k: k, l: l, how: how}, nil
}

func (k *fake) Lock(f *os.File) (io.Closer, error) {
	if err := k.enter("Lock"); err != nil {
		return nil, err
	}
	c, err := k.hostFiles.Lock(f)
	if err != nil {
		return nil, err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.open++
	return fakeLock{k, c}, nil
}

type fakeLock struct {
	k *fake
	io.Closer
}

func (l fakeLock) Close() error {
	l.k.mu.Lock()
	l.k.open--
	l.k.mu.Unlock()
	return l.Closer.Close()
}

func (k *fake) Stat(f *os.File) (fileStat, error) {
	if err := k.enter("Stat"); err != nil {
		return fileStat{}, err
	}
	return k.hostFiles.Stat(f)
}

func (k *fake) Sole(f *os.File, use leaseUse) (bool, error) {
	if err := k.enter("Sole"); err != nil {
		return false, err
	}
	return k.hostFiles.Sole(f, use)
}

// --- an open device

func (h *fakeHandle) Configure(c config) error {
	if err := h.k.enter("Configure"); err != nil {
		return err
	}
	return h.k.leave("Configure", h.configure(c))
}

func (h *fakeHandle) configure(c config) error {
	k, l := h.k, h.l
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.noConfigure {
		return syscall.EINVAL
	}
	if c.File == nil {
		return syscall.EBADF
	}
	st, err := k.hostFiles.Stat(c.File)
	if err != nil {
		return syscall.EBADF
	}
	const settable = flagReadOnly | flagAutoclear | 1<<3 | flagDirectIO
	switch {
	case l.state != fakeUnbound, l.claimed && h.how != forClaim:
		return syscall.EBUSY
	case !st.Regular, c.Flags&^settable != 0:
		return syscall.EINVAL
	case c.Offset>>63 != 0, c.SizeLimit>>63 != 0:
		return syscall.EOVERFLOW
	case c.BlockSize != 0 && (c.BlockSize < 512 || c.BlockSize&(c.BlockSize-1) != 0):
		return syscall.EINVAL
	}
	var fd int
	if err := withFD(c.File, func(f int) (err error) { fd, err = unix.Dup(f); return err }); err != nil {
		return err
	}
	l.file = os.NewFile(uintptr(fd), c.File.Name())
	l.block = int(c.BlockSize)
	if l.block == 0 {
		l.block = 512
	}
	flags := c.Flags
	if !st.Writable || h.how != forWriting {
		flags |= flagReadOnly // fact 6
	}
	if k.noDirectIO || c.Offset%uint64(l.block) != 0 {
		flags &^= flagDirectIO // silently (fact 19)
	}
	l.status = status{Image: st.ID, Offset: c.Offset, SizeLimit: c.SizeLimit, Number: l.number, Flags: flags, Tag: c.Tag}
	l.resize()
	if k.maskResets {
		l.masked = false
	}
	l.noDiscard = c.NoDiscard
	l.state = fakeBound
	k.seq++
	l.seq = k.seq
	return nil
}

// resize is fact 13. Precondition: fake.mu is held.
func (l *fakeLoop) resize() {
	st, _ := hostFiles{}.Stat(l.file)
	size := max(st.Size-int64(l.status.Offset), 0)
	if limit := int64(l.status.SizeLimit); limit > 0 {
		size = min(size, limit)
	}
	l.size = size &^ 511
}

func (h *fakeHandle) Status() (status, error) {
	if err := h.k.enter("Status"); err != nil {
		return status{}, err
	}
	h.k.mu.Lock()
	hung := h.k.hang[h.l.number]
	h.k.mu.Unlock()
	if hung != nil {
		<-hung
	}
	h.k.mu.Lock()
	defer h.k.mu.Unlock()
	if h.l.state != fakeBound {
		return status{}, syscall.ENXIO
	}
	return h.l.status, nil
}

func (h *fakeHandle) Geometry() (int64, int, error) {
	if err := h.k.enter("Geometry"); err != nil {
		return 0, 0, err
	}
	h.k.mu.Lock()
	defer h.k.mu.Unlock()
	if h.l.state != fakeBound {
		return 0, 512, nil
	}
	return h.l.size, h.l.block, nil
}

func (h *fakeHandle) DiskSeq() (uint64, error) {
	if err := h.k.enter("DiskSeq"); err != nil {
		return 0, err
	}
	if h.k.noDiskSeq {
		return 0, syscall.ENOTTY
	}
	h.k.mu.Lock()
	defer h.k.mu.Unlock()
	return h.l.seq, nil
}

func (h *fakeHandle) Clear() error {
	if err := h.k.enter("Clear"); err != nil {
		return err
	}
	h.k.mu.Lock()
	defer h.k.mu.Unlock()
	switch l := h.l; {
	case l.state != fakeBound:
		return syscall.ENXIO
	case l.openers > 1:
		l.status.Flags |= flagAutoclear
	case h.k.clearAtOnce:
		h.k.unbind(l)
	default:
		l.state = fakeRundown // until this very handle is closed (fact 32)
	}
	return nil
}

// Precondition: mu is held.
func (k *fake) unbind(l *fakeLoop) {
	l.file.Close()
	l.file, l.state, l.status = nil, fakeUnbound, status{}
	k.seq++
	l.seq = k.seq
}

func (h *fakeHandle) DropCache() error { return h.k.enter("DropCache") }

func (h *fakeHandle) Sync() error { return h.k.enter("Sync") }

func (h *fakeHandle) SetCapacity() error {
	if err := h.k.enter("SetCapacity"); err != nil {
		return err
	}
	h.k.mu.Lock()
	defer h.k.mu.Unlock()
	if h.l.state != fakeBound {
		return syscall.ENXIO
	}
	h.l.resize()
	return nil
}

func (h *fakeHandle) Discards() (bool, error) {
	if err := h.k.enter("Discards"); err != nil {
		return false, err
	}
	k, l := h.k, h.l
	k.mu.Lock()
	defer k.mu.Unlock()
	switch {
	case k.noDiscard, l.noDiscard && k.keyMasks:
		return false, nil
	case k.maskIsWord:
		return true, nil
	}
	return !l.masked, nil
}

func (h *fakeHandle) Close() error {
	h.k.mu.Lock()
	defer h.k.mu.Unlock()
	if h.closed {
		return syscall.EBADF
	}
	h.closed = true
	h.k.open--
	l := h.l
	l.openers--
	if h.how == forClaim {
		l.claimed = false
	}
	if l.openers == 0 && (l.state == fakeRundown || l.state == fakeBound && l.status.Flags&flagAutoclear != 0) {
		h.k.unbind(l)
	}
	return nil
}
