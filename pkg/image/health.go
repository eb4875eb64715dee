package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
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
	Message string // for people
}

// Check looks at the pool now, in constant time, and returns ErrPool when it
// cannot be used. What it finds is what Health returns until the next look.
func (p *Pool) Check(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := p.store.enter(); err != nil {
		return err
	}
	defer p.store.leave()
	return p.check()
}

// fullBelow is how much a full filesystem may still show as free, in bytes.
const fullBelow = 4 * MiB

// Precondition: the store is open.
func (p *Pool) check() error {
	err := p.present()
	p.notef(err != nil, Inaccessible, "PoolMissing", "%v", err)
	s, statErr := spaceOf(p.root)
	if statErr != nil {
		statErr = poolError(p.config, "%w", statErr)
	} else if s.ReadOnly {
		statErr = poolError(p.config, "its filesystem became read-only")
	} else if err := probeWrite(p.root); err != nil {
		statErr = poolError(p.config, "its filesystem takes no changes: %w; see the kernel log", err)
	}
	p.notef(statErr != nil, Inaccessible, "PoolFilesystem", "%v", statErr)
	if statErr == nil {
		promised, reserved := p.promises(s)
		p.notef(s.Free < promised, Degraded, "ThinPromisesUncovered",
			"%d bytes are free, thin volumes were promised %d: writes to them may fail; give the filesystem more space, or delete volumes that are not needed", s.Free, promised)
		p.notef(s.Free < reserved, Degraded, "ReserveUsed",
			"%d bytes are free, %d should be left to others: no volume is made until there is more", s.Free, reserved)
		p.notef(s.Free < fullBelow, Degraded, "PoolFull",
			"%d bytes are free: writes to thin volumes fail; give the filesystem more space, or delete volumes that are not needed", s.Free)
	}
	return errors.Join(err, statErr)
}

func (p *Pool) promises(s space) (promised, reserved int64) {
	p.account.ledger.mu.Lock()
	defer p.account.ledger.mu.Unlock()
	return p.account.ledger.promised, p.account.reserve.of(s.Size)
}

// notef sets or clears the problem with that reason.
func (p *Pool) notef(is bool, kind ProblemKind, reason, format string, args ...any) {
	if is {
		p.problem(Problem{Kind: kind, Reason: reason, Message: fmt.Sprintf(format, args...)})
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.problems, reason)
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
		all = append(all, Problem{Kind: Degraded, Reason: "VolumeRefused", Message: err.Error()})
	}
	for _, err := range p.damagedCut {
		all = append(all, Problem{Kind: Degraded, Reason: "SnapshotRefused", Message: err.Error()})
	}
	sortProblems(all)
	return all
}

func sortProblems(all []Problem) {
	slices.SortFunc(all, func(a, b Problem) int {
		if a.Kind != b.Kind {
			return int(b.Kind - a.Kind)
		}
		return strings.Compare(a.Reason+a.Message, b.Reason+b.Message)
	})
}

// VolumeHealth looks at one volume and its pool, and returns what is wrong with
// it, worst first. It reads no data. A volume that does not exist is an
// Inaccessible one.
func (p *Pool) VolumeHealth(ctx context.Context, id string) []Problem {
	var all []Problem
	add := func(kind ProblemKind, reason string, err error) {
		all = append(all, Problem{Kind: kind, Reason: reason, Message: err.Error()})
	}
	dir, ok := p.dirOf(id)
	if !ok {
		add(Inaccessible, "NotFound", fmt.Errorf("%w: %q", ErrNotFound, id))
		return all
	}
	leave, err := p.enter(ctx, dir)
	if err != nil {
		add(Inaccessible, "NotChecked", err)
		return all
	}
	defer leave()
	r, err := p.get(dir)
	switch {
	case errors.Is(err, ErrNotFound):
		add(Inaccessible, "NotFound", err)
		return all
	case err != nil:
		add(Inaccessible, "RecordUnreadable", err)
		return all
	}
	if err := p.check(); err != nil {
		add(Inaccessible, "PoolInaccessible", err)
	}
	all = append(all, p.imageHealth(dir, r)...)
	sortProblems(all)
	return all
}

func (p *Pool) imageHealth(dir string, r record) []Problem {
	st, err := p.imageStat(dir)
	var problem Problem
	switch {
	case errors.Is(err, fs.ErrNotExist):
		problem = Problem{DataLoss, "ImageMissing", "its image does not exist"}
	case err != nil:
		problem = Problem{Inaccessible, "ImageUnreadable", err.Error()}
	case st.Mode.IsRegular() && st.Size < r.Size:
		problem = Problem{DataLoss, "ImageTruncated", checkImage(r.Size, st).Error()}
	case checkImage(r.Size, st) != nil:
		problem = Problem{Inaccessible, "ImageForeign", checkImage(r.Size, st).Error()}
	case r.Allocation == Thick && st.Allocated < r.Size:
		problem = Problem{Degraded, "NotFullyAllocated", fmt.Sprintf(
			"%d of its %d bytes have blocks; the next attach allocates the rest", st.Allocated, r.Size)}
	case r.Allocation == Thin && st.Allocated < r.Size && p.has("PoolFull"):
		problem = Problem{Inaccessible, "PoolFull", "the pool is full: writes that need new blocks fail, and only the first fsync after that tells; " +
			"give the pool space, then start the volume's pods anew, so that its filesystem is checked"}
	case r.Allocation == Thin && p.has("ThinPromisesUncovered"):
		problem = Problem{Degraded, "PoolNearlyFull", "the pool has less free space than its thin volumes were promised: " +
			"writes may fail before long; give it more space, or delete volumes that are not needed"}
	default:
		return nil
	}
	return []Problem{problem}
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
func (p *Pool) has(reason string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	_, found := p.problems[reason]
	return found
}
