package image

import (
	"encoding/json"
	"fmt"
	"slices"
	"time"
)

const (
	snapshotFile    = "snapshot.json"
	snapshotVersion = 1
)

// How the image of a snapshot was made.
const (
	sharingReflink = "reflink"
	sharingCopy    = "copy"
)

// SnapshotSpec is what a new snapshot shall be.
type SnapshotSpec struct {
	// Name is the caller's, 1 to 128 bytes of UTF-8; anything but NUL.
	Name string
	// Source is the ID of a volume of the pool.
	Source string
	// Independent: the snapshot gets blocks of its own, in the background. Its
	// volume then needs no more space than before.
	Independent bool
}

// Snapshot is the content of a volume at one moment. It does not change, and does
// not need the volume any more.
type Snapshot struct {
	SnapshotSpec
	ID      string // <pool ID>.<directory>
	Pool    string // name of its pool
	Group   string // ID of the group snapshot that it is part of, or ""
	Volume  Spec   // what its volume was then; Name is the volume's
	Created time.Time
	// Reflinked snapshots share blocks with what they were made of; the others
	// are copies from the start.
	Reflinked bool
}

// snapshotRecord is snapshot.json.
type snapshotRecord struct {
	FormatVersion int            `json:"formatVersion"`
	Name          string         `json:"name"`
	Source        string         `json:"source"`
	Group         string         `json:"group,omitempty"`
	Independent   bool           `json:"independent,omitempty"`
	Sharing       string         `json:"sharing"`
	Created       time.Time      `json:"created"`
	Volume        snapshotVolume `json:"volume"`
}

// snapshotVolume is what a snapshot knows of its volume.
type snapshotVolume struct {
	Name        string     `json:"name"`
	Size        int64      `json:"size"`
	Allocation  Allocation `json:"allocation"`
	Filesystem  string     `json:"filesystem"`
	BlockSize   int        `json:"blockSize"`
	DirectIO    string     `json:"directIO"`
	MkfsOptions []string   `json:"mkfsOptions,omitempty"`
	Encryption  Encryption `json:"encryption,omitzero"`
}

func newSnapshotRecord(s SnapshotSpec, volume record, group string, reflinked bool, now time.Time) snapshotRecord {
	r := snapshotRecord{
		FormatVersion: snapshotVersion, Name: s.Name, Source: s.Source, Group: group, Independent: s.Independent,
		Sharing: sharingCopy, Created: now.UTC().Truncate(time.Millisecond),
		Volume: snapshotVolume{
			Name: volume.Name, Size: volume.Size, Allocation: volume.Allocation, Filesystem: volume.Filesystem,
			BlockSize: volume.BlockSize, DirectIO: volume.DirectIO, MkfsOptions: slices.Clone(volume.MkfsOptions),
			Encryption: volume.Encryption,
		},
	}
	if reflinked {
		r.Sharing = sharingReflink
	}
	return r
}

func (r snapshotRecord) spec() SnapshotSpec {
	return SnapshotSpec{Name: r.Name, Source: r.Source, Independent: r.Independent}
}

// separates tells whether it shares blocks that it shall not share.
func (r snapshotRecord) separates() bool { return r.Independent && r.Sharing == sharingReflink }

func (v snapshotVolume) spec() Spec {
	return Spec{
		Name: v.Name, Size: v.Size, Allocation: v.Allocation, Filesystem: v.Filesystem,
		BlockSize: v.BlockSize, DirectIO: v.DirectIO, MkfsOptions: slices.Clone(v.MkfsOptions), Encryption: v.Encryption,
	}
}

func (r snapshotRecord) encode() ([]byte, error) {
	b, err := json.MarshalIndent(r, "", "  ")
	return append(b, '\n'), err
}

// parseSnapshot reads the record of the snapshot in directory dir, as strictly as
// parseRecord does.
func parseSnapshot(b []byte, dir string) (snapshotRecord, error) {
	var r snapshotRecord
	if err := decodeStrict(b, snapshotVersion, &r); err != nil {
		return r, err
	}
	if err := r.spec().check(); err != nil {
		return r, err
	}
	s, err := r.Volume.spec().normalise()
	if err != nil {
		return r, err
	}
	if field, _, _ := difference(newRecord(r.Volume.spec(), r.Created), s); field != "" {
		return r, fmt.Errorf("incomplete: it does not say the %s", field)
	}
	if _, source, _ := ParseID(r.Source); source != DirName(r.Volume.Name) {
		return r, fmt.Errorf("it is of volume %q, whose ID does not end as %s does", r.Volume.Name, r.Source)
	}
	if r.Sharing != sharingReflink && r.Sharing != sharingCopy {
		return r, fmt.Errorf("sharing %q is neither %s nor %s", r.Sharing, sharingReflink, sharingCopy)
	}
	if r.Group != "" {
		if _, _, ok := ParseID(r.Group); !ok {
			return r, fmt.Errorf("group %q is not an ID", r.Group)
		}
	}
	if want := DirName(r.Name); want != dir {
		return r, fmt.Errorf("it is the record of snapshot %q, which belongs in directory %s", r.Name, want)
	}
	return r, nil
}

// check refuses what no pool can make.
func (s SnapshotSpec) check() error {
	if err := checkName(s.Name); err != nil {
		return err
	}
	if _, _, ok := ParseID(s.Source); !ok {
		return &SpecError{"Source", fmt.Sprintf("%q is not the ID of a volume", s.Source)}
	}
	return nil
}

// equalSnapshot is the one place that compares a snapshot with what is asked of
// it. The error wraps ErrIncompatible.
func equalSnapshot(r snapshotRecord, s SnapshotSpec, group string) error {
	switch {
	case r.Name != s.Name:
		return fmt.Errorf("%w: its name is %q, asked for %q", ErrIncompatible, r.Name, s.Name)
	case r.Source != s.Source:
		return fmt.Errorf("%w: it is of volume %s, asked for %s", ErrIncompatible, r.Source, s.Source)
	case r.Group != group:
		return fmt.Errorf("%w: its group is %q, asked for %q", ErrIncompatible, r.Group, group)
	case r.Independent != s.Independent:
		return fmt.Errorf("%w: independent is %v, asked for %v", ErrIncompatible, r.Independent, s.Independent)
	}
	return nil
}

func (p *Pool) snapshot(dir string, r snapshotRecord) Snapshot {
	return Snapshot{
		SnapshotSpec: r.spec(), ID: VolumeID(p.ID(), dir), Pool: p.Name(), Group: r.Group,
		Volume: r.Volume.spec(), Created: r.Created, Reflinked: r.Sharing == sharingReflink,
	}
}
