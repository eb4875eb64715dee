package crash

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
)

// copiedLife is the life of the copies of a volume that is in use all the time: it is
// frozen for each of them.
func copiedLife() []step {
	return []step{
		free("create", (*volume).create),
		free("stage", (*volume).stage),
		free("publish", func(v *volume) error { return v.publish(0) }),
		free("write", (*volume).write),
		free("warm up", (*volume).warmUp),
		rpc("snapshot", (*volume).takeSnapshot),
		rpc("restore", func(v *volume) error { return v.restored().create() }),
		rpc("clone", func(v *volume) error { return v.cloned().create() }),
		rpc("group snapshot", (*volume).takeGroup),
		free("prove restored", func(v *volume) error { return prove(v.restored()) }),
		free("prove cloned", func(v *volume) error { return prove(v.cloned()) }),
		end("delete group snapshot", (*volume).removeGroup),
		end("delete snapshot", (*volume).removeSnapshot),
		end("delete restored", func(v *volume) error { return v.restored().remove() }),
		end("delete cloned", func(v *volume) error { return v.cloned().remove() }),
		free("unpublish", func(v *volume) error { return v.unpublish(0) }),
		free("unstage", (*volume).unstage),
		free("delete", (*volume).remove),
	}
}

// stagedCopyLife is the life of a copy that is larger than its source, and whose filesystem
// grows when it is mounted first.
func stagedCopyLife() []step {
	return []step{
		free("create", (*volume).create),
		free("stage", (*volume).stage),
		free("publish", func(v *volume) error { return v.publish(0) }),
		free("write", (*volume).write),
		free("clone", func(v *volume) error { return v.larger().create() }),
		rpc("stage clone", (*volume).stageLarger),
		end("unstage clone", func(v *volume) error { return v.larger().unstage() }),
		free("prove clone", func(v *volume) error { return prove(v.larger()) }),
		free("delete clone", func(v *volume) error { return v.larger().remove() }),
		free("unpublish", func(v *volume) error { return v.unpublish(0) }),
		free("unstage", (*volume).unstage),
		free("delete", (*volume).remove),
	}
}

// larger is a clone that is larger than the volume.
func (v *volume) larger() *volume {
	return v.copy("larger", v.size+16*mib, &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Volume{
		Volume: &csi.VolumeContentSource_VolumeSource{VolumeId: v.id},
	}})
}

// stageLarger stages the larger clone, whose filesystem must be larger then, too.
func (v *volume) stageLarger() error {
	c := v.larger()
	if err := c.stage(); err != nil {
		return err
	}
	var small, large unix.Statfs_t
	err := errors.Join(unix.Statfs(v.staging(), &small), unix.Statfs(c.staging(), &large))
	if err == nil && large.Blocks < small.Blocks+uint64(8*mib/large.Bsize) {
		err = fmt.Errorf("the filesystem of the clone has %d blocks, that of its source %d", large.Blocks, small.Blocks)
	}
	return err
}

// warmUp has the driver find out whether the pool can reflink: a start does so only
// where there are copies already.
func (v *volume) warmUp() error {
	if err := v.takeSnapshot(); err != nil {
		return err
	}
	return v.removeSnapshot()
}

func (v *volume) takeSnapshot() error {
	ctx, cancel := call()
	defer cancel()
	r, err := v.controller().CreateSnapshot(ctx, &csi.CreateSnapshotRequest{
		Name: v.name + "-snapshot", SourceVolumeId: v.id, Parameters: map[string]string{"copyInUse": "true"},
	})
	if err != nil {
		return err
	}
	v.snapshot, v.hasSnapshot = r.GetSnapshot().GetSnapshotId(), true
	if !r.GetSnapshot().GetReadyToUse() || r.GetSnapshot().GetSizeBytes() != v.size {
		return fmt.Errorf("CreateSnapshot = %v, want %d bytes, ready", r, v.size)
	}
	return nil
}

func (v *volume) removeSnapshot() error {
	ctx, cancel := call()
	defer cancel()
	_, err := v.controller().DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: v.snapshot})
	v.hasSnapshot = v.hasSnapshot && err != nil
	return err
}

// takeGroup makes a group snapshot of the volume and its clone, which is not in use.
func (v *volume) takeGroup() error {
	ctx, cancel := call()
	defer cancel()
	r, err := csi.NewGroupControllerClient(v.conn).CreateVolumeGroupSnapshot(ctx, &csi.CreateVolumeGroupSnapshotRequest{
		Name: v.name + "-group", SourceVolumeIds: []string{v.id, v.cloned().id}, Parameters: map[string]string{"copyInUse": "true"},
	})
	if err != nil {
		return err
	}
	v.group, v.members, v.hasGroup = r.GetGroupSnapshot().GetGroupSnapshotId(), nil, true
	for _, s := range r.GetGroupSnapshot().GetSnapshots() {
		v.members = append(v.members, s.GetSnapshotId())
	}
	if len(v.members) != 2 {
		return fmt.Errorf("CreateVolumeGroupSnapshot = %v, want two snapshots", r)
	}
	return nil
}

func (v *volume) removeGroup() error {
	ctx, cancel := call()
	defer cancel()
	_, err := csi.NewGroupControllerClient(v.conn).DeleteVolumeGroupSnapshot(ctx, &csi.DeleteVolumeGroupSnapshotRequest{GroupSnapshotId: v.group})
	v.hasGroup = v.hasGroup && err != nil
	return err
}

// restored and cloned are the copies, one of them larger than the volume.
func (v *volume) restored() *volume {
	return v.copy("restored", 24*mib, &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{
		Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: v.snapshot},
	}})
}

func (v *volume) cloned() *volume {
	return v.copy("cloned", v.size, &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Volume{
		Volume: &csi.VolumeContentSource_VolumeSource{VolumeId: v.id},
	}})
}

func (v *volume) copy(what string, size int64, source *csi.VolumeContentSource) *volume {
	name := v.name + "-" + what
	if i := slices.IndexFunc(v.volumes, func(o *volume) bool { return o.name == name }); i >= 0 {
		return v.volumes[i]
	}
	c := v.volume(kind{fs: v.fs}, name)
	c.size, c.source, c.seed, c.written = size, source, v.seed, true
	return c
}

// copies lists the snapshots and the group snapshots that were acknowledged.
func (s *site) copies() (snapshots, groups []string) {
	for _, v := range s.volumes {
		if v.hasSnapshot {
			snapshots = append(snapshots, v.snapshot)
		}
		if v.hasGroup {
			groups, snapshots = append(groups, v.group), append(snapshots, v.members...)
		}
	}
	return snapshots, groups
}

// names are what IDs have behind that of their pool.
func names(ids []string) []string {
	var all []string
	for _, id := range ids {
		_, name, _ := strings.Cut(id, ".")
		all = append(all, name)
	}
	return all
}

// shared is what a volume claims for the blocks that it shares: no less than it shares
// now, and no more than the largest of its snapshots has. Of several snapshots of the
// same blocks it pays for one.
func (s *site) shared(volume string) (least, most int64, err error) {
	for _, record := range glob(s.pool + "/snapshots/*/snapshot.json") {
		var r struct {
			Source string `json:"source"`
		}
		b, err := os.ReadFile(record)
		if err == nil {
			err = json.Unmarshal(b, &r)
		}
		if err != nil {
			return 0, 0, err
		}
		if names([]string{r.Source})[0] != volume {
			continue
		}
		var st syscall.Stat_t
		if err := syscall.Stat(filepath.Join(filepath.Dir(record), "disk.img"), &st); err != nil {
			return 0, 0, err
		}
		most = max(most, st.Blocks*512)
	}
	if most == 0 {
		return 0, 0, nil
	}
	out, err := exec.Command("filefrag", "-v", "-b4096", filepath.Join(s.pool, "volumes", volume, "disk.img")).Output()
	if err != nil {
		return 0, 0, fmt.Errorf("filefrag: %w", err)
	}
	for line := range strings.Lines(string(out)) {
		// number: logical: physical: length: [expected:] flags
		columns := strings.Split(line, ":")
		if len(columns) < 5 || !strings.Contains(columns[len(columns)-1], "shared") {
			continue
		}
		blocks, err := strconv.ParseInt(strings.TrimSpace(columns[3]), 10, 64)
		if err != nil {
			return 0, 0, fmt.Errorf("filefrag: %q: %w", line, err)
		}
		least += blocks * 4096
	}
	return least, most, nil
}
