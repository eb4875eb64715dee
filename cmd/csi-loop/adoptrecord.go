package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// recordPrefix begins the lines of a record that are adopt's own. To YAML they are
// comments, so that the file stays one of PersistentVolumes.
const recordPrefix = "# csi-loop adopt: "

// record is the file of one move of a pool to a node: the PersistentVolumes as they
// were, and how far the move came. Only a record says that a PersistentVolume that is
// missing in the cluster was deleted by adopt, and not by somebody who wants it gone.
type record struct {
	path       string
	pool, node string // empty: the file is no record
	saved      []corev1.PersistentVolume
	begun      map[types.UID]bool // whose deletion adopt began, or was about to
	made       map[types.UID]bool // those of them that have a successor
	complete   bool
}

// readRecord reads a file, which need not be a record.
func readRecord(path string) (*record, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	r := &record{path: path, begun: map[types.UID]bool{}, made: map[types.UID]bool{}}
	for line := range strings.Lines(string(text)) {
		said, own := strings.CutPrefix(line, recordPrefix)
		said, whole := strings.CutSuffix(said, "\n")
		if !own || !whole { // what was not written to its end was not begun either
			continue
		}
		switch words := strings.Fields(said); {
		case len(words) == 4 && words[0] == "pool" && words[2] == "node":
			r.pool, r.node = words[1], words[3]
		case len(words) == 3 && words[0] == "deleting":
			r.begun[types.UID(words[1])] = true
		case len(words) == 3 && words[0] == "created":
			r.made[types.UID(words[1])] = true
		case len(words) == 1 && words[0] == "complete":
			r.complete = true
		}
	}
	if r.pool == "" {
		return r, nil
	}
	if r.saved, err = readVolumes(bytes.NewReader(text)); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return r, nil
}

// missing lists the PersistentVolumes that were deleted and not made again.
func (r *record) missing(inCluster map[string]bool) []corev1.PersistentVolume {
	var all []corev1.PersistentVolume
	for i := range r.saved {
		if pv := &r.saved[i]; r.begun[pv.UID] && !r.made[pv.UID] && !inCluster[pv.Name] {
			all = append(all, *pv)
		}
	}
	return all
}

// overtaken names a PersistentVolume that is neither as the record has it nor where the
// move takes it: another move came later. "" is none.
func (a *adoption) overtaken(r *record, listed []corev1.PersistentVolume) string {
	uids := map[string]types.UID{}
	for i := range r.saved {
		uids[r.saved[i].Name] = r.saved[i].UID
	}
	for i := range listed {
		pv := &listed[i]
		if uid, ok := uids[pv.Name]; ok && uid != pv.UID && a.mine(pv) && !a.there(pv) {
			return pv.Name
		}
	}
	return ""
}

// findRecord finds the record of a move that goes on: of this pool, to this node, not
// complete, and nothing came after it. Without one it returns nil, and the records that
// the next move ends: they are of this pool, not complete, and have nothing that is
// missing. It is an error if PersistentVolumes are missing that only such a record has.
func (a *adoption) findRecord(listed []corev1.PersistentVolume) (found *record, over []*record, err error) {
	inCluster := names(listed)
	paths := []string{a.save}
	if a.save == "" {
		if paths, err = existing(a.saveName()); err != nil {
			return nil, nil, err
		}
	}
	for _, path := range paths {
		r, err := readRecord(path)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			continue
		case err != nil:
			return nil, nil, err
		case r.pool != a.poolID || r.complete:
			continue
		}
		missing, later := r.missing(inCluster), a.overtaken(r, listed)
		switch {
		case len(missing) == 0 && (r.node != a.node || later != ""):
			over = append(over, r)
		case r.node != a.node:
			return nil, nil, fmt.Errorf("%s: a move of the pool to node %s was interrupted, and PersistentVolume %s is missing: complete it with --node=%s first",
				path, r.node, missing[0].Name, r.node)
		case later != "":
			return nil, nil, fmt.Errorf("%s: a move of the pool was interrupted, PersistentVolume %s is missing since, and %s was moved to another node later: "+
				"create from the file what is to be there, and move the file away", path, missing[0].Name, later)
		default:
			found = r
		}
	}
	return found, over, nil
}

func names(all []corev1.PersistentVolume) map[string]bool {
	has := map[string]bool{}
	for i := range all {
		has[all[i].Name] = true
	}
	return has
}

func (a *adoption) saveName() string { return "csi-loop-adopt-" + a.poolID }

// newRecord is for a move that begins. An explicit file that is there is an error.
func (a *adoption) newRecord() (*record, error) {
	r := &record{path: a.save, pool: a.poolID, node: a.node, begun: map[types.UID]bool{}, made: map[types.UID]bool{}}
	for n := 1; ; n++ {
		if a.save == "" {
			r.path = numbered(a.saveName(), n)
		}
		_, err := os.Lstat(r.path)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return r, nil
		case err != nil:
			return nil, err
		case a.save != "":
			return nil, usagef("--save %s: is there, and not of a move of this pool to node %s that was interrupted", a.save, a.node)
		}
	}
}

// start writes the record, durably, with the PersistentVolumes that are to be replaced
// as they are now.
func (r *record) start(steps []step) error {
	for _, s := range steps {
		if s.missing {
			continue
		}
		if i := slices.IndexFunc(r.saved, func(pv corev1.PersistentVolume) bool { return pv.UID == s.pv.UID }); i >= 0 {
			r.saved[i] = *s.pv
		} else {
			r.saved = append(r.saved, *s.pv)
		}
	}
	var text bytes.Buffer
	fmt.Fprintf(&text, "%spool %s node %s\n", recordPrefix, r.pool, r.node)
	var objects []any
	for i := range r.saved {
		pv := r.saved[i].DeepCopy()
		pv.TypeMeta = metav1.TypeMeta{APIVersion: "v1", Kind: "PersistentVolume"}
		objects = append(objects, pv)
	}
	if err := printManifests(&text, objects...); err != nil {
		return err
	}
	for i := range r.saved {
		pv := &r.saved[i]
		if r.begun[pv.UID] {
			fmt.Fprintf(&text, "%sdeleting %s %s\n", recordPrefix, pv.UID, pv.Name)
		}
		if r.made[pv.UID] {
			fmt.Fprintf(&text, "%screated %s %s\n", recordPrefix, pv.UID, pv.Name)
		}
	}
	if err := writeDurably(r.path+".new", os.O_CREATE|os.O_TRUNC, text.Bytes()); err != nil {
		return err
	}
	if err := os.Rename(r.path+".new", r.path); err != nil {
		return err
	}
	return syncDir(r.path)
}

// deleting says, durably, that the deletion of a PersistentVolume begins.
func (r *record) deleting(pv *corev1.PersistentVolume) error {
	return r.say(fmt.Sprintf("deleting %s %s", pv.UID, pv.Name))
}

// created says, durably, that a PersistentVolume has its successor.
func (r *record) created(pv *corev1.PersistentVolume) error {
	return r.say(fmt.Sprintf("created %s %s", pv.UID, pv.Name))
}

// finish says, durably, that the move is complete: nothing goes on with it.
func (r *record) finish() error { return r.say("complete") }

// say appends a line, which begins one of its own whatever an interrupted call left.
func (r *record) say(what string) error {
	return writeDurably(r.path, os.O_APPEND, []byte("\n"+recordPrefix+what+"\n"))
}

func writeDurably(path string, flags int, text []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|flags, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}
