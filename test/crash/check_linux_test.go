package crash

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

// settle is how long what ends by itself may take: a device after its last close,
// a child of a driver that was killed, an unlink in the background.
// A machine that is busy takes as long for it as for all else.
var settle = patience

// wrong lists everything that is not as it should be by what was acknowledged.
// Before it speaks it waits for what ends by itself.
func (s *site) wrong() []string { return s.wrongBut(settle, s.trap.unsynced) }

// wrongAfterFailure is wrong after an answer that promised nothing: what was taken back
// need not be on disk.
func (s *site) wrongAfterFailure() []string {
	return s.wrongBut(settle, func() []string { return nil })
}

func (s *site) wrongBut(limit time.Duration, unsynced func() []string) []string {
	var found []string
	_ = waitFor(limit, func() string {
		found = slices.Concat(s.leftovers(), s.unaccounted(), unsynced(), hurried())
		return strings.Join(found, "\n")
	})
	for _, v := range s.volumes {
		if err := v.unhealthy(); err != nil {
			found = append(found, fmt.Sprintf("volume %s: %v", v.name, err))
		}
	}
	return found
}

// unhealthy looks at the size and the data of one volume.
func (v *volume) unhealthy() error {
	if v.exists {
		st, err := os.Stat(v.image())
		if err != nil {
			return err
		}
		if want := v.size + v.header(); st.Size() != want {
			return fmt.Errorf("the image has %d bytes, want %d", st.Size(), want)
		}
		if blocks := st.Sys().(*syscall.Stat_t).Blocks * 512; !v.thin && blocks < v.size {
			return fmt.Errorf("a thick image of %d bytes has %d bytes of blocks", v.size, blocks)
		}
	}
	if last := waitFor(patience, v.untuned); last != "" {
		return errors.New(last)
	}
	for n, there := range v.published {
		if there && v.written {
			if err := within(patience, func() error { return v.read(n) }); err != nil {
				return err
			}
		}
	}
	if !v.published[0] {
		return nil
	}
	// Something frozen would not let this through.
	return within(patience, v.write)
}

// within runs f, and gives up on it after a while.
func within(limit time.Duration, f func() error) error {
	done := make(chan error, 1)
	go func() { done <- f() }()
	select {
	case err := <-done:
		return err
	case <-time.After(limit):
		return errors.New("it hangs")
	}
}

// difference lists what there is of a kind and should not be, and the reverse.
func difference(what string, have, want []string) []string {
	var found []string
	count := map[string]int{}
	for _, h := range have {
		count[h]++
	}
	for _, w := range want {
		count[w]--
	}
	for _, name := range slices.Sorted(maps.Keys(count)) {
		switch n := count[name]; {
		case n > 0:
			found = append(found, fmt.Sprintf("%s should not be there: %s", what, name))
		case n < 0:
			found = append(found, fmt.Sprintf("%s is missing: %s", what, name))
		}
	}
	return found
}

// leftovers compares what can be seen without the driver with what there should
// be: directories of volumes, work in progress, loop devices, mounts, paths,
// records and processes.
func (s *site) leftovers() []string {
	var dirs, loops, mappings, mounts, paths []string
	records, ephemerals := 0, 0
	for _, v := range s.volumes {
		if v.exists {
			dirs = append(dirs, v.name)
		}
		if v.staged || v.ephemeral && v.published[0] {
			records++
			if !v.ephemeral {
				loops = append(loops, v.image())
			}
			if v.encrypted {
				mappings = append(mappings, v.image())
			}
		}
		if v.stagingPath {
			paths = append(paths, v.staging())
		}
		if v.staged && v.fs != "" {
			mounts = append(mounts, v.staging())
		}
		for n, there := range v.published {
			if !there {
				continue
			}
			mounts, paths = append(mounts, v.target(n)), append(paths, v.target(n))
			switch {
			case v.ephemeral:
				ephemerals++
			case n == 1 && v.fs == "": // a device of its own
				loops = append(loops, v.image())
			}
		}
	}
	snapshots, groups := s.copies()
	bound := s.bound()
	haveDirs := base(s.pool + "/volumes/*")
	if ephemerals > 0 {
		// The driver chose their names.
		dirs, loops = s.addEphemerals(dirs, loops, haveDirs, ephemerals)
	}
	found := slices.Concat(
		difference("volume's directory", haveDirs, dirs),
		difference("snapshot's directory", base(s.pool+"/snapshots/*"), names(snapshots)),
		difference("group's directory", base(s.pool+"/groups/*"), names(groups)),
		difference("file of the pool", base(s.pool+"/.*"), nil),
		difference("loop device over", bound, loops),
		difference("mapping over", s.mappings(), mappings),
		difference("mount", mountsBelow(s.dir), mounts),
		difference("path", glob(s.dir+"/stage/*", s.dir+"/pods/*"), paths),
	)
	if have := glob(s.state + "/*/*"); len(have) != records {
		found = append(found, fmt.Sprintf("%d records, want %d: %q", len(have), records, have))
	}
	return append(found, s.strays()...)
}

// hurried says that the kernel is left in a hurry. Other sites hurry it, too, but only
// for moments.
func hurried() []string {
	b, err := os.ReadFile("/sys/kernel/rcu_expedited")
	if err == nil && string(bytes.TrimSpace(b)) == "0" {
		return nil
	}
	return []string{fmt.Sprintf("the kernel is left in a hurry: rcu_expedited is %q, %v", b, err)}
}

// addEphemerals adds the directories and loop devices of n ephemeral volumes to
// those that are expected.
func (s *site) addEphemerals(dirs, loops, have []string, n int) (allDirs, allLoops []string) {
	for _, d := range have {
		if n > 0 && !slices.Contains(dirs, d) {
			n--
			dirs = append(dirs, d)
			loops = append(loops, filepath.Join(s.pool, "volumes", d, "disk.img"))
		}
	}
	for range n {
		dirs = append(dirs, "of an ephemeral volume")
	}
	return dirs, loops
}

// base lists the last elements of what matches a pattern.
func base(pattern string) []string {
	var names []string
	for _, path := range glob(pattern) {
		names = append(names, filepath.Base(path))
	}
	return names
}

func glob(patterns ...string) []string {
	var all []string
	for _, p := range patterns {
		found, _ := filepath.Glob(p)
		all = append(all, found...)
	}
	return all
}

// loops lists loop devices over files of the site, one line each.
func (s *site) loops() []string {
	return append(roottest.Loops(s.dir), roottest.Loops(s.pool)...)
}

// bound lists the files that loop devices show.
func (s *site) bound() []string {
	var files []string
	for _, line := range s.loops() {
		_, path, _ := strings.Cut(line, " over ")
		files = append(files, path)
	}
	return files
}

// mappings lists the files whose loop devices have a device of the device mapper over them.
func (s *site) mappings() []string {
	var files []string
	for _, line := range s.loops() {
		device, path, _ := strings.Cut(line, " over ")
		for range glob("/sys/block/" + device + "/holders/dm-*") {
			files = append(files, path)
		}
	}
	return files
}

// strays lists processes other than the test and the driver that work on files of
// the site: mkfs, fsck, whatever a killed driver left running.
func (s *site) strays() []string {
	var found []string
	for _, p := range glob("/proc/[0-9]*") {
		pid := filepath.Base(p)
		if s.older[p] || pid == strconv.Itoa(s.proc.PID()) {
			continue
		}
		cmdline, _ := os.ReadFile(p + "/cmdline")
		uses := bytes.Contains(cmdline, []byte(s.dir+"/")) || bytes.Contains(cmdline, []byte(s.pool+"/"))
		for _, link := range glob(p+"/fd/*", p+"/cwd") {
			to, err := os.Readlink(link)
			uses = uses || err == nil && (strings.HasPrefix(to, s.dir+"/") || strings.HasPrefix(to, s.pool+"/"))
		}
		if uses {
			found = append(found, "process "+pid+" "+strings.ReplaceAll(string(cmdline), "\x00", " "))
		}
	}
	return found
}

// mountsBelow lists mount points below dir.
func mountsBelow(dir string) []string {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil
	}
	var found []string
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], dir+"/") {
			found = append(found, f[4])
		}
	}
	return found
}

// unaccounted compares the driver's list and its account with the pool.
func (s *site) unaccounted() []string {
	if s.proc.State() != nil {
		return nil
	}
	ctx, cancel := call()
	defer cancel()
	list, err := s.controller().ListVolumes(ctx, &csi.ListVolumesRequest{})
	if err != nil {
		return []string{"ListVolumes: " + explain(err)}
	}
	var have, want []string
	for _, e := range list.GetEntries() {
		have = append(have, fmt.Sprintf("%s of %d bytes", e.GetVolume().GetVolumeId(), e.GetVolume().GetCapacityBytes()))
	}
	for _, v := range s.volumes {
		if v.exists {
			want = append(want, fmt.Sprintf("%s of %d bytes", v.id, v.size))
		}
	}
	found := difference("listed volume", have, want)
	snapshots, err := s.controller().ListSnapshots(ctx, &csi.ListSnapshotsRequest{})
	if err != nil {
		return []string{"ListSnapshots: " + explain(err)}
	}
	have = nil
	for _, e := range snapshots.GetEntries() {
		have = append(have, e.GetSnapshot().GetSnapshotId())
	}
	want, _ = s.copies()
	found = append(found, difference("listed snapshot", have, want)...)
	return append(found, s.capacity(ctx)...)
}

// capacity compares GetCapacity with what the pool's filesystem and the records
// give: free space, less what volumes may still take, less 1 MiB, and less what is kept
// back of large filesystems (fact 106).
func (s *site) capacity(ctx context.Context) []string {
	r, err := s.controller().GetCapacity(ctx, &csi.GetCapacityRequest{})
	if err != nil {
		return []string{"GetCapacity: " + explain(err)}
	}
	var fs syscall.Statfs_t
	if err := syscall.Statfs(s.pool, &fs); err != nil {
		return []string{err.Error()}
	}
	// It may be less than what is free by as much: how many blocks a thin volume has,
	// and how many a volume shares, is looked at now and then only.
	free, late := int64(fs.Bavail)*fs.Bsize-max(0, int64(fs.Blocks)*fs.Bsize/200-8*mib), int64(0)
	for _, record := range glob(s.pool + "/volumes/*/volume.json") {
		least, most, err := s.claim(record)
		if err != nil {
			return []string{"record: " + err.Error()}
		}
		free -= least
		late += most - least
	}
	most := max(0, free-mib) / mib * mib
	if got := r.GetAvailableCapacity(); got > most || got < most-late-mib {
		return []string{fmt.Sprintf("GetCapacity says %d, the pool %d to %d", got, most-late-mib, most)}
	}
	return nil
}

// claim is what the volume of a record may still take, at least and at most.
func (s *site) claim(record string) (least, most int64, err error) {
	var v struct {
		Size       int64  `json:"size"`
		Allocation string `json:"allocation"`
	}
	b, err := os.ReadFile(record)
	if err == nil {
		err = json.Unmarshal(b, &v)
	}
	var st syscall.Stat_t
	if err == nil {
		err = syscall.Stat(filepath.Join(filepath.Dir(record), "disk.img"), &st)
	}
	if err != nil {
		return 0, 0, err
	}
	sharedLeast, sharedMost, err := s.shared(filepath.Base(filepath.Dir(record)))
	missing := max(0, v.Size-st.Blocks*512)
	least, most = min(v.Size, missing+sharedLeast), min(v.Size, missing+sharedMost)
	if v.Allocation == "thin" {
		most = v.Size
	}
	return least, most, err
}
