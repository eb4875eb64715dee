package driver

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc/stats"
	"k8s.io/klog/v2"

	"github.com/csi-loop/csi-loop/pkg/cgroup"
	"github.com/csi-loop/csi-loop/pkg/crypt"
	"github.com/csi-loop/csi-loop/pkg/image"
	"github.com/csi-loop/csi-loop/pkg/loop"
	"github.com/csi-loop/csi-loop/pkg/mount"
)

// DefaultName is the name the driver registers with.
const DefaultName = "csi-loop.io"

// topologySuffix follows the driver's name in the topology key:
// topology.csi-loop.io/node.
const topologySuffix = "/node"

// Config is what the driver must be told. Every field without a default named
// here is required.
type Config struct {
	Name    string // domain-like, at most 63 bytes; default DefaultName
	Version string
	// NodeID is this node's name, and the value of its topology segment: 1 to 63
	// bytes, letters, digits, '-', '_' and '.', a letter or digit at both ends.
	NodeID string
	// StateDir holds the stage records; it should be on a tmpfs, so that a
	// reboot empties it. One process at a time uses it.
	StateDir string
	// DefaultPool is used when a request names no pool.
	DefaultPool string
	// Observe is told of each CSI call that was answered; it may be nil.
	Observe func(method, code string, took time.Duration)
	// Stats sees the calls of Serve and ServeNode; it may be nil.
	Stats stats.Handler
	// Step is told of the parts of calls that take long; it may be nil.
	Step Step
	// Running is told 1 when a call begins and -1 when it was answered; it may be nil.
	// Any number of goroutines call it, and calls wait for it.
	Running func(change int)
	// EphemeralMaxSize bounds inline ephemeral volumes, in bytes; 0 refuses them.
	EphemeralMaxSize int64
	// EphemeralMaxVolumes bounds their number on this node, since the scheduler
	// does not count them and each takes a loop device; 0 means
	// DefaultEphemeralMaxVolumes.
	EphemeralMaxVolumes int
	// TrimInterval is how often the filesystems of thin volumes are trimmed in the
	// background; 0 is never. Up to TrimJitter is added each time, at random.
	TrimInterval, TrimJitter time.Duration
	// ExpediteFreezes has the kernel hurry while filesystems are frozen for a snapshot, so
	// that writers wait a fraction of the time; see mount.FreezeSpec.
	ExpediteFreezes bool
	// EphemeralPools are the pools that they may name; none means DefaultPool.
	EphemeralPools []string
	// Encryption is how passphrases of new encrypted volumes become keys.
	Encryption crypt.Options
	// CgroupRoot is where the cgroups of pods are, for limits of their I/O;
	// cgroup.DefaultRoot if empty.
	CgroupRoot string
}

// DefaultEphemeralMaxVolumes is how many inline ephemeral volumes a node takes.
const DefaultEphemeralMaxVolumes = 32

// attached is an attached loop device that keeps the binding alive until Close.
type attached interface {
	Info() loop.Info
	Reused() bool // bound before this Attach
	Close() error
	Release() error // Close, when nobody is shown it any more
}

// loopDevices attaches and detaches; *loop.Manager does, through loopAdapter.
type loopDevices interface {
	Attach(ctx context.Context, backing *os.File, m loop.Mapping) (attached, error)
	Hold(ctx context.Context, ref loop.Ref) (attached, error)
	Detach(ctx context.Context, ref loop.Ref) error
	WaitUnbound(ctx context.Context, ref loop.Ref) error
	Grow(ctx context.Context, ref loop.Ref) (int64, error)
	DropCache(ctx context.Context, ref loop.Ref) error
}

// loopTable tells what is bound to what, without changing it; *loop.Manager does.
type loopTable interface {
	Find(ctx context.Context, backing *os.File) ([]loop.Info, error)
	Survey(ctx context.Context) (bound, silent []loop.Info, err error)
	Status(ctx context.Context, ref loop.Ref) (loop.Info, error)
	Sync(ctx context.Context, ref loop.Ref) error
	Counters(ref loop.Ref) (loop.Counters, error)
	deviceRoom
}

// mounter changes mounts; *mount.Mounter does.
type mounter interface {
	Mount(ctx context.Context, s mount.Spec) error
	Bind(ctx context.Context, s mount.BindSpec) error
	Unmount(ctx context.Context, target string) error
	Remove(ctx context.Context, target string) error
	Grow(ctx context.Context, s mount.GrowSpec) error
	Check(ctx context.Context, fsType, device string) error
}

// mountTable tells what is mounted where; *mount.Mounter does.
type mountTable interface {
	NeedsGrow(s mount.GrowSpec) (bool, error)
	At(path string) (mount.Mount, bool, error)
	OfDevice(d mount.Device) ([]mount.Mount, error)
	DeviceAt(path string) (mount.Device, error)
	Stats(path string) (mount.Stats, error)
}

// tuner changes how a bound device is served; *loop.Manager does.
type tuner interface {
	ReadAhead(ctx context.Context, ref loop.Ref) (int64, error)
	SetReadAhead(ctx context.Context, ref loop.Ref, bytes int64) error
}

// podLimiter limits what pods do on a device; *cgroup.Pods does.
type podLimiter interface {
	Limit(podUID string, d cgroup.Device, l cgroup.Limits) error
}

// Driver is the CSI driver of one node: all services, over one set of pools.
type Driver struct {
	cfg    Config
	images *image.Store
	dirs   *image.Dirs // allowed directories of mapped volumes
	loops  loopDevices
	table  loopTable
	mounts mounter
	mtab   mountTable
	crypt  encrypter

	freezer freezer
	jobs    *jobs
	reports reporter
	counts  counting
	numbers numberShortage
	// Copies to and from other nodes.
	sending, receiving flows

	tuner   tuner
	pods    podLimiter
	tuning  *tuningState
	sweeper sweeper
	trimmer trimmer
	trims   *trims
	load    func(ctx context.Context, device int) string // why work in the background has to wait
	// takingIn has a *takeInCount for each request to take a file in, by its job's key.
	takingIn sync.Map

	sys    string // where sysfs is
	locks  volumeLocks
	inline inlineRoom
	state  *nodeState
	// stateLock keeps a second process off the state directory.
	stateLock *os.File

	mu   sync.Mutex
	held map[loop.Ref]attached // devices of staged raw block volumes; guarded by mu

	ready sync.Once
	up    chan struct{} // closed when Reconcile is done
}

var (
	validName   = regexp.MustCompile(`^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$`)
	validNodeID = regexp.MustCompile(`^[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$`)
)

// Validate checks what can be checked without the pools: the names. New does it
// too; a program that makes pools first can ask before that.
func (c Config) Validate() error {
	if name := or(c.Name, DefaultName); len(name) > 63 || !validName.MatchString(name) {
		return fmt.Errorf("driver name %q: need at most 63 lower-case letters, digits, '-' and '.', with a letter or digit at both ends", name)
	}
	if len(c.NodeID) > 63 || !validNodeID.MatchString(c.NodeID) {
		return fmt.Errorf("node ID %q: it is a topology value and needs 1 to 63 letters, digits, '-', '_' and '.', with a letter or digit at both ends", c.NodeID)
	}
	return nil
}

// New makes the driver. It changes nothing yet; call Reconcile before serving.
func New(cfg Config, images *image.Store, dirs *image.Dirs, loops *loop.Manager, mounts *mount.Mounter) (*Driver, error) {
	d, err := newDriver(cfg, images, dirs, loopAdapter{loops}, loops, mounts, mounts, freezeAdapter{mounts})
	if err != nil {
		return nil, err
	}
	d.tuner, d.pods = loops, cgroup.NewPods(cfg.CgroupRoot)
	d.trimmer, d.load = mounts, loadOf(loops)
	if cfg.Step != nil {
		d.tell(cfg.Step)
	}
	return d, nil
}

func newDriver(cfg Config, images *image.Store, dirs *image.Dirs, loops loopDevices, table loopTable, mounts mounter, mtab mountTable, freezer freezer) (*Driver, error) {
	if cfg.Name == "" {
		cfg.Name = DefaultName
	}
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if !images.Configured(cfg.DefaultPool) {
		return nil, fmt.Errorf("default pool %q is not one of the pools", cfg.DefaultPool)
	}
	mappings, err := crypt.New(cfg.Encryption)
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(cfg.StateDir, cfg.NodeID)
	lock, err := ownDir(dir)
	if err != nil {
		return nil, err
	}
	state, err := openNodeState(dir)
	if err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	return &Driver{
		cfg: cfg, images: images, dirs: dirs, loops: loops, table: table, mounts: mounts, mtab: mtab, crypt: mappings,
		sys: "/sys", freezer: freezer, jobs: newJobs(), trims: newTrims(), reports: newReporter(), state: state, stateLock: lock,
		held: make(map[loop.Ref]attached), up: make(chan struct{}), tuning: newTuningState(), sweeper: sweeper{every: sweepEvery},
	}, nil
}

// HasRecords says whether a driver with this configuration has volumes staged, or
// had when it was last there: such a node must be served even when no pool can be
// opened, since ending a staging needs none. It reads a directory and changes nothing.
func (c Config) HasRecords() bool {
	entries, err := os.ReadDir(filepath.Join(c.StateDir, c.NodeID))
	return err == nil && slices.ContainsFunc(entries, func(e os.DirEntry) bool { return filepath.Ext(e.Name()) == ".json" })
}

// Close ends the jobs that calls started, which take back what they did, and lets go
// of the held devices, which stay bound for the next start, of the process that
// freezes, and of the state directory. It must be called after the last request has ended, before the pools
// are closed.
func (d *Driver) Close() error {
	d.jobs.stop()
	d.tuning.end()
	d.sweeper.end()
	d.mu.Lock()
	defer d.mu.Unlock()
	errs := []error{d.freezer.EndHelper()}
	for ref, dev := range d.held {
		errs = append(errs, dev.Close())
		delete(d.held, ref)
	}
	return errors.Join(append(errs, d.stateLock.Close())...)
}

// hold keeps dev until letGo.
func (d *Driver) hold(dev attached) {
	d.mu.Lock()
	defer d.mu.Unlock()
	ref := dev.Info().Ref
	if old, ok := d.held[ref]; ok && old != dev {
		_ = old.Close() // the new descriptor keeps the device bound
	}
	d.held[ref] = dev
}

// letGo closes the held device of ref, if there is one, which nobody is shown any more.
func (d *Driver) letGo(ref loop.Ref) error {
	d.mu.Lock()
	dev, ok := d.held[ref]
	delete(d.held, ref)
	d.mu.Unlock()
	if !ok {
		return nil
	}
	return dev.Release()
}

// holds says whether the device of ref is held.
func (d *Driver) holds(ref loop.Ref) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	_, ok := d.held[ref]
	return ok
}

// topologyKey is the key of the one topology segment.
func (d *Driver) topologyKey() string { return "topology." + d.cfg.Name + topologySuffix }

// lockVolume takes the lock of a volume ID or of the directory its name leads
// to, so that CreateVolume (which knows a name) and the others (which know an
// ID) exclude each other.
func (d *Driver) lockVolume(id, method string) (func(), error) {
	return d.locks.lock(lockKey(id), method)
}

// lockKey is what the lock of a volume ID goes by.
func lockKey(id string) string {
	if _, dir, ok := image.ParseID(id); ok { // not Lookup: pools come and go
		return dir
	}
	return id
}

// loopAdapter narrows the concrete device of package loop to the interface.
type loopAdapter struct{ *loop.Manager }

func (a loopAdapter) Attach(ctx context.Context, backing *os.File, m loop.Mapping) (attached, error) {
	dev, err := a.Manager.Attach(ctx, backing, m)
	if err != nil {
		return nil, err // not a nil *loop.Device inside the interface
	}
	sayAttached(ctx, m, dev.Info())
	return dev, nil
}

// sayAttached tells what became of a wish that left the choice to the kernel.
func sayAttached(ctx context.Context, m loop.Mapping, got loop.Info) {
	log := klog.FromContext(ctx).WithValues("device", got.Path, "directIO", got.DirectIO, "blockSize", got.BlockSize)
	if m.DirectIO == loop.DirectIOAuto && !got.DirectIO {
		log.Info("Attached without direct I/O, which the kernel does not grant for this image and block size: what is read is cached twice")
		return
	}
	log.V(2).Info("Attached")
}

func (a loopAdapter) Hold(ctx context.Context, ref loop.Ref) (attached, error) {
	dev, err := a.Manager.Hold(ctx, ref)
	if err != nil {
		return nil, err
	}
	return dev, nil
}
