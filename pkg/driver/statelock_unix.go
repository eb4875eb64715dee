//go:build unix

package driver

import (
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"
)

// ownDir makes a state directory and keeps other processes off it until the file
// is closed. One that others than the caller could write to is refused: its
// records decide what is unmounted.
func ownDir(dir string) (_ *os.File, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("state directory %s: %w", dir, err)
		}
	}()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(dir, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Close())
		}
	}()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if owner, ok := st.Sys().(*syscall.Stat_t); ok && int(owner.Uid) != os.Geteuid() || st.Mode().Perm()&0o022 != 0 {
		return nil, errors.New("it belongs to somebody else, or others may write to it: give --state-dir a directory of its own")
	}
	if err := lockFile(f, lockTime); err != nil {
		return nil, fmt.Errorf("another csi-loop with the same node ID uses it: stop that one, or give this one another --node-id or --state-dir: %w", err)
	}
	return f, nil
}

// lockTime is how long a lock may be in the way that is about to go: a process that
// was killed leaves it to children that it had just forked, until they exec.
const lockTime = 2 * time.Second

// lockFile takes an flock, for which it waits that long: EWOULDBLOCK after it.
func lockFile(f *os.File, patience time.Duration) error {
	for deadline := time.Now().Add(patience); ; {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if !errors.Is(err, syscall.EWOULDBLOCK) || time.Now().After(deadline) {
			return err
		}
		<-time.After(20 * time.Millisecond)
	}
}
