// Package report is what csi-loop says of itself to those who only look: metrics,
// the controller, the kubectl plugin. It holds the words and no work: how they are
// come by is the driver's (on a node) and the router's (of a cluster) business.
//
// The types are JSON on the links and on the controller's HTTP endpoint. Fields are
// added and never change their meaning, so that either end may be older. Sizes are
// bytes.
package report

import (
	"slices"
	"strings"
	"time"
)

// Machine is what one node says of its pools and of what is in them. Lists are
// ordered by ID, pools by their configuration.
type Machine struct {
	// Time is when it was looked at.
	Time      time.Time  `json:"time"`
	Pools     []Pool     `json:"pools,omitempty"`
	Volumes   []Volume   `json:"volumes,omitempty"`
	Snapshots []Snapshot `json:"snapshots,omitempty"`
	// Templates has the first MaxTemplates of them, ordered by ID.
	Templates []Template `json:"templates,omitempty"`
	// Copies are those of data that go on, ordered by pool and name.
	Copies []Copy `json:"copies,omitempty"`
	// Problems are those of the node itself, such as a lack of loop devices.
	Problems []Problem `json:"problems,omitempty"`
}

// MaxTemplates bounds the templates in a report.
const MaxTemplates = 1000

// Template is what volumes may begin as.
type Template struct {
	ID         string    `json:"id"`
	Name       string    `json:"name"`
	Pool       string    `json:"pool"`
	Size       int64     `json:"size"`
	Filesystem string    `json:"filesystem,omitempty"` // empty: for raw block volumes
	Volumes    int       `json:"volumes"`              // that were made of it and exist
	Created    time.Time `json:"created,omitzero"`
}

// What a copy does.
const (
	Copying   = "copy"    // within a pool, or between two of the node
	Sending   = "send"    // to another node
	Receiving = "receive" // from another node
)

// Copy is a copy of data that goes on. Done and Total are bytes of data; Total is 0
// until it is known.
type Copy struct {
	// Name is that of the volume or snapshot that is made; of what is sent, the ID of
	// its source.
	Name  string `json:"name"`
	Pool  string `json:"pool,omitempty"`
	Kind  string `json:"kind"`
	Done  int64  `json:"done"`
	Total int64  `json:"total"`
}

// Pool is a directory of volumes.
type Pool struct {
	Name string `json:"name"`
	// ID is empty of a pool that is absent: it is configured and cannot be used.
	ID         string `json:"id,omitempty"`
	Filesystem string `json:"filesystem,omitempty"`
	// Size and Used are of the filesystem that the pool is on, with what others have
	// there. Reserved is kept free for these; Available is the size of the largest
	// thick volume that could be made.
	Size      int64     `json:"size"`
	Used      int64     `json:"used"`
	Reserved  int64     `json:"reserved"`
	Available int64     `json:"available"`
	Volumes   int       `json:"volumes"`
	Snapshots int       `json:"snapshots"`
	Problems  []Problem `json:"problems,omitempty"`
}

// The states of a volume.
const (
	Available = "available" // nothing shows it
	Staged    = "staged"    // attached and mounted for the node
	Published = "published" // shown to at least one pod
	Refused   = "refused"   // its record is damaged
)

// Volume is one volume, or an image that is mapped now.
type Volume struct {
	ID string `json:"id"`
	// Name is the one that CreateVolume was called with: in Kubernetes that of the
	// PersistentVolume. Of mapped volumes it is the path of the image.
	Name string `json:"name,omitempty"`
	// Pool is the pool's name; mapped volumes have none.
	Pool string `json:"pool,omitempty"`
	Size int64  `json:"size"`
	// Allocated are the blocks of its image, shared ones too.
	Allocated  int64  `json:"allocated"`
	Allocation string `json:"allocation,omitempty"` // thick or thin
	Filesystem string `json:"filesystem,omitempty"` // empty: a raw block volume
	Encryption string `json:"encryption,omitempty"` // luks2, or empty
	Ephemeral  bool   `json:"ephemeral,omitempty"`
	State      string `json:"state"`
	// Device is its loop device.
	Device string `json:"device,omitempty"`
	// Used is what is used of the filesystem, if it is mounted.
	Used     *int64    `json:"used,omitempty"`
	IO       *IO       `json:"io,omitempty"`
	Created  time.Time `json:"created,omitzero"`
	Problems []Problem `json:"problems,omitempty"`
}

// IO is what went through the loop device of a volume since this csi-loop process has
// known it. It starts at 0 again when the process does.
type IO struct {
	Reads      uint64 `json:"reads"`
	ReadBytes  uint64 `json:"readBytes"`
	Writes     uint64 `json:"writes"`
	WriteBytes uint64 `json:"writeBytes"`
	// ReadSeconds and WriteSeconds are the durations of all requests together, Busy
	// the time in which there was one.
	ReadSeconds  float64 `json:"readSeconds"`
	WriteSeconds float64 `json:"writeSeconds"`
	BusySeconds  float64 `json:"busySeconds"`
}

// Snapshot is one snapshot.
type Snapshot struct {
	ID        string    `json:"id"`
	Name      string    `json:"name,omitempty"`
	Source    string    `json:"source"` // ID of the volume
	Pool      string    `json:"pool"`
	Group     string    `json:"group,omitempty"`
	Size      int64     `json:"size"`
	Allocated int64     `json:"allocated"` // shared blocks too
	Reflinked bool      `json:"reflinked,omitempty"`
	Created   time.Time `json:"created,omitzero"`
}

// The kinds of problems, as CSI has them, worst last.
const (
	Degraded     = "Degraded"     // works, but not as it should
	Inaccessible = "Inaccessible" // does not work; the data may be well
	DataLoss     = "DataLoss"     // data is gone
)

// Problem is something that a person should look at.
type Problem struct {
	Kind string `json:"kind"`
	// Reason is one stable word, of those that docs/reference/errors.md lists.
	Reason string `json:"reason"`
	// Message says what is wrong and what to do about it.
	Message string `json:"message"`
}

// The states of a node beside its links.
const (
	Linked  = "linked"
	Away    = "away"    // it had a link
	Missing = "missing" // it should have one, and this controller has not seen it
)

// Node is one node in a cluster.
type Node struct {
	Name  string `json:"name"`
	State string `json:"state"`
	// Since is when it was linked, or went away.
	Since   time.Time `json:"since,omitzero"`
	Version string    `json:"version,omitempty"`
	Pod     string    `json:"pod,omitempty"`
	// Error says why Machine is not there, or not whole.
	Error string `json:"error,omitempty"`

	Machine
}

// Cluster is what a controller says. Nodes are ordered by name.
type Cluster struct {
	Time    time.Time `json:"time"`
	Driver  string    `json:"driver"`
	Version string    `json:"version"`
	Nodes   []Node    `json:"nodes"`
}

// Page is a part of a Machine that fits into a message of a link.
type Page struct {
	Machine

	// Next asks for what follows; "" when there is no more.
	Next string `json:"next,omitempty"`
}

// PageSize is how many volumes and snapshots a page has at most.
const PageSize = 1000

// The parts of a Next.
const (
	volumesAfter   = "volumes/"
	snapshotsAfter = "snapshots/"
)

// Page cuts out the page that a Next asks for; "" is the first, which alone has the
// pools, templates, copies and problems of the node. Without ok it is no Next. What comes and goes between two pages neither
// repeats nor hides others.
func (m *Machine) Page(next string) (p Page, ok bool) {
	p.Time = m.Time
	after, snapshots := strings.CutPrefix(next, snapshotsAfter)
	if !snapshots {
		after, ok = strings.CutPrefix(next, volumesAfter)
		if !ok && next != "" {
			return p, false
		}
		if next == "" {
			p.Pools, p.Templates, p.Copies, p.Problems = m.Pools, m.Templates, m.Copies, m.Problems
		}
		var more bool
		if p.Volumes, more = cut(m.Volumes, after, func(v Volume) string { return v.ID }); more {
			p.Next = volumesAfter + p.Volumes[len(p.Volumes)-1].ID
			return p, true
		}
		if len(p.Volumes) > 0 && len(m.Snapshots) > 0 {
			p.Next = snapshotsAfter
			return p, true
		}
	}
	var more bool
	if p.Snapshots, more = cut(m.Snapshots, after, func(s Snapshot) string { return s.ID }); more {
		p.Next = snapshotsAfter + p.Snapshots[len(p.Snapshots)-1].ID
	}
	return p, true
}

// cut returns what is behind after, PageSize at most, and whether there is more.
func cut[T any](all []T, after string, id func(T) string) (part []T, more bool) {
	i, found := slices.BinarySearchFunc(all, after, func(v T, after string) int { return strings.Compare(id(v), after) })
	if found {
		i++
	}
	all = all[i:]
	if len(all) > PageSize {
		return all[:PageSize], true
	}
	return all, false
}

// Add puts the next page behind the earlier ones.
func (m *Machine) Add(p Page) {
	m.Time = p.Time
	m.Pools = append(m.Pools, p.Pools...)
	m.Volumes = append(m.Volumes, p.Volumes...)
	m.Snapshots = append(m.Snapshots, p.Snapshots...)
	m.Templates = append(m.Templates, p.Templates...)
	m.Copies = append(m.Copies, p.Copies...)
	m.Problems = append(m.Problems, p.Problems...)
}
