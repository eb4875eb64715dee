//go:build linux

// Package lab is what the benchmarks of the data plane and of snapshots share: a
// driver process and a client of it, pools on filesystems of their own, statistics,
// and reports.
package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// MiB and GiB are bytes.
const (
	MiB = int64(1) << 20
	GiB = int64(1) << 30
)

// Kernel names the kernel this runs on.
func Kernel() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return "unknown kernel"
	}
	return "Linux " + unix.ByteSliceToString(u.Release[:])
}

// Commit is the first digits of the commit that is checked out, with "+" if something
// was changed since; "unknown" outside of a repository.
func Commit(ctx context.Context) string {
	out, err := exec.CommandContext(ctx, "git", "describe", "--always", "--abbrev=10", "--exclude=*", "--dirty=+").Output()
	if err != nil {
		return "unknown"
	}
	return strings.TrimSpace(string(out))
}

// Run runs a program and returns what it wrote; its error says what it complained of.
func Run(ctx context.Context, argv ...string) (string, error) {
	out, err := exec.CommandContext(ctx, argv[0], argv[1:]...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%s: %w: %s", strings.Join(argv, " "), err, out)
	}
	return strings.TrimSpace(string(out)), nil
}

// Scratch makes a directory in dir, or in the one for temporary files if dir is "".
// What remove finds on another filesystem was not unmounted, and is left alone.
func Scratch(ctx context.Context, dir string) (path string, remove func() error, err error) {
	if path, err = os.MkdirTemp(dir, "csi-loop-bench-"); err != nil {
		return "", nil, err
	}
	return path, func() error {
		_, err := Run(context.WithoutCancel(ctx), "rm", "-r", "--one-file-system", path)
		return err
	}, nil
}

// Pool is a directory for pools, on a filesystem of its own or on that of the machine.
type Pool struct {
	Dir    string // on the filesystem
	Device string // what it is on; "" if that is the machine's own
	Kind   string // type of the filesystem
	undo   []func() error
}

// NewPool makes a filesystem of that kind and size (bytes) on a loop device over a file
// in dir, with direct I/O; kind "" takes dir as it is. The file is sparse, unless it is
// filled first: else who writes where nobody has been waits for the filesystem below
// too, and who is at a place that was used before does not. Close it.
func NewPool(ctx context.Context, dir, kind string, size int64, filled bool) (_ *Pool, err error) {
	p := &Pool{Dir: dir, Kind: kind}
	if kind == "" {
		p.Kind, err = Run(ctx, "stat", "--file-system", "--format=%T", dir)
		p.Kind = strings.TrimSuffix(p.Kind, "/ext3") // stat's word for the family is ext2/ext3
		if p.Kind == "ext2" {
			p.Kind = "ext4"
		}
		return p, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.Close())
		}
	}()
	disk := filepath.Join(dir, kind+".disk")
	f, err := os.Create(disk)
	if err != nil {
		return nil, err
	}
	p.undo = append(p.undo, func() error { return os.Remove(disk) })
	if filled {
		err = fill(f, size)
	} else {
		err = f.Truncate(size)
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return nil, err
	}
	if p.Device, err = Losetup(ctx, disk, "--direct-io=on", "--sector-size=4096"); err != nil {
		return nil, err
	}
	p.undo = append(p.undo, func() error { return Detach(ctx, p.Device) })
	argv := map[string][]string{"xfs": {"mkfs.xfs", "-q", "-K"}, "btrfs": {"mkfs.btrfs", "-q", "-K"}, "ext4": {"mkfs.ext4", "-q", "-E", "nodiscard"}}[kind]
	if argv == nil {
		return nil, fmt.Errorf("no pool on %q", kind)
	}
	if _, err := Run(ctx, append(argv, p.Device)...); err != nil {
		return nil, err
	}
	p.Dir = filepath.Join(dir, kind)
	if err := os.Mkdir(p.Dir, 0o700); err != nil {
		return nil, err
	}
	if err := unix.Mount(p.Device, p.Dir, kind, 0, ""); err != nil {
		return nil, err
	}
	p.undo = append(p.undo, func() error { return unix.Unmount(p.Dir, 0) })
	return p, nil
}

// fill writes a file from end to end, and forgets what it wrote.
func fill(f *os.File, size int64) error {
	zeros := make([]byte, 4*MiB)
	for off := int64(0); off < size; off += int64(len(zeros)) {
		if _, err := f.Write(zeros[:min(int64(len(zeros)), size-off)]); err != nil {
			return err
		}
	}
	if err := f.Sync(); err != nil {
		return err
	}
	return unix.Fadvise(int(f.Fd()), 0, size, unix.FADV_DONTNEED)
}

// Close takes away what NewPool made, latest first.
func (p *Pool) Close() error {
	var errs []error
	for _, undo := range slices.Backward(p.undo) {
		errs = append(errs, undo())
	}
	p.undo = nil
	return errors.Join(errs...)
}

// Losetup binds a loop device by losetup, and returns its path.
func Losetup(ctx context.Context, file string, args ...string) (string, error) {
	return Run(ctx, append(append([]string{"losetup", "--find", "--show"}, args...), file)...)
}

// Detach frees a device of Losetup, also when ctx has ended.
func Detach(ctx context.Context, device string) error {
	_, err := Run(context.WithoutCancel(ctx), "losetup", "--detach", device)
	return err
}

// Driver is a driver process and clients of it.
type Driver struct {
	Controller csi.ControllerClient
	Node       csi.NodeClient
	Metadata   csi.SnapshotMetadataClient

	dir   string
	state string
	cmd   *exec.Cmd
	conn  *grpc.ClientConn
}

// StartDriver runs the driver with one pool, called default, in pool, and its socket
// and log in dir. Stop it.
func StartDriver(ctx context.Context, binary, dir, pool string) (*Driver, error) {
	d := &Driver{dir: dir}
	for _, sub := range []string{dir, pool} {
		if err := os.MkdirAll(sub, 0o700); err != nil {
			return nil, err
		}
	}
	var err error
	// On a tmpfs, as /run, where it is by default, is on most machines.
	if d.state, err = os.MkdirTemp("/dev/shm", "csi-loop-bench-"); err != nil {
		return nil, err
	}
	log, err := os.Create(d.Log())
	if err != nil {
		return nil, err
	}
	defer log.Close()
	socket := filepath.Join(dir, "csi.sock")
	// Not CommandContext: Stop ends it, after the volumes are gone.
	d.cmd = exec.Command(binary, "serve", "--endpoint=unix://"+socket, "--node-id=bench",
		"--pool=default="+pool, "--state-dir="+d.state, "-v=1")
	d.cmd.Stdout, d.cmd.Stderr = log, log
	// Nor does a Ctrl-C for the benchmark.
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := d.cmd.Start(); err != nil {
		return nil, err
	}
	d.conn, err = grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithInitialWindowSize(int32(MiB)), grpc.WithInitialConnWindowSize(int32(MiB)))
	if err != nil {
		return nil, errors.Join(err, d.Stop())
	}
	d.Controller, d.Node = csi.NewControllerClient(d.conn), csi.NewNodeClient(d.conn)
	d.Metadata = csi.NewSnapshotMetadataClient(d.conn)
	wait, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	if _, err := csi.NewIdentityClient(d.conn).Probe(wait, &csi.ProbeRequest{}, grpc.WaitForReady(true)); err != nil {
		out, _ := os.ReadFile(d.Log())
		return nil, errors.Join(fmt.Errorf("the driver does not answer: %w\n%s", err, out), d.Stop())
	}
	return d, nil
}

// Log is the path of the driver's log.
func (d *Driver) Log() string { return filepath.Join(d.dir, "log") }

// PID is the driver's process ID.
func (d *Driver) PID() int { return d.cmd.Process.Pid }

// Stop ends the process.
func (d *Driver) Stop() error {
	if d.conn != nil {
		_ = d.conn.Close()
	}
	_ = d.cmd.Process.Signal(syscall.SIGTERM)
	return errors.Join(d.cmd.Wait(), os.RemoveAll(d.state))
}
