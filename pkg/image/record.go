package image

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode/utf8"
)

const (
	recordFile    = "volume.json"
	recordNew     = ".new-volume.json" // a replacement before its rename
	imageFile     = "disk.img"
	recordVersion = 1
	maxRecordSize = 64 << 10
	// maxMkfsOptions bounds them in bytes, so that the record can be read again.
	maxMkfsOptions = 4 << 10

	// MiB is the unit of volume sizes (fact 16).
	MiB int64 = 1 << 20
)

// Allocation says when an image gets its blocks.
type Allocation string

// Thick images have all their blocks from the start, thin ones get them when
// written to, and may meet a full pool (fact 46).
const (
	Thick Allocation = "thick"
	Thin  Allocation = "thin"
)

// Ephemeral marks a volume that lives and dies with one publication.
type Ephemeral struct {
	// Target is the path it is published at.
	Target string `json:"target"`
}

// Spec is what a new volume shall be. All of it is recorded.
type Spec struct {
	// Name is the caller's, 1 to 128 bytes of UTF-8; anything but NUL.
	Name string
	// Size in bytes, a positive multiple of MiB.
	Size int64
	// Allocation is Thick if empty.
	Allocation Allocation
	// Filesystem is empty for a raw block volume, or ext2, ext3, ext4, xfs, btrfs.
	Filesystem string
	// BlockSize is the logical block size of the device that will show the image:
	// 512, 1024, 2048, 4096; 4096 if 0 (fact 61).
	BlockSize int
	// DirectIO is auto, on or off, auto if empty. It is kept for the node.
	DirectIO string
	// MkfsOptions are arguments for mkfs that ParseMkfsOptions accepts.
	MkfsOptions []string
	// Ephemeral is nil for ordinary volumes.
	Ephemeral *Ephemeral
	// Source is nil for volumes that begin empty.
	Source *Source
	// Encryption says what lies between the image and its content.
	Encryption Encryption
	// Tuning may change later, by Tune. No two specs differ by it.
	Tuning Tuning
}

// Volume is a volume that exists.
type Volume struct {
	Spec
	ID      string // <pool ID>.<directory>
	Pool    string // name of its pool
	Created time.Time
}

// record is volume.json.
type record struct {
	FormatVersion int        `json:"formatVersion"`
	Name          string     `json:"name"`
	Size          int64      `json:"size"`
	Allocation    Allocation `json:"allocation"`
	Filesystem    string     `json:"filesystem"`
	BlockSize     int        `json:"blockSize"`
	DirectIO      string     `json:"directIO"`
	MkfsOptions   []string   `json:"mkfsOptions,omitempty"`
	Ephemeral     *Ephemeral `json:"ephemeral,omitempty"`
	Source        *Source    `json:"source,omitempty"`
	Encryption    Encryption `json:"encryption,omitzero"`
	Tuning        *Tuning    `json:"tuning,omitempty"`
	Created       time.Time  `json:"created"`
}

func newRecord(s Spec, now time.Time) record {
	return record{
		FormatVersion: recordVersion,
		Name:          s.Name,
		Size:          s.Size,
		Allocation:    s.Allocation,
		Filesystem:    s.Filesystem,
		BlockSize:     s.BlockSize,
		DirectIO:      s.DirectIO,
		MkfsOptions:   slices.Clone(s.MkfsOptions),
		Ephemeral:     cloneEphemeral(s.Ephemeral),
		Source:        cloneSource(s.Source),
		Encryption:    s.Encryption,
		Tuning:        s.Tuning.recorded(),
		Created:       now.UTC().Truncate(time.Second),
	}
}

func cloneEphemeral(e *Ephemeral) *Ephemeral {
	if e == nil {
		return nil
	}
	c := *e
	return &c
}

func (r record) spec() Spec {
	return Spec{
		Name:        r.Name,
		Size:        r.Size,
		Allocation:  r.Allocation,
		Filesystem:  r.Filesystem,
		BlockSize:   r.BlockSize,
		DirectIO:    r.DirectIO,
		MkfsOptions: slices.Clone(r.MkfsOptions),
		Ephemeral:   cloneEphemeral(r.Ephemeral),
		Source:      cloneSource(r.Source),
		Encryption:  r.Encryption,
		Tuning:      r.tuning(),
	}
}

func (r record) tuning() Tuning {
	if r.Tuning == nil {
		return Tuning{}
	}
	return *r.Tuning
}

func (r record) encode() ([]byte, error) {
	b, err := json.MarshalIndent(r, "", "  ")
	return append(b, '\n'), err
}

// parseRecord reads the record of the volume in directory dir. It accepts only
// what Create could have written there, so that a record copied from elsewhere,
// or half of one, is not a volume.
func parseRecord(b []byte, dir string) (record, error) {
	if len(b) == 0 {
		return record{}, errors.New("empty")
	}
	var r record
	if err := decodeStrict(b, recordVersion, &r); err != nil {
		return record{}, err
	}
	s, err := r.spec().normalise()
	if err != nil {
		return record{}, err
	}
	if field, _, _ := difference(r, s); field != "" {
		return record{}, fmt.Errorf("incomplete: it does not say the %s", field)
	}
	if want := DirName(r.Name); want != dir {
		return record{}, fmt.Errorf("it is the record of volume %q, which belongs in directory %s", r.Name, want)
	}
	return r, nil
}

// normalise fills in the defaults and returns a *SpecError for what no pool can
// make. It does not look at minimum sizes, which depend on mkfs.
func (s Spec) normalise() (Spec, error) {
	if err := checkName(s.Name); err != nil {
		return s, err
	}
	if s.Allocation == "" {
		s.Allocation = Thick
	}
	if s.BlockSize == 0 {
		s.BlockSize = 4096
	}
	if s.DirectIO == "" {
		s.DirectIO = "auto"
	}
	switch {
	case s.Size <= 0:
		return s, &SpecError{"Size", "must be positive"}
	case s.Size%MiB != 0:
		return s, &SpecError{"Size", fmt.Sprintf("%d is not a multiple of 1 MiB", s.Size)}
	case s.Allocation != Thick && s.Allocation != Thin:
		return s, &SpecError{"Allocation", fmt.Sprintf("%q is neither thick nor thin", s.Allocation)}
	case !slices.Contains([]int{512, 1024, 2048, 4096}, s.BlockSize):
		return s, &SpecError{"BlockSize", fmt.Sprintf("%d is not 512, 1024, 2048 or 4096", s.BlockSize)}
	case !slices.Contains([]string{"auto", "on", "off"}, s.DirectIO):
		return s, &SpecError{"DirectIO", fmt.Sprintf("%q is not auto, on or off", s.DirectIO)}
	case s.Filesystem != "" && minimumSizes[s.Filesystem] == 0:
		return s, &SpecError{"Filesystem", fmt.Sprintf("%q is not ext2, ext3, ext4, xfs or btrfs", s.Filesystem)}
	case s.Ephemeral != nil && s.Ephemeral.Target == "":
		return s, &SpecError{"Ephemeral", "has no target"}
	}
	if err := errors.Join(s.checkEncryption(), s.Source.check(), s.Tuning.check(s.Allocation)); err != nil {
		return s, err
	}
	options, err := ParseMkfsOptions(s.Filesystem, s.MkfsOptions)
	s.MkfsOptions = options
	if n := len(strings.Join(options, " ")); err == nil && n > maxMkfsOptions { // some may be repeated
		return s, &SpecError{"MkfsOptions", fmt.Sprintf("have %d bytes, more than %d", n, maxMkfsOptions)}
	}
	return s, err
}

func checkName(name string) error {
	switch {
	case name == "":
		return &SpecError{"Name", "is empty"}
	case len(name) > maxNameLength:
		return &SpecError{"Name", fmt.Sprintf("has %d bytes, more than %d", len(name), maxNameLength)}
	case !utf8.ValidString(name):
		return &SpecError{"Name", "is not UTF-8"}
	case strings.ContainsRune(name, 0):
		return &SpecError{"Name", "contains NUL"}
	}
	return nil
}

// equal is the one place that compares a volume with what is asked of it. The
// error wraps ErrIncompatible and names the first field that differs.
func equal(r record, s Spec) error {
	if field, has, want := difference(r, s); field != "" {
		return fmt.Errorf("%w: its %s is %#v, asked for %#v", ErrIncompatible, field, has, want)
	}
	return nil
}

func difference(r record, s Spec) (field string, has, want any) {
	type pair struct {
		field     string
		has, want any
	}
	target := func(e *Ephemeral) string {
		if e == nil {
			return ""
		}
		return e.Target
	}
	for _, p := range []pair{
		{"name", r.Name, s.Name},
		{"size", r.Size, s.Size},
		{"allocation", string(r.Allocation), string(s.Allocation)},
		{"filesystem", r.Filesystem, s.Filesystem},
		{"block size", r.BlockSize, s.BlockSize},
		{"direct I/O", r.DirectIO, s.DirectIO},
		{"mkfs options", strings.Join(r.MkfsOptions, " "), strings.Join(s.MkfsOptions, " ")},
		{"source", r.Source.String(), s.Source.String()},
		{"encryption", r.Encryption.String(), s.Encryption.String()},
		{"ephemeral target", target(r.Ephemeral), target(s.Ephemeral)},
	} {
		if p.has != p.want {
			return p.field, p.has, p.want
		}
	}
	return "", nil, nil
}
