package survey

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/csi-loop/csi-loop/pkg/driver"
	"github.com/csi-loop/csi-loop/pkg/image"
)

// Level grades a finding.
type Level string

// The levels, worst last.
const (
	OK      Level = "ok"
	Note    Level = "note"    // good to know
	Warning Level = "warning" // works, but not as it should
	Problem Level = "problem" // something does not work
)

// Finding is the result of one check.
type Finding struct {
	Level   Level  `json:"level"`
	Subject string `json:"subject"` // what was looked at
	Message string `json:"message"`
	// Fix is the command that mends it, or words where no command can.
	Fix string `json:"fix,omitempty"`
	// Repairable: Repair mends it.
	Repairable bool `json:"repairable,omitempty"`
}

// findings collects.
type findings []Finding

func (f *findings) addf(level Level, subject, fix, format string, args ...any) {
	*f = append(*f, Finding{Level: level, Subject: subject, Fix: fix, Message: fmt.Sprintf(format, args...)})
}

// CheckSite judges what Look found. serving says that csi-loop runs: then what is
// under way is no leftover.
func CheckSite(s *Site, cfg Config, serving bool) []Finding {
	var f findings
	for _, err := range s.Blind {
		f.addf(Problem, "node", "run it as root, in the node's own namespaces or in csi-loop's container", "cannot look: %v", err)
	}
	if len(s.Pools) == 0 {
		f.addf(Note, "pools", "give the flags of serve, its --config, or its environment", "no pool is named, so none is looked at")
	}
	for i, p := range s.Pools {
		f.pool(p, cfg.Pools[i], serving)
	}
	f.copies(s.Pools)
	for _, p := range s.Pools {
		for _, v := range p.Volumes {
			f.volume(p, v)
		}
		for _, v := range p.Templates {
			f.template(p, v)
		}
	}
	for _, v := range s.Snapshots {
		f.snapshot(v, serving)
	}
	f.devices(s)
	f.records(s, serving)
	ours := 0
	for _, d := range s.Devices {
		if d.State != Foreign {
			ours++
		}
	}
	switch {
	case cfg.MaxDevices > 0 && ours >= cfg.MaxDevices:
		f.addf(Warning, "loop devices", "raise --loop-devices-max", "%d are attached, the limit is %d: no more volumes can be staged", ours, cfg.MaxDevices)
	case len(s.Blind) == 0:
		f.addf(OK, "loop devices", "", "%d bound, %d of them by csi-loop", len(s.Devices), ours)
	}
	return f
}

func (f *findings) pool(p image.PoolView, cfg image.Config, serving bool) {
	subject := "pool " + p.Name
	switch {
	case p.Err != nil:
		f.addf(Problem, subject, fixOfPool(cfg), "%v", p.Err)
		return
	case p.New:
		f.addf(Note, subject, "", "%s on %s is empty: csi-loop makes the pool at its start", p.Path, p.Filesystem)
	default:
		f.addf(OK, subject, "", "%s (%s) on %s, %s of %s free, %d volumes, %d snapshots, %d templates",
			p.Path, p.ID, p.Filesystem, Bytes(p.Usage.Free), Bytes(p.Usage.Size), len(p.Volumes), len(p.Snapshots), len(p.Templates))
	}
	if p.NoThick {
		f.addf(Warning, subject, "put the pool on ext4, XFS or btrfs", "%s cannot promise space: only thin volumes can be made", p.Filesystem)
	}
	switch {
	case p.DirectIO == 0 && !p.New:
		f.addf(Warning, subject, "put the pool on ext4, XFS or btrfs", "no direct I/O on %s: pages are cached twice", p.Filesystem)
	case p.DirectIO > 4096:
		f.addf(Warning, subject, "", "direct I/O needs an alignment of %d bytes, volumes have blocks of 4096 at most: they go without it", p.DirectIO)
	case p.DirectIO > 0:
		f.addf(OK, subject, "", "direct I/O, aligned to %d bytes", p.DirectIO)
	}
	if p.Reflinks {
		f.addf(OK, subject, "", "files can share blocks: snapshots are made at once")
	} else {
		f.addf(Note, subject, "", "files cannot share blocks on this %s: a snapshot is a copy", p.Filesystem)
	}
	for _, problem := range p.Problems {
		level := Problem
		if problem.Kind == image.Degraded {
			level = Warning
		}
		f.addf(level, subject, problem.Action, "%s: %s", problem.Reason, problem.Message)
	}
	for _, name := range p.Exposed {
		f.repairablef(Warning, subject, "chmod go= "+Quote(filepath.Join(p.Path, name)), "%s can be read or written by others than root", name)
	}
	for _, name := range p.Leftovers {
		if serving {
			f.addf(Note, subject, "", "%s: a call is under way, or was interrupted; the next start removes it", name)
			continue
		}
		f.repairablef(Warning, subject, "start csi-loop, or csi-loop doctor --repair", "%s was left by an interrupted call and keeps its space", name)
	}
}

// repairablef is addf for what Repair mends.
func (f *findings) repairablef(level Level, subject, fix, format string, args ...any) {
	f.addf(level, subject, fix, format, args...)
	(*f)[len(*f)-1].Repairable = true
}

// fixOfPool finds what is likely to help a pool that cannot be used.
func fixOfPool(c image.Config) string {
	path := Quote(c.Path)
	st, err := os.Stat(c.Path)
	switch {
	case os.IsNotExist(err) && (c.Expect.MountPoint || c.Expect.UUID != ""):
		return "mount the pool's disk: mount " + path
	case os.IsNotExist(err):
		return "mkdir -p -m 0700 " + path + ", or mount its disk first"
	case err != nil:
		return ""
	case !st.IsDir():
		return "name a directory"
	case st.Mode().Perm()&0o022 != 0:
		return "chmod go-w " + path
	}
	return "findmnt -T " + path + " shows what is mounted there"
}

// copies finds pools with one ID.
func (f *findings) copies(pools []image.PoolView) {
	for i, p := range pools {
		for _, o := range pools[:i] {
			if p.ID != "" && p.ID == o.ID {
				f.addf(Problem, "pool "+p.Name, "remove the copy from the configuration; csi-loop does not start with both",
					"it has the ID of pool %s (%s): one is a copy of the other", o.Name, p.ID)
			}
		}
	}
}

func (f *findings) volume(p image.PoolView, v image.VolumeView) {
	subject := "volume " + v.ID
	if v.Err != nil {
		_, dir, _ := strings.Cut(v.ID, ".")
		path := Quote(filepath.Join(p.Path, "volumes", dir))
		f.addf(Problem, subject, image.RecordProblem(v.Err).Action+" ("+path+"); if nobody needs the volume, stop csi-loop and rm -r "+path, "refused: %v", v.Err)
		return
	}
	for _, problem := range v.Problems {
		path := Quote(filepath.Join(p.Path, "volumes", image.DirName(v.Name), "disk.img"))
		switch {
		case problem.Reason == image.GrowthUnfinished:
			f.repairablef(Warning, subject, problem.Action, "%s", problem.Message)
		case problem.Reason == "PoolNearlyFull": // the pool's finding
		case problem.Kind == image.Degraded:
			f.addf(Warning, subject, problem.Action, "%s: %s", problem.Reason, problem.Message)
		default:
			f.addf(Problem, subject, problem.Action+" ("+path+")", "%s: %s", problem.Reason, problem.Message)
		}
	}
}

func (f *findings) snapshot(v Snapshot, serving bool) {
	subject := "snapshot " + v.ID
	switch v.State {
	case Refused, Damaged:
		f.addf(Problem, subject, v.fix, "%s: %s", v.State, v.Problem)
	case Unfinished:
		level := Warning
		if serving {
			level = Note
		}
		f.addf(level, subject, "start csi-loop: it removes the snapshot", "it is part of a group snapshot (%s) that was not completed", v.Group)
	}
}

func (f *findings) template(p image.PoolView, v image.TemplateView) {
	err := v.Err
	if err == nil {
		err = v.ImageErr
	}
	if err == nil {
		made := 0
		for _, x := range p.Volumes {
			if x.Source != nil && x.Source.Template == v.ID {
				made++
			}
		}
		f.addf(OK, "template "+v.ID, "", "%s, %s, in pool %s: %d volumes were made of it", Bytes(v.Size), or(v.Filesystem, "raw"), p.Name, made)
		return
	}
	_, dir, _ := strings.Cut(v.ID, ".")
	path := Quote(filepath.Join(p.Path, "templates", dir))
	fix, damaged := image.SnapshotProblem(err)
	if damaged {
		fix.Action += "; the template is " + path + ", and no volume needs it: where its source is still there, stop csi-loop, rm -r " + path + ", start it, and make the template anew"
	}
	f.addf(Problem, "template "+v.ID, fix.Action, "%v", err)
}

func (f *findings) devices(s *Site) {
	writers := map[string][]Device{}
	for _, d := range s.Devices {
		subject := "device " + d.Path
		if d.State == Foreign {
			continue
		}
		v, known := s.images[d.info.Image]
		if known && !d.ReadOnly {
			writers[v.ID] = append(writers[v.ID], d)
		}
		detach := "losetup -d " + d.Path
		if d.MappingName != "" {
			detach = "dmsetup remove " + d.MappingName + ", then " + detach
		}
		if len(d.Mounts) > 0 {
			detach = "umount " + quoteAll(d.Mounts) + ", then " + detach
		}
		switch {
		case !known && d.State == Attached:
			f.imageless(s, d, detach)
		case d.State == Attached:
			f.addf(Warning, subject, "if nobody uses it: "+detach, "it shows volume %s, and no record says why: attached by hand, or the state directory was lost; csi-loop leaves it alone", d.Volume)
		case d.State == Staged && d.MappingName != "" && len(d.Mounts) == 0 && known && v.Filesystem != "":
			f.addf(Note, subject, "", "%s lies over it and nothing is mounted: a call is under way, or was cut short; the next call for volume %s goes on", d.Mapping, d.Volume)
		case known && v.Allocation == image.Thick && d.Discard && d.Tag == driver.TagOf(v.ID):
			f.addf(Problem, subject, fmt.Sprintf("echo 0 > /sys/block/loop%d/queue/discard_max_bytes", d.Number),
				"it accepts discards, and volume %s is thick: its blocks can be given back and lost", v.ID)
		}
		if known && d.Size < v.Size && d.SizeLimit == 0 {
			f.addf(Warning, subject, "expand the claim again, or losetup -c "+d.Path, "it has %s, its image %s: growth was not completed on the node", Bytes(d.Size), Bytes(v.Size))
		}
	}
	for id, w := range writers {
		if len(w) > 1 {
			paths := make([]string, len(w))
			for i, d := range w {
				paths[i] = d.Path
			}
			f.addf(Problem, "volume "+id, "stop its pods, and losetup -d the device that csi-loop did not attach",
				"%d devices write to its image (%s): a filesystem that is mounted twice is destroyed", len(w), strings.Join(paths, " "))
		}
	}
}

// imageless is of a device whose image is found in no pool.
func (f *findings) imageless(s *Site, d Device, detach string) {
	if s.removed(d.Volume) {
		f.addf(Warning, "device "+d.Path, detach, "it keeps an image of volume %s that is removed, and its space (%s)", d.Volume, d.Image)
		return
	}
	f.addf(Warning, "device "+d.Path, "see to the pool and the volume first; if nobody uses the device, and nobody needs what it shows: "+detach,
		"it shows an image of volume %s (%s) that is not found in the pool, and may be all that is left of the volume", d.Volume, d.Image)
}

func (f *findings) records(s *Site, serving bool) {
	for _, r := range s.Records {
		if r.Stale {
			f.addf(Note, "record "+r.File, "", "it is of an earlier boot, or not sound; the next start drops it")
			continue
		}
		subject := "volume " + r.VolumeID
		restart := "start csi-loop: it looks again"
		if serving {
			restart = "restart csi-loop, and delete the pods that use the volume"
		}
		bound := slices.ContainsFunc(s.Devices, func(d Device) bool { return slices.Contains(r.Devices, d.info.Ref) })
		var mounts, readOnly []string
		small := false
		for _, d := range s.Devices {
			if slices.Contains(r.Devices, d.info.Ref) {
				mounts, readOnly, small = append(mounts, d.Mounts...), append(readOnly, d.readOnly...), small || d.small
			}
		}
		switch {
		case len(s.Blind) > 0: // what is missing may be what could not be looked at
		case len(r.Devices) == 0:
			f.addf(Note, subject, restart, "its staging at %s was begun and not completed", r.StagingPath)
		case !bound:
			f.addf(Warning, subject, restart, "it is staged at %s on record, and its loop device is gone", r.StagingPath)
		case !r.Block && !r.Ephemeral && !slices.Contains(mounts, r.StagingPath):
			f.addf(Warning, subject, restart, "it is staged at %s on record, and not mounted there", r.StagingPath)
		default:
			for _, t := range r.Targets {
				if !slices.Contains(mounts, t) {
					f.addf(Warning, subject, restart, "it is published at %s on record, and not shown there", t)
				}
			}
			f.filesystem(r, subject, slices.Contains(readOnly, r.StagingPath), small)
		}
	}
}

// filesystem says what is wrong with the filesystem of a volume that is staged.
func (f *findings) filesystem(r driver.Staged, subject string, readOnly, small bool) {
	switch {
	case r.Block || r.ReadOnly:
	case readOnly:
		f.addf(Problem, subject, "dmesg, then delete the pods that use the volume: it is checked when it is staged anew",
			"its filesystem at %s takes no more writes: the kernel found an error in it, or somebody remounted it", r.StagingPath)
	case small && r.Mapped == "":
		f.addf(Warning, subject, "expand the claim again; if csi-loop's log names CAP_SYS_RESOURCE, give it that",
			"its filesystem at %s is smaller than its device: it did not grow", r.StagingPath)
	}
}

// Quote makes a word safe for a shell.
func Quote(word string) string {
	plain := func(r rune) bool {
		return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("/._-+:@%,=", r)
	}
	if word != "" && !strings.ContainsFunc(word, func(r rune) bool { return !plain(r) }) {
		return word
	}
	return "'" + strings.ReplaceAll(word, "'", `'\''`) + "'"
}

func quoteAll(words []string) string {
	quoted := make([]string, len(words))
	for i, w := range words {
		quoted[i] = Quote(w)
	}
	return strings.Join(quoted, " ")
}

// Bytes shows a number of bytes to people.
func Bytes(n int64) string {
	units := []string{"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"}
	value, i := float64(n), 0
	for value >= 1024 && i < len(units)-1 {
		value, i = value/1024, i+1
	}
	if i == 0 {
		return fmt.Sprintf("%d B", n)
	}
	return fmt.Sprintf("%.1f %s", value, units[i])
}
