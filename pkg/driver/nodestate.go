package driver

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"k8s.io/klog/v2"

	"github.com/csi-loop/csi-loop/pkg/loop"
)

// recordVersion is the version of the stage records' format.
const recordVersion = 1

// stageRecord is what the node remembers of one staged (or inline ephemeral)
// volume: the arguments it was staged with, which a repeated call is compared
// to, and which binding of which loop device serves it.
//
// It lives on a tmpfs (a reboot ends the mounts and the records alike), is
// written before a device is bound, so that what a crash leaves can be
// recognised, and is never trusted about what is mounted or bound: the kernel is
// asked for that.
type stageRecord struct {
	// Version is recordVersion. A record of another one is not believed: what it
	// stands for is found anew.
	Version int `json:"version"`
	// BootID is the boot that the record is of. Devices and mounts end with it.
	BootID      string                  `json:"bootID"`
	VolumeID    string                  `json:"volumeID"`
	StagingPath string                  `json:"stagingPath,omitempty"`
	Block       bool                    `json:"block,omitempty"`
	FSType      string                  `json:"fsType,omitempty"`
	Flags       []string                `json:"flags,omitempty"`
	Mode        string                  `json:"mode,omitempty"`
	ReadOnly    bool                    `json:"readOnly,omitempty"` // no writing through this staging
	Ephemeral   bool                    `json:"ephemeral,omitempty"`
	Encrypted   bool                    `json:"encrypted,omitempty"` // Device without a mapping is not in force
	Mapped      *mappedAttributes       `json:"mapped,omitempty"`
	Image       loop.FileID             `json:"image"`
	Device      binding                 `json:"device"`                    // none until bound
	ReadDevice  binding                 `json:"readOnlyDevice"`            // second, read-only device of a raw block volume, or none
	ReadPending bool                    `json:"readOnlyPending,omitempty"` // ReadDevice is about to be bound
	Targets     map[string]targetRecord `json:"targets,omitempty"`
	// ReadAhead is what the devices read ahead before the volume's parameter was
	// set on them, in bytes, by number; it is set back before they go.
	ReadAhead map[int]int64 `json:"readAheadBefore,omitempty"`
}

// targetRecord is one publication.
type targetRecord struct {
	ReadOnly bool    `json:"readOnly,omitempty"`
	Mode     string  `json:"mode,omitempty"` // "" when recovered
	Device   binding `json:"device"`         // what it shows
	PodUID   string  `json:"podUID,omitempty"`
}

// sameAs says whether a repeated publication asks for the same.
func (t targetRecord) sameAs(o targetRecord) bool {
	return t.ReadOnly == o.ReadOnly && (t.Mode == o.Mode || t.Mode == "")
}

func (t targetRecord) String() string {
	if t.ReadOnly {
		return "read-only, " + t.Mode
	}
	return "writable, " + t.Mode
}

// devices are the bindings that serve the volume; the read-only one first.
func (r stageRecord) devices() []binding {
	return slices.DeleteFunc([]binding{r.ReadDevice, r.Device}, binding.none)
}

// clone makes a copy that shares nothing with r.
func (r stageRecord) clone() stageRecord {
	r.Flags = slices.Clone(r.Flags)
	r.Targets = maps.Clone(r.Targets)
	r.ReadAhead = maps.Clone(r.ReadAhead)
	if r.Mapped != nil {
		m := *r.Mapped
		r.Mapped = &m
	}
	return r
}

// nodeState is the set of stage records, in memory and in a directory.
type nodeState struct {
	dir    string
	bootID string

	mu      sync.Mutex
	records map[string]stageRecord // by volume ID; guarded by mu
}

// maxStateRecord bounds a record of the state directory, in bytes: a hundred times what
// the largest has, of a volume that hundreds of pods use.
const maxStateRecord = 16 << 20

// errNoRecord is a file of the state directory that is none of its records.
var errNoRecord = errors.New("not a record")

// readState reads a file of the state directory, whatever lies there: errNoRecord for
// what is no file, or too large.
func readState(path string) ([]byte, error) {
	st, err := os.Lstat(path)
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("%w: not a regular file", errNoRecord)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxStateRecord+1))
	if err == nil && len(b) > maxStateRecord {
		return nil, fmt.Errorf("%w: more than %d bytes", errNoRecord, maxStateRecord)
	}
	return b, err
}

// openNodeState reads the records below dir, which this process owns. A file that
// is no record is removed: records are hints and can be found anew. So is one that cannot be
// read, but it stays: it may be sound, and is replaced when its volume is staged anew.
func openNodeState(dir string) (*nodeState, error) {
	s := &nodeState{dir: dir, bootID: bootID(), records: make(map[string]stageRecord)}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		if strings.HasPrefix(e.Name(), ".new-") {
			_ = os.Remove(path)
			continue
		}
		if !strings.HasSuffix(e.Name(), ".json") {
			continue
		}
		data, err := readState(path)
		switch {
		case passes(err): // another start can read it
			return nil, fmt.Errorf("stage record: %w", err)
		case err != nil && !errors.Is(err, errNoRecord):
			klog.Background().Error(err, "Cannot read a stage record; what it is of is found anew", "path", path)
			continue
		}
		r, ok := s.parse(path, data)
		if !ok {
			klog.Background().Info("Removing what is no stage record of this boot", "path", path)
			_ = os.Remove(path)
			continue
		}
		s.records[r.VolumeID] = r
	}
	return s, nil
}

// bootID names this boot of the kernel; "" where there is no such name.
func bootID() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// path is where the record of a volume lives. Volume IDs of mapped volumes are
// free text, so the name is a hash.
func (s *nodeState) path(id string) string {
	sum := sha256.Sum256([]byte(id))
	return filepath.Join(s.dir, hex.EncodeToString(sum[:16])+".json")
}

// get returns a copy of the record of a volume.
func (s *nodeState) get(id string) (stageRecord, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r, ok := s.records[id]
	return r.clone(), ok
}

// list returns copies of all records, ordered by volume ID.
func (s *nodeState) list() []stageRecord {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make([]stageRecord, 0, len(s.records))
	for _, id := range slices.Sorted(maps.Keys(s.records)) {
		all = append(all, s.records[id].clone())
	}
	return all
}

// put writes the record, replacing what was there in one step.
// Precondition: the caller holds the volume's lock.
func (s *nodeState) put(r stageRecord) error {
	data, err := s.encode(r)
	if err != nil {
		return err
	}
	path := s.path(r.VolumeID)
	tmp := filepath.Join(s.dir, ".new-"+filepath.Base(path))
	if err := os.WriteFile(tmp, data, 0o600); err != nil {
		return errors.Join(fmt.Errorf("stage record of %q: %w", r.VolumeID, err), removeFile(tmp))
	}
	if err := os.Rename(tmp, path); err != nil {
		return errors.Join(fmt.Errorf("stage record of %q: %w", r.VolumeID, err), removeFile(tmp))
	}
	s.remember(r)
	return nil
}

// note is put for a record that the kernel bears out by itself: of what has ended, or was
// found. What ends must not wait for room in the directory, so that this cannot fail:
// a record that is no longer than the one before is written over it, and another one is
// known to this process only. The next one finds it anew, as after a crash.
// Precondition: the caller holds the volume's lock.
func (s *nodeState) note(ctx context.Context, r stageRecord) {
	err := s.put(r)
	if err == nil {
		return
	}
	data, encodeErr := s.encode(r)
	if encodeErr == nil && overwrite(s.path(r.VolumeID), data) == nil {
		err = nil
	}
	if err != nil {
		klog.FromContext(ctx).Error(err, "Cannot write a stage record; it is kept in memory", "volume", r.VolumeID)
	}
	s.remember(r)
}

func (s *nodeState) encode(r stageRecord) ([]byte, error) {
	r.Version, r.BootID = recordVersion, s.bootID
	data, err := json.Marshal(r) //nolint:musttag // the fields of loop.Ref and loop.FileID keep their names
	if err != nil {
		return nil, fmt.Errorf("stage record of %q: %w", r.VolumeID, err)
	}
	return data, nil
}

func (s *nodeState) remember(r stageRecord) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.records[r.VolumeID] = r.clone()
}

// overwrite replaces a file's content in place, by one that is not longer and is filled up
// with blanks: that needs no room. Half of it is no record, and removed at the next start.
func overwrite(path string, data []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	st, err := f.Stat()
	if err == nil && int64(len(data)) > st.Size() {
		err = fmt.Errorf("%d bytes do not fit into %d", len(data), st.Size())
	}
	if err == nil {
		_, err = f.WriteAt(append(data, bytes.Repeat([]byte(" "), int(st.Size())-len(data))...), 0)
	}
	return errors.Join(err, f.Close())
}

// keep returns a function that makes the record of a volume again what it is now.
// Precondition, for both: the caller holds the volume's lock.
func (s *nodeState) keep(id string) (restore func() error) {
	r, ok := s.get(id)
	return func() error {
		if ok {
			return s.put(r)
		}
		return s.drop(id)
	}
}

// drop forgets a volume. Unknown is success.
// Precondition: the caller holds the volume's lock.
func (s *nodeState) drop(id string) error {
	if _, ok := s.get(id); !ok {
		return nil
	}
	if err := removeFile(s.path(id)); err != nil {
		return fmt.Errorf("stage record of %q: %w", id, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.records, id)
	return nil
}

// removeFile removes a file; a missing one is success.
func removeFile(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
