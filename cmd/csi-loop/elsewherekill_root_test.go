package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"

	"github.com/csi-loop/csi-loop/internal/kubeapi/kubeapitest"
	"github.com/csi-loop/csi-loop/internal/roottest"
	"github.com/csi-loop/csi-loop/pkg/driver"
	"github.com/csi-loop/csi-loop/pkg/router"
	"github.com/csi-loop/csi-loop/pkg/router/kube"
	"github.com/csi-loop/csi-loop/pkg/router/link"
)

// asController makes the test binary a controller for which the API server is
// podTokens: a process that can be killed. Its value is a controllerSpec.
const asController = "CSI_LOOP_TEST_AS_CONTROLLER"

// controllerSpec is what a controller process is told.
type controllerSpec struct {
	Socket  string `json:"socket"`
	Address string `json:"address"`
	TLSDir  string `json:"tlsDir"`
	Rate    int64  `json:"rate"` // of transfers, bytes a second
}

// runController is the controller's process, until it is told to stop.
func runController(spec string) error {
	var c controllerSpec
	if err := json.Unmarshal([]byte(spec), &c); err != nil {
		return err
	}
	running, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	group, running := errgroup.WithContext(running)
	return routeCSI(running, plan{
		mode: modeController, endpoint: "unix://" + c.Socket, stopTimeout: time.Second, driver: driver.Config{Name: driver.DefaultName, Version: "v1"},
		link: linkConfig{LinkListen: c.Address, LinkAdvertise: c.Address}, transferRate: c.Rate,
	}, newMetrics(build{}), group, router.Config{Auth: podTokens{}, Roster: noRoster{}, Claims: noClaims{}, Certificate: kube.Dir(c.TLSDir)},
		func(ctx context.Context, tell func([]string)) {
			tell([]string{c.Address})
			<-ctx.Done()
		})
}

// process is one that is killed, and started again as it was.
type process struct {
	*child
	begin func() *child
}

func newProcess(begin func() *child) *process { return &process{begin(), begin} }

func (p *process) kill() {
	p.signal(syscall.SIGKILL)
	<-p.done
}

// again starts it anew.
func (p *process) again() { p.child = p.begin() }

// realPair is a pair of which all three are processes: the nodes are csi-loop itself.
type realPair struct {
	*pair
	controller *process
	serving    [2]*process
}

func newRealPair(t *testing.T, pools [2]string, rate int64) *realPair {
	t.Helper()
	r := &realPair{pair: &pair{t: t, place: newPlace(t)}}
	client := fake.NewClientset()
	certificates := &kube.Certificates{Client: kubeapitest.Of(client), Namespace: "ns", Secret: "s", ConfigMap: "c", ServerName: link.DefaultName}
	r.must(certificates.Ensure(t.Context()))
	bundle, err := client.CoreV1().ConfigMaps("ns").Get(t.Context(), "c", meta.GetOptions{})
	r.must(err)
	secret, err := client.CoreV1().Secrets("ns").Get(t.Context(), "s", meta.GetOptions{})
	r.must(err)
	r.ca = r.place.dir + "/ca.crt"
	r.must(os.WriteFile(r.ca, []byte(bundle.Data[kube.CAKey]), 0o600))
	for _, key := range []string{core.TLSCertKey, core.TLSPrivateKeyKey} {
		r.must(os.WriteFile(filepath.Join(r.place.dir, key), secret.Data[key], 0o600))
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	r.must(err)
	r.address = l.Addr().String()
	r.must(l.Close())
	for i, fsType := range pools {
		n := &pairNode{p: r.pair, name: fmt.Sprintf("n%d", i+1)}
		n.work, n.pool = filepath.Join(r.place.dir, n.name), filepath.Join(roottest.Pool(t, fsType, 3<<30), "pool")
		r.must(os.Mkdir(n.pool, 0o700))
		r.must(os.Mkdir(n.work, 0o700))
		r.must(os.WriteFile(n.work+"/token", []byte(n.name), 0o600))
		r.nodes[i] = n
	}
	t.Cleanup(r.scrub) // when the processes have ended
	spec, err := json.Marshal(controllerSpec{r.place.socket, r.address, r.place.dir, rate})
	r.must(err)
	r.controller = newProcess(func() *child {
		c := spawn(t, []string{asController + "=" + string(spec)})
		c.waitFor("Serving")
		return c
	})
	for i, n := range r.nodes {
		r.serving[i] = newProcess(func() *child {
			c := spawn(t, nil, "serve", "--mode="+modeNode, "--endpoint=unix://"+n.work+"/csi.sock", "--node-id="+n.name, "--pool=default="+n.pool,
				"--state-dir="+n.work+"/state", "--controller-address="+r.address, "--controller-ca="+r.ca, "--link-token-file="+n.work+"/token", "-v=1")
			c.waitFor("Serving")
			return c
		})
		n.node = csi.NewNodeClient(dial(t, n.work+"/csi.sock"))
	}
	r.ctrl = csi.NewControllerClient(dial(t, r.place.socket))
	return r
}

// scrub takes away what a test that failed has left mounted.
func (r *realPair) scrub() {
	if !r.t.Failed() {
		return
	}
	for _, n := range r.nodes {
		targets, _ := filepath.Glob(n.work + "/*/*/mount")
		stages, _ := filepath.Glob(n.work + "/staging/*")
		for _, at := range append(targets, stages...) {
			_ = exec.Command("umount", "-l", at).Run()
		}
		for _, l := range roottest.Loops(n.pool) {
			name, _, _ := strings.Cut(l, " ")
			_ = exec.Command("losetup", "-d", "/dev/"+name).Run()
		}
	}
}

// listed are the volumes that the controller lists, once both nodes are there.
func (r *realPair) listed(want int) []string {
	r.t.Helper()
	var ids []string
	eventually(r.t, "both nodes are linked", func() error {
		l, err := r.ctrl.ListVolumes(r.t.Context(), &csi.ListVolumesRequest{})
		if err != nil {
			return err
		}
		ids = nil
		for _, e := range l.GetEntries() {
			ids = append(ids, e.GetVolume().GetVolumeId())
		}
		if len(ids) < want {
			return fmt.Errorf("listed: %q", ids)
		}
		return nil
	})
	slices.Sort(ids)
	return ids
}

// The sender, the receiver and the controller are killed in the middle of a copy of a
// volume in use, early and late in it, and started again. Nothing of the copy is to be
// seen or costs space, unless all of it had been sent; the source is neither frozen nor
// kept; the repeated call makes the copy, once.
func TestProcessKilledWhileCopying(t *testing.T) {
	roottest.Require(t)
	rate := int64(2 << 20)
	if os.Getenv("CSI_LOOP_VM") != "" {
		rate >>= 1 // an emulated processor is slow to see how far a copy is
	}
	r := newRealPair(t, [2]string{"xfs", "ext4"}, rate)
	a, b := r.nodes[0], r.nodes[1]
	const size = 16 << 20
	data := make([]byte, 6<<20)
	_, _ = rand.Read(data)
	id := a.create("v", "ext4", size, nil, nil)
	beside := b.create("w", "", 1<<20, nil, nil) // so that the list tells when b is linked
	at := a.up(id, "ext4")
	r.must(writeSynced(at+"/data", data))
	made, err := r.ctrl.CreateSnapshot(t.Context(), &csi.CreateSnapshotRequest{Name: "s", SourceVolumeId: id})
	r.must(err)
	before, loops := r.room(b), [2][]string{roottest.Loops(a.pool), roottest.Loops(b.pool)}
	for _, who := range []struct {
		name string
		*process
	}{{"sender", r.serving[0]}, {"receiver", r.serving[1]}, {"controller", r.controller}} {
		for what, src := range map[string]*csi.VolumeContentSource{"restored": source(made.GetSnapshot().GetSnapshotId(), ""), "cloned": source("", id)} {
			for when, part := range map[string]int{"early": 0, "late": len(data) / 2} {
				t.Run(strings.Join([]string{who.name, what, when}, " "), func(t *testing.T) {
					name := strings.Join([]string{who.name, what, when}, "-")
					r.cut(t, who.process, name, size, src, data, part)
					if _, err := os.Stat(filepath.Join(b.pool, "volumes", name)); !errors.Is(err, os.ErrNotExist) {
						t.Errorf("half of it is a volume: %v", err)
					}
					who.again()
					whole := func(id string) bool { return part > 0 && strings.HasSuffix(id, "."+name) } // it is read below
					if got, want := slices.DeleteFunc(r.listed(2), whole), slices.Sorted(slices.Values([]string{id, beside})); !slices.Equal(got, want) {
						t.Errorf("listed: %q, want %q", got, want)
					}
					r.whole(t, b.create(name, "ext4", size, src, nil), data)
					written := make(chan error, 1)
					go func() { written <- writeSynced(at+"/after", data[:4096]) }()
					eventually(t, "the source is not frozen", func() error {
						select {
						case err := <-written:
							r.must(err)
							return nil
						default:
							return errors.New("a write waits")
						}
					})
					r.settled(before, loops)
				})
			}
		}
	}
	a.down(id)
	_, err = r.ctrl.DeleteSnapshot(t.Context(), &csi.DeleteSnapshotRequest{SnapshotId: made.GetSnapshot().GetSnapshotId()})
	r.must(err)
	r.deleted(id)
	r.deleted(beside)
	for _, p := range []*process{r.serving[0], r.serving[1], r.controller} {
		p.stop()
	}
	if left := append(roottest.Loops(a.pool), roottest.Loops(b.pool)...); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
}

// cut begins a copy onto the second node and kills a process once the receiver has a part
// of the data. A machine that is busy may see that late, when all of it is a volume: then once more.
func (r *realPair) cut(t *testing.T, who *process, name string, size int64, src *csi.VolumeContentSource, data []byte, part int) {
	t.Helper()
	b := r.nodes[1]
	for range 5 {
		asked := make(chan error, 1)
		go func() {
			_, err := b.try(name, "ext4", size, src, nil)
			asked <- err
		}()
		eventually(t, "the copy is on its way", func() error {
			select {
			case err := <-asked:
				if err != nil {
					t.Fatalf("not copied: %v", err)
				}
				asked <- nil
				return nil
			default:
				return b.holds(data[part : part+4096])
			}
		})
		who.kill()
		err := <-asked
		if _, none := os.Stat(filepath.Join(b.pool, "volumes", name)); err != nil && errors.Is(none, os.ErrNotExist) {
			return
		}
		t.Logf("all of it was there before the kill: %v", err)
		who.again()
		r.listed(3) // all are linked
		r.whole(t, b.create(name, "ext4", size, src, nil), data)
	}
	t.Fatal("the copy was made each time: the test shows nothing")
}

// whole reads a copy, and deletes it.
func (r *realPair) whole(t *testing.T, id string, data []byte) {
	t.Helper()
	at := r.nodes[1].up(id, "ext4")
	if got, err := os.ReadFile(at + "/data"); err != nil || !bytes.Equal(got, data) {
		t.Errorf("it differs: %d bytes, %v", len(got), err)
	}
	r.nodes[1].down(id)
	r.deleted(id)
}

// deleted deletes a volume, once its node is linked again.
func (r *realPair) deleted(id string) {
	r.t.Helper()
	eventually(r.t, "deleted: "+id, func() error {
		_, err := r.ctrl.DeleteVolume(r.t.Context(), &csi.DeleteVolumeRequest{VolumeId: id})
		if c := status.Code(err); err != nil && c != codes.Aborted && c != codes.Unavailable {
			r.t.Fatal(id, err)
		}
		return err
	})
}

func writeSynced(path string, data []byte) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	return errors.Join(err, f.Sync(), f.Close())
}

// holds fails until a file that is no volume yet has these bytes.
func (n *pairNode) holds(data []byte) error {
	found, err := filepath.Glob(n.pool + "/.new-*/disk.img")
	if err != nil || len(found) == 0 {
		return errors.Join(err, errors.New("no file"))
	}
	got, err := os.ReadFile(found[0])
	if err == nil && !bytes.Contains(got, data) {
		err = errors.New("no data")
	}
	return err
}

// room is what the controller says of a node's pool.
func (r *realPair) room(n *pairNode) int64 {
	r.t.Helper()
	var free int64
	eventually(r.t, "a capacity", func() error {
		c, err := r.ctrl.GetCapacity(r.t.Context(), &csi.GetCapacityRequest{AccessibleTopology: n.requirement().GetRequisite()[0]})
		free = c.GetAvailableCapacity()
		return err
	})
	return free
}

// settled waits until nothing of a copy is left on either node.
func (r *realPair) settled(room int64, loops [2][]string) {
	r.t.Helper()
	eventually(r.t, "nothing is left", func() error {
		for i, n := range r.nodes {
			if left, _ := filepath.Glob(n.pool + "/.*"); len(left) > 0 {
				return fmt.Errorf("%s: files %q", n.name, left)
			}
			if have := roottest.Loops(n.pool); !slices.Equal(have, loops[i]) {
				return fmt.Errorf("%s: devices %q, want %q", n.name, have, loops[i])
			}
			volumes, _ := filepath.Glob(n.pool + "/*/*")
			if want := 2 - i; len(volumes) != want { // a volume on each, and a snapshot on one
				return fmt.Errorf("%s: %q", n.name, volumes)
			}
		}
		if now := r.room(r.nodes[1]); now < room-1<<20 {
			return fmt.Errorf("%d bytes are free, of %d", now, room)
		}
		return nil
	})
}
