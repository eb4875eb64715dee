//go:build linux

package main

import (
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/csi-loop/csi-loop/test/bench/lab"
)

// block is what is written at a time.
const block = 4096

// aligned is a block that direct I/O takes.
func aligned() []byte {
	b := make([]byte, 2*block)
	skip := (block - int(uintptr(unsafe.Pointer(&b[0]))%block)) % block
	return b[skip : skip+block]
}

// writer writes a block and syncs it, over and over, and notes when each was done.
type writer struct {
	f    *os.File
	stop chan struct{}
	wg   sync.WaitGroup

	mu   sync.Mutex
	done []time.Time // guarded by mu
	err  error       // guarded by mu
}

// startWriter writes to a file of the directory until end.
func startWriter(dir string) (*writer, error) {
	f, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		return nil, err
	}
	w := &writer{f: f, stop: make(chan struct{})}
	w.wg.Go(func() {
		for i := int64(0); ; i++ {
			select {
			case <-w.stop:
				return
			default:
			}
			// A log of 16 MiB that is written over and over.
			_, err := f.WriteAt(aligned(), i%(16*lab.MiB/block)*block)
			if err == nil {
				err = unix.Fdatasync(int(f.Fd()))
			}
			w.mu.Lock()
			w.done, w.err = append(w.done, time.Now()), errors.Join(w.err, err)
			w.mu.Unlock()
			if err != nil {
				return
			}
		}
	})
	return w, nil
}

// gap waits until the writer goes on after `to`, and returns its longest pause that
// overlaps the time from `from` to `to`. It forgets what was before.
func (w *writer) gap(from, to time.Time) (time.Duration, error) {
	for {
		w.mu.Lock()
		done, err := w.done, w.err
		w.mu.Unlock()
		if err != nil {
			return 0, err
		}
		if len(done) > 0 && done[len(done)-1].After(to) {
			break
		}
		time.Sleep(time.Millisecond)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	var longest time.Duration
	for i := 1; i < len(w.done); i++ {
		if w.done[i].After(from) && w.done[i-1].Before(to) {
			longest = max(longest, w.done[i].Sub(w.done[i-1]))
		}
	}
	w.done = w.done[len(w.done)-1:]
	return longest, nil
}

func (w *writer) end() error {
	close(w.stop)
	w.wg.Wait()
	return errors.Join(w.err, w.f.Close())
}

// fill makes a file of that size in the directory, and writes 1 MiB in each step bytes
// of it.
func fill(dir string, size, step int64) error {
	f, err := os.OpenFile(filepath.Join(dir, "data"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Fallocate(int(f.Fd()), 0, 0, size); err != nil {
		return err
	}
	b := make([]byte, lab.MiB)
	for i := range b {
		b[i] = byte(rand.Uint32())
	}
	for at := int64(0); at+lab.MiB <= size; at += step {
		if _, err := f.WriteAt(b, at); err != nil {
			return err
		}
	}
	return f.Sync()
}

// scatter writes n blocks at random places of the file that fill made.
func scatter(dir string, n int) error {
	f, err := os.OpenFile(filepath.Join(dir, "data"), os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	b := aligned()
	_, _ = rand.NewChaCha8([32]byte{1}).Read(b)
	places := rand.New(rand.NewPCG(1, uint64(n)))
	for range n {
		if _, err := f.WriteAt(b, places.Int64N(st.Size()/block)*block); err != nil {
			return err
		}
	}
	return f.Sync()
}
