package image

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"maps"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"k8s.io/klog/v2"
)

// Pool is a directory of volumes. Its methods may be called concurrently; calls
// for one volume wait for each other.
type Pool struct {
	config    Config
	identity  identity
	fsType    string
	noCow     bool // images must be NOCOW: btrfs
	root      *os.File
	rootStat  fileStat
	volumes   *os.File
	snapshots *os.File
	groups    *os.File
	templates *os.File
	account   *account
	store     *Store
	logger    klog.Logger
	erasers   *erasers // nil in one that is only looked at

	leftovers bool            // what an interrupted call left is being erased, and may share blocks
	settled   bool            // its independent snapshots are being separated
	late      bool            // opened while others are served
	said      map[string]bool // what earlier attempts to open it logged; nil once it is open

	locks keyedLock    // by directory
	freed atomic.Int64 // when a removed volume was last unlinked, Unix ns

	copies copies

	probing  sync.Mutex           // held while it is tried whether files can share blocks, and taken before mu
	reflinks atomic.Pointer[bool] // whether they can; nil until it is known

	mu       sync.Mutex
	records  map[string]record  // guarded by mu; by directory
	damaged  map[string]error   // guarded by mu; by directory
	problems map[string]Problem // guarded by mu; by reason

	cuts            map[string]snapshotRecord // guarded by mu; snapshots by directory
	unsettled       map[string]snapshotRecord // guarded by mu; snapshots of groups that were not looked up yet
	groupRecords    map[string]groupRecord    // guarded by mu; by directory
	damagedCut      map[string]error          // guarded by mu; snapshots, groups and templates by their lock's key
	templateRecords map[string]templateRecord // guarded by mu; by directory
	recounts        map[string]time.Time      // guarded by mu; when a volume's sharing may be looked at again
	looks           map[string]look           // guarded by mu; how fragmented images are, by their lock's key
	checking        *checking                 // guarded by mu; nil when nobody looks at the pool
}

func (p *Pool) close() error {
	if p.erasers != nil {
		p.erasers.stop()
	}
	if p.account != nil {
		p.account.leave()
	}
	var errs []error
	for _, f := range []*os.File{p.templates, p.groups, p.snapshots, p.volumes, p.root} { // the lock is root's: last
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
	u.Snapshots = p.snapshotCount()
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

// Precondition of all three: the lock of dir is held.

func (p *Pool) remember(dir string, r record) {
	p.mu.Lock()
	_, was := p.records[dir]
	p.records[dir] = r
	p.mu.Unlock()
	if !was {
		p.store.observers.tell(Change{p.ID(), dir, true})
	}
}

func (p *Pool) refuse(dir string, err error) {
	p.mu.Lock()
	p.damaged[dir] = err
	p.mu.Unlock()
	p.store.observers.tell(Change{p.ID(), dir, true})
}

func (p *Pool) forget(dir string) {
	p.mu.Lock()
	delete(p.records, dir)
	delete(p.recounts, dir) // another volume may get the name
	p.mu.Unlock()
	p.store.observers.tell(Change{p.ID(), dir, false})
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
