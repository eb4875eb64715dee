package loop

import (
	"os"
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
