package loop

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"syscall"
	"time"
)

// Attach binds a device that shows the mapping's range of backing, or reuses one
// that does so already (Device.Reused). backing stays the caller's and may be
// closed afterwards; it must be open for reading and, unless the mapping is
// read-only, for writing. Open it anew for each Attach: one that was attached
// before takes the slow path.
//
// On success the device has exactly the size, access, block size and discard limit
// of the mapping, and counts against the limit. On an error nothing that Attach
// bound stays bound.
//
// Over another mapping of the same file: adjacent ranges are independent. A
// read-only mapping may overlap anything. A writable mapping that overlaps a
// writable one reuses that device if it is equal (image, range, access, block size,
// autoclear, direct I/O, discard and tag), is refused with *ConflictError if not,
// and with ErrBusy if that device is in Rundown.
//
// Errors: *MappingError, *ConflictError, ErrBusy, ErrLimit, ErrDirectIO, ErrIdentity
// (the file changed meanwhile), *OpError, the context's.
func (m *Manager) Attach(ctx context.Context, backing *os.File, want Mapping) (*Device, error) {
	st, err := m.kernel.Stat(backing)
	if err != nil {
		return nil, opError("stat image", -1, err)
	}
	switch err := want.Validate(st.Size); {
	case !st.Regular:
		return nil, &MappingError{Field: "backing", Reason: "not a regular file"}
	case err != nil:
		return nil, err
	case !want.ReadOnly && !st.Writable: // the kernel would make the device read-only (fact 6)
		return nil, &MappingError{Field: "ReadOnly", Reason: "a writable device needs a file that is open for reading and writing"}
	}
	unlock, err := m.images.lock(ctx, st.ID)
	if err != nil {
		return nil, err
	}
	defer unlock()

	if sole, err := m.kernel.Sole(backing, beforeBind); err != nil || !sole {
		return m.attachShared(ctx, backing, st.ID, want, nil)
	}
	dev, err := m.bind(ctx, backing, st.ID, want)
	if err != nil {
		return nil, err
	}
	// Still nobody else has the file open, so nobody else shows it; and whoever opens
	// it from now on finds our device.
	if sole, err := m.kernel.Sole(backing, afterBind); err == nil && sole {
		return dev, nil
	}
	return m.attachShared(ctx, backing, st.ID, want, dev)
}

// attachShared attaches an image that somebody else has open. It looks at every
// device before and after the bind: before, to reuse; after, because a program that
// does not honour the flock may have bound the image in between. If two do so at the
// same time each sees the other, and each undoes its own and tries again. dev, if
// not nil, is a device that was just bound.
func (m *Manager) attachShared(ctx context.Context, backing *os.File, image FileID, want Mapping, dev *Device) (_ *Device, err error) {
	defer func() {
		if err != nil && dev != nil {
			err = errors.Join(err, m.undo(ctx, dev))
		}
	}()
	lock, err := m.lockImage(ctx, backing)
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	for try := 0; try < m.retry.Attempts; try++ {
		if dev == nil {
			found, err := m.scan(ctx, image)
			if err != nil {
				return nil, err
			}
			same, err := want.judge(found)
			if err != nil {
				return nil, err
			}
			if same != nil {
				reused, err := m.adopt(ctx, same.Ref, &want)
				if !errors.Is(err, ErrNotBound) {
					return reused, err
				}
				// Unbound since the scan: autoclear, or somebody's losetup -d.
				if err := m.retry.pause(ctx, try); err != nil {
					return nil, err
				}
				continue
			}
			if dev, err = m.bind(ctx, backing, image, want); err != nil {
				return nil, err
			}
		}
		found, err := m.scan(ctx, image)
		if err != nil {
			return nil, err
		}
		found = slices.DeleteFunc(found, func(in Info) bool { return in.Ref == dev.Ref() })
		if same, err := want.judge(found); err == nil && (same == nil || want.ReadOnly) {
			return dev, nil
		}
		ours := dev
		dev = nil
		if err := m.undo(ctx, ours); err != nil {
			return nil, err
		}
		if err := m.retry.pause(ctx, try); err != nil {
			return nil, err
		}
	}
	return nil, fmt.Errorf("%w: image is being attached by others, %d tries", ErrBusy, m.retry.Attempts)
}

// judge decides what to do beside the devices found over the same file: reuse one,
// bind a new one (nil), or refuse.
func (m Mapping) judge(found []Info) (same *Info, err error) {
	for i, in := range found {
		if in.ReadOnly != m.ReadOnly || !overlaps(m.Offset, m.SizeLimit, in.Offset, in.SizeLimit) {
			continue
		}
		field, have, want := m.differs(in)
		switch {
		case field == "" && in.State == Bound:
			if same == nil {
				same = &found[i]
			}
		case m.ReadOnly: // a device of its own
		case in.State == Rundown, field == "Autoclear" && in.Autoclear:
			// An autoclear flag that was not asked for may be that of LOOP_CLR_FD.
			return nil, fmt.Errorf("image is still attached as %s until its last user leaves: %w", in.Path, ErrBusy)
		default:
			return nil, &ConflictError{Ref: in.Ref, Path: in.Path, Field: field, Have: have, Want: want}
		}
	}
	return same, nil
}

// lockImage takes the image's flock. Other programs that lock images are expected
// to be done soon.
func (m *Manager) lockImage(ctx context.Context, backing *os.File) (io.Closer, error) {
	deadline := time.Now().Add(m.retry.Settle)
	for try := 0; ; try++ {
		lock, err := m.kernel.Lock(backing)
		switch {
		case err == nil:
			return lock, nil
		case !errors.Is(err, syscall.EAGAIN):
			return nil, opError("lock image", -1, err)
		case time.Now().After(deadline):
			return nil, fmt.Errorf("image is locked (flock) by another program: %w", ErrBusy)
		}
		if err := m.retry.pause(ctx, min(try, 4)); err != nil {
			return nil, err
		}
	}
}

// bind binds a free device, verified and counted. It does not look for others over
// the same file.
func (m *Manager) bind(ctx context.Context, backing *os.File, image FileID, want Mapping) (_ *Device, err error) {
	if err := m.reserve(); err != nil {
		return nil, err
	}
	var ref *Ref
	defer func() { m.settleReservation(ref) }()
	candidate := -1
	for try := 0; try < m.retry.Attempts; try++ {
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
		if !errors.Is(err, errMasked) {
			return nil, err
		}
		if candidate, err = m.recycle(number); err != nil {
			return nil, err
		}
	}
	return nil, fmt.Errorf("%w: found no device without a discard mask in %d tries", ErrBusy, m.retry.Attempts)
}

// configure takes a free device, or candidate if that is not -1, and binds it. The
// handle is writable and is the only thing that keeps an autoclear device bound.
func (m *Manager) configure(ctx context.Context, backing *os.File, image FileID, want Mapping, candidate int) (int, handle, error) {
	if err := m.alloc.lock(ctx); err != nil {
		return 0, nil, err
	}
	defer m.alloc.unlock()
	var last error
	for try := 0; try < m.retry.Attempts; try++ {
		if err := ctx.Err(); err != nil {
			return 0, nil, err
		}
		number := candidate
		if candidate = -1; number < 0 {
			n, err := m.kernel.GetFree()
			if err != nil {
				return 0, nil, opError("get free", -1, err)
			}
			number = n
		}
		m.note(number, true)
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

func (m *Manager) configureNumber(number int, backing *os.File, image FileID, want Mapping) (handle, error) {
	h, _, err := m.open(number, forWriting) // O_RDONLY would make it read-only (fact 6)
	if err != nil {
		return nil, err
	}
	c := config{
		File:      backing,
		Offset:    uint64(want.Offset),    //nolint:gosec // validated
		SizeLimit: uint64(want.SizeLimit), //nolint:gosec // validated
		BlockSize: uint32(want.BlockSize), //nolint:gosec // validated
		Tag:       want.Tag,
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

// errMasked: a former binding's discard mask sticks to the number (fact 63).
var errMasked = errors.New("discard is masked")

// finish turns a device that was just bound into one that is as wanted, held for
// reading only. On an error the device is unbound again.
func (m *Manager) finish(ctx context.Context, number int, writable handle, backing *os.File, image FileID, want Mapping) (_ *Device, err error) {
	var seq uint64
	undo := writable
	defer func() {
		if err != nil {
			err = errors.Join(err, m.unbind(ctx, Ref{number, seq}, undo))
		}
	}()
	if seq, err = writable.DiskSeq(); err != nil {
		return nil, opError("get diskseq", number, err)
	}
	if err := m.setDiscard(number, want.Discard); err != nil {
		return nil, err
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

// setDiscard masks discard, or finds that a mask is left.
func (m *Manager) setDiscard(number int, want bool) error {
	if !want {
		return opError("mask discard", number, m.kernel.SetAttr(number, attrDiscard, "0"))
	}
	have, err := m.kernel.Attr(number, attrDiscard)
	if err != nil {
		return opError("read "+attrDiscard, number, err)
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
	// Taking the mask off works on some kernels only; 6.18 takes the write and
	// ignores it.
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
	if m.kernel.Remove(number) == nil {
		add = number
	}
	n, err := m.kernel.Add(add)
	if errors.Is(err, syscall.EEXIST) {
		return number, nil // somebody's GET_FREE was faster; the mask is gone all the same
	}
	if err != nil {
		return 0, opError("add "+strconv.Itoa(add), -1, err)
	}
	m.note(n, true)
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
	field, have, want := m.differs(in)
	if size := m.size(fileSize); field == "" && in.Size != size {
		field, have, want = "Size", strconv.FormatInt(in.Size, 10), strconv.FormatInt(size, 10)
	}
	if field != "" {
		return opError("verify", in.Number, fmt.Errorf("%s is %s, not %s: %w", field, have, want, ErrIdentity))
	}
	return nil
}
