// Package survey looks at a node from outside the driver: its kernel and programs,
// the pools, the loop devices, the mounts and the stage records. It works beside a
// running driver as well as without one, and changes nothing; Repair does.
//
// What it reports is of one moment for each thing it looks at, not for all of them:
// beside a running driver a volume may be seen between two steps of a call.
package survey

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/csi-loop/csi-loop/pkg/crypt"
	"github.com/csi-loop/csi-loop/pkg/driver"
	"github.com/csi-loop/csi-loop/pkg/image"
	"github.com/csi-loop/csi-loop/pkg/loop"
	"github.com/csi-loop/csi-loop/pkg/mount"
)

// Config is what there is to look at.
type Config struct {
	Pools      []image.Config
	StateDir   string
	NodeID     string // "": all nodes of the state directory
	Endpoint   string // where the driver would answer; "" is not known
	KubeletDir string // "" is none
	MaxDevices int
}

// The states of a volume, as far as the kernel and the records show them.
const (
	Refused   = "refused"   // its record is damaged; csi-loop does not serve it
	Available = "available" // not attached
	Attached  = "attached"  // a loop device shows its image, and no record says why
	Staged    = "staged"    // attached for a staging that is recorded
	Published = "published" // and shown to at least one pod
)

// Volume is a volume of a pool, or a mapped one that is staged.
type Volume struct {
	ID          string           `json:"id"`
	Name        string           `json:"name,omitempty"`
	Pool        string           `json:"pool,omitempty"` // none for mapped volumes
	Size        int64            `json:"size"`           // bytes
	Allocated   int64            `json:"allocated"`      // bytes of blocks
	Allocation  image.Allocation `json:"allocation,omitempty"`
	Filesystem  string           `json:"filesystem,omitempty"` // none for raw block volumes
	Encryption  string           `json:"encryption,omitempty"` // luks2, or none
	BlockSize   int              `json:"blockSize,omitempty"`
	DirectIO    string           `json:"directIO,omitempty"`
	Created     *time.Time       `json:"created,omitempty"`
	Ephemeral   bool             `json:"ephemeral,omitempty"`
	MappedImage string           `json:"mappedImage,omitempty"`
	State       string           `json:"state"`
	Devices     []string         `json:"devices,omitempty"`
	StagingPath string           `json:"stagingPath,omitempty"`
	Targets     []string         `json:"targets,omitempty"`
	Problems    []string         `json:"problems,omitempty"`
}

// The states of a snapshot; Refused is one too.
const (
	Ready      = "ready"
	Damaged    = "damaged"    // its image is not what its record says
	Unfinished = "unfinished" // part of a group that is not complete
)

// Snapshot is a snapshot of a volume.
type Snapshot struct {
	ID         string     `json:"id"`
	Name       string     `json:"name,omitempty"`
	Pool       string     `json:"pool"`
	Source     string     `json:"source,omitempty"` // ID of the volume that it was made of
	Group      string     `json:"group,omitempty"`  // ID of its group snapshot
	Size       int64      `json:"size"`             // bytes
	Allocated  int64      `json:"allocated"`        // bytes of blocks, shared ones too
	Filesystem string     `json:"filesystem,omitempty"`
	Reflinked  bool       `json:"reflinked"` // made by sharing blocks
	Created    *time.Time `json:"created,omitempty"`
	State      string     `json:"state"`
	Problem    string     `json:"problem,omitempty"`

	fix string // of the problem
}

// Device is a bound loop device.
type Device struct {
	Path      string   `json:"path"`
	Number    int      `json:"number"`
	DiskSeq   uint64   `json:"diskSeq"`
	Volume    string   `json:"volume,omitempty"` // none for devices that are not csi-loop's
	Tag       string   `json:"tag,omitempty"`
	Image     string   `json:"image"` // the kernel's idea of its path
	Offset    int64    `json:"offset"`
	SizeLimit int64    `json:"sizeLimit"`
	Size      int64    `json:"size"`
	BlockSize int      `json:"blockSize"`
	ReadOnly  bool     `json:"readOnly"`
	DirectIO  bool     `json:"directIO"`
	Autoclear bool     `json:"autoclear"`
	Discard   bool     `json:"discard"`
	State     string   `json:"state"`            // Attached or Staged; "foreign" for those of others
	Mounts    []string `json:"mounts,omitempty"` // where it or its mapping is mounted, or a node of them is shown
	// Mapping is the device that shows an encrypted volume's content, and MappingName its
	// name in dmsetup.
	Mapping     string `json:"mapping,omitempty"`
	MappingName string `json:"mappingName,omitempty"`

	info     loop.Info
	readOnly []string // those of Mounts that take no writes
	small    bool     // a filesystem on it, or on its mapping, does not fill it
}

// Foreign is the state of a device that is not csi-loop's.
const Foreign = "foreign"

// Site is what was found.
type Site struct {
	Pools     []image.PoolView
	Volumes   []Volume   // by ID
	Snapshots []Snapshot // by ID
	Devices   []Device   // by number; those of others too
	Records   []driver.Staged
	// Blind says what could not be looked at. What depends on it is not known.
	Blind []error

	images   map[loop.FileID]image.VolumeView
	mappings map[string]crypt.Mapping // by the loop device below, as in loop3
}

// Look looks at an installation. The error is that of an invalid configuration, or
// ctx's; what cannot be looked at is in Blind.
func Look(ctx context.Context, cfg Config) (*Site, error) {
	s := &Site{}
	devices, err := loop.List(ctx)
	s.blind(err)
	mounts, err := mount.New().List()
	s.blind(err)
	if s.Records, err = driver.StagedVolumes(cfg.StateDir, cfg.NodeID); err != nil {
		s.blind(err)
	}
	s.blind(s.findMappings())
	if s.Pools, err = image.Inspect(ctx, cfg.Pools); err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	s.see()
	for _, d := range devices {
		s.Devices = append(s.Devices, s.device(d, mounts))
	}
	for _, p := range s.Pools {
		for _, v := range p.Volumes {
			s.Volumes = append(s.Volumes, s.volume(v))
		}
		for _, v := range p.Snapshots {
			s.Snapshots = append(s.Snapshots, snapshot(v))
		}
	}
	for _, r := range s.Records {
		if !r.Stale && r.Mapped != "" {
			s.Volumes = append(s.Volumes, s.mapped(r))
		}
	}
	slices.SortStableFunc(s.Snapshots, func(a, b Snapshot) int { return strings.Compare(a.ID, b.ID) })
	slices.SortStableFunc(s.Volumes, func(a, b Volume) int { return strings.Compare(a.ID, b.ID) })
	return s, nil
}

// see notes which volume an image is of.
func (s *Site) see() {
	s.images = map[loop.FileID]image.VolumeView{}
	for _, p := range s.Pools {
		for _, v := range p.Volumes {
			if v.Ino != 0 {
				s.images[loop.FileID{Dev: v.Dev, Ino: v.Ino}] = v
			}
		}
	}
}

// findMappings finds what lies over the loop devices of encrypted volumes.
func (s *Site) findMappings() error {
	c, err := crypt.New(crypt.Options{})
	if err != nil {
		return err
	}
	all, err := c.Mappings(driver.MappingPrefix)
	s.mappings = map[string]crypt.Mapping{}
	for m, below := range all {
		for _, device := range below {
			s.mappings[device] = m
		}
	}
	return err
}

func (s *Site) blind(err error) {
	if err != nil {
		s.Blind = append(s.Blind, err)
	}
}

// device says whose a loop device is, and where it is shown.
func (s *Site) device(i loop.Info, mounts []mount.Mount) Device {
	d := Device{
		Path: i.Path, Number: i.Number, DiskSeq: i.DiskSeq, Tag: i.Tag, Image: i.BackingPath,
		Offset: i.Offset, SizeLimit: i.SizeLimit, Size: i.Size, BlockSize: i.BlockSize,
		ReadOnly: i.ReadOnly, DirectIO: i.DirectIO, Autoclear: i.Autoclear, Discard: i.Discard, State: Foreign, info: i,
	}
	nodes := []string{i.Path}
	if m, ok := s.mappings[fmt.Sprintf("loop%d", i.Number)]; ok {
		d.Mapping, d.MappingName = m.Path, m.Name
		nodes = append(nodes, m.Path)
	}
	for _, node := range nodes {
		numbers, err := mount.New().DeviceAt(node)
		if err != nil {
			continue
		}
		for _, m := range mounts {
			if !m.IsOf(numbers) {
				continue
			}
			d.Mounts = append(d.Mounts, m.Path)
			if m.ReadOnly {
				d.readOnly = append(d.readOnly, m.Path)
			}
			small, err := mount.New().NeedsGrow(mount.GrowSpec{FSType: m.FSType, Device: node, Path: m.Path})
			d.small = d.small || err == nil && small // an error is that of what is no filesystem of ours
		}
	}
	if v, ok := s.images[i.Image]; ok {
		d.Volume, d.State = v.ID, Attached
	} else if s.poolOf(i.Tag) {
		d.Volume, d.State = i.Tag, Attached // its image is gone, as a rule, and the device keeps it
	}
	for _, r := range s.Records {
		if slices.Contains(r.Devices, i.Ref) {
			d.State = Staged
			if d.Volume == "" {
				d.Volume = r.VolumeID
			}
		}
	}
	return d
}

// poolOf tells whether a tag is the ID of a volume of one of the pools.
func (s *Site) poolOf(tag string) bool {
	id, _, ok := image.ParseID(tag)
	return ok && slices.ContainsFunc(s.Pools, func(p image.PoolView) bool { return p.ID == id })
}

// removed tells whether a volume is known not to be there: its pool could be looked at as a
// whole, and has nothing of that ID.
func (s *Site) removed(id string) bool {
	return !slices.ContainsFunc(s.Pools, func(p image.PoolView) bool {
		return p.Err != nil && strings.HasPrefix(id, p.ID+".") ||
			slices.ContainsFunc(p.Volumes, func(v image.VolumeView) bool { return v.ID == id })
	})
}

func (s *Site) volume(v image.VolumeView) Volume {
	out := Volume{
		ID: v.ID, Name: v.Name, Pool: v.Pool, Size: v.Content(), Allocated: v.Allocated, Allocation: v.Allocation,
		Filesystem: v.Filesystem, Encryption: v.Encryption.Type, BlockSize: v.BlockSize, DirectIO: v.DirectIO, Ephemeral: v.Ephemeral != nil,
	}
	if v.Err != nil {
		out.State, out.Problems = Refused, []string{v.Err.Error()}
		return out
	}
	out.Created = &v.Created
	for _, p := range v.Problems {
		out.Problems = append(out.Problems, p.Reason+": "+p.Message)
	}
	s.attach(&out, func(d Device) bool { return d.Volume == v.ID }, func(r driver.Staged) bool { return s.names(r, v) })
	return out
}

func snapshot(v image.SnapshotView) Snapshot {
	out := Snapshot{ID: v.ID, Pool: v.Pool, State: Ready}
	if v.Err != nil {
		out.refuse(Refused, v.Err)
		return out
	}
	out.Name, out.Source, out.Group, out.Size, out.Allocated = v.Name, v.Source, v.Group, v.Volume.Content(), v.Allocated
	out.Filesystem, out.Reflinked, out.Created = v.Volume.Filesystem, v.Reflinked, &v.Created
	switch {
	case v.Unfinished:
		out.State = Unfinished
	case v.ImageErr != nil:
		out.refuse(Damaged, v.ImageErr)
	}
	return out
}

func (s *Snapshot) refuse(state string, err error) {
	problem, _ := image.SnapshotProblem(err)
	s.State, s.Problem, s.fix = state, err.Error(), problem.Action
}

// names tells whether a record is that of a volume of a pool. A record of an inline
// ephemeral volume has the ID that the CO gave, which is the volume's name.
func (s *Site) names(r driver.Staged, v image.VolumeView) bool {
	return r.VolumeID == v.ID || r.Ephemeral && v.Ephemeral != nil && r.VolumeID == v.Name
}

func (s *Site) mapped(r driver.Staged) Volume {
	v := Volume{ID: r.VolumeID, MappedImage: r.Mapped}
	s.attach(&v, func(d Device) bool { return slices.Contains(r.Devices, d.info.Ref) }, func(o driver.Staged) bool { return o.File == r.File })
	for _, d := range s.Devices {
		if slices.Contains(v.Devices, d.Path) {
			v.Size, v.BlockSize = d.Size, d.BlockSize
		}
	}
	return v
}

// attach adds devices, paths and the state.
func (s *Site) attach(v *Volume, device func(Device) bool, record func(driver.Staged) bool) {
	v.State = Available
	var mounts []string
	for _, d := range s.Devices {
		if device(d) {
			v.Devices = append(v.Devices, d.Path)
			mounts = append(mounts, d.Mounts...)
			if v.State == Available || d.State == Staged {
				v.State = d.State
			}
		}
	}
	for _, r := range s.Records {
		if r.Stale || !record(r) {
			continue
		}
		v.StagingPath = r.StagingPath
		for _, t := range r.Targets {
			if slices.Contains(mounts, t) {
				v.Targets = append(v.Targets, t)
			}
		}
	}
	if v.State == Staged && len(v.Targets) > 0 {
		v.State = Published
	}
}

// Repair does what the next start of csi-loop would do with the pools that have
// something to be done, and says for each what became of it: it removes what
// interrupted calls left, completes growths, and makes files private. A pool that
// a process serves is left to that process.
func Repair(ctx context.Context, site *Site, configs []image.Config) map[string]error {
	done := map[string]error{}
	for i, p := range site.Pools {
		if !needsRepair(p) {
			continue
		}
		cfg := configs[i]
		cfg.Expect.Existing = true // never make one
		done[p.Name] = repair(ctx, cfg)
	}
	return done
}

func needsRepair(p image.PoolView) bool {
	growing := slices.ContainsFunc(p.Volumes, func(v image.VolumeView) bool {
		return slices.ContainsFunc(v.Problems, func(p image.Problem) bool { return p.Reason == image.GrowthUnfinished })
	})
	return p.Err == nil && !p.New && (len(p.Leftovers)+len(p.Exposed) > 0 || growing)
}

func repair(ctx context.Context, cfg image.Config) error {
	store, err := image.Open(ctx, []image.Config{cfg}, image.WithRefresh(0))
	if err != nil {
		return fmt.Errorf("left alone: %w", err)
	}
	var left []error
	if err := store.Erased(ctx); err != nil {
		left = append(left, fmt.Errorf("not finished: %w", err))
	}
	for _, p := range store.Pools() {
		for _, problem := range p.Health() {
			if problem.Reason == image.CannotRemove {
				left = append(left, errors.New(problem.Message))
			}
		}
	}
	return errors.Join(append(left, store.Close())...)
}
