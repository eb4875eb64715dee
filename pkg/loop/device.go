package loop

import "sync"

// Device is an attached device. It holds one O_RDONLY descriptor until it is
// closed: an autoclear device is unbound then, unless somebody else has it open.
type Device struct {
	manager *Manager
	info    Info
	reused  bool

	mu     sync.Mutex
	handle handle // nil after Close; guarded by mu
}

// newDevice counts the device as held.
func (m *Manager) newDevice(h handle, info Info, reused bool) *Device {
	m.mu.Lock()
	m.held[info.Ref]++
	m.mu.Unlock()
	return &Device{manager: m, info: info, reused: reused, handle: h}
}

// Info returns what the device was when it was attached.
func (d *Device) Info() Info { return d.info }

// Ref identifies the binding.
func (d *Device) Ref() Ref { return d.info.Ref }

// Path is a node of the device that this process can open.
func (d *Device) Path() string { return d.info.Path }

// Reused tells whether the device was bound already when it was asked for.
func (d *Device) Reused() bool { return d.reused }

// Size returns the device's size in bytes now, or when it was attached if the
// Device is closed.
func (d *Device) Size() int64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.handle != nil {
		if size, _, err := d.handle.Geometry(); err == nil {
			return size
		}
	}
	return d.info.Size
}

// Close drops the hold. Closing twice is closing once. It does not detach: see
// Manager.Detach, and Manager.WaitUnbound for autoclear devices.
func (d *Device) Close() error {
	d.mu.Lock()
	h := d.handle
	d.handle = nil
	d.mu.Unlock()
	if h == nil {
		return nil
	}
	err := opError("close", d.info.Number, h.Close())
	d.manager.mu.Lock()
	defer d.manager.mu.Unlock()
	if d.manager.held[d.info.Ref]--; d.manager.held[d.info.Ref] == 0 {
		delete(d.manager.held, d.info.Ref)
	}
	return err
}

// Release is Close for who knows that nobody is shown the device any more. Somebody who was
// may have given it another file (LOOP_CHANGE_FD, fact 108), after which Detach takes the
// binding for gone: such a device is cleared. Nobody can have bound it anew meanwhile, since
// it was open.
func (d *Device) Release() error {
	d.mu.Lock()
	if h := d.handle; h != nil {
		if seq, err := h.DiskSeq(); err == nil && seq != d.info.DiskSeq {
			_ = h.Clear()
		}
	}
	d.mu.Unlock()
	return d.Close()
}
