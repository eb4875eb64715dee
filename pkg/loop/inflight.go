package loop

import (
	"context"
	"fmt"
	"strconv"
	"strings"
)

// InFlight is how many reads and writes of a device are under way at this moment.
// ErrNotExist if there is no such device.
func (m *Manager) InFlight(ctx context.Context, number int) (int, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	text, err := m.kernel.Attr(number, "inflight")
	if err != nil {
		return 0, fmt.Errorf("/dev/loop%d: %w", number, err)
	}
	return parseInFlight(text)
}

// parseInFlight reads "       0        0".
func parseInFlight(text string) (int, error) {
	sum := 0
	for field := range strings.FieldsSeq(text) {
		n, err := strconv.Atoi(field)
		if err != nil {
			return 0, fmt.Errorf("requests under way: %q: %w", text, err)
		}
		sum += n
	}
	return sum, nil
}
