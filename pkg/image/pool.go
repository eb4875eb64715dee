package image

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"k8s.io/klog/v2"
)

// Pool is a directory of volumes. Its methods may be called concurrently; calls
// for one volume wait for each other.
type Pool struct {
	config   Config
	identity identity
	fsType   string
	noCow    bool // images must be NOCOW: btrfs
	root     *os.File
	rootStat fileStat
	volumes  *os.File
	account  *account
	store    *Store
	logger   klog.Logger

	locks keyedLock    // by directory
	freed atomic.Int64 // when a removed volume was last unlinked, Unix ns

	mu       sync.Mutex
	records  map[string]record  // guarded by mu; by directory
	damaged  map[string]error   // guarded by mu; by directory
	problems map[string]Problem // guarded by mu; by reason
}

// Store is a set of pools that are open.
type Store struct {
	pools  []*Pool
	byID   map[string]*Pool
	byName map[string]*Pool
	tools  *tools
	now    func() time.Time
	kill   func(point string)

	refresh time.Duration
	stop    context.CancelFunc
	loops   sync.WaitGroup // the refresher

	mu     sync.Mutex
	closed bool           // guarded by mu
	work   sync.WaitGroup // calls and removals; Add is guarded by mu
}

// Pools returns the pools in the order of their configuration.
func (s *Store) Pools() []*Pool { return slices.Clone(s.pools) }

// Pool returns the pool of that name.
func (s *Store) Pool(name string) (*Pool, bool) {
	p, ok := s.byName[name]
	return p, ok
}

// Lookup returns the pool that a volume ID belongs to and the volume's directory.
// It does not tell whether the volume exists; without ok it cannot exist here.
func (s *Store) Lookup(id string) (p *Pool, dir string, ok bool) {
	poolID, dir, ok := ParseID(id)
	if !ok {
		return nil, "", false
	}
	p, ok = s.byID[poolID]
	return p, dir, ok
}

// Get returns a volume by its ID: ErrNotFound, ErrDamaged when its record is not
// sound, or another error when the record could not be read at the start.
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

// Find returns the volume with that name, in whichever pool it is.
func (s *Store) Find(name string) (Volume, bool) {
	dir := DirName(name)
	for _, p := range s.pools {
		if r, err := p.get(dir); err == nil && r.Name == name {
			return p.volume(dir, r), true
		}
	}
	return Volume{}, false
}

// List returns all volumes, sorted by ID. The slice is the caller's.
func (s *Store) List() []Volume {
	var all []Volume
	for _, p := range s.pools {
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

// Close waits for calls and removals under way, then gives the pools free for
// other processes. Calls after it answer ErrPool. Again is harmless.
func (s *Store) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	s.mu.Unlock()
	if s.stop != nil {
		s.stop()
	}
	s.loops.Wait()
	s.work.Wait()
	var errs []error
	for _, p := range s.pools {
		errs = append(errs, p.close())
	}
	return errors.Join(errs...)
}

func (p *Pool) close() error {
	if p.account != nil {
		p.account.leave()
	}
	var errs []error
	for _, f := range []*os.File{p.volumes, p.root} { // the lock is root's: last
		if f != nil {
			errs = append(errs, f.Close())
		}
	}
	return errors.Join(errs...)
}

// ID is the pool's ID, which begins the IDs of its volumes.
func (p *Pool) ID() string { return p.identity.ID }

// Name is the pool's name in the configuration.
func (p *Pool) Name() string { return p.config.Name }

// Path is the pool's directory, for people.
func (p *Pool) Path() string { return p.config.Path }

// Filesystem is the type of the filesystem that the pool is on.
func (p *Pool) Filesystem() string { return p.fsType }

// PublicKey is the key that the pool's ID is a hash of.
func (p *Pool) PublicKey() ed25519.PublicKey {
	key, _ := p.identity.key().Public().(ed25519.PublicKey)
	return key
}

// Sign signs a message with the pool's key, which proves the possession of the
// pool to whoever knows its ID.
func (p *Pool) Sign(message []byte) []byte { return ed25519.Sign(p.identity.key(), message) }

// Capacity is the size in bytes, a multiple of MiB, of the largest volume that
// Create would accept now. Constant time: one statfs.
func (p *Pool) Capacity(alloc Allocation) int64 {
	if p.store.enter() != nil {
		return 0
	}
	defer p.store.leave()
	return p.account.capacity(alloc)
}

// Usage is the state of the pool; zero Size and Free when the filesystem does not
// answer. Constant time.
func (p *Pool) Usage() Usage {
	if p.store.enter() != nil {
		return Usage{}
	}
	defer p.store.leave()
	u, err := p.account.usage()
	if err != nil {
		u.Size, u.Free = 0, 0
	}
	return u
}

// Damaged returns the entries of volumes/ that are refused, and why.
func (p *Pool) Damaged() map[string]error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return maps.Clone(p.damaged)
}

// get returns a record by directory: ErrNotFound, ErrDamaged, or why it could not
// be read.
func (p *Pool) get(dir string) (record, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if r, ok := p.records[dir]; ok {
		return r, nil
	}
	if err, ok := p.damaged[dir]; ok {
		return record{}, err
	}
	return record{}, fmt.Errorf("%w: %s", ErrNotFound, VolumeID(p.ID(), dir))
}

func (p *Pool) remember(dir string, r record) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.records[dir] = r
}

func (p *Pool) refuse(dir string, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.damaged[dir] = err
}

func (p *Pool) forget(dir string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.records, dir)
}

func (p *Pool) volume(dir string, r record) Volume {
	return Volume{Spec: r.spec(), ID: VolumeID(p.ID(), dir), Pool: p.Name(), Created: r.Created}
}

func (p *Pool) list() []Volume {
	p.mu.Lock()
	defer p.mu.Unlock()
	all := make([]Volume, 0, len(p.records))
	for dir, r := range p.records {
		all = append(all, p.volume(dir, r))
	}
	return all
}

// enter begins a call for one volume: the store stays open, and other calls for
// the volume wait until leave.
func (p *Pool) enter(ctx context.Context, dir string) (leave func(), err error) {
	if err := p.store.enter(); err != nil {
		return nil, err
	}
	unlock, err := p.locks.lock(ctx, dir)
	if err != nil {
		p.store.leave()
		return nil, err
	}
	return func() { unlock(); p.store.leave() }, nil
}

// dirOf returns the directory of one of this pool's IDs.
func (p *Pool) dirOf(id string) (string, bool) {
	poolID, dir, ok := ParseID(id)
	return dir, ok && poolID == p.ID()
}

// charge is the account's view of a volume whose image has that many blocks.
func (r record) charge(allocated int64) charge {
	return charge{size: r.Size, allocated: allocated, thick: r.Allocation == Thick}
}
