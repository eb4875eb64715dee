package driver

import (
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/csi-loop/csi-loop/pkg/loop"
)

// freezeSuffix ends the names of freeze records, which lie beside the stage records.
const freezeSuffix = ".freeze"

// freezeRecord says what was about to be frozen. Its file is locked as long as
// anybody lives who will thaw it.
type freezeRecord struct {
	Version int            `json:"version"`
	BootID  string         `json:"bootID"`
	Volumes []frozenVolume `json:"volumes"`
	// Expedited says that the kernel is made to hurry meanwhile.
	Expedited bool `json:"expedited,omitempty"`

	path string
	file *os.File // nil once it is closed
}

// frozenVolume is one filesystem of a freeze record.
type frozenVolume struct {
	VolumeID string      `json:"volumeID"`
	Image    loop.FileID `json:"image"`
	Device   binding     `json:"device"`
	FSType   string      `json:"fsType"`
}

// putFreeze writes a record of what is about to be frozen.
func (s *nodeState) putFreeze(all []writers, expedited bool) (*freezeRecord, error) {
	r := &freezeRecord{Version: recordVersion, BootID: s.bootID, Expedited: expedited}
	for _, w := range all {
		if w.path != "" {
			r.Volumes = append(r.Volumes, frozenVolume{VolumeID: w.volume.ID, Image: w.image, Device: w.device, FSType: w.fsType})
		}
	}
	b, err := json.Marshal(r) //nolint:musttag // the fields of loop.Ref and loop.FileID keep their names
	if err != nil {
		return nil, fmt.Errorf("freeze record: %w", err)
	}
	name := rand.Text() + freezeSuffix
	r.path = filepath.Join(s.dir, name)
	// Locked before it has its name: nobody sees it unlocked.
	if r.file, err = os.OpenFile(filepath.Join(s.dir, ".new-"+name), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600); err != nil {
		return nil, fmt.Errorf("freeze record: %w", err)
	}
	if _, err = r.file.Write(b); err == nil {
		err = lockFile(r.file, lockTime)
	}
	if err == nil {
		err = os.Rename(r.file.Name(), r.path)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("freeze record: %w", err), removeFile(r.file.Name()), r.file.Close())
	}
	return r, nil
}

// drop forgets the record.
func (r *freezeRecord) drop() error { return errors.Join(removeFile(r.path), r.keep()) }

// keep leaves it for the next start. Again, and after drop, it is harmless.
func (r *freezeRecord) keep() error {
	if r.file == nil {
		return nil
	}
	err := r.file.Close()
	r.file = nil
	return err
}

// freezes returns the records that an earlier process left, of this boot. It waits for
// a helper of that process which is thawing now; one that still does after a while is
// not waited for, as it does what the record is for.
func (s *nodeState) freezes() ([]*freezeRecord, error) {
	paths, err := filepath.Glob(filepath.Join(s.dir, "*"+freezeSuffix))
	if err != nil {
		return nil, err
	}
	var all []*freezeRecord
	var errs []error
	for _, path := range paths {
		r, err := s.freeze(path)
		if err != nil {
			errs = append(errs, fmt.Errorf("freeze record %s: %w", path, err))
		}
		if r != nil {
			all = append(all, r)
		}
	}
	return all, errors.Join(errs...)
}

// freeze reads and locks one record; nil if it is of no use.
func (s *nodeState) freeze(path string) (*freezeRecord, error) {
	r, err := s.readFreeze(path)
	if errors.Is(err, errNoRecord) {
		return nil, errors.Join(fmt.Errorf("%w: it is removed, and what it was of is not thawed", err), removeFile(path))
	}
	if err != nil {
		return nil, err
	}
	if r.BootID != s.bootID {
		return nil, r.drop()
	}
	if err := lockFile(r.file, thawTime); err != nil {
		return nil, errors.Join(fmt.Errorf("a helper is still thawing: %w", err), r.keep())
	}
	return r, nil
}

// readFreeze reads a record, of whichever boot, and leaves its file open. The error is
// errNoRecord for what is none.
func (s *nodeState) readFreeze(path string) (*freezeRecord, error) {
	b, err := readState(path)
	if err != nil {
		return nil, err
	}
	r := &freezeRecord{}
	if err := json.Unmarshal(b, r); err != nil { //nolint:musttag // as above
		return nil, fmt.Errorf("%w: %w", errNoRecord, err)
	}
	if r.Version != recordVersion {
		return nil, fmt.Errorf("%w: version %d, not %d", errNoRecord, r.Version, recordVersion)
	}
	r.path = path
	r.file, err = os.OpenFile(path, os.O_RDWR, 0)
	return r, err
}

// FreezeRecords returns the paths of the freeze records in a directory of the state
// directory that count: of this boot, and with nobody who is thawing. It may run beside
// the driver, whose own records are locked while it freezes.
func FreezeRecords(dir string) []string {
	paths, err := filepath.Glob(filepath.Join(dir, "*"+freezeSuffix))
	if err != nil {
		return nil
	}
	s := &nodeState{dir: dir, bootID: bootID()}
	return slices.DeleteFunc(paths, func(path string) bool {
		if strings.HasPrefix(filepath.Base(path), ".") { // not in force yet
			return true
		}
		r, err := s.readFreeze(path)
		if err != nil { // one that cannot be read may count
			return errors.Is(err, fs.ErrNotExist) || errors.Is(err, errNoRecord)
		}
		defer func() { _ = r.keep() }()
		return r.BootID != s.bootID || lockFile(r.file, 0) != nil
	})
}

// thawTime is how long a helper that is thawing is waited for.
const thawTime = 10 * time.Second
