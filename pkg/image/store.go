package image

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"k8s.io/klog/v2"
)

// Store is the set of the configured pools: those that are open, and those that
// are absent.
type Store struct {
	tools     *tools
	templates *templates // nil: mkfs makes every filesystem
	now       func() time.Time
	kill      func(point string)
	steps     Step // nil: nobody is told
	logger    klog.Logger

	observers observers

	refresh time.Duration
	stop    context.CancelFunc
	// background is what goes on after a call; it ends with Close.
	background context.Context
	end        context.CancelFunc
	loops      sync.WaitGroup // the refresher, and who tries absent pools again
	mayBeNone  bool           // no usable pool is no reason for Open to fail

	set atomic.Pointer[poolSet]
	// Of Open, and then of the one goroutine that tries absent pools again.
	members []*member
	ledgers map[string]*ledger // by filesystem

	mu     sync.Mutex
	closed bool           // guarded by mu
	work   sync.WaitGroup // calls; Add is guarded by mu
}

// Option changes how Open works.
type Option func(*Store)

// WithRefresh sets how often the allocation of thin volumes and the health of the
// pools are looked at, and absent pools are tried again; 30 s unless given, 0 for
// never.
func WithRefresh(interval time.Duration) Option { return func(s *Store) { s.refresh = interval } }

// WithToolDirs sets where the mkfs programs are looked for, instead of PATH and
// the sbin directories.
func WithToolDirs(dirs ...string) Option { return func(s *Store) { s.tools = newTools(dirs) } }

// WithoutTemplates makes mkfs run for each new filesystem.
func WithoutTemplates() Option { return func(s *Store) { s.templates = nil } }

// withKill is for crash tests: f is called after every step that a crash may
// follow.
func withKill(f func(point string)) Option { return func(s *Store) { s.kill = f } }

// Open opens the pools. It makes a pool in a directory that is empty, finishes
// what a crash interrupted, and reads all records. A pool that cannot be used is
// kept as absent and tried again; see Absent.
//
// It fails, and opens none, when that would hide a mistake (a configuration that
// is invalid, two pools of one directory or one ID, a pool that another process
// has), and when no pool can be used. The error wraps ErrPool and says which pool
// is refused and what to do.
//
// ctx bounds the call, and gives its logger to the work in the background, which
// goes on until Close.
func Open(ctx context.Context, configs []Config, options ...Option) (_ *Store, err error) {
	s := &Store{
		tools: newTools(toolDirs()), now: time.Now, kill: func(string) {}, logger: klog.FromContext(ctx),
		templates: newTemplates(), refresh: 30 * time.Second, ledgers: map[string]*ledger{},
	}
	for _, o := range options {
		o(s)
	}
	s.background, s.end = context.WithCancel(context.WithoutCancel(ctx))
	if err := validateConfigs(configs); err != nil {
		s.end()
		return nil, err
	}
	for _, c := range configs {
		s.members = append(s.members, &member{config: c, said: map[string]bool{}})
	}
	s.publish()
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	if err := s.openAll(ctx); err != nil {
		return nil, err
	}
	s.start(ctx)
	return s, nil
}

// start begins the work in the background, which outlives the call's ctx.
func (s *Store) start(ctx context.Context) {
	if s.refresh <= 0 {
		return
	}
	ctx, s.stop = context.WithCancel(context.WithoutCancel(ctx))
	s.every(ctx, func() {
		for _, p := range s.Pools() {
			// What is wrong is kept for Health. The rest could hang where this did.
			if p.Check(ctx) != nil {
				continue
			}
			p.refresh(ctx)
			p.refreshRefused(ctx)
			p.recount(ctx)
			p.countFragments(ctx)
		}
	})
	// Apart from the above: a disk that hangs is no reason not to look at others.
	if len(s.Absent()) > 0 {
		s.every(ctx, func() { s.retry(ctx) })
	}
}

func (s *Store) every(ctx context.Context, work func()) {
	s.loops.Go(func() {
		t := time.NewTicker(s.refresh)
		defer t.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-t.C:
			}
			work()
		}
	})
}

// refresh looks how many blocks the thin volumes have by now. Between two looks
// the account believes that they may still take what they took meanwhile, and does not
// count what they gave back: too little is given away, not too much.
func (p *Pool) refresh(ctx context.Context) { p.account.ledger.look(ctx.Done(), p.account.statfs) }

func (p *Pool) refreshOne(dir string) {
	before := p.account.of(dir)
	// Its blocks are not worth an error: OpenImage and VolumeHealth report what
	// is wrong with an image.
	if st, err := statAt(p.volumes, dir+"/"+imageFile); err == nil && st.Mode.IsRegular() {
		p.account.seen(dir, before, st.Allocated)
	}
}

// Pools returns the pools that are open, in the order of their configuration.
func (s *Store) Pools() []*Pool { return slices.Clone(s.set.Load().pools) }

// Pool returns the pool of that name, if it is open.
func (s *Store) Pool(name string) (*Pool, bool) {
	p, ok := s.set.Load().byName[name]
	return p, ok
}

// Lookup returns the pool that a volume ID belongs to and the volume's directory.
// It does not tell whether the volume exists. Without ok the ID is nonsense, or
// its pool is not open here: not configured, or absent.
func (s *Store) Lookup(id string) (p *Pool, dir string, ok bool) {
	poolID, dir, ok := ParseID(id)
	if !ok {
		return nil, "", false
	}
	p, ok = s.set.Load().byID[poolID]
	return p, dir, ok
}

// Get returns a volume by its ID: ErrNotFound, also when Lookup does not know its
// pool; ErrDamaged when its record is not sound; another error when the record
// could not be read at the start.
func (s *Store) Get(id string) (Volume, error) {
	p, dir, ok := s.Lookup(id)
	if !ok {
		return Volume{}, fmt.Errorf("%w: %q", ErrNotFound, id)
	}
	r, err := p.get(dir)
	if err != nil {
		return Volume{}, err
	}
	return p.volume(dir, r), nil
}

// Find returns the volume with that name, in whichever open pool it is.
func (s *Store) Find(name string) (Volume, bool) {
	dir := DirName(name)
	for _, p := range s.set.Load().pools {
		if r, err := p.get(dir); err == nil && r.Name == name {
			return p.volume(dir, r), true
		}
	}
	return Volume{}, false
}

// List returns all volumes of open pools, sorted by ID. The slice is the caller's.
func (s *Store) List() []Volume {
	var all []Volume
	for _, p := range s.set.Load().pools {
		all = append(all, p.list()...)
	}
	slices.SortFunc(all, func(a, b Volume) int { return strings.Compare(a.ID, b.ID) })
	return all
}

// enter keeps the store open until leave is called.
func (s *Store) enter() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return fmt.Errorf("%w: it is closed", ErrPool)
	}
	s.work.Add(1)
	return nil
}

func (s *Store) leave() { s.work.Done() }

// Close waits for calls under way, ends the freeing of what was removed, which the next
// Open goes on with, and gives the pools free for other processes. Calls after it answer
// ErrPool. Again is harmless.
func (s *Store) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	s.mu.Unlock()
	s.end()
	if s.stop != nil {
		s.stop()
	}
	s.loops.Wait() // no pool comes in after this
	s.work.Wait()
	var errs []error
	for _, p := range s.set.Load().pools {
		errs = append(errs, p.close())
	}
	return errors.Join(errs...)
}
