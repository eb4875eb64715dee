package loop

import (
	"os"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// loopChangeFD is LOOP_CHANGE_FD of linux/loop.h.
const loopChangeFD = 0x4c06

// Fact 108: whoever has the node of a read-only device may give it another file of the same
// size. What the device was bound as is gone then, and it must not stay for ever.
func TestDeviceGivenAnotherFile(t *testing.T) {
	m := realMachine(t)
	manager := m.manager(t)
	d := m.attach(t, manager, "a", Mapping{BlockSize: 4096, ReadOnly: true})
	node, err := os.Open(d.Path())
	check(t, err)
	other := m.image(t, "b")
	check(t, unix.IoctlSetInt(int(node.Fd()), loopChangeFD, int(other.Fd())))
	check(t, node.Close())
	check(t, other.Close())
	if info := must(manager.Inspect(t.Context(), d.Info().Number))(t); info.Ref == d.Ref() {
		t.Log("this kernel counts it as the same disk")
	}
	check(t, d.Release())
	m.detach(t, manager, d) // and the machine looks that nothing is left bound
}

// TestRangeIsMovedByWhoHasTheNode shows why a part of a file is not handed out as a raw
// device: no capability is needed to make it another part, of a read-only device neither.
func TestRangeIsMovedByWhoHasTheNode(t *testing.T) {
	m := realMachine(t)
	manager := m.manager(t)
	for _, readOnly := range []bool{false, true} {
		d := m.attach(t, manager, "a", Mapping{BlockSize: 4096, Offset: 1 << 20, SizeLimit: 4096, ReadOnly: readOnly})
		moved := make(chan error)
		go func() {
			runtime.LockOSThread() // and never unlocked: the thread ends with its lack of rights
			head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
			var none [2]unix.CapUserData
			if err := unix.Capset(&head, &none[0]); err != nil {
				moved <- err
				return
			}
			fd, err := unix.Open(d.Path(), unix.O_RDWR|unix.O_CLOEXEC, 0)
			if err != nil {
				moved <- err
				return
			}
			defer unix.Close(fd)
			info, err := unix.IoctlLoopGetStatus64(fd)
			if err == nil {
				info.Offset, info.Sizelimit = 0, 0
				err = unix.IoctlLoopSetStatus64(fd, info)
			}
			moved <- err
		}()
		check(t, <-moved)
		if size := d.Size(); size != testSize {
			t.Errorf("read-only: %t: it shows %d bytes, not all %d", readOnly, size, testSize)
		}
		m.detach(t, manager, d)
	}
}
