package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"syscall"
	"time"
)

// ProblemKind grades a problem, worst last.
type ProblemKind int

// The kinds of problems, as CSI has them.
const (
	Degraded     ProblemKind = iota + 1 // works, but not as it should
	Inaccessible                        // does not work; the data may be well
	DataLoss                            // data is gone
)

func (k ProblemKind) String() string {
	switch k {
	case Degraded:
		return "Degraded"
	case Inaccessible:
		return "Inaccessible"
	case DataLoss:
		return "DataLoss"
	}
	return fmt.Sprintf("ProblemKind(%d)", int(k))
}

// Problem is something that an operator should look at.
type Problem struct {
	Kind    ProblemKind
	Reason  string // one CamelCase word, stable
	Message string // for people: what is wrong
	Action  string // and what they do about it
}

// String is what is wrong, and what to do.
func (p Problem) String() string { return p.Reason + ": " + p.Message + "; " + p.Action }

// Check looks at the pool now, in constant time, and returns ErrPool when it
// cannot be used. What it finds is what Health returns until the next look.
//
// One look is under way at a time: a filesystem that hangs keeps it, and its thread, for as
// long as it hangs. After checkPatience such a pool does not answer, and from then on
// that is said at once.
func (p *Pool) Check(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	_, err := p.checkNow(ctx)
	return err
}

// checkNow is Check. answered is that there was a look, whatever it found.
func (p *Pool) checkNow(ctx context.Context) (answered bool, err error) {
	// What began before this call is not the look that it asks for.
	began := time.Now()
	for {
		c, err := p.checkOnce()
		if err != nil {
			return false, err
		}
		over, err := c.wait(ctx, p)
		if !over || !c.began.Before(began) {
			return over, err
		}
	}
}

// checkFor is checkNow for the health of a volume: whoever has no time left, as in a long
// list, has healthPatience all the same. A pool that is well answers within that.
func (p *Pool) checkFor(ctx context.Context) (answered bool, err error) {
	until, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	t := time.AfterFunc(healthPatience, func() { context.AfterFunc(ctx, cancel) })
	defer t.Stop()
	return p.checkNow(until)
}

// checkPatience is how long a pool may take to be looked at. A disk that is merely busy
// keeps the making of a file waiting for seconds.
const checkPatience = 10 * time.Second

// checking is a look that is under way.
type checking struct {
	began time.Time
	done  chan struct{}
	err   error // once it is done
}

// checkOnce returns the look that is under way, or begins one.
func (p *Pool) checkOnce() (*checking, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.checking != nil {
		return p.checking, nil
	}
	if err := p.store.enter(); err != nil {
		return nil, err
	}
	c := &checking{began: time.Now(), done: make(chan struct{})}
	p.checking = c
	go func() {
		defer p.store.leave()
		c.err = p.check()
		p.mu.Lock()
		p.checking = nil
		p.mu.Unlock()
		close(c.done)
	}()
	return c, nil
}

// wait waits for the end of a look, or until it has taken too long. over is that it ended.
func (c *checking) wait(ctx context.Context, p *Pool) (over bool, err error) {
	t := time.NewTimer(time.Until(c.began.Add(checkPatience)))
	defer t.Stop()
	select {
	case <-c.done:
		return true, c.err
	case <-ctx.Done():
		return false, ctx.Err()
	case <-t.C:
		select {
		case <-c.done: // at the same moment
			return true, c.err
		default:
		}
		err := poolError(p.config, "its filesystem has not answered for %v", time.Since(c.began).Round(time.Second))
		p.notef(true, reasonPoolFilesystem, Inaccessible, "%v", err)
		return false, err
	}
}

// fullBelow is how much a full filesystem may still show as free, in bytes.
const fullBelow = 4 * MiB

// Precondition: the store is open.
func (p *Pool) check() error {
	err := p.present()
	s, statErr := spaceOf(p.root)
	quota := false
	switch {
	case statErr != nil:
		statErr = poolError(p.config, "%w", statErr)
	case s.ReadOnly:
		statErr = poolError(p.config, "its filesystem became read-only")
	default:
		// A filesystem that is nearly full may search long for a block.
		probe := probeWrite(p.root, s.Free >= fullBelow && (s.Type == "ext4" || s.Type == "xfs"))
		if quota = errors.Is(probe, syscall.EDQUOT); probe != nil && !quota {
			statErr = poolError(p.config, "its filesystem takes no changes: %w", probe)
		}
	}
	both := errors.Join(err, statErr)
	short := outOfDescriptors(both)
	p.notef(short, reasonNoDescriptors, Degraded, "%v", both)
	p.notef(err != nil && !short, reasonPoolMissing, Inaccessible, "%v", err)
	p.notef(statErr != nil && !short, reasonPoolFilesystem, Inaccessible, "%v", statErr)
	if statErr == nil {
		promised, reserved := p.promises(s)
		p.notef(quota, reasonQuota, Degraded, "a quota of the pool's filesystem is used up: no volume is made")
		p.notef(s.Free < promised, reasonThinPromises, Degraded,
			"%d bytes are free, thin volumes were promised %d: writes to them may fail", s.Free, promised)
		p.notef(s.Free < reserved, reasonReserveUsed, Degraded,
			"%d bytes are free, %d should be left to others: no volume is made until there is more", s.Free, reserved)
		p.notef(s.Free < fullBelow, reasonPoolFull, Degraded, "%d bytes are free: writes to thin volumes fail", s.Free)
	}
	return both
}

func (p *Pool) promises(s space) (promised, reserved int64) {
	p.account.ledger.mu.Lock()
	defer p.account.ledger.mu.Unlock()
	return p.account.ledger.promised, p.account.reserve.of(s.Size)
}

// notef sets or clears the problem with that reason.
func (p *Pool) notef(is bool, r reason, kind ProblemKind, format string, args ...any) {
	if is {
		p.problem(r.problemf(kind, format, args...))
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.problems, reasonTable[r].word)
}

func (p *Pool) problem(problem Problem) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.problems[problem.Reason] = problem
}

// Health returns the pool's problems as last seen, worst first. Constant time but
// for volumes whose records cannot be read, each of which is one.
func (p *Pool) Health() []Problem {
	p.mu.Lock()
	defer p.mu.Unlock()
	var all []Problem
	for _, problem := range p.problems {
		all = append(all, problem)
	}
	for _, err := range p.damaged {
		all = append(all, either(err, reasonVolumeRefused, reasonVolumeNewer).problemf(Degraded, "%v", err))
	}
	for _, err := range p.damagedCut {
		all = append(all, either(err, reasonSnapshotRefused, reasonSnapshotNewer).problemf(Degraded, "%v", err))
	}
	sortProblems(all)
	return all
}

// either is damaged, or newer if err is that of a file that a later version wrote.
func either(err error, damaged, newer reason) reason {
	if errors.Is(err, errNewer) {
		return newer
	}
	return damaged
}

// RecordProblem is what the error of a volume that is refused, as Damaged has it, means
// for the volume.
func RecordProblem(err error) Problem {
	return either(err, reasonRecordUnreadable, reasonRecordNewer).problemf(Inaccessible, "%v", err)
}

// SnapshotProblem is what the error of a snapshot or a template that is refused means for
// it. damaged says that it is of no more use, and not just written by a newer csi-loop,
// or not to be looked at now.
func SnapshotProblem(err error) (problem Problem, damaged bool) {
	switch {
	case errors.Is(err, errNewer):
		return reasonSnapshotNewer.problemf(Inaccessible, "%v", err), false
	case errors.Is(err, ErrDamaged):
		return reasonSnapshotRefused.problemf(Inaccessible, "%v", err), true
	default:
		return reasonNotChecked.problemf(Inaccessible, "it cannot be looked at: %v", err), false
	}
}

func sortProblems(all []Problem) {
	slices.SortFunc(all, func(a, b Problem) int {
		if a.Kind != b.Kind {
			return int(b.Kind - a.Kind)
		}
		return strings.Compare(a.Reason+a.Message, b.Reason+b.Message)
	})
}

// healthPatience is how long VolumeHealth waits for a call that works on the volume. Most
// are over by then, and their volume is judged; a copy may take hours.
const healthPatience = time.Second

// VolumeHealth looks at one volume and its pool, and returns what is wrong with
// it, worst first. It reads no data. A volume that does not exist is an
// Inaccessible one. Of one that a call works on for longer than healthPatience, or
// until ctx ends, its image is not judged, as LookAt does not; nor is that of one whose
// pool does not answer.
func (p *Pool) VolumeHealth(ctx context.Context, id string) []Problem {
	dir, ok := p.dirOf(id)
	if !ok {
		return []Problem{reasonNotFound.problemf(Inaccessible, "%v: %q", ErrNotFound, id)}
	}
	if err := p.store.enter(); err != nil {
		return []Problem{reasonNotChecked.problemf(Inaccessible, "%v", err)}
	}
	defer p.store.leave()
	if _, err := p.get(dir); err != nil {
		return []Problem{lookupProblem(err)}
	}
	// Before the lock, which nobody should wait for because the pool hangs.
	var all []Problem
	answered, err := p.checkFor(ctx)
	switch {
	case outOfDescriptors(err):
		return []Problem{reasonNoDescriptors.problemf(Degraded, "it cannot be looked at: %v", err)}
	case !answered && errors.Is(err, context.Canceled): // ctx has ended
		return []Problem{reasonNotChecked.problemf(Degraded, "its pool has not answered yet")}
	case err != nil:
		all = append(all, reasonPoolInaccessible.problemf(Inaccessible, "%v", err))
	}
	if !answered {
		return all
	}
	unlock, free := p.idle(ctx, dir)
	defer unlock()
	r, err := p.get(dir)
	if err != nil { // removed meanwhile
		return []Problem{lookupProblem(err)}
	}
	if free {
		all = append(all, p.imageHealth(dir, r)...)
	}
	sortProblems(all)
	return all
}

// lookupProblem is what it means for a volume that its record is not found, or refused.
func lookupProblem(err error) Problem {
	if errors.Is(err, ErrNotFound) {
		return reasonNotFound.problemf(Inaccessible, "%v", err)
	}
	return RecordProblem(err)
}

// idle takes a volume's lock, if it is free soon.
func (p *Pool) idle(ctx context.Context, dir string) (unlock func(), free bool) {
	if unlock, free = p.locks.tryLock(dir); free { // also when ctx has ended
		return unlock, true
	}
	ctx, cancel := context.WithTimeout(ctx, healthPatience)
	defer cancel()
	unlock, err := p.locks.lock(ctx, dir)
	if err != nil {
		return func() {}, false
	}
	return unlock, true
}

func (p *Pool) imageHealth(dir string, r record) []Problem {
	st, err := p.imageStat(dir)
	if problem, is := imageProblem(r, st, err); is {
		return []Problem{problem}
	}
	switch missing := st.Allocated < r.Size; {
	case r.Allocation == Thick && missing:
		return []Problem{reasonNotFullyAllocated.problemf(Degraded, "%d of its %d bytes have blocks", st.Allocated, r.Size)}
	case p.account.of(dir).cow:
		return []Problem{reasonCopyOnWrite.problemf(Degraded, "its image is not NOCOW, so btrfs writes to other blocks each time: writes fail once the pool is full")}
	case p.has(reasonQuota) && p.fsType == "btrfs": // whose quotas hold for every write
		return []Problem{reasonVolumeUnderQuota.problemf(Degraded, "a quota of the pool's filesystem is used up: writes fail, to blocks that it has too")}
	case r.Allocation == Thin && missing && p.has(reasonPoolFull):
		return []Problem{reasonVolumeOnFullPool.problemf(Inaccessible, "the pool is full: writes that need new blocks fail, and only the first fsync after that tells")}
	case r.Allocation == Thin && p.has(reasonThinPromises):
		return []Problem{reasonPoolNearlyFull.problemf(Degraded, "the pool has less free space than its thin volumes were promised: writes may fail before long")}
	}
	return nil
}

// imageProblem judges what stands in the place of an image, or why that cannot be told.
func imageProblem(r record, st fileStat, err error) (Problem, bool) {
	if err == nil {
		err = checkImage(r.Size, st)
		switch {
		case err == nil:
			return Problem{}, false
		case st.Mode.IsRegular() && st.Size < r.Size:
			return reasonImageTruncated.problemf(DataLoss, "its image was cut: %v", err), true
		}
		return reasonImageForeign.problemf(Inaccessible, "its image is not as csi-loop left it: %v", err), true
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return reasonImageMissing.problemf(DataLoss, "its image does not exist"), true
	case outOfDescriptors(err):
		return reasonNoDescriptors.problemf(Degraded, "it cannot be looked at: %v", err), true
	case scarce(err):
		return reasonNotChecked.problemf(Degraded, "%v", err), true
	}
	return reasonImageUnreadable.problemf(Inaccessible, "%v", err), true
}

// imageStat looks at what stands in the place of a volume's image, without
// judging it and without following a link.
func (p *Pool) imageStat(dir string) (fileStat, error) {
	d, err := openDirAt(p.volumes, dir)
	if err != nil {
		return fileStat{}, err
	}
	defer d.Close()
	return statAt(d, imageFile)
}

// has says whether the last look at the pool found that problem.
func (p *Pool) has(r reason) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	_, found := p.problems[reasonTable[r].word]
	return found
}
