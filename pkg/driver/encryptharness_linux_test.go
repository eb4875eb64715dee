package driver

import (
	"context"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/csi-loop/csi-loop/internal/roottest"
	"github.com/csi-loop/csi-loop/pkg/crypt"
	"github.com/csi-loop/csi-loop/pkg/image"
	"github.com/csi-loop/csi-loop/pkg/loop"
	"github.com/csi-loop/csi-loop/pkg/mount"
)

const goodKey, badKey = "correct horse battery", "paper clip bottle"

// cheapKeys spare the tests the work that makes guessing dear.
var cheapKeys = crypt.Options{PBKDF: "pbkdf2", Time: time.Millisecond}

// encrypting is a driver over real loop devices and mappings, called directly.
type encrypting struct {
	t     *testing.T
	dir   string
	pool  string        // a filesystem that can reflink
	keys  crypt.Options // cheapKeys if zero
	d     *Driver
	store *image.Store
	loops *loop.Manager
}

// newEncrypting makes one, or skips where the kernel has no dm-crypt: not in the virtual
// machines of make test-encryption, which have it.
func newEncrypting(t *testing.T) *encrypting {
	t.Helper()
	roottest.Require(t)
	needDMCrypt(t)
	e := &encrypting{t: t, dir: t.TempDir(), pool: roottest.Pool(t, "xfs", 3<<30)}
	e.start()
	t.Cleanup(func() {
		e.stop()
		e.clean()
	})
	return e
}

func needDMCrypt(t *testing.T) {
	t.Helper()
	c, err := crypt.New(cheapKeys)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Available(); err != nil && os.Getenv("CSI_LOOP_VM") == "" {
		t.Skip(err)
	} else if err != nil {
		t.Fatal(err)
	}
}

func (e *encrypting) start() {
	e.t.Helper()
	e.must(os.Chmod(e.pool, 0o700))
	ctx := context.Background()
	var err error
	e.store, err = image.Open(ctx, []image.Config{{Name: "default", Path: e.pool, Overcommit: 10}})
	e.must(err)
	e.loops, err = loop.New(ctx, loop.WithWarm(0))
	e.must(err)
	keys := e.keys
	if keys == (crypt.Options{}) {
		keys = cheapKeys
	}
	e.d, err = New(Config{
		Version: "test", NodeID: "node-a", StateDir: filepath.Join(e.dir, "state"), DefaultPool: "default", Encryption: keys,
	}, e.store, nil, e.loops, mount.New())
	e.must(err)
	e.must(e.d.Reconcile(ctx))
}

func (e *encrypting) stop() {
	e.t.Helper()
	e.must(e.d.Close())
	e.must(e.loops.Close())
	e.must(e.store.Close())
}

// restart is a stop and a start of the driver while volumes are in use.
func (e *encrypting) restart() {
	e.stop()
	e.start()
}

func (e *encrypting) must(err error) {
	e.t.Helper()
	if err != nil {
		e.t.Fatal(err)
	}
}

// repeat repeats a call whose job goes on, as a CO does.
func (e *encrypting) repeat(call func() error) {
	e.t.Helper()
	err := call()
	for tries := 0; codeOf(err) == codes.Aborted && tries < 30; tries++ {
		err = call()
	}
	e.must(err)
}

// clean checks that nothing of a volume is attached any more. A mapping that ends with its
// last user does so a moment later.
func (e *encrypting) clean() {
	e.t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for {
		left := roottest.Loops(e.pool)
		left = append(left, e.mappings()...)
		if len(left) == 0 {
			break
		}
		if time.Now().After(deadline) {
			e.t.Fatalf("left: %v", left)
		}
		time.Sleep(20 * time.Millisecond)
	}
	if nodes, _ := filepath.Glob("/dev/mapper/csi-loop-*"); len(nodes) > 0 {
		e.t.Fatalf("left: %v", nodes)
	}
}

// mappings are the names of all that there are, but for the disk below a pool.
func (e *encrypting) mappings() []string {
	e.t.Helper()
	files, err := filepath.Glob("/sys/block/dm-*/dm/name")
	e.must(err)
	var names []string
	for _, file := range files {
		b, err := os.ReadFile(file)
		if name := strings.TrimSpace(string(b)); err == nil && name != cutDisk {
			names = append(names, name)
		}
	}
	return names
}

func (e *encrypting) create(name string, c *csi.VolumeCapability, size int64, src *csi.VolumeContentSource, params map[string]string) string {
	e.t.Helper()
	all := map[string]string{"encrypted": "true"}
	maps.Copy(all, params)
	var resp *csi.CreateVolumeResponse
	e.repeat(func() (err error) {
		resp, err = (&controllerServer{d: e.d}).CreateVolume(e.t.Context(), &csi.CreateVolumeRequest{
			Name: name, CapacityRange: &csi.CapacityRange{RequiredBytes: size}, VolumeCapabilities: []*csi.VolumeCapability{c},
			Parameters: all, VolumeContentSource: src,
		})
		return err
	})
	if got := resp.GetVolume().GetCapacityBytes(); got != size {
		e.t.Fatalf("%s has %d bytes, asked for %d", name, got, size)
	}
	return resp.GetVolume().GetVolumeId()
}

func (e *encrypting) path(kind, id string) string {
	dir := filepath.Join(e.dir, kind)
	e.must(os.MkdirAll(dir, 0o750))
	return filepath.Join(dir, image.DirName(id))
}

func (e *encrypting) stage(id string, c *csi.VolumeCapability, secrets map[string]string) error {
	staging := e.path("staging", id)
	e.must(os.MkdirAll(staging, 0o750))
	_, err := (&nodeServer{d: e.d}).NodeStageVolume(e.t.Context(), &csi.NodeStageVolumeRequest{
		VolumeId: id, StagingTargetPath: staging, VolumeCapability: c, Secrets: secrets,
	})
	return err
}

func (e *encrypting) unstage(id string) error {
	_, err := (&nodeServer{d: e.d}).NodeUnstageVolume(e.t.Context(), &csi.NodeUnstageVolumeRequest{VolumeId: id, StagingTargetPath: e.path("staging", id)})
	return err
}

func (e *encrypting) publish(id string, c *csi.VolumeCapability, readOnly bool) error {
	_, err := (&nodeServer{d: e.d}).NodePublishVolume(e.t.Context(), &csi.NodePublishVolumeRequest{
		VolumeId: id, StagingTargetPath: e.path("staging", id), TargetPath: e.path("target", id), VolumeCapability: c, Readonly: readOnly,
	})
	return err
}

func (e *encrypting) unpublish(id string) error {
	_, err := (&nodeServer{d: e.d}).NodeUnpublishVolume(e.t.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: id, TargetPath: e.path("target", id)})
	return err
}

func (e *encrypting) remove(ids ...string) {
	e.t.Helper()
	for _, id := range ids {
		_, err := (&controllerServer{d: e.d}).DeleteVolume(e.t.Context(), &csi.DeleteVolumeRequest{VolumeId: id})
		e.must(err)
	}
}

func (e *encrypting) snapshot(name, id string) *csi.VolumeContentSource {
	e.t.Helper()
	var resp *csi.CreateSnapshotResponse
	e.repeat(func() (err error) {
		resp, err = (&controllerServer{d: e.d}).CreateSnapshot(e.t.Context(), &csi.CreateSnapshotRequest{Name: name, SourceVolumeId: id})
		return err
	})
	return &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{
		Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: resp.GetSnapshot().GetSnapshotId()},
	}}
}

func (e *encrypting) removeSnapshot(s *csi.VolumeContentSource) {
	e.t.Helper()
	_, err := (&controllerServer{d: e.d}).DeleteSnapshot(e.t.Context(), &csi.DeleteSnapshotRequest{SnapshotId: s.GetSnapshot().GetSnapshotId()})
	e.must(err)
}

// expand grows a volume that is staged.
func (e *encrypting) expand(id string, size int64) {
	e.t.Helper()
	c := &csi.CapacityRange{RequiredBytes: size}
	resp, err := (&controllerServer{d: e.d}).ControllerExpandVolume(e.t.Context(), &csi.ControllerExpandVolumeRequest{VolumeId: id, CapacityRange: c})
	e.must(err)
	if resp.GetCapacityBytes() != size {
		e.t.Fatalf("grew to %d bytes, asked for %d", resp.GetCapacityBytes(), size)
	}
	node, err := (&nodeServer{d: e.d}).NodeExpandVolume(e.t.Context(), &csi.NodeExpandVolumeRequest{
		VolumeId: id, VolumePath: e.path("staging", id), StagingTargetPath: e.path("staging", id), CapacityRange: c,
	})
	e.must(err)
	if node.GetCapacityBytes() != size {
		e.t.Fatalf("the node grew it to %d bytes, asked for %d", node.GetCapacityBytes(), size)
	}
}

// total is how large the volume at a path is.
func (e *encrypting) total(id, path string) int64 {
	e.t.Helper()
	resp, err := (&nodeServer{d: e.d}).NodeGetVolumeStats(e.t.Context(), &csi.NodeGetVolumeStatsRequest{VolumeId: id, VolumePath: path})
	e.must(err)
	return resp.GetUsage()[0].GetTotal()
}

// healthy fails when something is wrong with a volume.
func (e *encrypting) healthy(id string) {
	e.t.Helper()
	resp, err := (&nodeServer{d: e.d}).NodeGetVolumeHealth(e.t.Context(), &csi.NodeGetVolumeHealthRequest{VolumeId: id})
	e.must(err)
	if found := resp.GetVolumeHealth().GetHealthStatuses(); len(found) > 0 {
		e.t.Fatalf("not healthy: %v", found)
	}
}

func (e *encrypting) image(id string) string {
	_, dir, _ := image.ParseID(id)
	return filepath.Join(e.pool, "volumes", dir, "disk.img")
}

func (e *encrypting) key(k string) map[string]string { return map[string]string{"passphrase": k} }

func (e *encrypting) wantCode(err error, want codes.Code, words string) {
	e.t.Helper()
	if got := codeOf(err); got != want || !strings.Contains(err.Error(), words) {
		e.t.Fatalf("got %v (%v), want %v with %q", got, err, want, words)
	}
	if strings.Contains(err.Error(), badKey) || strings.Contains(err.Error(), goodKey) {
		e.t.Fatalf("the error tells the passphrase: %v", err)
	}
}
