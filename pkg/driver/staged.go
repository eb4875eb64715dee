package driver

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/csi-loop/csi-loop/pkg/loop"
)

// Staged is what a stage record says of one volume. It is a hint: the kernel
// decides what is bound and mounted.
type Staged struct {
	NodeID, VolumeID string
	// Stale: the record is of another boot, or is no record at all (then all but
	// NodeID and File is empty). The driver drops it at its next start.
	Stale bool
	File  string

	StagingPath string // "" for inline ephemeral volumes
	Block       bool
	ReadOnly    bool
	Ephemeral   bool
	Mapped      string     // path of the image of a mapped volume
	Devices     []loop.Ref // none until bound; a second one is read-only
	Targets     []string   // sorted
}

// StagedVolumes reads the stage records of a node, or of all nodes of the state
// directory when nodeID is "". It takes no lock, and may run beside the driver. A
// directory that does not exist has none.
func StagedVolumes(stateDir, nodeID string) ([]Staged, error) {
	nodes := []string{nodeID}
	if nodeID == "" {
		nodes = nil
		entries, err := readDir(stateDir)
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			if e.IsDir() {
				nodes = append(nodes, e.Name())
			}
		}
	}
	var all []Staged
	for _, node := range nodes {
		dir := filepath.Join(stateDir, node)
		entries, err := readDir(dir)
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			if !strings.HasSuffix(e.Name(), ".json") || strings.HasPrefix(e.Name(), ".") {
				continue
			}
			data, err := readState(filepath.Join(dir, e.Name()))
			if errors.Is(err, fs.ErrNotExist) {
				continue // unstaged a moment ago
			} else if err != nil && !errors.Is(err, errNoRecord) {
				return nil, fmt.Errorf("stage record: %w", err)
			}
			all = append(all, stagedOf(node, filepath.Join(dir, e.Name()), data))
		}
	}
	return all, nil
}

// readDir lists a directory; one that does not exist is empty.
func readDir(dir string) ([]os.DirEntry, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	return entries, nil
}

func stagedOf(node, path string, data []byte) Staged {
	s := Staged{NodeID: node, File: path}
	state := nodeState{dir: filepath.Dir(path), bootID: bootID()}
	r, ok := state.parse(path, data)
	if !ok {
		s.Stale = true
		return s
	}
	s.VolumeID, s.StagingPath, s.Block, s.ReadOnly, s.Ephemeral = r.VolumeID, r.StagingPath, r.Block, r.ReadOnly, r.Ephemeral
	if r.Mapped != nil {
		s.Mapped = r.Mapped.Image
	}
	for _, b := range []binding{r.Device, r.ReadDevice} {
		if !b.none() {
			s.Devices = append(s.Devices, b.ref())
		}
	}
	s.Targets = slices.Sorted(maps.Keys(r.Targets))
	return s
}

// parse reads a stage record; false when it is none, of another boot or format, or
// not in its place.
func (s *nodeState) parse(path string, data []byte) (r stageRecord, ok bool) {
	err := json.Unmarshal(data, &r) //nolint:musttag // the fields of loop.Ref and loop.FileID keep their names
	return r, err == nil && r.Version == recordVersion && r.BootID == s.bootID && r.VolumeID != "" && s.path(r.VolumeID) == path
}

// TagOf is what the loop devices of a pool's volume show as their tag (losetup's REF).
func TagOf(volumeID string) string { return poolTag(volumeID) }
