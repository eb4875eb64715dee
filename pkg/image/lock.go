package image

import (
	"context"
	"errors"
	"os"
	"syscall"
	"time"
)

// lockTime is how long Open waits for a lock that may be about to go: a process that
// was killed leaves it to the children that it had just forked, until they exec.
const lockTime = 2 * time.Second

// lockRoot takes the lock of a pool's directory: EWOULDBLOCK if somebody keeps it.
func lockRoot(ctx context.Context, root *os.File) error {
	deadline := time.NewTimer(lockTime)
	defer deadline.Stop()
	again := time.NewTicker(20 * time.Millisecond)
	defer again.Stop()
	for {
		err := lockDir(root)
		if !errors.Is(err, syscall.EWOULDBLOCK) {
			return err
		}
		select {
		case <-again.C:
		case <-deadline.C:
			return err
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
