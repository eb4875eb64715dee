package loop

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"syscall"
)

// bind binds a free device, verified and counted. It does not look for others over
// the same file.
func (m *Manager) bind(ctx context.Context, backing *os.File, image FileID, want Mapping) (_ *Device, err error) {
	if err := m.reserve(); err != nil {
		return nil, err
	}
	var ref *Ref
	defer func() { m.settleReservation(ref) }()
	candidate := -1
	for range m.retry.Attempts {
		number, h, err := m.configure(ctx, backing, image, want, candidate)
		if err != nil {
			return nil, err
		}
		dev, err := m.finish(ctx, number, h, backing, image, want)
		if err == nil {
			r := dev.Ref()
			ref = &r
			return dev, nil
		}
		switch {
		case errors.Is(err, errMasked):
			if candidate, err = m.recycle(number); err != nil {
				return nil, err
			}
		case errors.Is(err, errCleared):
			candidate = -1
		default:
			return nil, err
		}
	}
	return nil, fmt.Errorf("%w: found no device that stays as it was bound in %d tries", ErrBusy, m.retry.Attempts)
}

// configure takes a free device, or candidate if that is not -1, and binds it. The
// handle is writable and is the only thing that keeps an autoclear device bound.
func (m *Manager) configure(ctx context.Context, backing *os.File, image FileID, want Mapping, candidate int) (int, handle, error) {
	if err := m.alloc.lock(ctx); err != nil {
		return 0, nil, err
	}
	defer m.alloc.unlock()
	var last error
	previous, same := -1, 0
	for try := range m.retry.Attempts {
		if err := ctx.Err(); err != nil {
			return 0, nil, err
		}
		number, err := m.candidate(candidate, same >= stuckAfter)
		if err != nil {
			return 0, nil, err
		}
		candidate = -1
		if same++; number != previous {
			previous, same = number, 1
		}
		h, err := m.configureNumber(number, backing, image, want)
		if err == nil {
			return number, h, nil
		}
		if !passing(err) {
			return 0, nil, err
		}
		last = err
		if err := m.retry.pause(ctx, try); err != nil {
			return 0, nil, err
		}
	}
	return 0, nil, fmt.Errorf("%w: no device to be had in %d tries: %w", ErrBusy, m.retry.Attempts, last)
}

// stuckAfter is how often the same free number may fail before a new device is
// registered. GET_FREE gives the lowest unbound number for as long as somebody keeps
// it claimed without binding it.
const stuckAfter = 3

// candidate returns the number to try: the given one, a new one, or what GET_FREE
// says.
func (m *Manager) candidate(number int, fresh bool) (int, error) {
	var err error
	switch {
	case number >= 0:
	case fresh:
		number, err = m.kernel.Add(-1)
		err = opError("add", -1, numbersError(err))
	default:
		number, err = m.kernel.GetFree()
		err = opError("get free", -1, numbersError(err))
	}
	if err == nil {
		m.note(number)
	}
	return number, err
}

// numbersError is what the kernel says when it gives no number. ENOSPC is that it has no
// more (2^20 minors, fact 8), and nothing about the space of a disk.
func numbersError(err error) error {
	if errors.Is(err, syscall.ENOSPC) {
		return fmt.Errorf("%w: the kernel has no loop device number left (%w); free devices that nobody needs, losetup --list shows them", ErrLimit, err)
	}
	return err
}

func (m *Manager) configureNumber(number int, backing *os.File, image FileID, want Mapping) (handle, error) {
	h, _, err := m.open(number, forWriting) // O_RDONLY would make it read-only (fact 6)
	if err != nil {
		return nil, err
	}
	c := config{
		File:      backing,
		Offset:    uint64(want.Offset),
		SizeLimit: uint64(want.SizeLimit),
		BlockSize: uint32(want.BlockSize),
		Tag:       want.Tag,
		NoDiscard: !want.Discard,
	}
	if want.ReadOnly {
		c.Flags |= flagReadOnly
	}
	if want.Autoclear {
		c.Flags |= flagAutoclear
	}
	if want.DirectIO != DirectIOOff {
		c.Flags |= flagDirectIO
	}
	err = h.Configure(c)
	if errors.Is(err, syscall.EINTR) {
		// Not known to happen after the bind, and not promised not to. A device that
		// shows just this was bound by this call: the number was free, and nobody else
		// binds this image now.
		st, serr := h.Status()
		if serr == nil && st.Image == image && st.Offset == c.Offset && st.SizeLimit == c.SizeLimit && st.Tag == c.Tag {
			return h, nil
		}
	}
	if err != nil {
		// On EBUSY it belongs to somebody else: never clear (fact 5).
		_ = h.Close()
		return nil, opError("configure", number, err)
	}
	return h, nil
}

// What a device that was just bound can suffer from that another try may spare it.
var (
	// errMasked: a former binding's discard mask sticks to the number (fact 63).
	errMasked = errors.New("discard is masked")
	// errCleared: somebody cleared the number, which was another device's before.
	// Seen with tools that free a device by its name after an unmount that freed it
	// already.
	errCleared = errors.New("cleared by another program")
)

// finish turns a device that was just bound into one that is as wanted, held for
// reading only. On an error the device is unbound again.
func (m *Manager) finish(ctx context.Context, number int, writable handle, backing *os.File, image FileID, want Mapping) (_ *Device, err error) {
	var seq uint64
	undo := writable
	defer func() {
		if err != nil {
			uerr := m.unbind(ctx, Ref{number, seq}, undo)
			if uerr != nil && (errors.Is(err, errMasked) || errors.Is(err, errCleared)) {
				err = uerr // no second device beside one that is still there
			} else {
				err = errors.Join(err, uerr)
			}
		}
	}()
	if seq, err = writable.DiskSeq(); err != nil {
		return nil, opError("get diskseq", number, err)
	}
	if err := m.setDiscard(number, want.Discard); err != nil {
		return nil, err
	}
	if !want.Discard && !want.ReadOnly {
		// What the attribute says is not what Linux before 5.19 does (fact 107).
		if through, err := writable.Discards(); err != nil || through {
			return nil, opError("mask discard", number, cmp.Or(err, ErrDiscard))
		}
	}
	// Only now may the writable one go: the last close clears an autoclear device.
	reading, path, err := m.open(number, forReading)
	if err != nil {
		return nil, err
	}
	undo = reading
	_ = writable.Close()
	info, err := m.describe(number, path, reading)
	if err != nil {
		return nil, err
	}
	st, err := m.kernel.Stat(backing)
	if err != nil {
		return nil, opError("stat image", -1, err)
	}
	if err := want.verify(info, image, st.Size); err != nil {
		return nil, err
	}
	return m.newDevice(reading, info, false), nil
}

// setDiscard masks discard, or finds that a mask is left. Writing the attribute
// freezes the device's queue, some 15 ms on 6.18 whatever the value, so a mask that
// is there already is not written again.
func (m *Manager) setDiscard(number int, want bool) error {
	have, err := m.kernel.Attr(number, attrDiscard)
	if err != nil {
		return opError("read "+attrDiscard, number, err)
	}
	if !want {
		if have == "0" {
			return nil
		}
		return opError("mask discard", number, m.kernel.SetAttr(number, attrDiscard, "0"))
	}
	if have != "0" {
		return nil
	}
	limit, err := m.kernel.Attr(number, attrDiscardLimit)
	if err != nil {
		return opError("read "+attrDiscardLimit, number, err)
	}
	if limit == "0" {
		return nil // the file system below cannot punch holes
	}
	// Taking the mask off works on some kernels only (fact 63).
	if m.kernel.SetAttr(number, attrDiscard, limit) == nil {
		if have, err := m.kernel.Attr(number, attrDiscard); err == nil && have != "0" {
			return nil
		}
	}
	return opError("unmask discard", number, errMasked)
}

// recycle unregisters a device whose discard mask sticks and registers it anew,
// Unbound -> Deleting -> Unbound. If somebody has it open (udev) another one is
// registered instead. It returns the number to use.
func (m *Manager) recycle(number int) (int, error) {
	add := -1
	if m.remove(number) == nil {
		add = number
	}
	n, err := m.kernel.Add(add)
	if errors.Is(err, syscall.EEXIST) {
		return number, nil // somebody's GET_FREE was faster; the mask is gone all the same
	}
	if err != nil {
		return 0, opError("add "+strconv.Itoa(add), -1, numbersError(err))
	}
	m.note(n)
	return n, nil
}

// verify compares what was bound with what was wanted.
func (m Mapping) verify(in Info, image FileID, fileSize int64) error {
	if in.Image != image {
		return opError("verify", in.Number, ErrIdentity)
	}
	if in.DirectIO != (m.DirectIO == DirectIOOn) && m.DirectIO != DirectIOAuto {
		return opError("verify", in.Number, fmt.Errorf("direct I/O is %v: %w", in.DirectIO, ErrDirectIO))
	}
	if in.Autoclear && !m.Autoclear {
		return opError("verify", in.Number, errCleared)
	}
	field, have, want := m.differs(in)
	if size := m.size(fileSize); field == "" && in.Size != size {
		field, have, want = "Size", strconv.FormatInt(in.Size, 10), strconv.FormatInt(size, 10)
	}
	if field != "" {
		return opError("verify", in.Number, fmt.Errorf("%s is %s, not %s: %w", field, have, want, ErrIdentity))
	}
	return nil
}
