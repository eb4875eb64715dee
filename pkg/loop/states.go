package loop

import (
	"context"
	"errors"
	"syscall"
)

// States counts the registered loop devices of the machine by state. Those of others
// are only looked at in sysfs, and never opened: they are Unbound or Bound. Deleting
// are those that this manager is removing now.
func (m *Manager) States(ctx context.Context) (map[State]int, error) {
	numbers, err := m.kernel.Numbers()
	if err != nil {
		return nil, opError("list", -1, err)
	}
	m.mu.Lock()
	count := map[State]int{Unbound: 0, Bound: 0, Rundown: 0, Deleting: m.deleting}
	m.mu.Unlock()
	for _, n := range numbers {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if _, err := m.kernel.Attr(n, attrBackingFile); absent(err) {
			count[Unbound]++
			continue
		}
		count[m.boundState(n)]++
	}
	count[Unbound] = max(0, count[Unbound]-count[Deleting])
	return count, nil
}

// boundState is the state of a device that has a backing file.
func (m *Manager) boundState(number int) State {
	m.mu.Lock()
	seq, ours := m.attached[number]
	m.mu.Unlock()
	if !ours || !m.mayBeBound(Ref{number, seq}) {
		return Bound
	}
	h, path, err := m.open(number, forReading)
	if errors.Is(err, syscall.ENXIO) {
		return Rundown // bound to the eye, closed to all (fact 27)
	}
	if err != nil {
		return Bound
	}
	defer h.Close()
	info, err := m.describe(number, path, h)
	switch {
	case errors.Is(err, ErrNotBound):
		return Rundown
	case err != nil:
		return Bound
	}
	return m.stateOf(info)
}

// remove is LOOP_CTL_REMOVE.
func (m *Manager) remove(number int) error {
	m.mu.Lock()
	m.deleting++
	m.mu.Unlock()
	defer func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.deleting--
	}()
	return m.kernel.Remove(number)
}
