package loop

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"syscall"
)

// Manager attaches and detaches loop devices. Its methods may be called by any
// number of goroutines; several managers, in one process or in many, may share a
// kernel and even an image.
type Manager struct {
	kernel       kernel
	dev, nodeDir string
	warm, max    int
	retry        Retry

	images keyedLock // serialises Attach calls over one image
	alloc  semaphore // held from GET_FREE to LOOP_CONFIGURE

	mu sync.Mutex
	// attached holds the devices that count against max, by number. It is a hint:
	// the kernel frees autoclear devices by itself. Guarded by mu.
	attached map[int]uint64
	// pending counts binds under way. Guarded by mu.
	pending int
	// held counts our open Devices. Guarded by mu.
	held map[Ref]int
	// seen holds the numbers known to be registered, registered those of them that
	// came into being for us. Guarded by mu.
	seen, registered map[int]bool
	questions        map[Ref]*question     // guarded by mu
	silent           int                   // questions that took too long and are under way; guarded by mu
	shown            map[int]answeredImage // by number; guarded by mu
	deleting         int                   // removals under way; guarded by mu
	closed           bool                  // guarded by mu
}

// New makes a manager after checking that the kernel can do what it needs. If not,
// the error is ErrUnsupported and says what to do. New binds no device, and makes the
// kernel register one only if there is no idle one to ask. The manager must be
// closed.
func New(ctx context.Context, opts ...Option) (*Manager, error) {
	o := options{warm: 8, max: 256, dev: "/dev", sysfs: "/sys"}
	for _, opt := range opts {
		opt(&o)
	}
	if o.nodeDir == "" {
		o.nodeDir = filepath.Join(o.dev, "csi-loop")
	}
	if o.warm < 0 || o.max < 1 {
		return nil, fmt.Errorf("loop manager: warm %d or limit %d out of range", o.warm, o.max)
	}
	if o.kernel == nil {
		k, err := newKernel(o.dev, o.sysfs, o.nodeDir)
		if err != nil {
			return nil, fmt.Errorf("%w: no loop control device: %w; load the kernel module (modprobe loop) and give the process the host's /dev",
				ErrUnsupported, err)
		}
		o.kernel = k
	}
	m := &Manager{
		kernel: o.kernel, dev: o.dev, nodeDir: o.nodeDir,
		warm: o.warm, max: o.max, retry: o.retry.withDefaults(),
		alloc:    newSemaphore(),
		attached: map[int]uint64{}, held: map[Ref]int{},
		seen: map[int]bool{}, registered: map[int]bool{},
	}
	err := m.check(ctx)
	if err != nil {
		return nil, errors.Join(err, m.Close())
	}
	return m, nil
}

// check asks the kernel for its features, not for its version.
func (m *Manager) check(ctx context.Context) error {
	numbers, err := m.kernel.Numbers()
	if err != nil {
		return fmt.Errorf("%w: cannot list loop devices: %w; mount sysfs at /sys", ErrUnsupported, err)
	}
	for _, n := range numbers {
		m.seen[n] = true
	}
	for try := 0; ; try++ {
		err := m.checkOne()
		if err == nil || errors.Is(err, ErrUnsupported) || !passing(err) || try >= m.retry.Attempts {
			return err
		}
		if err := m.retry.pause(ctx, try); err != nil {
			return err
		}
	}
}

func (m *Manager) checkOne() error {
	n, err := m.kernel.GetFree()
	if err != nil {
		return opError("get free", -1, err)
	}
	m.note(n)
	h, path, err := m.open(n, forReading)
	if err != nil {
		return err
	}
	defer h.Close()
	// LOOP_CONFIGURE looks at the descriptor first, whatever the device's state: -1
	// is EBADF. Kernels without the call answer EINVAL or ENXIO (fact 3).
	if err := h.Configure(config{BlockSize: 4096}); !errors.Is(err, syscall.EBADF) {
		return fmt.Errorf("%w: LOOP_CONFIGURE on %s: %w; Linux 5.15 or later is needed", ErrUnsupported, path, err)
	}
	if _, err := h.DiskSeq(); err != nil {
		return fmt.Errorf("%w: disk sequence number of %s: %w; Linux 5.15 or later is needed", ErrUnsupported, path, err)
	}
	return nil
}

// passing tells whether an error of opening or binding a free device comes from
// somebody else's use of the same number, so that another number may do.
func passing(err error) bool {
	for _, errno := range []error{
		syscall.EBUSY,  // bound or claimed since GET_FREE (fact 4)
		syscall.ENXIO,  // running down, or being removed
		syscall.ENODEV, // removed
		syscall.ENOENT, // removed, or its node is not there yet
		syscall.EACCES, // the node is there and udev has not set its mode yet
		syscall.EAGAIN, // some kernels while dirty pages are written
		syscall.EINTR,  // a signal, and it was not bound
		errNotNode,     // the node is being replaced
		ErrNotExist,
	} {
		if errors.Is(err, errno) {
			return true
		}
	}
	return false
}

// open opens a device by the kernel's node, or by one of our own where the
// kernel's is missing or is something else (fact 11). It returns the node's path.
func (m *Manager) open(number int, how access) (handle, string, error) {
	id, err := m.kernel.Attr(number, attrDev)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ENODEV) {
		return nil, "", opError("open", number, ErrNotExist)
	} else if err != nil {
		return nil, "", opError("read "+attrDev, number, err)
	}
	missing := func(err error) bool { return errors.Is(err, syscall.ENOENT) || errors.Is(err, errNotNode) }
	name := fmt.Sprintf("loop%d", number)
	path := filepath.Join(m.dev, name)
	h, err := m.kernel.Open(path, id, how)
	if missing(err) {
		path = filepath.Join(m.nodeDir, name)
		if h, err = m.kernel.Open(path, id, how); missing(err) {
			if err := m.kernel.MakeNode(path, id); err != nil {
				return nil, "", opError("make node "+path, number, err)
			}
			h, err = m.kernel.Open(path, id, how)
		}
	}
	if err != nil {
		return nil, "", opError("open", number, err)
	}
	return &patient{handle: h, m: m, number: number}, path, nil
}

// note remembers that the kernel gave us a number. If it is new it counts as
// registered by this manager, and Trim may remove it. (GET_FREE does not say
// whether it made the device. A device that another program registered since we
// looked last, and that GET_FREE gave to us, passes for ours too.)
func (m *Manager) note(number int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.seen[number] {
		m.registered[number] = true
	}
	m.seen[number] = true
}

// Limit returns how many devices the manager may have attached.
func (m *Manager) Limit() int { return m.max }

// Attached returns how many devices that this manager attached or adopted are still
// bound. It looks at each of them.
func (m *Manager) Attached() int {
	m.prune()
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.attached)
}

// reserve makes room for one more device, or returns ErrLimit. The reservation ends
// with settleReservation.
func (m *Manager) reserve() error {
	m.mu.Lock()
	full := len(m.attached)+m.pending >= m.max
	if !full {
		m.pending++
	}
	m.mu.Unlock()
	if !full {
		return nil
	}
	m.prune()
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.attached)+m.pending >= m.max {
		return fmt.Errorf("%w: %d", ErrLimit, m.max)
	}
	m.pending++
	return nil
}

// settleReservation turns a reservation into a counted device, or drops it if ref
// is nil.
func (m *Manager) settleReservation(ref *Ref) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.pending--
	if ref != nil {
		m.attached[ref.Number] = ref.DiskSeq
	}
}

// prune forgets counted devices that are not bound any more. Diskseq changes with
// the unbind (fact 28), so nothing needs to be opened.
func (m *Manager) prune() {
	m.mu.Lock()
	refs := make([]Ref, 0, len(m.attached))
	for n, seq := range m.attached {
		refs = append(refs, Ref{n, seq})
	}
	m.mu.Unlock()
	for _, ref := range refs {
		if !m.mayBeBound(ref) {
			m.forget(ref)
		}
	}
}

func (m *Manager) forget(ref Ref) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if seq, ok := m.attached[ref.Number]; ok && seq == ref.DiskSeq {
		delete(m.attached, ref.Number)
	}
}

func (m *Manager) heldCount(ref Ref) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.held[ref]
}

// Close releases the manager's own descriptor. It changes nothing in the kernel,
// and Devices stay open. Closing twice is closing once.
func (m *Manager) Close() error {
	m.mu.Lock()
	closed := m.closed
	m.closed = true
	m.mu.Unlock()
	if closed {
		return nil
	}
	return m.kernel.Close()
}
