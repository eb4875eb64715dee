package mount

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"
)

// ErrThawed means that a filesystem did not stay frozen until Thaw: the time was
// up, somebody else thawed it, or the helper process died.
var ErrThawed = errors.New("was thawed early")

// ErrNotThawed means that what was frozen could not be thawed, and may be frozen still.
// Without it nothing is.
var ErrNotThawed = errors.New("may still be frozen")

// FreezeSpec says what to freeze, and for how long at most.
type FreezeSpec struct {
	// Paths are directories, each on a mounted filesystem of its own.
	Paths []string
	// Mounts are the kernel's numbers (Mount.ID) of the mounts that Paths must be in, in
	// the same order; without any, whatever is there is frozen.
	Mounts []int
	// Limit bounds the time that anything is frozen; more than 0.
	Limit time.Duration
	// Keep is held open by whoever may still thaw: a lock on it is free when the
	// filesystems will not be touched any more. It may be nil.
	Keep *os.File
	// Expedite makes the kernel hurry while it freezes, where it lets itself be hurried:
	// then writers wait a fraction of the time. A process that may be killed looks at
	// CanExpedite first, writes down what it does, and calls EndExpedite when it finds
	// that after its end.
	Expedite bool
}

// Frozen is filesystems that are frozen until Thaw.
type Frozen struct {
	dirs    []*os.File
	helpers *helpers
	helper  *helperProcess
	hurried bool // as FreezeSpec.Expedite
	asked   bool // the helper was told to freeze, and did not say that all is thawed
	again   bool // the helper can be used again: it holds and owes nothing
	once    sync.Once
	err     error
}

// graceTime is how much longer than the limit an answer of the helper is waited for.
const graceTime = 5 * time.Second

// Freeze writes out what the filesystems have in memory, and then stops all writers
// to all of them, until Thaw or until the limit is over, whichever is first: also
// when this process dies. A helper process of this same program sees to that; one is
// kept for the next Freeze, until EndHelper or the end of this process. After an error
// nothing is frozen by this call, unless it is ErrNotThawed.
//
// ErrBusy: one of them is frozen by somebody else already, and is left so; or another
// mount than the one that was meant is at its path.
//
// ctx is looked at before. The kernel's calls cannot be interrupted.
func (m *Mounter) Freeze(ctx context.Context, s FreezeSpec) (_ *Frozen, err error) {
	f := &Frozen{helpers: &m.helpers, hurried: s.Expedite && CanExpedite()}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.close())
		}
	}()
	if err := f.open(s); err != nil {
		return nil, err
	}
	kept, err := f.take() //nolint:contextcheck // the helper outlives the call
	if err != nil {
		return nil, fmt.Errorf("start the helper that thaws: %w", err)
	}
	// So that little is left to be written while writers wait. A new helper, which takes
	// some milliseconds to come up, does so meanwhile.
	for _, dir := range f.dirs {
		if err := syncFilesystem(dir); err != nil {
			return nil, &OpError{Op: "sync", Path: dir.Name(), Err: err}
		}
	}
	if err := f.handOver(s, kept); err != nil { //nolint:contextcheck // as above
		return nil, fmt.Errorf("start the helper that thaws: %w", err)
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	f.asked = true
	command := "freeze " + s.Limit.String() + " " + strconv.Itoa(len(f.dirs))
	if f.hurried {
		command += " " + hurried
	}
	answer, err := f.ask(command, s.Limit)
	if err != nil {
		return nil, errors.Join(err, f.abandon())
	}
	f.unhurry()
	if answer != "frozen" {
		return nil, f.failure("freeze", answer)
	}
	return f, nil
}

// open opens the directories, and makes sure that they are those that are meant: a
// mount that is gone, or covered, since its path was looked up would have another
// filesystem frozen, perhaps the machine's own.
func (f *Frozen) open(s FreezeSpec) error {
	for i, path := range s.Paths {
		dir, err := os.OpenFile(path, os.O_RDONLY|syscall.O_DIRECTORY|syscall.O_NOFOLLOW, 0)
		if err != nil {
			return err
		}
		f.dirs = append(f.dirs, dir)
		if i >= len(s.Mounts) {
			continue
		}
		number, err := mountNumberOf(dir)
		if err == nil && number != uint64(s.Mounts[i]) {
			err = ErrBusy
		}
		if err != nil {
			return &OpError{Op: "freeze", Path: path, Err: err, Words: "another mount is there than a moment ago"}
		}
	}
	return nil
}

// take gets a helper: the one that is kept, or a new one.
func (f *Frozen) take() (kept bool, err error) {
	f.helper, kept, err = f.helpers.take()
	return kept, err
}

// handOver gives the helper what it will freeze and hold. One that was kept may have
// died meanwhile, and is replaced.
func (f *Frozen) handOver(s FreezeSpec, kept bool) error {
	files := f.dirs
	if s.Keep != nil {
		files = append(slices.Clip(files), s.Keep)
	}
	err := f.helper.hold(files, s.Limit)
	if err == nil || !kept {
		return err
	}
	f.helper.kill()
	if f.helper, err = startHelper(); err != nil {
		return err
	}
	return f.helper.hold(files, s.Limit)
}

func (f *Frozen) ask(command string, limit time.Duration) (string, error) {
	answer, err := f.helper.ask(command, nil, limit)
	if err != nil {
		return "", fmt.Errorf("%w: the helper is gone: %w", ErrThawed, err)
	}
	return answer, nil
}

// unhurry makes sure that the kernel is not left hurried, should the helper have failed
// to. Somebody else's hurry that it ends, if one began in between, only takes longer.
func (f *Frozen) unhurry() {
	if f.hurried {
		_ = EndExpedite() // close tries once more
	}
}

// failure makes an error of the helper's "failed <index> <errno>".
func (f *Frozen) failure(op, answer string) error {
	var index, errno int
	if _, err := fmt.Sscanf(answer, "failed %d %d", &index, &errno); err != nil || index < 0 || index >= len(f.dirs) {
		return fmt.Errorf("%s: the helper says %q", op, answer)
	}
	e := &OpError{Op: op, Path: f.dirs[index].Name(), Err: syscall.Errno(errno)}
	if op == "freeze" && errors.Is(e.Err, syscall.EBUSY) {
		e.Words = "somebody else has frozen it"
	}
	return e
}

// Thaw lets the writers go on. ErrThawed: they did so before, and were not still all
// the time. After any error nothing is frozen any more, unless it is ErrNotThawed: the
// kernel refused. Again is harmless and returns the same.
func (f *Frozen) Thaw() error {
	f.once.Do(func() {
		answer, err := f.ask("thaw", 0)
		switch {
		case err != nil:
			f.err = errors.Join(err, f.abandon())
		case answer == "late":
			f.asked = false
			f.err = fmt.Errorf("%w: the time was up, or somebody else did it", ErrThawed)
		case answer != "thawed":
			f.err = errors.Join(f.failure("thaw", answer), f.abandon())
		default:
			f.asked, f.again = false, true
		}
		f.err = errors.Join(f.err, f.close())
	})
	return f.err
}

// abandon is for a helper that does not do its work: it is ended, and this process
// thaws what may be frozen.
func (f *Frozen) abandon() error {
	f.helper.kill()
	f.helper, f.asked = nil, false
	var errs []error
	f.unhurry()
	for _, dir := range f.dirs {
		if err := thawFilesystem(dir); err != nil && !errors.Is(err, syscall.EINVAL) { // EINVAL: it is not frozen
			errs = append(errs, fmt.Errorf("%w: %w", ErrNotThawed, &OpError{Op: "thaw", Path: dir.Name(), Err: err}))
		}
	}
	return errors.Join(errs...)
}

// close ends the helper, which has nothing to thaw any more, or does so now. One that
// did all it was told to is kept.
func (f *Frozen) close() (err error) {
	f.unhurry()
	switch {
	case f.helper == nil:
	case f.again:
		err = f.helpers.put(f.helper)
	default:
		if err = f.helper.end(); err != nil && f.asked {
			err = fmt.Errorf("%w: the helper that thaws: %w", ErrNotThawed, err)
		}
	}
	f.helper = nil
	for _, dir := range f.dirs {
		_ = dir.Close()
	}
	return err
}

// Thaw thaws the filesystem mounted at path, whoever froze it; one that is not frozen
// is success.
func (m *Mounter) Thaw(path string) error {
	dir, err := os.OpenFile(path, os.O_RDONLY|syscall.O_DIRECTORY|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := thawFilesystem(dir); err != nil && !errors.Is(err, syscall.EINVAL) {
		return &OpError{Op: "thaw", Path: path, Err: err}
	}
	return nil
}
