package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"k8s.io/klog/v2"
)

// PoolView is what a look at a pool found.
type PoolView struct {
	Name, Path string
	// Err is why the pool cannot be used; then all that could not be found out is
	// zero. It wraps ErrPool.
	Err error
	// New: there is no pool yet, in a directory where csi-loop would make one.
	New bool

	ID         string
	Filesystem string // its type
	UUID       string // of the filesystem; "" when it cannot tell
	Reflinks   bool   // the filesystem can share blocks between files
	// DirectIO is the alignment in bytes that direct I/O needs; 0 when there is
	// none, -1 when the kernel cannot tell (before 6.1, or the filesystem's fault).
	DirectIO int
	// NoThick: the filesystem cannot promise that an allocated file can be written.
	NoThick bool
	Usage   Usage
	Thick   int64 // the largest volume that could be made, in bytes
	Thin    int64

	Problems []Problem
	// Exposed are the files of the pool that others than root may read or write,
	// relative to it. The next Open makes them private.
	Exposed []string
	// Leftovers are the names of work in progress. Unless a process serves the
	// pool it was interrupted, and the next Open removes it.
	Leftovers []string
	Volumes   []VolumeView   // by directory
	Snapshots []SnapshotView // by directory
	Templates []TemplateView // by directory
}

// VolumeView is what a look at a volume found.
type VolumeView struct {
	ID string
	// Err is why the volume is refused; then Volume is zero but for Pool.
	Err error
	Volume

	Dev, Ino  uint64 // of the image; 0 when there is none
	Allocated int64  // bytes of blocks that the image has
	Problems  []Problem

	growing bool // settle would give the record the size of the image
}

// Inspect looks at pools as Open would find them, and changes nothing: it takes no
// lock, so that it works beside a process that serves them, finishes nothing and
// makes nothing. Volumes that come and go meanwhile may be missing, or be there.
// The error is that of invalid configurations, or ctx's.
func Inspect(ctx context.Context, configs []Config) ([]PoolView, error) {
	if err := validateConfigs(configs); err != nil {
		return nil, err
	}
	// Promises are shared by pools on one filesystem.
	s := &Store{ledgers: map[string]*ledger{}}
	pools, views := make([]*Pool, len(configs)), make([]PoolView, len(configs))
	for i, c := range configs {
		p := &Pool{
			config: c, store: s, logger: klog.Logger{},
			records: map[string]record{}, damaged: map[string]error{}, problems: map[string]Problem{},
			cuts: map[string]snapshotRecord{}, groupRecords: map[string]groupRecord{}, templateRecords: map[string]templateRecord{}, damagedCut: map[string]error{},
		}
		defer func() { _ = p.close() }()
		pools[i], views[i] = p, p.inspect(ctx)
		if err := ctx.Err(); err != nil {
			return nil, err
		}
	}
	settleViews(pools, views)
	for i, p := range pools {
		if p.account != nil {
			views[i].finish(p)
		}
	}
	return views, nil
}

// inspect is open without its effects.
func (p *Pool) inspect(ctx context.Context) PoolView {
	v := PoolView{Name: p.Name(), Path: p.Path()}
	root, uuid, err := openRoot(p.config)
	if err != nil {
		v.Err = err
		return v
	}
	p.root, v.UUID = root, uuid
	if v.Err = p.inspectIdentity(&v); v.Err != nil || v.New {
		return v
	}
	p.startAccount(uuid)
	content, err := names(p.root)
	if err != nil {
		v.Err = poolError(p.config, "%w", err)
		return v
	}
	for _, n := range content {
		if strings.HasPrefix(n, newPrefix) || strings.HasPrefix(n, gonePrefix) {
			v.Leftovers = append(v.Leftovers, n)
		}
	}
	slices.Sort(v.Leftovers)
	for name, mode := range map[string]fs.FileMode{identityFile: 0o600, volumesDir: 0o700, snapshotsDir: 0o700, groupsDir: 0o700, templatesDir: 0o700} {
		if st, err := statAt(p.root, name); err == nil && st.Mode.Perm()&^mode != 0 {
			v.Exposed = append(v.Exposed, name)
		}
	}
	slices.Sort(v.Exposed)
	if p.volumes, err = openDirAt(p.root, volumesDir); errors.Is(err, fs.ErrNotExist) {
		return v // made, and killed before the next step
	} else if err != nil {
		v.Err = poolError(p.config, "%s: %w", volumesDir, err)
		return v
	}
	if v.Volumes, v.Err = p.inspectVolumes(ctx); v.Err != nil {
		return v
	}
	if v.Snapshots, v.Err = p.inspectSnapshots(ctx); v.Err != nil {
		return v
	}
	if v.Templates, v.Err = p.inspectTemplates(ctx); v.Err == nil {
		p.inspectSharing()
	}
	return v
}

func (p *Pool) inspectIdentity(v *PoolView) error {
	s, err := spaceOf(p.root)
	if err != nil {
		return poolError(p.config, "%w", err)
	}
	if p.rootStat, err = statFile(p.root); err != nil {
		return poolError(p.config, "%w", err)
	}
	p.fsType, v.Filesystem = s.Type, s.Type
	v.Usage.Size, v.Usage.Free = s.Size, s.Free
	v.Reflinks, v.NoThick = reflinks(p.root, s.Type), !promisesSpace(s.Type)
	f, err := openAt(p.root, identityFile, false)
	if errors.Is(err, fs.ErrNotExist) {
		v.New = true
		return p.mayBeMade()
	} else if err != nil {
		return poolError(p.config, "%s: %w", identityFile, err)
	}
	defer f.Close()
	v.DirectIO = directIOAlignment(f)
	b, err := readSmall(f, maxIdentitySize)
	if err == nil {
		p.identity, err = parseIdentity(b)
	}
	if err != nil {
		return poolError(p.config, "%s: %w", identityFile, err)
	}
	v.ID = p.ID()
	if want := p.config.Expect.PoolID; want != "" && want != p.ID() {
		return poolError(p.config, "it is pool %s, expected %s; is the right disk mounted?", p.ID(), want)
	}
	return nil
}

func (p *Pool) inspectVolumes(ctx context.Context) ([]VolumeView, error) {
	content, err := names(p.volumes)
	if err != nil {
		return nil, poolError(p.config, "%s: %w", volumesDir, err)
	}
	slices.Sort(content)
	var all []VolumeView
	for _, dir := range content {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if v, ok := p.inspectVolume(dir); ok {
			all = append(all, v)
		}
	}
	return all, nil
}

// inspectVolume looks at one entry of volumes/; false when it is gone by now.
func (p *Pool) inspectVolume(dir string) (VolumeView, bool) {
	v := VolumeView{ID: VolumeID(p.ID(), dir), Volume: Volume{Pool: p.Name()}}
	r, err := p.inspectRecord(dir)
	if err != nil {
		if _, gone := statAt(p.volumes, dir); errors.Is(gone, fs.ErrNotExist) {
			return v, false
		}
		v.Err = fmt.Errorf("%s/%s/%s: %w", p.Path(), volumesDir, dir, err)
		if st, err := p.imageStat(dir); err == nil && st.Mode.IsRegular() {
			v.Dev, v.Ino = st.Dev, st.Ino // a device may show it all the same
			p.chargeRefused(dir)
		}
		return v, true
	}
	v.Volume = p.volume(dir, r)
	p.records[dir] = r
	if st, err := p.imageStat(dir); err == nil && st.Mode.IsRegular() {
		v.Dev, v.Ino, v.Allocated = st.Dev, st.Ino, st.Allocated
		v.growing = st.Size > r.Size && st.Size%MiB == 0
	}
	p.account.put(dir, p.chargeOf(dir, r, v.Allocated), nil)
	return v, true
}

func (p *Pool) inspectRecord(dir string) (record, error) {
	if !validDir(dir) {
		return record{}, fmt.Errorf("%w: not a name that csi-loop gives", ErrDamaged)
	}
	d, err := openDirAt(p.volumes, dir)
	if err != nil {
		return record{}, openError(dir, err)
	}
	defer d.Close()
	return readRecord(d, recordFile, dir, parseRecord)
}

// finish adds what needs the account of all pools.
func (v *PoolView) finish(p *Pool) {
	v.Usage, _ = p.account.usage()
	v.Usage.Snapshots = len(v.Snapshots)
	v.Thick, v.Thin = p.account.capacity(Thick), p.account.capacity(Thin)
	_ = p.check() // what is wrong is one of the problems
	v.Problems = p.Health()
	for i, volume := range v.Volumes {
		switch dir := DirName(volume.Name); {
		case volume.Err != nil:
		case volume.growing:
			v.Volumes[i].Problems = []Problem{reasonGrowthUnfinished.problemf(Degraded, "its image is larger than its record says: it is being grown, or the next start completes its growth")}
		default:
			v.Volumes[i].Problems = p.imageHealth(dir, p.records[dir])
		}
	}
}
