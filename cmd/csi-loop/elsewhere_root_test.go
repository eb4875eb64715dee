package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"k8s.io/client-go/kubernetes/fake"

	"github.com/csi-loop/csi-loop/internal/roottest"
	"github.com/csi-loop/csi-loop/pkg/driver"
	"github.com/csi-loop/csi-loop/pkg/image"
	"github.com/csi-loop/csi-loop/pkg/router"
	"github.com/csi-loop/csi-loop/pkg/router/link"
)

// podTokens is the API server for pods whose token is the name of their node.
type podTokens struct{}

func (podTokens) Authenticate(_ context.Context, token string) (router.Identity, error) {
	return router.Identity{Node: token, NodeUID: token, Pod: "pod-" + token, PodUID: token, Expires: time.Now().Add(time.Hour)}, nil
}

// pair is a controller and two nodes, as serve puts them together, each node with a pool
// on a filesystem of its own.
type pair struct {
	t       *testing.T
	ctrl    csi.ControllerClient
	nodes   [2]*pairNode
	place   place
	address string
	ca      string
	metrics *metrics // of the controller
	options []image.Option
}

type pairNode struct {
	p                *pair
	name, pool, work string
	node             csi.NodeClient
	metrics          *metrics
	stop             func()
}

func newPair(t *testing.T, pools [2]string) *pair { t.Helper(); return newPairAt(t, pools, 1<<30) }

// newPairAt is newPair with a bound for transfers, in bytes a second, and options for the
// pools.
func newPairAt(t *testing.T, pools [2]string, rate int64, options ...image.Option) *pair {
	t.Helper()
	p := &pair{t: t, place: newPlace(t), metrics: newMetrics(build{}), options: append([]image.Option{image.WithRefresh(0)}, options...)}
	certificates, ca := linkCertificates(t, fake.NewClientset(), p.place.dir)
	p.ca, p.address = ca, freeAddress(t)
	control(t, plan{
		mode: modeController, endpoint: "unix://" + p.place.socket, stopTimeout: time.Second, driver: driver.Config{Name: driver.DefaultName, Version: "v1"},
		link: linkConfig{LinkListen: p.address, LinkAdvertise: p.address}, transferRate: rate,
	}, p.metrics, router.Config{Auth: podTokens{}, Roster: noRoster{}, Claims: noClaims{}, Certificate: certificates.Get})
	for i, fsType := range pools {
		n := &pairNode{p: p, name: fmt.Sprintf("n%d", i+1)}
		n.work = filepath.Join(p.place.dir, n.name)
		n.pool = filepath.Join(roottest.Pool(t, fsType, 3<<30), "pool")
		p.must(os.Mkdir(n.pool, 0o700))
		p.must(os.Mkdir(n.work, 0o700))
		p.nodes[i] = n
		n.start()
	}
	p.ctrl = csi.NewControllerClient(dial(t, p.place.socket))
	return p
}

func (p *pair) must(err error) {
	p.t.Helper()
	if err != nil {
		p.t.Fatal(err)
	}
}

// start starts the node's process.
func (n *pairNode) start() {
	p, t := n.p, n.p.t
	t.Helper()
	c := plan{
		endpoint: "unix://" + n.work + "/csi.sock", stopTimeout: time.Second,
		driver: driver.Config{Name: driver.DefaultName, Version: "v1", NodeID: n.name, StateDir: n.work + "/state", DefaultPool: "default"},
		link:   linkConfig{ControllerAddress: []string{p.address}, ControllerCA: p.ca, LinkTokenFile: n.work + "/token", ControllerName: link.DefaultName},
	}
	p.must(os.WriteFile(c.link.LinkTokenFile, []byte(n.name), 0o600))
	m := openStack(t, []image.Config{{Name: "default", Path: n.pool}}, c.driver, p.options...)
	n.metrics = newMetrics(build{})
	n.metrics.node(m.images, m.loops)
	ctx, cancel := context.WithCancel(context.Background())
	l, err := driver.Listen(ctx, c.endpoint)
	p.must(err)
	done := make(chan error, 1)
	go func() { done <- serveNode(ctx, m.d, m.images, c, l, n.metrics) }()
	stopped := false
	n.stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := errors.Join(<-done, m.close()); err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(n.stop)
	n.node = csi.NewNodeClient(dial(t, n.work+"/csi.sock"))
}

func (n *pairNode) requirement() *csi.TopologyRequirement {
	here := []*csi.Topology{{Segments: map[string]string{"topology." + driver.DefaultName + "/node": n.name}}}
	return &csi.TopologyRequirement{Requisite: here, Preferred: here}
}

func capabilityOf(fsType string) *csi.VolumeCapability {
	c := &csi.VolumeCapability{AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER}}
	if fsType == "" {
		c.AccessType = &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}}
	} else {
		c.AccessType = &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{FsType: fsType}}
	}
	return c
}

func source(snapshot, volume string) *csi.VolumeContentSource {
	if snapshot != "" {
		return &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: snapshot}}}
	}
	return &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Volume{Volume: &csi.VolumeContentSource_VolumeSource{VolumeId: volume}}}
}

// create makes a volume there, and asks as often as Kubernetes would.
func (n *pairNode) create(name, fsType string, size int64, src *csi.VolumeContentSource, params map[string]string) string {
	n.p.t.Helper()
	var made *csi.CreateVolumeResponse
	eventually(n.p.t, "made: "+name, func() (err error) {
		made, err = n.try(name, fsType, size, src, params)
		if c := status.Code(err); err != nil && c != codes.Aborted && c != codes.Unavailable {
			n.p.t.Fatal(name, err)
		}
		return err
	})
	v := made.GetVolume()
	if got := v.GetAccessibleTopology()[0].GetSegments()["topology.csi-loop.io/node"]; got != n.name || v.GetCapacityBytes() != size {
		n.p.t.Errorf("%v", v)
	}
	return v.GetVolumeId()
}

// snapshot makes the snapshot "s" of a volume. On a pool that cannot reflink it may outlast a call.
func (p *pair) snapshot(id string, params map[string]string) *csi.CreateSnapshotResponse {
	p.t.Helper()
	var made *csi.CreateSnapshotResponse
	eventually(p.t, "a snapshot", func() (err error) {
		made, err = p.ctrl.CreateSnapshot(p.t.Context(), &csi.CreateSnapshotRequest{Name: "s", SourceVolumeId: id, Parameters: params})
		if err != nil && status.Code(err) != codes.Aborted {
			p.t.Fatal(err)
		}
		return err
	})
	return made
}

func (n *pairNode) try(name, fsType string, size int64, src *csi.VolumeContentSource, params map[string]string) (*csi.CreateVolumeResponse, error) {
	return n.p.ctrl.CreateVolume(n.p.t.Context(), &csi.CreateVolumeRequest{
		Name: name, CapacityRange: &csi.CapacityRange{RequiredBytes: size}, VolumeCapabilities: []*csi.VolumeCapability{capabilityOf(fsType)},
		VolumeContentSource: src, Parameters: params, AccessibilityRequirements: n.requirement(),
	})
}

// up mounts a volume, and returns where.
func (n *pairNode) up(id, fsType string) string {
	t := n.p.t
	t.Helper()
	staging, target := filepath.Join(n.work, "staging", image.DirName(id)), filepath.Join(n.work, "pods", image.DirName(id), "mount")
	n.p.must(os.MkdirAll(staging, 0o750))
	n.p.must(os.MkdirAll(filepath.Dir(target), 0o750))
	_, err := n.node.NodeStageVolume(t.Context(), &csi.NodeStageVolumeRequest{VolumeId: id, StagingTargetPath: staging, VolumeCapability: capabilityOf(fsType)})
	n.p.must(err)
	_, err = n.node.NodePublishVolume(t.Context(), &csi.NodePublishVolumeRequest{VolumeId: id, StagingTargetPath: staging, TargetPath: target, VolumeCapability: capabilityOf(fsType)})
	n.p.must(err)
	t.Cleanup(func() {
		if _, err := os.Lstat(target); err == nil {
			n.down(id)
		}
	})
	return target
}

func (n *pairNode) down(id string) {
	t := n.p.t
	t.Helper()
	ctx := context.WithoutCancel(t.Context()) // also in a cleanup
	staging, target := filepath.Join(n.work, "staging", image.DirName(id)), filepath.Join(n.work, "pods", image.DirName(id), "mount")
	if _, err := n.node.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: id, TargetPath: target}); err != nil {
		t.Error(err)
	}
	// As place.down says, a CO repeats the call.
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		_, err := n.node.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: id, StagingTargetPath: staging})
		if err == nil {
			return
		}
		if status.Code(err) != codes.Aborted || time.Now().After(deadline) {
			t.Error(err)
			return
		}
	}
}

// image is a volume's image file.
func (n *pairNode) image(id string) string {
	_, dir, _ := strings.Cut(id, ".")
	return filepath.Join(n.pool, "volumes", dir, "disk.img")
}

// clean fails when the pool has anything but what is in its three directories.
func (n *pairNode) clean() {
	n.p.t.Helper()
	left, err := filepath.Glob(n.pool + "/.*")
	n.p.must(err)
	if len(left) > 0 {
		n.p.t.Errorf("left: %v", left)
	}
}

// Volumes are restored and cloned on another node than that of their source, whose pool
// is on another filesystem, and mounted there while the source is mounted here: both
// nodes are of this one kernel, which knows filesystems by their identity.
func TestCopiesOnAnotherNode(t *testing.T) {
	roottest.Require(t)
	for _, c := range []struct {
		pools [2]string
		fs    string
		size  int64
	}{
		{[2]string{"ext4", "xfs"}, "xfs", 320 << 20},
		{[2]string{"xfs", "btrfs"}, "btrfs", 256 << 20},
		{[2]string{"btrfs", "ext4"}, "ext4", 64 << 20},
	} {
		t.Run(fmt.Sprintf("%s on %s to %s", c.fs, c.pools[0], c.pools[1]), func(t *testing.T) {
			p := newPair(t, c.pools)
			a, b := p.nodes[0], p.nodes[1]
			// On a pool that cannot reflink the writers wait for a copy.
			inUse := map[string]string{"copyInUse": "true", "freezeTimeout": "1m"}
			id := a.create("v", c.fs, c.size, nil, nil)
			at := a.up(id, c.fs)
			data := make([]byte, 5<<20)
			_, _ = rand.Read(data)
			p.must(os.WriteFile(at+"/before", data, 0o600))
			made := p.snapshot(id, inUse)
			p.must(os.WriteFile(at+"/after", data[:1000], 0o600))
			restore, clone := source(made.GetSnapshot().GetSnapshotId(), ""), source("", id)

			for name, v := range map[string]struct {
				src   *csi.VolumeContentSource
				extra int64
				thin  bool
				after bool
			}{
				"thick": {src: restore}, "thin": {src: restore, thin: true}, "larger": {src: restore, extra: 64 << 20},
				"cloned": {src: clone, after: true}, "cloned-thin": {src: clone, thin: true, after: true},
			} {
				params := map[string]string{"copyInUse": "true", "freezeTimeout": "1m"}
				if v.thin {
					params["allocation"] = "thin"
				}
				size := c.size + v.extra
				made := b.create(name, c.fs, size, v.src, params)
				if again := b.create(name, c.fs, size, v.src, params); again != made {
					t.Errorf("%s was made twice: %s, %s", name, made, again)
				}
				st := roottest.Run(t, "stat", "-c", "%s %b", b.image(made))
				var length, blocks int64
				if _, err := fmt.Sscan(st, &length, &blocks); err != nil || length != size || !v.thin && blocks*512 < size || v.thin && blocks*512 > size/2 {
					t.Errorf("%s of %d bytes has %s (%v)", name, size, st, err)
				}
				there := b.up(made, c.fs)
				if got, err := os.ReadFile(there + "/before"); err != nil || !bytes.Equal(got, data) {
					t.Errorf("%s: %d bytes, %v", name, len(got), err)
				}
				if got, err := os.ReadFile(there + "/after"); (err == nil) != v.after || v.after && !bytes.Equal(got, data[:1000]) {
					t.Errorf("%s, written later: %v", name, err)
				}
				p.must(os.WriteFile(there+"/own", data, 0o600))
				b.down(made)
				_, err := p.ctrl.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: made})
				p.must(err)
			}
			a.down(id)
			a.clean()
			b.clean()
		})
	}
}

// A raw block volume arrives byte for byte, and what cannot be is refused.
func TestRawCopyOnAnotherNode(t *testing.T) {
	roottest.Require(t)
	p := newPair(t, [2]string{"xfs", "ext4"})
	a, b := p.nodes[0], p.nodes[1]
	const size = 64 << 20
	id := a.create("v", "", size, nil, map[string]string{"allocation": "thin"})
	data := make([]byte, size)
	for at := 0; at < size; at += 7 << 20 {
		_, _ = rand.Read(data[at : at+300_001])
	}
	data[size-1] = 1
	f, err := os.OpenFile(a.image(id), os.O_WRONLY, 0)
	p.must(err)
	for at := 0; at < size; at += 1 << 20 {
		if piece := data[at : at+1<<20]; !bytes.Equal(piece, make([]byte, 1<<20)) {
			_, err := f.WriteAt(piece, int64(at))
			p.must(err)
		}
	}
	p.must(f.Close())
	made, err := p.ctrl.CreateSnapshot(t.Context(), &csi.CreateSnapshotRequest{Name: "s", SourceVolumeId: id})
	p.must(err)
	restore, clone := source(made.GetSnapshot().GetSnapshotId(), ""), source("", id)
	for name, src := range map[string]*csi.VolumeContentSource{"restored": restore, "cloned": clone} {
		for _, allocation := range []string{"thick", "thin"} {
			made := b.create(name+"-"+allocation, "", size, src, map[string]string{"allocation": allocation})
			if got, err := os.ReadFile(b.image(made)); err != nil || !bytes.Equal(got, data) {
				t.Errorf("%s, %s: it differs (%v)", name, allocation, err)
			}
		}
	}
	refused := func(want codes.Code, name, fsType string, size int64, src *csi.VolumeContentSource, params map[string]string) {
		t.Helper()
		if _, err := b.try(name, fsType, size, src, params); status.Code(err) != want {
			t.Errorf("%s: %v, want %v", name, err, want)
		}
	}
	refused(codes.OutOfRange, "smaller", "", size-1<<20, restore, nil)
	refused(codes.InvalidArgument, "another-filesystem", "ext4", size, restore, nil)
	refused(codes.ResourceExhausted, "its-node", "", size, restore, map[string]string{"sourceNode": "required"})
	refused(codes.InvalidArgument, "no-such-value", "", size, restore, map[string]string{"sourceNode": "sometimes"})
	refused(codes.ResourceExhausted, "too-large", "", 1<<40, restore, nil)
	refused(codes.NotFound, "none", "", size, source(image.VolumeID(id[:20], "none"), ""), nil)
	refused(codes.AlreadyExists, "restored-thick", "", size, clone, nil)
	a.stop()
	refused(codes.Unavailable, "away", "", size, restore, nil)
	b.create("restored-thick", "", size, restore, nil) // it is there: its source is of no interest
	a.start()
	b.create("back", "", size, restore, nil)
	a.clean()
	b.clean()
}
