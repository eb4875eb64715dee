package driver

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"k8s.io/klog/v2"

	"github.com/csi-loop/csi-loop/pkg/image"
	"github.com/csi-loop/csi-loop/pkg/loop"
	"github.com/csi-loop/csi-loop/pkg/mount"
)

// TakeInRequest asks for a volume or a template with the content of a file. Sizes are
// bytes.
type TakeInRequest struct {
	Name     string `json:"name"`
	Template bool   `json:"template,omitempty"` // else a volume
	Pool     string `json:"pool,omitempty"`     // "" is the default pool

	// File is an absolute path, as this process sees it; Dev and Ino say which file the
	// asker means, and Modified when it was changed last, in nanoseconds since 1970: it is
	// another request once the file has changed. 0 for a file that is moved.
	File     string `json:"file"`
	Dev      uint64 `json:"dev"`
	Ino      uint64 `json:"ino"`
	Modified int64  `json:"modified,omitempty"`
	// The range: a partition, or what is from Offset on, Length bytes or all.
	Partition int   `json:"partition,omitempty"`
	Offset    int64 `json:"offset,omitempty"`
	Length    int64 `json:"length,omitempty"`
	// Raw: it is not looked at, and is a raw block volume.
	Raw bool `json:"raw,omitempty"`

	Size       int64        `json:"size,omitempty"` // at least; 0 is that of the content
	Method     image.Method `json:"method"`
	Allocation string       `json:"allocation,omitempty"` // of a volume; "" is thick
	DirectIO   string       `json:"directIO,omitempty"`   // "" is auto
	BlockSize  int          `json:"blockSize,omitempty"`  // 0 is what fits the content

	// Begin: the asker has not asked before. The request may go on for somebody else, and
	// is joined then; how it ended for one who did not wait for that is no answer.
	Begin  bool `json:"begin,omitempty"`
	Cancel bool `json:"cancel,omitempty"` // end the same request, which was made before
}

// TakeInProgress is how far a request is.
type TakeInProgress struct {
	Copied int64 `json:"copied"`
	All    int64 `json:"all"`
	// Done: the volume or template exists, durably.
	Done     bool      `json:"done"`
	Volume   *TakenIn  `json:"volume,omitempty"`
	Template *Template `json:"template,omitempty"`
}

// TakenIn is a volume that was made of a file, and what a PersistentVolume says of it.
type TakenIn struct {
	ID         string `json:"id"`
	Pool       string `json:"pool"`
	Size       int64  `json:"size"`
	Filesystem string `json:"filesystem"` // "" for a raw block volume
	BlockSize  int    `json:"blockSize"`
	Allocation string `json:"allocation"`
	Driver     string `json:"driver"`
	Topology   string `json:"topologyKey"`
	Node       string `json:"node"`
}

// Template is a template of a pool of this node.
type Template struct {
	Name       string    `json:"name"`
	Pool       string    `json:"pool"`
	Size       int64     `json:"size"`
	Filesystem string    `json:"filesystem"` // "" for raw block volumes
	BlockSize  int       `json:"blockSize"`
	Source     string    `json:"source"`
	Created    time.Time `json:"created"`
	Volumes    int       `json:"volumes"` // that were made of it and exist
}

// takeInPatience is how long one call waits before it tells how far the request is.
const takeInPatience = time.Second

// TakeIn makes a volume or template of the content of a file, or tells how far that is:
// the same request is repeated until it is done. It goes on for 10 minutes when nobody
// asks, and is taken back if it is cancelled. A request that was done is done again.
//
// Errors have the codes of package status: among them INVALID_ARGUMENT for a file that
// is not what the request says, FAILED_PRECONDITION for one that is in use, or that no
// volume can be made of.
func (d *Driver) TakeIn(ctx context.Context, r TakeInRequest) (TakeInProgress, error) {
	begin, cancel := r.Begin, r.Cancel
	r.Begin, r.Cancel = false, false
	wish, err := json.Marshal(r)
	if err != nil {
		return TakeInProgress{}, err
	}
	if err := r.check(); err != nil {
		return TakeInProgress{}, err
	}
	key := image.DirName(r.Name)
	if r.Template {
		key = "template/" + key
	}
	if cancel {
		d.jobs.end(key, adminTakeIn, string(wish))
		return TakeInProgress{}, nil
	}
	if begin {
		d.jobs.forget(key, adminTakeIn)
	}
	count, _ := d.takingIn.LoadOrStore(key, &takeInCount{})
	counted, _ := count.(*takeInCount)
	done, err := d.jobs.await(ctx, takeInPatience, key, adminTakeIn, string(wish), func() (func(context.Context) error, error) {
		return d.prepareTakeIn(r, key, counted)
	})
	p := TakeInProgress{Copied: counted.copied.Load(), All: counted.all.Load()}
	if done || err != nil && ctx.Err() == nil {
		d.takingIn.Delete(key)
	}
	if err != nil || !done {
		return p, err
	}
	return p, d.tookIn(r, &p)
}

// takeInCount is how far a request is.
type takeInCount struct{ copied, all atomic.Int64 }

func (r TakeInRequest) check() error {
	if err := checkName(r.Name); err != nil {
		return err
	}
	p := params{}
	for key, value := range map[string]string{paramAllocation: r.Allocation, paramDirectIO: r.DirectIO} {
		if err := p.set(key, value); value != "" && err != nil {
			return err
		}
	}
	switch {
	case r.Offset < 0 || r.Length < 0 || r.Size < 0 || r.Size > maxSize || r.Partition < 0:
		return invalidf("a size, an offset or a partition is out of range")
	case r.Partition > 0 && r.Offset+r.Length > 0:
		return invalidf("give a partition or a range, not both")
	case r.Template && r.Allocation != "":
		return invalidf("a template has no allocation")
	}
	return nil
}

// tookIn puts what exists by now into the answer.
func (d *Driver) tookIn(r TakeInRequest, p *TakeInProgress) error {
	if r.Template {
		pool, err := d.pool(r.Pool)
		if err != nil {
			return err
		}
		t, err := pool.Template(r.Name)
		if err != nil {
			return err
		}
		p.Done, p.Template = true, new(d.describeTemplate(t))
		return nil
	}
	v, ok := d.images.Find(r.Name)
	if !ok {
		return abortedf("volume %q was removed meanwhile", r.Name)
	}
	p.Done, p.Volume = true, &TakenIn{
		ID: v.ID, Pool: v.Pool, Size: v.Size, Filesystem: v.Filesystem, BlockSize: v.BlockSize, Allocation: string(v.Allocation),
		Driver: d.cfg.Name, Topology: d.topologyKey(), Node: d.cfg.NodeID,
	}
	return nil
}

// prepareTakeIn looks at the file, and returns what takes it in.
func (d *Driver) prepareTakeIn(r TakeInRequest, key string, count *takeInCount) (func(context.Context) error, error) {
	pool, err := d.pool(r.Pool)
	if err != nil {
		return nil, err
	}
	if have, ok := d.images.Find(r.Name); ok && !r.Template && have.Pool != pool.Name() {
		return nil, existsf("volume %q exists as %q", r.Name, have.ID)
	}
	unlock, err := d.locks.lock(key, adminTakeIn)
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context) error {
		defer unlock()
		if moved, err := d.movedBefore(r); moved || err != nil {
			return err
		}
		f, err := openTakeIn(r)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := d.outside(r.File); err != nil {
			return err
		}
		content := image.FileContent{File: f, Path: r.File, Method: r.Method, Progress: func(done, all int64) {
			count.copied.Store(done)
			count.all.Store(all)
		}}
		if err := d.unused(ctx, f); err != nil {
			return err
		}
		spec, err := describeFile(r, f, &content)
		if err != nil {
			return err
		}
		if r.Template {
			t, err := pool.AddTemplate(ctx, image.TemplateSpec{Name: spec.Name, Size: spec.Size, Filesystem: spec.Filesystem, BlockSize: spec.BlockSize}, content)
			if err == nil {
				klog.FromContext(ctx).Info("Made a template", "template", t.Name, "pool", t.Pool, "size", t.Size, "filesystem", t.Filesystem, "file", r.File)
			}
			return err
		}
		v, err := pool.Import(ctx, spec, content)
		if err == nil {
			klog.FromContext(ctx).Info("Imported a volume", "volume", v.ID, "pool", v.Pool, "size", v.Size, "filesystem", v.Filesystem, "allocation", v.Allocation, "file", r.File)
		}
		return err
	}, nil
}

// movedBefore tells whether the request is a move that was completed: then there is no
// file any more.
func (d *Driver) movedBefore(r TakeInRequest) (bool, error) {
	have, ok := d.images.Find(r.Name)
	if _, err := os.Lstat(r.File); !ok || r.Template || r.Method != image.Move || !errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if have.Source == nil || have.Source.File != r.File {
		return false, nil
	}
	// Its old name may be gone, and not yet durably so.
	parent, err := os.Open(filepath.Dir(r.File))
	if err != nil {
		if errors.Is(err, os.ErrNotExist) {
			err = nil
		}
		return true, err
	}
	return true, errors.Join(parent.Sync(), parent.Close())
}

// openTakeIn opens the file that the request means.
func openTakeIn(r TakeInRequest) (*os.File, error) {
	if !filepath.IsAbs(r.File) {
		return nil, invalidf("file %q is not an absolute path", r.File)
	}
	st, err := os.Stat(r.File)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil, invalidf("this csi-loop does not see %q: in a container it sees the host's files only where they are mounted", r.File)
	case err != nil:
		return nil, err
	case !st.Mode().IsRegular(): // before it is opened: opening a device can do things
		return nil, invalidf("%q is not a regular file", r.File)
	}
	flags := os.O_RDONLY
	if r.Method == image.Move {
		flags = os.O_RDWR
	}
	f, err := os.OpenFile(r.File, flags, 0)
	if err != nil {
		return nil, err
	}
	id, err := loop.FileIDOf(f)
	if err == nil && (r.Dev != 0 || r.Ino != 0) && id != (loop.FileID{Dev: r.Dev, Ino: r.Ino}) {
		err = invalidf("this csi-loop sees another file at %q than you do: run the command where it runs, in its container", r.File)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// outside refuses what lies in a pool, as it is a volume's, or a snapshot's; but for what
// was put there to be taken in.
func (d *Driver) outside(file string) error {
	file, err := filepath.EvalSymlinks(file)
	if err != nil {
		return err
	}
	for _, pool := range d.images.Pools() {
		path, err := filepath.EvalSymlinks(pool.Path())
		if err != nil {
			return err
		}
		if strings.HasPrefix(file, path+"/") && !strings.HasPrefix(file, filepath.Join(path, image.Incoming)+"/") {
			return invalidf("%q lies in pool %q: a volume or snapshot is cloned or restored, not imported; files that are to be imported may lie in %s", file, pool.Name(), filepath.Join(path, image.Incoming))
		}
	}
	return nil
}

// unused refuses a file that a loop device shows, which may be written to.
func (d *Driver) unused(ctx context.Context, f *os.File) error {
	bound, err := d.table.Find(ctx, f)
	if err != nil {
		return err
	}
	for _, b := range bound {
		return preconditionf("%q is attached to %s: unmount it and detach it first", f.Name(), b.Path)
	}
	return nil
}

// describeFile says what the content of the file makes, and where it is.
func describeFile(r TakeInRequest, f *os.File, c *image.FileContent) (image.Spec, error) {
	st, err := f.Stat()
	if err != nil {
		return image.Spec{}, err
	}
	c.Offset, c.Length = r.Offset, r.Length
	if r.Partition > 0 {
		p, err := findPartition(f, r.Partition)
		if err != nil {
			return image.Spec{}, fmt.Errorf("%q: %w", r.File, err)
		}
		c.Offset, c.Length = p.Offset, p.Length
	}
	if c.Length == 0 {
		c.Length = st.Size() - c.Offset
	}
	if c.Length <= 0 || c.Offset > st.Size() || c.Length > st.Size()-c.Offset {
		return image.Spec{}, invalidf("%q has %d bytes; %d from byte %d on are not in it", r.File, st.Size(), c.Length, c.Offset)
	}
	spec := image.Spec{
		Name: r.Name, Size: roundUp(max(r.Size, c.Length)), Allocation: image.Allocation(r.Allocation),
		DirectIO: r.DirectIO, BlockSize: r.BlockSize,
	}
	fit := 512 // what is not looked at may want the smallest
	if !r.Raw {
		sb, err := mount.ReadSuperblock(io.NewSectionReader(f, c.Offset, c.Length))
		switch {
		case errors.Is(err, mount.ErrUnknownFilesystem):
			return spec, fmt.Errorf("%q, from byte %d on: %w; a partition is named with --partition, and --raw makes a raw block volume", r.File, c.Offset, err)
		case err != nil:
			return spec, err
		case sb.Size > c.Length:
			return spec, preconditionf("%q holds %s of %d bytes and has only %d: it was cut", r.File, sb.Type, sb.Size, c.Length)
		}
		spec.Filesystem, fit = sb.Type, min(4096, sb.SectorSize)
	}
	switch {
	case spec.BlockSize == 0:
		spec.BlockSize = fit
	case spec.BlockSize > fit && !r.Raw:
		return spec, preconditionf("%q holds %s of sectors of %d bytes, which a device of blocks of %d cannot show", r.File, spec.Filesystem, fit, spec.BlockSize)
	}
	return spec, nil
}

// Templates lists the templates of a pool of this node, or of all if pool is "", that can
// be used. A pool that is none is INVALID_ARGUMENT.
func (d *Driver) Templates(_ context.Context, pool string) ([]Template, error) {
	pools := d.images.Pools()
	if pool != "" {
		p, err := d.pool(pool)
		if err != nil {
			return nil, err
		}
		pools = []*image.Pool{p}
	}
	all := []Template{}
	for _, pool := range pools {
		for _, t := range pool.Templates() {
			all = append(all, d.describeTemplate(t))
		}
	}
	return all, nil
}

func (d *Driver) describeTemplate(t image.Template) Template {
	volumes := 0
	for _, v := range d.images.List() {
		if v.Source != nil && v.Source.Template == t.ID {
			volumes++
		}
	}
	return Template{
		Name: t.Name, Pool: t.Pool, Size: t.Size, Filesystem: t.Filesystem, BlockSize: t.BlockSize,
		Source: t.Source, Created: t.Created, Volumes: volumes,
	}
}

// RemoveTemplate removes a template. Volumes that were made of it, or are being made,
// do not need it.
func (d *Driver) RemoveTemplate(ctx context.Context, pool, name string) error {
	p, err := d.pool(pool)
	if err != nil {
		return err
	}
	return p.RemoveTemplate(ctx, name)
}
