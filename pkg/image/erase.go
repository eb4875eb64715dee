package image

import (
	"context"
	"errors"
	"io/fs"
	"maps"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"
)

const (
	// patience is how long a call waits for the blocks of what it removed to be free:
	// long enough for all but the largest files.
	patience = time.Second
	// An image of more blocks is cut piece by piece before it is unlinked. What the
	// kernel does in one call cannot be interrupted, not even by SIGKILL.
	firstPiece int64 = 64 * MiB
	// scarcePause is how long what cannot be removed for want of descriptors waits.
	scarcePause = time.Second
	// pieceTime is about what the freeing of one piece may take.
	pieceTime = 50 * time.Millisecond
)

// erasers free the blocks of what does not exist any more: beside its caller, and
// after it where that takes long. They end with the pool, wherever they are; the next
// opening of the pool goes on.
type erasers struct {
	work  sync.WaitGroup
	end   context.Context //nolint:containedctx // that of what outlives calls
	close context.CancelFunc

	mu    sync.Mutex
	under map[<-chan struct{}]bool // what is under way, by what its end closes; guarded by mu
}

func newErasers(ctx context.Context) *erasers {
	end, cancel := context.WithCancel(ctx)
	return &erasers{end: end, close: cancel, under: map[<-chan struct{}]bool{}}
}

// note says that what done belongs to is under way, or no more.
func (e *erasers) note(done <-chan struct{}, under bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if under {
		e.under[done] = true
	} else {
		delete(e.under, done)
	}
}

// wait waits for what is being erased as long as a removal does, and says whether there is
// anything.
func (e *erasers) wait(ctx context.Context) (some bool) {
	e.mu.Lock()
	all := slices.Collect(maps.Keys(e.under))
	e.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for _, done := range all {
		await(ctx, done)
	}
	return len(all) > 0
}

func (e *erasers) stop() {
	e.close()
	e.work.Wait()
}

// Erased waits until nothing that was removed is being erased any more, or for ctx, with
// its error. Precondition: no calls are made meanwhile.
func (s *Store) Erased(ctx context.Context) error {
	done := make(chan struct{})
	go func() {
		defer close(done)
		for _, p := range s.Pools() {
			p.erasers.work.Wait()
		}
	}()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// discard removes what is not a volume or snapshot yet, or no more: work below the
// pool's root that nobody knows. It waits for that, but not longer than patience. What
// cannot be removed is a problem of the pool's health.
// Precondition: the pool is open or being opened, and not being closed.
func (p *Pool) discard(name string) { await(p.erasers.end, p.eraseAll(name)) }

// eraseAll begins to erase, and closes done when it is over.
func (p *Pool) eraseAll(all ...string) (done <-chan struct{}) {
	over := make(chan struct{})
	p.erasers.note(over, true)
	p.erasers.work.Go(func() {
		defer close(over)
		defer p.erasers.note(over, false)
		p.store.kill("remove: unlinking")
		for i, name := range all {
			if i > 0 && p.erasers.end.Err() != nil {
				return
			}
			err := p.eraseSurely(name)
			switch {
			case err == nil:
				p.freed.Store(p.store.now().UnixNano())
			case p.erasers.end.Err() == nil:
				p.leftBehind(name, err)
			}
		}
		p.store.kill("remove: unlinked")
	})
	return over
}

// eraseSurely is erase until it is not a lack of descriptors or memory that stands in its
// way, or the erasers end: a call that fails for such a lack leaves nothing for longer.
func (p *Pool) eraseSurely(name string) error {
	err := p.erase(p.erasers.end, name)
	if scarce(err) {
		p.logger.Info("Cannot remove yet; trying again", "path", p.Path()+"/"+name, "in", scarcePause.String(), "reason", err.Error())
	}
	for scarce(err) {
		if err := pause(p.erasers.end, scarcePause); err != nil {
			return err
		}
		err = p.erase(p.erasers.end, name)
	}
	return err
}

// await waits for done as long as a call should: until patience is over, or ctx.
func await(ctx context.Context, done <-chan struct{}) {
	t := time.NewTimer(patience)
	defer t.Stop()
	select {
	case <-done:
	case <-t.C:
	case <-ctx.Done():
	}
}

// erase is removeTree for what may have large images in it; ctx ends it between two
// pieces. What is left is still below that name.
func (p *Pool) erase(ctx context.Context, name string) error {
	if d, err := openDirAt(p.root, name); err == nil {
		err = p.shrink(ctx, d, time.Now().Add(patience))
		_ = d.Close()
		if err != nil {
			return err
		}
	}
	return removeTree(p.root, name)
}

// shrink cuts a large image from its end until what is left can be unlinked at once.
// After late it rests as long as it works, so that others have the disk too. It does
// not touch what somebody else has open, or knows by another name: that keeps its
// data, as it does when a file is unlinked. The error is ctx's; nothing else is a
// reason not to unlink.
func (p *Pool) shrink(ctx context.Context, dir *os.File, late time.Time) error {
	st, err := statAt(dir, imageFile)
	if err != nil || st.Allocated <= firstPiece {
		return nil
	}
	f, err := openAt(dir, imageFile, true)
	if err != nil {
		return nil
	}
	defer f.Close()
	if st, err = statFile(f); err != nil || st.Links != 1 || !openedOnce(f) {
		return nil
	}
	piece := firstPiece
	for size := st.Size - piece; size > 0; size -= piece {
		if err := ctx.Err(); err != nil {
			return err
		}
		began := time.Now()
		if f.Truncate(size) != nil {
			return nil
		}
		p.store.kill("remove: cut")
		took := time.Since(began)
		piece = nextPiece(piece, took)
		if began.After(late) {
			if err := pause(ctx, min(took, pieceTime)); err != nil {
				return err
			}
		}
	}
	return nil
}

// nextPiece is how many bytes to cut next, when piece bytes took so long. How much work
// they are depends on how fragmented they are, which is not known.
func nextPiece(piece int64, took time.Duration) int64 {
	switch {
	case took < pieceTime/4:
		return 2 * piece
	case took > pieceTime:
		return max(MiB, piece/2)
	}
	return piece
}

// removeTree removes name and, if it is a directory, all that is in it. It does
// not follow links and does not enter other filesystems: a mount point in there
// is an error, and stays. That name does not exist is success.
func removeTree(dir *os.File, name string) error {
	err := unlinkAt(dir, name, false)
	switch {
	case err == nil || errors.Is(err, fs.ErrNotExist):
		return nil
	case errors.Is(err, syscall.EISDIR), errors.Is(err, syscall.EPERM):
		// Linux says EISDIR, POSIX says EPERM.
	default:
		return err
	}
	sub, err := openDirAt(dir, name)
	if err != nil {
		return err
	}
	defer sub.Close()
	content, err := names(sub)
	if err != nil {
		return err
	}
	for _, n := range content {
		if err := removeTree(sub, n); err != nil {
			return err
		}
	}
	if err := unlinkAt(dir, name, true); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
