package loop

import (
	"strings"
	"syscall"
	"testing"
)

// The kernel has no number left, for GET_FREE or for a new device: that is the limit,
// with words that tell it from a full disk, and nothing stays behind. When there is one
// again the next Attach has it.
func TestNoNumberLeft(t *testing.T) {
	for name, full := range map[string]func(k *fake, call string) error{
		"to find": func(_ *fake, call string) error {
			if call == "GetFree" {
				return syscall.ENOSPC
			}
			return nil
		},
		// Somebody keeps the lowest number claimed, so that a new one is asked for.
		"to make": func(_ *fake, call string) error {
			switch call {
			case "Configure":
				return syscall.EBUSY
			case "Add":
				return syscall.ENOSPC
			}
			return nil
		},
		// The only free one keeps a mask (fact 63), and is removed to be made anew.
		"to make anew": func(k *fake, call string) error {
			if call == "Add" && k.count("Remove") > 0 {
				return syscall.ENOSPC
			}
			return nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			m := fakeMachine(t, generations[0])
			manager := m.manager(t)
			want := whole
			if name == "to make anew" {
				m.detach(t, manager, m.attach(t, manager, "a", whole))
				want.Discard = true
			}
			m.fake.before = func(call string) error { return full(m.fake, call) }
			_, err := manager.Attach(t.Context(), m.image(t, "a"), want)
			m.fake.before = nil
			wantErr(t, "attach", err, ErrLimit)
			if !strings.Contains(err.Error(), "no loop device number left") || !strings.Contains(err.Error(), "losetup --list") {
				t.Errorf("it says %v", err)
			}
			if bound := m.fake.bound(); len(bound) > 0 || manager.Attached() != 0 {
				t.Errorf("bound: %v, counted: %d", bound, manager.Attached())
			}
			m.detach(t, manager, m.attach(t, manager, "a", want))
		})
	}
}
