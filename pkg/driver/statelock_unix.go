//go:build unix

package driver

import (
	"errors"
	"fmt"
	"os"
	"syscall"
)

// lockDir keeps other processes off a state directory until the file is closed.
func lockDir(dir string) (*os.File, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if err == nil {
		return f, nil
	}
	if errors.Is(err, syscall.EWOULDBLOCK) {
		err = errors.New("another csi-loop with the same node ID uses it: stop that one, or give this one another --node-id or --state-dir")
	}
	return nil, errors.Join(fmt.Errorf("state directory %s: %w", dir, err), f.Close())
}
