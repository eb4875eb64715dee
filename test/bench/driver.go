//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
)

// driver is a driver and a client of it.
type driver struct {
	binary string
	dir    string
	state  string
	args   []string
	cmd    *exec.Cmd // nil for one in this process
	conn   *grpc.ClientConn
	ctrl   csi.ControllerClient
	node   csi.NodeClient
	slot   string        // directory of one client's paths
	delay  time.Duration // before each call of a cycle

	mu  *sync.Mutex
	ids map[string]string // guarded by mu; volume IDs by name
}

// startDriver runs the driver with a new pool below dir.
func startDriver(ctx context.Context, binary, dir string, args ...string) (*driver, error) {
	d := &driver{binary: binary, dir: dir, args: args, mu: &sync.Mutex{}, ids: make(map[string]string)}
	for _, sub := range []string{"pool", "staging", "pod"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o750); err != nil {
			return nil, err
		}
	}
	// On a tmpfs, as /run, where it is by default, is on most machines.
	var err error
	if d.state, err = os.MkdirTemp("/dev/shm", "csi-loop-bench-"); err != nil {
		return nil, err
	}
	if err := d.start(ctx); err != nil {
		return nil, errors.Join(err, d.stop())
	}
	return d, nil
}

// start runs the process, and returns when it answers.
func (d *driver) start(ctx context.Context) error {
	socket := filepath.Join(d.dir, "csi.sock")
	// Not CommandContext: stop ends it, after the volumes are gone.
	d.cmd = exec.Command(d.binary, append([]string{
		"serve", "--endpoint=unix://" + socket, "--node-id=bench",
		"--pool=default=" + filepath.Join(d.dir, "pool"), "--state-dir=" + d.state,
	}, d.args...)...)
	log, err := os.Create(filepath.Join(d.dir, "log"))
	if err != nil {
		return err
	}
	defer log.Close()
	d.cmd.Stdout, d.cmd.Stderr = log, log
	if err := d.cmd.Start(); err != nil {
		return err
	}
	if err := d.dial(ctx, socket); err != nil {
		out, _ := os.ReadFile(filepath.Join(d.dir, "log"))
		return fmt.Errorf("the driver does not answer: %w\n%s", err, out)
	}
	return nil
}

func (d *driver) dial(ctx context.Context, socket string) (err error) {
	// Fixed windows, as the driver's: measuring the link for larger ones costs a ping
	// for each call.
	d.conn, err = grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: time.Millisecond, Multiplier: 1.2, MaxDelay: 10 * time.Millisecond}, MinConnectTimeout: time.Second}),
		grpc.WithInitialWindowSize(int32(mib)), grpc.WithInitialConnWindowSize(int32(mib)))
	if err != nil {
		return err
	}
	d.ctrl, d.node = csi.NewControllerClient(d.conn), csi.NewNodeClient(d.conn)
	wait, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	_, err = csi.NewIdentityClient(d.conn).Probe(wait, &csi.ProbeRequest{}, grpc.WaitForReady(true))
	return err
}

// kill ends the process without a warning.
func (d *driver) kill() error {
	_ = d.conn.Close()
	if err := d.cmd.Process.Kill(); err != nil {
		return err
	}
	_ = d.cmd.Wait() // "signal: killed"
	return nil
}

func (d *driver) stop() error {
	if d.cmd == nil || d.cmd.Process == nil {
		return os.RemoveAll(d.state) // it did not start
	}
	return errors.Join(d.stopProcess(), os.RemoveAll(d.state))
}

// stopProcess ends the process as it asks for; start runs another.
func (d *driver) stopProcess() error {
	if d.conn != nil {
		_ = d.conn.Close()
	}
	_ = d.cmd.Process.Signal(syscall.SIGTERM)
	return d.cmd.Wait()
}

// memory is the resident set of the driver, in bytes.
func (d *driver) memory() int64 {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", d.cmd.Process.Pid))
	if err != nil {
		return 0
	}
	pages, _ := strconv.ParseInt(strings.Fields(string(b))[1], 10, 64)
	return pages * int64(os.Getpagesize())
}

func capability(kind string) *csi.VolumeCapability {
	c := &csi.VolumeCapability{AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER}}
	if kind == "block" {
		c.AccessType = &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}}
	} else {
		c.AccessType = &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{FsType: kind}}
	}
	return c
}

// cycle is one whole life of a volume.
func (d *driver) cycle(ctx context.Context, kind, name string, size int64) (timing, error) {
	c, id := capability(kind), ""
	staging, target := filepath.Join(d.dir, "staging", d.slot), filepath.Join(d.dir, "pod", d.slot, "mount")
	calls := map[string]func() error{
		"create": func() error {
			resp, err := d.ctrl.CreateVolume(ctx, &csi.CreateVolumeRequest{
				Name: name, CapacityRange: &csi.CapacityRange{RequiredBytes: size}, VolumeCapabilities: []*csi.VolumeCapability{c},
			})
			id = resp.GetVolume().GetVolumeId()
			return err
		},
		"stage": func() error {
			_, err := d.node.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{VolumeId: id, StagingTargetPath: staging, VolumeCapability: c})
			return err
		},
		"publish": func() error {
			_, err := d.node.NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{VolumeId: id, StagingTargetPath: staging, TargetPath: target, VolumeCapability: c})
			return err
		},
		"unpublish": func() error {
			_, err := d.node.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: id, TargetPath: target})
			return err
		},
		"unstage": func() error {
			_, err := d.node.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: id, StagingTargetPath: staging})
			return err
		},
		"delete": func() error { return d.delete(ctx, id) },
	}
	if d.delay > 0 {
		for step, call := range calls {
			calls[step] = func() error {
				time.Sleep(d.delay)
				return call()
			}
		}
	}
	return measure(calls)
}

// measure times the steps in order.
func measure(calls map[string]func() error) (timing, error) {
	t := timing{}
	for _, step := range steps {
		start := time.Now()
		if err := calls[step](); err != nil {
			return nil, fmt.Errorf("%s: %w", step, err)
		}
		t[step] = time.Since(start)
	}
	return t, nil
}

func (d *driver) delete(ctx context.Context, id string) error {
	_, err := d.ctrl.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: id})
	return err
}

// createThin makes a sparse raw volume.
func (d *driver) createThin(ctx context.Context, name string) error {
	resp, err := d.ctrl.CreateVolume(ctx, &csi.CreateVolumeRequest{
		Name: name, CapacityRange: &csi.CapacityRange{RequiredBytes: mib},
		VolumeCapabilities: []*csi.VolumeCapability{capability("block")}, Parameters: map[string]string{"allocation": "thin"},
	})
	d.mu.Lock()
	d.ids[name] = resp.GetVolume().GetVolumeId()
	d.mu.Unlock()
	return err
}

func (d *driver) idOf(name string) string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.ids[name]
}
