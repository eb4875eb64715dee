package driver

import (
	"cmp"
	"context"
	"flag"
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"k8s.io/klog/v2"

	"github.com/csi-loop/csi-loop/internal/roottest"
	"github.com/csi-loop/csi-loop/pkg/image"
)

const mib = int64(1) << 20

func TestMain(m *testing.M) {
	quiet := flag.NewFlagSet("klog", flag.PanicOnError)
	klog.InitFlags(quiet)
	_ = quiet.Parse([]string{"-logtostderr=false", "-stderrthreshold=FATAL"})
	klog.SetOutput(io.Discard)
	roottest.Main(m, roottest.IgnoreGoroutine("github.com/onsi/ginkgo/v2/internal/interrupt_handler.(*InterruptHandler).registerForInterrupts.func2"))
}

// node is a driver under test with everything it stands on, and a client.
type node struct {
	t    *testing.T
	cfg  Config
	dir  string // scratch; pool, state and sockets lie in it
	pool []image.Config
	dirs []string

	fake     *fakeKernel
	pods     *fakePods
	mappings encrypter     // dm-crypt is asked if nil
	sweep    time.Duration // instead of the driver's own, unless 0

	socket string
	d      *Driver
	store  *image.Store
	conn   *grpc.ClientConn
	stop   func()
	ident  csi.IdentityClient
	ctrl   csi.ControllerClient
	client csi.NodeClient
}

// newFake makes a node over fake loop devices and mounts, and a real pool.
func newFake(t *testing.T) *node {
	dir := t.TempDir()
	n := &node{t: t, dir: dir, fake: newFakeKernel(), pods: newFakePods()}
	n.defaults(filepath.Join(dir, "pool"))
	n.start()
	t.Cleanup(func() { n.fake.clean(t) })
	return n
}

func (n *node) defaults(pool string) {
	n.t.Helper()
	mapped := filepath.Join(n.dir, "images")
	for _, d := range []string{pool, mapped} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			n.t.Fatal(err)
		}
	}
	n.pool = []image.Config{{Name: "default", Path: pool, Overcommit: 1}}
	n.dirs = []string{mapped}
	n.cfg = Config{
		Version: "test", NodeID: "node-a", StateDir: filepath.Join(n.dir, "state"), DefaultPool: "default",
		EphemeralMaxSize: 1 << 30,
	}
	n.t.Cleanup(func() { n.halt() })
}

// start opens everything and serves.
func (n *node) start() {
	n.t.Helper()
	ctx := context.Background()
	store, err := image.Open(ctx, n.pool)
	n.must(err)
	dirs, err := image.OpenDirs(n.dirs, store.Pools()...)
	n.must(err)
	d, err := newDriver(n.cfg, store, dirs, n.fake, n.fake, fakeMounts{n.fake}, n.fake, n.fake)
	n.must(err)
	d.tuner, d.pods = n.fake, n.pods
	if n.mappings != nil {
		d.crypt = n.mappings
	}
	d.sweeper.every = cmp.Or(n.sweep, d.sweeper.every)
	n.must(d.Reconcile(ctx))
	n.socket = filepath.Join(socketDir(n.t), "csi.sock")
	l, err := Listen(ctx, "unix://"+n.socket)
	n.must(err)
	serve, cancel := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() { done <- d.Serve(serve, l, 0) }()
	n.conn, err = grpc.NewClient("unix:"+n.socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	n.must(err)
	n.d, n.store = d, store
	n.ident, n.ctrl, n.client = csi.NewIdentityClient(n.conn), csi.NewControllerClient(n.conn), csi.NewNodeClient(n.conn)
	n.stop = func() {
		n.must(n.conn.Close())
		cancel()
		n.must(<-done)
		n.must(d.Close())
		n.must(store.Close())
	}
}

// halt stops serving; a second call does nothing.
func (n *node) halt() {
	if n.stop != nil {
		n.stop()
		n.stop = nil
	}
}

// restart is a stop and a start over what the stop left.
func (n *node) restart() {
	n.halt()
	n.start()
}

func (n *node) must(err error) {
	n.t.Helper()
	if err != nil {
		n.t.Fatal(err)
	}
}

// code asserts the gRPC code of an error.
func code(t *testing.T, err error, want codes.Code) {
	t.Helper()
	if got := status.Code(err); got != want {
		t.Fatalf("got %s (%v), want %s", got, err, want)
	}
	if s, _ := status.FromError(err); want != codes.OK && (s.Message() == "" || len(s.Details()) > 0) {
		t.Fatalf("status %v: want a message and no details", s)
	}
}

func mountCap(fsType string, mode csi.VolumeCapability_AccessMode_Mode, flags ...string) *csi.VolumeCapability {
	return &csi.VolumeCapability{
		AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{FsType: fsType, MountFlags: flags}},
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: mode},
	}
}

func blockCap(mode csi.VolumeCapability_AccessMode_Mode) *csi.VolumeCapability {
	return &csi.VolumeCapability{
		AccessType: &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}},
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: mode},
	}
}

const (
	oneWriter   = csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER
	manyWriters = csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER
	legacy      = csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER
	reader      = csi.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY
)

// volume is one volume of a test and where it goes.
type volume struct {
	n       *node
	id      string
	cap     *csi.VolumeCapability
	context map[string]string
}

// create makes a volume.
func (n *node) create(name string, size int64, c *csi.VolumeCapability, params map[string]string) volume {
	n.t.Helper()
	resp, err := n.ctrl.CreateVolume(n.t.Context(), &csi.CreateVolumeRequest{
		Name: name, CapacityRange: &csi.CapacityRange{RequiredBytes: size},
		VolumeCapabilities: []*csi.VolumeCapability{c}, Parameters: params,
	})
	n.must(err)
	return volume{n: n, id: resp.GetVolume().GetVolumeId(), cap: c}
}

func (v volume) staging() string {
	dir := filepath.Join(v.n.dir, "staging", image.DirName(v.id))
	v.n.must(os.MkdirAll(dir, 0o750))
	return dir
}

func (v volume) target(pod string) string {
	dir := filepath.Join(v.n.dir, "pods", pod)
	v.n.must(os.MkdirAll(dir, 0o750))
	return filepath.Join(dir, "mount")
}

func (v volume) stage() error {
	_, err := v.n.client.NodeStageVolume(v.n.t.Context(), &csi.NodeStageVolumeRequest{
		VolumeId: v.id, StagingTargetPath: v.staging(), VolumeCapability: v.cap, VolumeContext: v.context,
	})
	return err
}

func (v volume) unstage() error {
	_, err := v.n.client.NodeUnstageVolume(v.n.t.Context(), &csi.NodeUnstageVolumeRequest{VolumeId: v.id, StagingTargetPath: v.staging()})
	return err
}

func (v volume) publish(pod string, readOnly bool) error {
	_, err := v.n.client.NodePublishVolume(v.n.t.Context(), &csi.NodePublishVolumeRequest{
		VolumeId: v.id, StagingTargetPath: v.staging(), TargetPath: v.target(pod), VolumeCapability: v.cap,
		Readonly: readOnly, VolumeContext: v.context,
	})
	return err
}

func (v volume) unpublish(pod string) error {
	_, err := v.n.client.NodeUnpublishVolume(v.n.t.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: v.id, TargetPath: v.target(pod)})
	return err
}

func (v volume) delete() error {
	_, err := v.n.ctrl.DeleteVolume(v.n.t.Context(), &csi.DeleteVolumeRequest{VolumeId: v.id})
	return err
}

// up stages and publishes for pod.
func (v volume) up(pod string) volume {
	v.n.t.Helper()
	v.n.must(v.stage())
	v.n.must(v.publish(pod, false))
	return v
}

// down takes everything back.
func (v volume) down(pods ...string) {
	v.n.t.Helper()
	for _, p := range slices.Concat(pods) {
		v.n.must(v.unpublish(p))
	}
	v.n.must(v.unstage())
	v.n.must(v.delete())
}

// socketDir is a directory for sockets: their paths are short, and a test's name,
// which t.TempDir puts into its path, may be long.
func socketDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "s") //nolint:usetesting // for the short path
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// dial connects to a socket.
func dial(t *testing.T, path string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	return conn
}
