package loop

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"syscall"
)

// Find returns every bound device that shows some of the file, by number. An image
// that nobody else has open costs a few system calls, otherwise each bound device
// is looked at.
//
// State is Rundown for an autoclear device that nobody has mounted and that this
// manager does not hold. To learn that, each autoclear device over the file is
// opened with O_EXCL for an instant.
func (m *Manager) Find(ctx context.Context, backing *os.File) ([]Info, error) {
	st, err := m.kernel.Stat(backing)
	if err != nil {
		return nil, opError("stat image", -1, err)
	}
	if sole, err := m.kernel.Sole(backing, looking); err == nil && sole {
		return nil, nil
	}
	return m.scan(ctx, backing, st.ID)
}

// Survey returns every bound device on the machine, by number, in one pass. Devices of
// others are among them. State is Bound for each: whether an autoclear device is mounted is
// not looked at, because looking could make somebody else's mount fail; Inspect does, for
// one device. Those that do not say in time what they show, because the filesystem of their
// file hangs, are returned apart, with what the kernel knows by itself: Image is zero and
// Tag empty. They may show any file that MayBe does not rule out.
func (m *Manager) Survey(ctx context.Context) (bound, silent []Info, err error) {
	bound, err = m.each(ctx, func(n int) (Info, error) {
		h, path, err := m.open(n, forReading)
		if err != nil {
			return Info{}, err
		}
		defer h.Close()
		info, err := m.describe(n, path, h)
		if errors.Is(err, ErrSilent) {
			silent = append(silent, info)
			return Info{}, ErrNotBound
		}
		return info, err
	})
	return bound, silent, err
}

// Inspect returns what a device is. ErrNotExist if there is none with the number,
// ErrNotBound if it is Unbound or finishing its run-down. Both come with the Info's
// Number and State filled in as far as they are known.
func (m *Manager) Inspect(ctx context.Context, number int) (Info, error) {
	if err := ctx.Err(); err != nil {
		return Info{}, err
	}
	h, path, err := m.open(number, forReading)
	if err != nil {
		if errors.Is(err, syscall.ENXIO) {
			// Bound to the eye, closed to all (fact 27).
			return Info{Ref: Ref{Number: number}, State: Rundown}, opError("inspect", number, ErrNotBound)
		}
		return Info{}, err
	}
	defer h.Close()
	info, err := m.describe(number, path, h)
	if err != nil {
		return Info{Ref: info.Ref, Path: path}, err
	}
	info.State = m.stateOf(info)
	return info, nil
}

// scan looks at each bound device and returns those over the image, with State. ErrSilent
// if one does not answer that may be among them.
func (m *Manager) scan(ctx context.Context, backing *os.File, image FileID) ([]Info, error) {
	found, err := m.each(ctx, func(n int) (Info, error) {
		h, path, err := m.open(n, forReading)
		if err != nil {
			return Info{}, err
		}
		defer h.Close()
		// The rest costs more than this one call, and is wanted of few devices.
		st, err := h.Status()
		if errors.Is(err, syscall.ENXIO) {
			return Info{}, opError("get status", n, err)
		}
		if errors.Is(err, ErrSilent) {
			if may, err := m.mayShow(n, h, backing, image); err != nil || may {
				return Info{}, opError("get status", n, errors.Join(ErrSilent, err))
			}
			return Info{}, ErrNotBound
		}
		// The kernel asks the file's filesystem, which may be dead. That of this image
		// answered a moment ago.
		if err != nil || st.Image != image {
			return Info{}, ErrNotBound
		}
		return m.describe(n, path, h)
	})
	for i := range found {
		found[i].State = m.stateOf(found[i])
	}
	return found, err
}

// each calls look for every number whose device shows signs of being bound. Devices
// that turn out not to be, or that are running down or gone, are left out.
func (m *Manager) each(ctx context.Context, look func(number int) (Info, error)) ([]Info, error) {
	numbers, err := m.kernel.Numbers()
	if err != nil {
		return nil, opError("list", -1, err)
	}
	slices.Sort(numbers)
	var found []Info
	for _, n := range numbers {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		// An opener is in the way of whoever wants to remove the device, so the idle
		// ones are not opened.
		if _, err := m.kernel.Attr(n, attrBackingFile); absent(err) {
			continue
		}
		info, err := look(n)
		switch {
		case err == nil:
			found = append(found, info)
		case errors.Is(err, ErrNotBound), errors.Is(err, ErrNotExist),
			errors.Is(err, syscall.ENXIO),  // running down (fact 27)
			errors.Is(err, syscall.ENODEV): // removed between two steps
		default:
			return nil, err
		}
	}
	return found, nil
}

// absent tells whether an attribute is not there. ENODEV is the answer when the
// device or the attribute goes away between open and read.
func absent(err error) bool {
	return errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ENODEV)
}

// describe reads all there is to know from an open device, except whether somebody
// claims it: State is Bound. While h is open the binding cannot be replaced, so all
// of it is about one binding. ErrNotBound, with the Ref, if there is none; ErrSilent, with
// what describeDead finds, if it does not say what it shows.
func (m *Manager) describe(number int, path string, h handle) (Info, error) {
	seq, err := h.DiskSeq()
	if err != nil {
		return Info{}, opError("get diskseq", number, err)
	}
	info := Info{Ref: Ref{Number: number, DiskSeq: seq}, State: Bound, Path: path}
	if info.Major, info.Minor, err = m.numbers(number); err != nil {
		return info, err
	}
	st, err := h.Status()
	if errors.Is(err, syscall.ENXIO) {
		return info, opError("get status", number, ErrNotBound)
	} else if err != nil {
		silent := errors.Is(err, ErrSilent)
		if info, err = m.describeDead(info, h); err == nil && silent {
			err = opError("get status", number, ErrSilent)
		}
		return info, err
	}
	info.Image, info.Tag = st.Image, st.Tag
	info.Offset, info.SizeLimit = int64(st.Offset), int64(st.SizeLimit)
	info.ReadOnly = st.Flags&flagReadOnly != 0
	info.DirectIO = st.Flags&flagDirectIO != 0
	info.Autoclear = st.Flags&flagAutoclear != 0
	if info.Size, info.BlockSize, err = h.Geometry(); err != nil {
		return info, opError("get size", number, err)
	}
	discard, err := m.kernel.Attr(number, attrDiscard)
	if err != nil {
		return info, opError("read "+attrDiscard, number, err)
	}
	info.Discard = discard != "0"
	// For people; a device that is unbound right now has none.
	info.BackingPath, _ = m.kernel.Attr(number, attrBackingFile)
	return info, nil
}

// describeDead completes info, from sysfs, for a device whose file's filesystem fails to be
// asked, so that LOOP_GET_STATUS64 fails (fact 103): Image is zero, and Tag empty.
func (m *Manager) describeDead(info Info, h handle) (Info, error) {
	var err error
	if info.Size, info.BlockSize, err = h.Geometry(); err != nil {
		return info, opError("get size", info.Number, err)
	}
	flag := func(name string) bool {
		v, err := m.kernel.Attr(info.Number, name)
		return err == nil && v == "1"
	}
	number := func(name string) int64 {
		v, _ := m.kernel.Attr(info.Number, name)
		n, _ := strconv.ParseInt(v, 10, 64)
		return n
	}
	info.ReadOnly, info.Autoclear, info.DirectIO = flag(attrReadOnly), flag(attrAutoclear), flag(attrDirectIO)
	info.Offset, info.SizeLimit = number(attrOffset), number(attrSizeLimit)
	info.BackingPath, _ = m.kernel.Attr(info.Number, attrBackingFile)
	return info, nil
}

// stateOf tells Bound from Rundown for a device that was bound when info was read.
// After LOOP_CLR_FD of a device in use the kernel shows the autoclear flag, as on
// one that was bound with it: what tells them apart is whether anybody relies on
// the device, by a claim (a mount) or as a Device of ours.
func (m *Manager) stateOf(info Info) State {
	if !info.Autoclear || m.heldCount(info.Ref) > 0 {
		return Bound
	}
	h, _, err := m.open(info.Number, forClaim)
	if err != nil {
		if errors.Is(err, syscall.EBUSY) {
			return Bound // claimed
		}
		return Rundown // ENXIO: on its way out. Anything else: not known to be relied on.
	}
	_ = h.Close()
	return Rundown
}

// numbers reads a device's major and minor numbers.
func (m *Manager) numbers(number int) (major, minor uint32, err error) {
	id, err := m.kernel.Attr(number, attrDev)
	if err != nil {
		return 0, 0, opError("read "+attrDev, number, err)
	}
	if _, err := fmt.Sscanf(id, "%d:%d", &major, &minor); err != nil {
		return 0, 0, opError("read "+attrDev, number, fmt.Errorf("%q: %w", id, err))
	}
	return major, minor, nil
}
