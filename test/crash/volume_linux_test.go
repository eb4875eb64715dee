package crash

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/csi-loop/csi-loop/pkg/image"
)

// kind is one way to use a volume.
type kind struct {
	name      string
	fs        string // "" is a raw block volume
	size      int64
	thin      bool
	mapped    bool // the whole of a file in the site's images directory
	partition bool // of a mapped one: the first partition of the file, not the whole
	ephemeral bool
	grown     int64 // 0: it cannot be expanded
	copied    bool  // its life is that of its copies
	encrypted bool
}

var (
	ext4      = kind{name: "ext4", fs: "ext4", size: 16 * mib, grown: 24 * mib}
	xfs       = kind{name: "xfs", fs: "xfs", size: 300 * mib, grown: 316 * mib}
	btrfs     = kind{name: "btrfs", fs: "btrfs", size: 128 * mib, grown: 264 * mib}
	block     = kind{name: "block", size: 4 * mib, grown: 8 * mib}
	thinExt4  = kind{name: "thin-ext4", fs: "ext4", size: 16 * mib, grown: 24 * mib, thin: true}
	thinXFS   = kind{name: "thin-xfs", fs: "xfs", size: 300 * mib, grown: 316 * mib, thin: true}
	thinBtrfs = kind{name: "thin-btrfs", fs: "btrfs", size: 128 * mib, grown: 264 * mib, thin: true}
	thinBlock = kind{name: "thin-block", size: 4 * mib, grown: 8 * mib, thin: true}
	mapped    = kind{name: "mapped", fs: "ext4", size: 16 * mib, mapped: true}
	mappedRaw = kind{name: "mapped-block", size: 4 * mib, mapped: true}
	partition = kind{name: "partition", fs: "ext4", size: 16 * mib, mapped: true, partition: true}
	ephemeral = kind{name: "ephemeral", fs: "ext4", size: 16 * mib, ephemeral: true}
	copied    = kind{name: "copied", fs: "ext4", size: 16 * mib, copied: true}
	copiedXFS = kind{name: "copied-xfs", fs: "xfs", size: 300 * mib, copied: true}

	encryptedExt4  = kind{name: "encrypted-ext4", fs: "ext4", size: 16 * mib, grown: 24 * mib, encrypted: true}
	encryptedBlock = kind{name: "encrypted-block", size: 4 * mib, grown: 8 * mib, encrypted: true}
)

// header is what the image of a volume has in front of its content, in bytes.
func (k kind) header() int64 {
	if k.encrypted {
		return image.HeaderSize
	}
	return 0
}

// volume is one volume, and what should be true of it.
type volume struct {
	*site
	kind

	name    string
	id      string
	context map[string]string // volume_context
	seed    uint64            // of its data
	source  *csi.VolumeContentSource

	// IDs of its snapshot, of its group snapshot and of that one's members.
	snapshot, group string
	members         []string

	// The staging path is the CO's own.
	stagingPath bool

	// What was acknowledged.
	exists    bool
	staged    bool
	published [2]bool // read-write, read-only
	size      int64
	tuned     bool // it has its read-ahead
	written   bool

	hasSnapshot, hasGroup bool
}

// volume describes a volume that does not exist yet.
func (s *site) volume(k kind, name string) *volume {
	v := &volume{site: s, kind: k, name: name, id: name, size: k.size, seed: rand.Uint64()}
	if k.ephemeral {
		v.context = map[string]string{"csi.storage.k8s.io/ephemeral": "true", "size": strconv.FormatInt(k.size, 10)}
	}
	s.volumes = append(s.volumes, v)
	return v
}

func (v *volume) capability() *csi.VolumeCapability {
	mode := csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER
	if v.ephemeral {
		mode = csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER
	}
	c := &csi.VolumeCapability{AccessMode: &csi.VolumeCapability_AccessMode{Mode: mode}}
	if v.fs == "" {
		c.AccessType = &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}}
	} else {
		c.AccessType = &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{FsType: v.fs}}
	}
	return c
}

func (v *volume) staging() string { return filepath.Join(v.dir, "stage", v.name) }
func (v *volume) target(n int) string {
	return filepath.Join(v.dir, "pods", v.name+"-"+strconv.Itoa(n))
}

// image is the volume's file; of an ephemeral one only a pattern is known.
func (v *volume) image() string {
	if v.mapped {
		return filepath.Join(v.images, v.name+".img")
	}
	return filepath.Join(v.pool, "volumes", v.name, "disk.img")
}

// call makes a context for one RPC.
func call() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), 60*time.Second)
}

func (v *volume) create() error {
	ctx, cancel := call()
	defer cancel()
	parameters := map[string]string{}
	if v.source != nil {
		parameters["copyInUse"] = "true"
	}
	if v.thin {
		parameters["allocation"] = "thin"
	}
	if v.encrypted {
		parameters["encrypted"] = "true"
	}
	r, err := v.controller().CreateVolume(ctx, &csi.CreateVolumeRequest{
		Name: v.name, CapacityRange: &csi.CapacityRange{RequiredBytes: v.size},
		VolumeCapabilities: []*csi.VolumeCapability{v.capability()}, Parameters: parameters, VolumeContentSource: v.source,
	})
	if err != nil {
		return err
	}
	v.id, v.exists = r.GetVolume().GetVolumeId(), true
	if got := r.GetVolume().GetCapacityBytes(); got != v.size {
		return fmt.Errorf("the volume has %d bytes, want %d", got, v.size)
	}
	return nil
}

// makeImage makes the file that a mapped volume shows.
func (v *volume) makeImage() error {
	v.context = map[string]string{"image": v.image()}
	start, size := int64(0), v.size
	if v.partition {
		v.context["partition"] = "1"
		start, size = mib, v.size+2*mib
	}
	err := os.WriteFile(v.image(), nil, 0o600)
	if err == nil {
		err = os.Truncate(v.image(), size)
	}
	if err == nil && v.partition {
		table := exec.Command("sfdisk", "-q", v.image())
		table.Stdin = strings.NewReader(fmt.Sprintf("label: gpt\nstart=%d, size=%d\n", start/512, v.size/512))
		err = run(table)
	}
	if err == nil && v.fs != "" {
		err = run(exec.Command("mkfs."+v.fs, "-q", "-E", fmt.Sprint("offset=", start), v.image(), fmt.Sprint(v.size>>10, "k")))
	}
	return err
}

func run(cmd *exec.Cmd) error {
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", cmd, err, out)
	}
	return nil
}

func (v *volume) stage() error {
	if err := os.MkdirAll(v.staging(), 0o750); err != nil {
		return err
	}
	v.stagingPath = true
	ctx, cancel := call()
	defer cancel()
	r := &csi.NodeStageVolumeRequest{VolumeId: v.id, StagingTargetPath: v.staging(), VolumeCapability: v.capability(), VolumeContext: v.context}
	if v.encrypted {
		r.Secrets = map[string]string{"passphrase": "correct horse battery"}
	}
	_, err := v.node().NodeStageVolume(ctx, r)
	v.staged = v.staged || err == nil
	if err != nil || v.thin || v.encrypted { // the device mapper drops discards by itself
		return err
	}
	return v.masked()
}

// masked fails if a device of a volume that must keep its blocks lets discards through.
func (v *volume) masked() error {
	for _, file := range v.queues("discard_max_bytes") {
		if b, err := os.ReadFile(file); err != nil || strings.TrimSpace(string(b)) != "0" {
			return errors.Join(fmt.Errorf("%s is %q", file, b), err)
		}
	}
	return nil
}

// queues lists an attribute of the queues of the loop devices over the volume's image.
func (v *volume) queues(attribute string) (files []string) {
	for _, line := range v.loops() {
		if device, path, _ := strings.Cut(line, " over "); path == v.image() {
			files = append(files, "/sys/block/"+device+"/queue/"+attribute)
		}
	}
	return files
}

func (v *volume) unstage() error {
	ctx, cancel := call()
	defer cancel()
	_, err := v.node().NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: v.id, StagingTargetPath: v.staging()})
	if err != nil {
		return err
	}
	v.staged = false
	if err := os.Remove(v.staging()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("the staging path after unstage: %w", err)
	}
	v.stagingPath = false
	return nil
}

func (v *volume) publish(n int) error {
	ctx, cancel := call()
	defer cancel()
	r := &csi.NodePublishVolumeRequest{
		VolumeId: v.id, TargetPath: v.target(n), VolumeCapability: v.capability(), Readonly: n == 1, VolumeContext: v.context,
	}
	if !v.ephemeral {
		r.StagingTargetPath = v.staging()
	}
	_, err := v.node().NodePublishVolume(ctx, r)
	v.published[n] = v.published[n] || err == nil
	return err
}

func (v *volume) unpublish(n int) error {
	ctx, cancel := call()
	defer cancel()
	_, err := v.node().NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: v.id, TargetPath: v.target(n)})
	if err != nil {
		return err
	}
	v.published[n] = false
	return nil
}

func (v *volume) remove() error {
	ctx, cancel := call()
	defer cancel()
	_, err := v.controller().DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: v.id})
	v.exists = v.exists && err != nil
	return err
}

func (v *volume) expandImage() error {
	ctx, cancel := call()
	defer cancel()
	r, err := v.controller().ControllerExpandVolume(ctx, &csi.ControllerExpandVolumeRequest{
		VolumeId: v.id, CapacityRange: &csi.CapacityRange{RequiredBytes: v.grown}, VolumeCapability: v.capability(),
	})
	if err != nil {
		return err
	}
	v.size = v.grown
	if r.GetCapacityBytes() != v.size || !r.GetNodeExpansionRequired() {
		return fmt.Errorf("ControllerExpandVolume = %v, want %d bytes and the node's part", r, v.size)
	}
	return nil
}

// readAhead is that of the volume once it is modified, in bytes. A number whose device could
// not be set back keeps that of another volume, so that no two have the same.
func (v *volume) readAhead() int64 { return int64(1<<20 + v.seed%15000*4096) }

func (v *volume) modify() error {
	ctx, cancel := call()
	defer cancel()
	_, err := v.controller().ControllerModifyVolume(ctx, &csi.ControllerModifyVolumeRequest{
		VolumeId: v.id, MutableParameters: map[string]string{"readAhead": strconv.FormatInt(v.readAhead(), 10)},
	})
	v.tuned = v.tuned || err == nil
	return err
}

// untuned says which device of a modified volume is not as it was asked for. One that could
// not be set fails no call and is tried again.
func (v *volume) untuned() string {
	if !v.tuned || !v.staged {
		return ""
	}
	for _, file := range v.queues("read_ahead_kb") {
		if v.encrypted { // it is the mapping that reads
			for _, holder := range glob(strings.Replace(file, "queue/read_ahead_kb", "holders/*", 1)) {
				file = holder + "/queue/read_ahead_kb"
			}
		}
		b, err := os.ReadFile(file)
		if got, want := strings.TrimSpace(string(b)), strconv.FormatInt(v.readAhead()>>10, 10); err != nil || got != want {
			return fmt.Sprintf("%s is %q, want %s: %v", file, got, want, err)
		}
	}
	return ""
}

// expand is the node's part. Where the kernel does not let a mounted ext4 grow,
// that is what the node must say.
func (v *volume) expand() error {
	ctx, cancel := call()
	defer cancel()
	r, err := v.node().NodeExpandVolume(ctx, &csi.NodeExpandVolumeRequest{
		VolumeId: v.id, VolumePath: v.target(0), StagingTargetPath: v.staging(),
		CapacityRange: &csi.CapacityRange{RequiredBytes: v.grown}, VolumeCapability: v.capability(),
	})
	if v.fs == "ext4" && !canGrowExt4() && status.Code(err) == codes.FailedPrecondition && strings.Contains(err.Error(), "CAP_SYS_RESOURCE") {
		return nil
	}
	if err == nil && r.GetCapacityBytes() != v.grown {
		return fmt.Errorf("NodeExpandVolume = %v, want %d bytes", r, v.grown)
	}
	return err
}

// canGrowExt4 says whether this process has CAP_SYS_RESOURCE (fact 40).
func canGrowExt4() bool {
	const sysResource = 24
	var data [2]unix.CapUserData
	err := unix.Capget(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &data[0])
	return err == nil && data[0].Effective&(1<<sysResource) != 0
}

// chunk is how much data a volume gets, in bytes.
const chunk = 128 << 10

func (v *volume) pattern() []byte {
	b := make([]byte, chunk)
	fill := rand.NewChaCha8([32]byte(fmt.Appendf(nil, "%32x", v.seed)))
	_, _ = fill.Read(b)
	return b
}

// file is where the volume's data is, seen through target n.
func (v *volume) file(n int) string {
	if v.fs == "" {
		return v.target(n)
	}
	return filepath.Join(v.target(n), "data")
}

// write writes the volume's data and waits until it is on disk.
func (v *volume) write() error {
	f, err := os.OpenFile(v.file(0), os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(v.pattern(), 0)
	err = errors.Join(err, f.Sync(), f.Close())
	v.written = v.written || err == nil
	return err
}

// read compares the data with what was written, through target n.
func (v *volume) read(n int) error {
	f, err := os.Open(v.file(n))
	if err != nil {
		return err
	}
	defer f.Close()
	got := make([]byte, chunk)
	if _, err := f.ReadAt(got, 0); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if !bytes.Equal(got, v.pattern()) {
		return fmt.Errorf("%s is not what was written", f.Name())
	}
	return nil
}
