// Command churn runs in the virtual machine of the power cut tests. It checks the
// disks that the plan names, each as it was left by a cut, and then changes volumes
// on the last one until the power goes: it creates, writes, expands and deletes
// through the driver, and says on the serial line what it begins and what was
// acknowledged.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/csi-loop/csi-loop/test/vm/plan"
)

const (
	mib    = int64(1) << 20
	record = 16 << 10 // bytes
	work   = "/run/churn"
	pool   = work + "/pool"
	// rounds bounds the churn: the power should go long before.
	rounds = 10000
)

func main() {
	c, err := load()
	if err == nil {
		err = c.run()
	}
	if err != nil {
		fmt.Println("churn:", err)
		c.say(plan.Entry{Op: plan.OpProblem, Text: err.Error()})
		os.Exit(1)
	}
}

// churn is the state of one boot.
type churn struct {
	plan plan.CutPlan
	mu   sync.Mutex // one line at a time

	driver *exec.Cmd
	conn   *grpc.ClientConn
}

func load() (*churn, error) {
	c := &churn{}
	f, err := os.Open(plan.LedgerDisk)
	if err != nil {
		return c, err
	}
	defer f.Close()
	b, err := io.ReadAll(f)
	if err != nil {
		return c, err
	}
	return c, json.Unmarshal(bytes.TrimRight(b, "\x00"), &c.plan)
}

// say sends a line and waits until it is out of the machine.
func (c *churn) say(e plan.Entry) {
	c.mu.Lock()
	defer c.mu.Unlock()
	fmt.Println(e.Line(c.plan.Token))
	// TCSBRK with an argument waits for the line (tcdrain).
	_ = unix.IoctlSetInt(int(os.Stdout.Fd()), unix.TCSBRK, 1)
}

func (c *churn) run() error {
	if err := os.MkdirAll(pool, 0o700); err != nil {
		return err
	}
	if c.plan.Boot == 0 {
		out, err := exec.Command("mkfs."+c.plan.Filesystem, plan.PoolDisk).CombinedOutput()
		if err != nil {
			return fmt.Errorf("mkfs: %w: %s", err, out)
		}
		c.plan.Check = []plan.Cut{{Device: plan.PoolDisk}}
	}
	for i, cut := range c.plan.Check {
		if err := c.up(cut.Device); err != nil {
			return fmt.Errorf("%s: %w", cut.Device, err)
		}
		if err := c.check(plan.Fates(c.plan.Entries, cut.Acked, cut.Begun)); err != nil {
			c.say(plan.Entry{Op: plan.OpProblem, Text: cut.Device + ": " + err.Error()})
		}
		c.say(plan.Entry{Op: plan.OpChecked, Volume: "", Text: cut.Device})
		if last := i == len(c.plan.Check)-1; last && !c.plan.CheckOnly {
			break
		}
		if err := c.down(); err != nil {
			return fmt.Errorf("%s: %w", cut.Device, err)
		}
	}
	if c.plan.CheckOnly {
		return nil
	}
	c.say(plan.Entry{Op: plan.OpChurn})
	var workers sync.WaitGroup
	for i, kind := range []string{"ext4", "block", "thin"} {
		workers.Go(func() {
			for n := range rounds {
				if err := c.life(kind, fmt.Sprintf("%s-%d-%d-%d", kind, c.plan.Boot, i, n)); err != nil {
					c.say(plan.Entry{Op: plan.OpProblem, Text: err.Error()})
					return
				}
			}
		})
	}
	workers.Wait()
	return errors.New("the power did not go")
}

// up mounts a disk, which recovers it, and starts the driver on it.
func (c *churn) up(device string) error {
	if out, err := exec.Command("mount", "-t", c.plan.Filesystem, device, pool).CombinedOutput(); err != nil {
		return fmt.Errorf("mount: %w: %s", err, out)
	}
	if err := os.MkdirAll(pool+"/csi", 0o700); err != nil {
		return err
	}
	socket := work + "/csi.sock"
	c.driver = exec.Command("/tests/bin/csi-loop", "serve", "--endpoint=unix://"+socket, "--node-id=vm", "--pool=default="+pool+"/csi", "--state-dir="+work+"/state")
	log, err := os.Create(work + "/log")
	if err != nil {
		return err
	}
	defer log.Close()
	c.driver.Stdout, c.driver.Stderr = log, log
	if err := c.driver.Start(); err != nil {
		return err
	}
	if c.conn, err = grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials())); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if _, err := csi.NewIdentityClient(c.conn).Probe(ctx, &csi.ProbeRequest{}, grpc.WaitForReady(true)); err != nil {
		b, _ := os.ReadFile(work + "/log")
		return fmt.Errorf("the driver does not come up: %w: %s", err, b)
	}
	return nil
}

func (c *churn) down() error {
	_ = c.conn.Close()
	if err := c.driver.Process.Signal(unix.SIGTERM); err != nil {
		return err
	}
	err := c.driver.Wait()
	if err == nil {
		err = unix.Unmount(pool, 0)
	}
	return err
}

func (c *churn) controller() csi.ControllerClient { return csi.NewControllerClient(c.conn) }
func (c *churn) node() csi.NodeClient             { return csi.NewNodeClient(c.conn) }

func call() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), 5*time.Minute)
}

// check compares what is there with what must be.
func (c *churn) check(fates map[string]*plan.Fate) error {
	ctx, cancel := call()
	defer cancel()
	list, err := c.controller().ListVolumes(ctx, &csi.ListVolumesRequest{})
	if err != nil {
		return err
	}
	var errs []error
	seen := map[string]bool{}
	for _, e := range list.GetEntries() {
		id := e.GetVolume().GetVolumeId()
		_, name, _ := strings.Cut(id, ".")
		seen[name] = true
		if err := c.checkVolume(id, name, e.GetVolume().GetCapacityBytes(), fates[name]); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", name, err))
		}
	}
	for name, f := range fates {
		if f.Created && !seen[name] {
			errs = append(errs, fmt.Errorf("%s was acknowledged and is lost", name))
		}
	}
	dirs, _ := filepath.Glob(pool + "/csi/volumes/*")
	left, _ := filepath.Glob(pool + "/csi/.*")
	if len(dirs) != len(list.GetEntries()) || len(left) > 0 {
		errs = append(errs, fmt.Errorf("%d volumes are listed; there are %q and %q", len(list.GetEntries()), dirs, left))
	}
	health, err := c.node().NodeGetStorageHealth(ctx, &csi.NodeGetStorageHealthRequest{})
	if err != nil || len(health.GetBackendHealth()) > 0 {
		errs = append(errs, fmt.Errorf("health: %v, %w", health.GetBackendHealth(), err))
	}
	return errors.Join(errs...)
}

func (c *churn) checkVolume(id, name string, size int64, f *plan.Fate) error {
	switch {
	case f == nil:
		return errors.New("nobody made it")
	case f.Deleted:
		return errors.New("its deletion was acknowledged")
	case size < f.MinSize || size > f.MaxSize:
		return fmt.Errorf("it has %d bytes, not %d to %d", size, f.MinSize, f.MaxSize)
	}
	image := pool + "/csi/volumes/" + name + "/disk.img"
	st, err := os.Stat(image)
	if err != nil {
		return err
	}
	// An image that grew before its record did is cut when it is opened.
	if st.Size() < size || st.Size() > f.MaxSize {
		return fmt.Errorf("its image has %d bytes, its record says %d", st.Size(), size)
	}
	v := &volume{c, f.Kind, name, id}
	if err := v.attach(); err != nil {
		return err
	}
	for n := range f.Records {
		got := make([]byte, record)
		file, err := os.Open(v.file())
		if err == nil {
			_, err = file.ReadAt(got, n*record)
			_ = file.Close()
		}
		if err != nil || !bytes.Equal(got, v.record(n)) {
			return fmt.Errorf("record %d of %d was synced and is not there: %w", n, f.Records, errors.Join(err, v.detach()))
		}
	}
	if err := v.detach(); err != nil {
		return err
	}
	if f.Kind == "block" {
		return nil
	}
	if out, err := exec.Command("e2fsck", "-fn", image).CombinedOutput(); err != nil {
		return fmt.Errorf("e2fsck: %w: %s", err, out)
	}
	return nil
}

// volume is one volume of a kind: "ext4", "block" or "thin".
type volume struct {
	*churn
	kind, name, id string
}

func (v *volume) capability() *csi.VolumeCapability {
	c := &csi.VolumeCapability{AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER}}
	if v.kind == "block" {
		c.AccessType = &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}}
	} else {
		c.AccessType = &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{FsType: "ext4"}}
	}
	return c
}

func (v *volume) staging() string { return work + "/stage/" + v.name }
func (v *volume) target() string  { return work + "/target/" + v.name }

// file is where the records are.
func (v *volume) file() string {
	if v.kind == "block" {
		return v.target()
	}
	return v.target() + "/records"
}

// record is what record n holds: every byte depends on the volume and on n.
func (v *volume) record(n int64) []byte {
	b := make([]byte, record)
	fill := rand.NewChaCha8([32]byte([]byte(fmt.Sprintf("%-24.24s%08d", v.name, n))))
	_, _ = fill.Read(b)
	return b
}

func (v *volume) attach() error {
	ctx, cancel := call()
	defer cancel()
	for _, dir := range []string{v.staging(), filepath.Dir(v.target())} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return err
		}
	}
	_, err := v.node().NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{VolumeId: v.id, StagingTargetPath: v.staging(), VolumeCapability: v.capability()})
	if err == nil {
		_, err = v.node().NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{
			VolumeId: v.id, StagingTargetPath: v.staging(), TargetPath: v.target(), VolumeCapability: v.capability(),
		})
	}
	return err
}

func (v *volume) detach() error {
	ctx, cancel := call()
	defer cancel()
	_, err := v.node().NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: v.id, TargetPath: v.target()})
	if err == nil {
		_, err = v.node().NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: v.id, StagingTargetPath: v.staging()})
	}
	return err
}

// life makes a volume, writes records, lets it grow, writes more, and deletes every
// second one.
func (c *churn) life(kind, name string) error {
	v := &volume{c, kind, name, ""}
	size := 8 * mib
	step := func(op string, n int64, do func() error) error {
		c.say(plan.Entry{Op: op, Volume: name, N: n})
		if err := do(); err != nil {
			return fmt.Errorf("%s %s: %w", op, name, err)
		}
		c.say(plan.Entry{Op: op, Volume: name, N: n, Acked: true})
		return nil
	}
	if err := step(plan.OpCreate, size, func() error { return v.create(size) }); err != nil {
		return err
	}
	if err := v.attach(); err != nil {
		return err
	}
	for n := range int64(12) {
		if n == 6 {
			if err := step(plan.OpExpand, 2*size, func() error { return v.expand(2 * size) }); err != nil {
				return err
			}
		}
		if err := step(plan.OpWrite, n, func() error { return v.write(n) }); err != nil {
			return err
		}
	}
	if err := v.detach(); err != nil {
		return err
	}
	if strings.HasSuffix(name, "0") || strings.HasSuffix(name, "5") {
		return nil
	}
	return step(plan.OpDelete, 0, v.remove)
}

func (v *volume) create(size int64) error {
	ctx, cancel := call()
	defer cancel()
	parameters := map[string]string{}
	if v.kind == "thin" {
		parameters["allocation"] = "thin"
	}
	r, err := v.controller().CreateVolume(ctx, &csi.CreateVolumeRequest{
		Name: v.name, CapacityRange: &csi.CapacityRange{RequiredBytes: size}, VolumeCapabilities: []*csi.VolumeCapability{v.capability()}, Parameters: parameters,
	})
	v.id = r.GetVolume().GetVolumeId()
	return err
}

func (v *volume) expand(size int64) error {
	ctx, cancel := call()
	defer cancel()
	capacity := &csi.CapacityRange{RequiredBytes: size}
	_, err := v.controller().ControllerExpandVolume(ctx, &csi.ControllerExpandVolumeRequest{VolumeId: v.id, CapacityRange: capacity, VolumeCapability: v.capability()})
	if err == nil {
		_, err = v.node().NodeExpandVolume(ctx, &csi.NodeExpandVolumeRequest{
			VolumeId: v.id, VolumePath: v.target(), StagingTargetPath: v.staging(), CapacityRange: capacity, VolumeCapability: v.capability(),
		})
	}
	return err
}

func (v *volume) write(n int64) error {
	f, err := os.OpenFile(v.file(), os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(v.record(n), n*record)
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil && n == 0 && v.kind != "block" {
		err = syncDir(v.target()) // the name of a new file
	}
	return err
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func (v *volume) remove() error {
	ctx, cancel := call()
	defer cancel()
	_, err := v.controller().DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: v.id})
	return err
}
