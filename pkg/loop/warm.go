package loop

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"syscall"
)

// Warm registers devices until as many are idle as WithWarm says, so that Attach
// does not have to. That there are enough already is success.
func (m *Manager) Warm(ctx context.Context) error {
	idle, err := m.idle(ctx)
	if err != nil {
		return err
	}
	for range m.warm - len(idle) {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := m.kernel.Add(-1)
		if err != nil {
			return opError("add", -1, err)
		}
		m.note(n)
	}
	return nil
}

// Trim unregisters idle devices above the number of WithWarm, the highest first,
// but only such as this manager registered. One that somebody has open is left for
// the next time.
func (m *Manager) Trim(ctx context.Context) error {
	idle, err := m.idle(ctx)
	if err != nil {
		return err
	}
	surplus := len(idle) - m.warm
	for _, n := range slices.Backward(idle) {
		if surplus <= 0 {
			return nil
		}
		m.mu.Lock()
		ours := m.registered[n]
		m.mu.Unlock()
		if !ours {
			continue
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		err := m.remove(n)
		switch {
		case err == nil, errors.Is(err, syscall.ENODEV): // ENODEV: somebody else did it
			m.unnote(n)
			surplus--
		case errors.Is(err, syscall.EBUSY): // bound or opened since we looked
		default:
			return opError("remove", n, err)
		}
	}
	return nil
}

// idle lists the unbound devices in order.
func (m *Manager) idle(ctx context.Context) ([]int, error) {
	numbers, err := m.kernel.Numbers()
	if err != nil {
		return nil, opError("list", -1, err)
	}
	slices.Sort(numbers)
	var idle []int
	for _, n := range numbers {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if _, err := m.kernel.Attr(n, attrBackingFile); absent(err) {
			idle = append(idle, n)
		}
	}
	return idle, nil
}

func (m *Manager) unnote(number int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.seen, number)
	delete(m.registered, number)
}

// Remove unregisters a device, Unbound -> Deleting -> gone. That there is none is
// success. A Bound device is refused with *TransitionError before anything is done;
// one in Rundown, or one that somebody has open, is waited for and then ErrBusy.
func (m *Manager) Remove(ctx context.Context, number int) error {
	for try := 0; ; try++ {
		info, err := m.Inspect(ctx, number)
		switch {
		case errors.Is(err, ErrNotExist):
			m.unnote(number)
			return nil
		case err != nil && !errors.Is(err, ErrNotBound):
			return err
		}
		if _, err := Next(info.State, Remove); err != nil {
			return opError("remove", number, err)
		}
		err = m.remove(number)
		switch {
		case err == nil, errors.Is(err, syscall.ENODEV):
			m.unnote(number)
			return nil
		case !errors.Is(err, syscall.EBUSY):
			return opError("remove", number, err)
		case try >= m.retry.Attempts:
			return opError("remove", number, fmt.Errorf("%w: %w", ErrBusy, err))
		}
		// Refused: Deleting -> what the kernel says now.
		if err := m.retry.pause(ctx, try); err != nil {
			return err
		}
	}
}
