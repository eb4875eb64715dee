// Package cgroup limits what the processes of a pod read from and write to a block
// device, by io.max of the pod's cgroup (version 2).
//
// It finds the cgroup that the kubelet made for a pod by the pod's UID, whichever of
// the two cgroup drivers the kubelet uses, and asks the kernel each time: nothing is
// remembered. It makes no cgroup, moves no process, and switches no controller on:
// those belong to the kubelet and to systemd.
//
// The kernel counts reads, direct writes, and the writing back of what a pod's
// processes have dirtied in ext4, XFS or btrfs, for the pod. Limits of several devices
// and several pods know nothing of each other.
package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
)

// DefaultRoot is where the hierarchy is mounted.
const DefaultRoot = "/sys/fs/cgroup"

// Errors that callers tell apart with errors.Is.
var (
	// ErrUnsupported: nobody's I/O can be limited here: there is no hierarchy of
	// version 2, or its io controller is not on for pods.
	ErrUnsupported = errors.New("I/O cannot be limited on this node")
	// ErrNoPod: the pod has no cgroup, not yet or not any more.
	ErrNoPod = errors.New("the pod has no cgroup")
)

// Device is a block device.
type Device struct{ Major, Minor uint32 }

func (d Device) String() string { return fmt.Sprintf("%d:%d", d.Major, d.Minor) }

// Limits of a device: operations, and bytes, in a second. 0 is no limit; a nil field
// is left as it is.
type Limits struct {
	ReadIOPS, WriteIOPS, ReadBandwidth, WriteBandwidth *int64
}

// None tells whether all of it is left as it is.
func (l Limits) None() bool { return l == Limits{} }

// keys are the words of io.max, in one order.
func (l Limits) keys() []struct {
	name  string
	value *int64
} {
	return []struct {
		name  string
		value *int64
	}{{"rbps", l.ReadBandwidth}, {"wbps", l.WriteBandwidth}, {"riops", l.ReadIOPS}, {"wiops", l.WriteIOPS}}
}

// Pods are the cgroups of this node's pods.
type Pods struct {
	root string
	// unified says whether the directory is of a version 2 hierarchy.
	unified func(dir string) (bool, error)
}

// NewPods looks for them below root, DefaultRoot if it is empty.
func NewPods(root string) *Pods {
	if root == "" {
		root = DefaultRoot
	}
	return &Pods{root: root, unified: isUnified}
}

// Supported returns an ErrUnsupported that says what is missing, or nil when pods with
// the io controller may be there.
func (p *Pods) Supported() error {
	unified, err := p.unified(p.root)
	switch {
	case err != nil:
		return fmt.Errorf("%w: %w", ErrUnsupported, err)
	case !unified:
		return fmt.Errorf("%w: %s is not cgroup version 2", ErrUnsupported, p.root)
	}
	controllers, err := os.ReadFile(filepath.Join(p.root, "cgroup.controllers"))
	if err != nil {
		return fmt.Errorf("%w: %w", ErrUnsupported, err)
	}
	for name := range strings.FieldsSeq(string(controllers)) {
		if name == "io" {
			return nil
		}
	}
	return fmt.Errorf("%w: the hierarchy at %s has no io controller", ErrUnsupported, p.root)
}

// Limit makes the limits hold for the processes of a pod. That they do already is
// success, and writes nothing. Errors: ErrUnsupported, ErrNoPod, or the kernel's.
func (p *Pods) Limit(uid string, d Device, l Limits) error {
	if l.None() {
		return nil
	}
	file, err := p.ioMax(uid)
	if err != nil {
		return err
	}
	have, err := readLimits(file, d)
	if err != nil {
		return err
	}
	line := []string{d.String()}
	for _, k := range l.keys() {
		if k.value != nil && have[k.name] != word(*k.value) {
			line = append(line, k.name+"="+word(*k.value))
		}
	}
	if len(line) == 1 {
		return nil
	}
	f, err := os.OpenFile(file, os.O_WRONLY, 0)
	if err != nil {
		return p.gone(err)
	}
	_, err = f.WriteString(strings.Join(line, " "))
	return p.gone(errors.Join(err, f.Close()))
}

// gone makes ErrNoPod of the errors that files of a removed cgroup give.
func (p *Pods) gone(err error) error {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, errNoDevice) {
		return fmt.Errorf("%w: %w", ErrNoPod, err)
	}
	return err
}

// word is a limit as io.max shows it.
func word(limit int64) string {
	if limit == 0 {
		return "max"
	}
	return strconv.FormatInt(limit, 10)
}

// readLimits reads what io.max says of a device: "max" for each word that it says
// nothing of.
func readLimits(file string, d Device) (map[string]string, error) {
	have := map[string]string{}
	for _, k := range (Limits{}).keys() {
		have[k.name] = "max"
	}
	b, err := os.ReadFile(file)
	if errors.Is(err, errNoDevice) || errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: %w", ErrNoPod, err)
	} else if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(b)) {
		fields := strings.Fields(line)
		if len(fields) == 0 || fields[0] != d.String() {
			continue
		}
		for _, pair := range fields[1:] {
			if key, value, ok := strings.Cut(pair, "="); ok {
				have[key] = value
			}
		}
	}
	return have, nil
}

// uids are what the kubelet gives pods: UUIDs, or hashes of static pods' manifests.
var uids = regexp.MustCompile(`^[A-Za-z0-9][-A-Za-z0-9]{0,62}$`)

// ioMax finds the file of a pod.
func (p *Pods) ioMax(uid string) (string, error) {
	if !uids.MatchString(uid) {
		return "", fmt.Errorf("%w: %q is no UID of a pod", ErrNoPod, uid)
	}
	if err := p.Supported(); err != nil {
		return "", err
	}
	parents, err := p.parents()
	if err != nil {
		return "", err
	}
	for _, dir := range parents {
		for _, pod := range candidates(dir, uid) {
			if _, err := os.Stat(pod); err != nil {
				continue
			}
			file := filepath.Join(pod, "io.max")
			if _, err := os.Stat(file); err != nil {
				return "", fmt.Errorf("%w: the io controller is not on for pods: %w", ErrUnsupported, err)
			}
			return file, nil
		}
	}
	return "", fmt.Errorf("%w: pod %s is nowhere below %s", ErrNoPod, uid, p.root)
}

// parents are the cgroups that the kubelet puts all pods in: kubepods (cgroupfs) or
// kubepods.slice (systemd), at the root, or below another one where the kubelet has
// a --cgroup-root.
func (p *Pods) parents() ([]string, error) {
	entries, err := os.ReadDir(p.root)
	if err != nil {
		return nil, err
	}
	var found []string
	for _, e := range entries {
		if !e.IsDir() {
			continue
		}
		dir := filepath.Join(p.root, e.Name())
		if isKubepods(e.Name()) {
			found = append(found, dir)
			continue
		}
		below, err := os.ReadDir(dir)
		if err != nil {
			continue // it went away
		}
		for _, b := range below {
			if b.IsDir() && isKubepods(b.Name()) {
				found = append(found, filepath.Join(dir, b.Name()))
			}
		}
	}
	return found, nil
}

func isKubepods(name string) bool {
	return name == "kubepods" || name == "kubepods.slice" || strings.HasSuffix(name, "-kubepods.slice")
}

// candidates are where a pod's cgroup may be below that of all pods: guaranteed pods
// are directly in it, the others in one for their class.
func candidates(parent, uid string) []string {
	name, systemd := strings.CutSuffix(filepath.Base(parent), ".slice")
	if !systemd {
		pod := "pod" + uid
		return []string{filepath.Join(parent, pod), filepath.Join(parent, "burstable", pod), filepath.Join(parent, "besteffort", pod)}
	}
	// A slice has the names of all above it in its own, where "-" separates them.
	pod := "-pod" + strings.ReplaceAll(uid, "-", "_") + ".slice"
	paths := []string{filepath.Join(parent, name+pod)}
	for _, class := range []string{"-burstable", "-besteffort"} {
		paths = append(paths, filepath.Join(parent, name+class+".slice", name+class+pod))
	}
	return paths
}
