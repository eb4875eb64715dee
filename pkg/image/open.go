package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"syscall"
)

const (
	newPrefix    = ".new-"
	gonePrefix   = ".gone-"
	volumesDir   = "volumes"
	snapshotsDir = "snapshots"
)

// open opens the pool, which it makes in a directory that is empty. After an
// error it must be closed. A *conflictError is a reason to refuse all pools.
func (p *Pool) open(ctx context.Context) error {
	root, uuid, err := openRoot(p.config)
	if err != nil {
		return err
	}
	p.root = root
	if p.rootStat, err = statFile(root); err != nil {
		return poolError(p.config, "%w", err)
	}
	set := p.store.set.Load()
	for _, other := range set.pools {
		if other.rootStat.Dev == p.rootStat.Dev && other.rootStat.Ino == p.rootStat.Ino {
			return conflict(p.config, "it is the same directory as pool %q", other.Name())
		}
	}
	if err := lockRoot(ctx, root); err != nil {
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return conflict(p.config, "it is in use by another csi-loop process; stop that one first")
		}
		return poolError(p.config, "lock: %w", err)
	}
	if err := p.openIdentity(); err != nil {
		return err
	}
	if other, ok := set.byID[p.ID()]; ok {
		return conflict(p.config, "it has the same ID %s as pool %q at %s: one is a copy of the other. Take one of them out of the configuration; if both are needed, the copy gets an ID of its own with csi-loop pool reinit",
			p.ID(), other.Name(), other.Path())
	}
	return p.openContent(ctx, uuid)
}

func (p *Pool) openContent(ctx context.Context, uuid string) error {
	s, err := spaceOf(p.root)
	if err != nil {
		return poolError(p.config, "%w", err)
	}
	p.fsType, p.noCow = s.Type, s.Type == "btrfs"
	p.startAccount(uuid)
	p.account.lag, p.account.look = p.lag, p.refreshOne
	if p.volumes, err = p.ensureDir(volumesDir); err != nil {
		return poolError(p.config, "%s: %w", volumesDir, err)
	}
	if p.snapshots, err = p.ensureDir(snapshotsDir); err != nil {
		return poolError(p.config, "%s: %w", snapshotsDir, err)
	}
	if p.groups, err = p.ensureDir(groupsDir); err != nil {
		return poolError(p.config, "%s: %w", groupsDir, err)
	}
	if p.templates, err = p.ensureDir(templatesDir); err != nil {
		return poolError(p.config, "%s: %w", templatesDir, err)
	}
	p.markNoCow()
	if err := p.sweep(ctx); err != nil {
		return err
	}
	if err := p.load(ctx); err != nil {
		return err
	}
	if err := p.loadTemplates(ctx); err != nil {
		return err
	}
	if err := p.loadSnapshots(ctx); err != nil {
		return err
	}
	// A rename that a killed process did not get to sync may have been found; it
	// must not be acknowledged and then lost.
	if err := errors.Join(p.volumes.Sync(), p.snapshots.Sync(), p.groups.Sync(), p.templates.Sync(), p.root.Sync()); err != nil {
		return poolError(p.config, "sync: %w", err)
	}
	return nil
}

// markNoCow lets what is copied into the pool by hand, from a backup, be as csi-loop makes
// it. Nothing that csi-loop makes itself needs that, so an error is of no importance.
func (p *Pool) markNoCow() {
	if !p.noCow {
		return
	}
	for _, d := range []*os.File{p.volumes, p.snapshots, p.templates} {
		if on, err := isNoCow(d); err == nil && !on {
			_ = setNoCow(d)
		}
	}
}

// startAccount begins the pool's account, in the ledger of its filesystem.
func (p *Pool) startAccount(uuid string) {
	// Not st_dev: each subvolume of a btrfs has its own.
	key := uuid
	if key == "" {
		key = fmt.Sprintf("device %d", p.rootStat.Dev)
	}
	p.account = newAccount(p.store.ledger(key), func() (space, error) { return spaceOf(p.root) },
		p.config.Reserve, max(1, p.config.Overcommit))
}

// ensureDir makes and opens a directory of the pool.
func (p *Pool) ensureDir(name string) (*os.File, error) {
	if err := mkdirAt(p.root, name); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	d, err := openDirAt(p.root, name)
	if err != nil {
		return nil, err
	}
	if err := keepPrivate(d, 0o700); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

// openIdentity reads pool.json, or makes it in an empty directory.
func (p *Pool) openIdentity() error {
	b, err := p.readIdentity()
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if err := p.makeIdentity(); err != nil {
			return err
		}
	case err != nil:
		return poolError(p.config, "%s: %w", identityFile, err)
	default:
		if p.identity, err = parseIdentity(b); err != nil {
			return poolError(p.config, "%s: %w", identityFile, err)
		}
	}
	if want := p.config.Expect.PoolID; want != "" && want != p.ID() {
		return poolError(p.config, "it is pool %s, expected %s; is the right disk mounted?", p.ID(), want)
	}
	return nil
}

func (p *Pool) readIdentity() ([]byte, error) {
	f, err := openAt(p.root, identityFile, false)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if err := keepPrivate(f, 0o600); err != nil {
		return nil, err
	}
	return readSmall(f, maxIdentitySize)
}

// keepPrivate takes away what a restored backup let others do: an image is a
// tenant's disk (fact 42), and pool.json is a key.
func keepPrivate(f *os.File, mode fs.FileMode) error {
	st, err := statFile(f)
	if err != nil || st.Mode.Perm()&^mode == 0 {
		return err
	}
	return f.Chmod(mode)
}

// mayBeMade says why csi-loop makes no pool in this directory, nil if it would.
func (p *Pool) mayBeMade() error {
	if p.config.Expect.Existing || p.config.Expect.PoolID != "" {
		return poolError(p.config, "there is no %s, and an existing pool is expected; is its disk mounted?", identityFile)
	}
	content, err := names(p.root)
	if err != nil {
		return poolError(p.config, "%w", err)
	}
	for _, n := range content {
		if n == "lost+found" || n == newPrefix+identityFile {
			continue
		}
		return poolError(p.config, "it has no %s but is not empty (%s); use an empty directory, or restore the file", identityFile, n)
	}
	return nil
}

func (p *Pool) makeIdentity() error {
	if err := p.mayBeMade(); err != nil {
		return err
	}
	if e := p.config.Expect; p.late && !e.MountPoint && e.UUID == "" {
		return poolError(p.config, "it is empty, and may be where its disk is not mounted yet; mount the disk, or restart csi-loop to make a new pool here")
	}
	i, err := newIdentity(p.store.now())
	if err != nil {
		return poolError(p.config, "make a key: %w", err)
	}
	b, err := i.encode()
	if err != nil {
		return poolError(p.config, "%w", err)
	}
	p.once("make").Info("Making a new pool", "path", p.Path(), "poolID", i.ID)
	if _, err := replaceSynced(p.root, identityFile, newPrefix+identityFile, b, p.store.kill); err != nil {
		return poolError(p.config, "%s: %w", identityFile, opError("write", identityFile, err))
	}
	p.identity = i
	return nil
}

// sweep removes what a crash left; of large images it does not wait for the end. What
// cannot be removed is a problem of the pool's health, not a reason to refuse its
// volumes.
func (p *Pool) sweep(ctx context.Context) error {
	content, err := names(p.root)
	if err != nil {
		return poolError(p.config, "%w", err)
	}
	var left []string
	for _, n := range content {
		if !strings.HasPrefix(n, newPrefix) && !strings.HasPrefix(n, gonePrefix) {
			continue
		}
		p.once("remove "+n).Info("Removing what an interrupted call left", "path", p.Path()+"/"+n)
		left = append(left, n)
	}
	if p.leftovers = len(left) > 0; p.leftovers {
		await(ctx, p.eraseAll(left...))
	}
	return nil
}

func (p *Pool) leftBehind(name string, err error) {
	p.logger.Error(err, "Cannot remove; trying again at the next start", "path", p.Path()+"/"+name)
	p.problem(reasonCannotRemove.problemf(Degraded, "%s/%s cannot be removed and keeps its space: %v", p.Path(), name, err))
}

// load reads every record. One that cannot be read makes its volume refused, and
// no more; a listing that fails, and a lack of descriptors or memory, which says
// nothing about the records, are errors.
func (p *Pool) load(ctx context.Context) error {
	content, err := names(p.volumes)
	if err != nil {
		return poolError(p.config, "%w", err)
	}
	for _, dir := range content {
		if err := ctx.Err(); err != nil {
			return err
		}
		r, allocated, err := p.loadOne(dir)
		if scarce(err) {
			return poolError(p.config, "%s/%s: %w", volumesDir, dir, err)
		}
		if err != nil {
			err = fmt.Errorf("%s/%s/%s: %w", p.Path(), volumesDir, dir, err)
			p.once("refuse "+dir).Error(err, "Refusing a volume", "volume", VolumeID(p.ID(), dir))
			p.damaged[dir] = err
			p.chargeRefused(dir)
			continue
		}
		p.records[dir] = r
		p.account.put(dir, p.chargeOf(dir, r, allocated), nil)
	}
	return nil
}

// chargeOf is the charge of a volume that was found. Images are made NOCOW on btrfs, but
// one that was copied into the pool by hand may not be.
func (p *Pool) chargeOf(dir string, r record, allocated int64) charge {
	c := r.charge(allocated)
	if p.fsType != "btrfs" || r.Allocation != Thick {
		return c
	}
	d, f, err := p.openVolume(dir, r, false)
	if err != nil {
		return c // OpenImage and VolumeHealth report it
	}
	defer d.Close()
	defer f.Close()
	on, err := isNoCow(f)
	c.cow = err == nil && !on
	return c
}

// chargeRefused brings up to date what is kept for a volume that is refused.
func (p *Pool) chargeRefused(dir string) {
	st, err := p.imageStat(dir)
	switch is := err == nil && st.Mode.IsRegular(); {
	case !validDir(dir):
	case is:
		p.account.keep(dir, st.Size, st.Allocated)
	case err == nil, errors.Is(err, fs.ErrNotExist): // removed by hand
		p.account.drop(dir)
	}
}

// refreshRefused is chargeRefused for all of them.
func (p *Pool) refreshRefused(ctx context.Context) {
	for dir := range p.Damaged() {
		if ctx.Err() != nil {
			return
		}
		p.chargeRefused(dir)
	}
}

// loadOne reads one record; ErrDamaged when it was looked at and is not sound.
func (p *Pool) loadOne(dir string) (r record, allocated int64, err error) {
	if !validDir(dir) {
		return r, 0, fmt.Errorf("%w: not a name that csi-loop gives", ErrDamaged)
	}
	d, err := openDirAt(p.volumes, dir)
	if err != nil {
		return r, 0, openError(dir, err)
	}
	defer d.Close()
	if r, err = readRecord(d, recordFile, dir, parseRecord); err != nil {
		return r, 0, err
	}
	// The rest of a replacement that a crash interrupted. That it cannot go, as on a full
	// disk, says nothing against the volume.
	if err := removeTree(d, recordNew); err != nil {
		p.once("remove record "+dir).Error(err, "Cannot remove what an interrupted call left; trying again at the next start", "volume", VolumeID(p.ID(), dir), "file", recordNew)
	}
	st, err := statAt(d, imageFile)
	if err != nil || !st.Mode.IsRegular() {
		// The volume exists and has lost its data: OpenImage and VolumeHealth say so.
		return r, 0, nil
	}
	return p.settle(d, dir, r, st)
}

// readRecord reads and parses the record called name of what is in directory dir.
func readRecord[T any](d *os.File, name, dir string, parse func(b []byte, dir string) (T, error)) (r T, err error) {
	f, err := openAt(d, name, false)
	if err != nil {
		return r, openError(name, err)
	}
	defer f.Close()
	st, err := statFile(f)
	if err != nil {
		return r, opError("look at", name, err)
	}
	if st.Links != 1 {
		return r, fmt.Errorf("%w: %s has more than one link", ErrDamaged, name)
	}
	b, err := readSmall(f, maxRecordSize)
	if err != nil && !errors.Is(err, errTooLarge) {
		return r, opError("read", name, err)
	}
	if err == nil {
		r, err = parse(b, dir)
	}
	if err != nil {
		var none T
		return none, fmt.Errorf("%w: %s: %w", ErrDamaged, name, err)
	}
	return r, nil
}

// settle finishes a Grow that a crash interrupted: blocks past the end are given
// back, or, when the image has its new size already, the record follows. What of that
// fails, as on a full disk, is left to the next start.
func (p *Pool) settle(d *os.File, dir string, r record, st fileStat) (record, int64, error) {
	switch {
	case st.Size == r.Size && st.Allocated > withMetadata(r.Size):
		if err := p.trim(d, r.Size); err != nil {
			p.once("trim "+dir).Error(err, "Cannot give back the blocks of an interrupted growth; trying again at the next start", "volume", VolumeID(p.ID(), dir))
		}
		if after, err := statAt(d, imageFile); err == nil {
			st = after
		}
	case st.Size > r.Size && st.Size%MiB == 0:
		p.once("grow "+dir).Info("Completing an interrupted growth", "volume", VolumeID(p.ID(), dir), "from", r.Size, "to", st.Size)
		r.Size = st.Size
		// The size may not be on disk yet, and must be before the record says so.
		if err := syncAt(d, imageFile); err != nil {
			return r, 0, err
		}
		if _, err := p.replaceRecord(d, r); err != nil {
			p.once("record "+dir).Error(err, "Cannot write the record of a completed growth; trying again at the next start", "volume", VolumeID(p.ID(), dir))
		}
	}
	return r, st.Allocated, nil
}

// withMetadata is what a whole image of that size may occupy, extent tree
// included. The image may be in use, so what is less is left to the next Grow.
func withMetadata(size int64) int64 { return size + size/4096 + 64<<10 }

// trim gives back the blocks past the end, which truncating to the very size does.
func (p *Pool) trim(d *os.File, size int64) error {
	f, err := openAt(d, imageFile, true)
	if err != nil {
		return err
	}
	return errors.Join(f.Truncate(size), f.Close())
}

func (p *Pool) replaceRecord(d *os.File, r record) (renamed bool, err error) {
	b, err := r.encode()
	if err != nil {
		return false, err
	}
	return replaceSynced(d, recordFile, recordNew, b, p.store.kill)
}
