package survey

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/csi-loop/csi-loop/pkg/crypt"
	"github.com/csi-loop/csi-loop/pkg/driver"
	"github.com/csi-loop/csi-loop/pkg/loop"
)

// LookAtNode finds out what the machine is like. It makes the kernel register one
// loop device if there is no idle one to ask, and load its module of dm-crypt, and
// otherwise changes nothing.
func LookAtNode(ctx context.Context, cfg Config) Node {
	n := Node{
		Root: os.Geteuid() == 0, Release: release(), Calls: probes(), MaxPart: maxPart(), Devtmpfs: onDevtmpfs("/dev"),
		Filesystems: filesystems(), Capabilities: capabilities(), Endpoint: cfg.Endpoint,
	}
	m, err := loop.New(ctx, loop.WithWarm(0))
	if n.Loop = err; err == nil {
		n.Loop = m.Close()
	}
	c, err := crypt.New(crypt.Options{})
	if n.Encryption = err; err == nil {
		n.Encryption = c.Available()
	}
	for _, t := range tools() {
		n.Tools = append(n.Tools, lookForTool(ctx, t))
	}
	if cfg.KubeletDir != "" {
		n.KubeletDir, n.Propagation = cfg.KubeletDir, propagation(cfg.KubeletDir)
	}
	n.Serving = cfg.Endpoint != "" && serving(ctx, cfg.Endpoint)
	n.Freezes, n.Expedited = driver.FreezeRecords(filepath.Join(cfg.StateDir, cfg.NodeID)), expedited()
	return n
}

func expedited() bool {
	b, err := os.ReadFile("/sys/kernel/rcu_expedited")
	return err == nil && strings.TrimSpace(string(b)) != "0"
}

func release() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return "of unknown release"
	}
	return unix.ByteSliceToString(u.Release[:])
}

// probes tries calls in a way that has no effect. Only that there is no such call
// is an error, and that it is forbidden to who may do everything: by seccomp.
func probes() []Probe {
	admin := capabilities()&(1<<capSysAdmin) != 0
	missing := func(err error) error {
		if errors.Is(err, unix.ENOSYS) || admin && errors.Is(err, unix.EPERM) {
			return err
		}
		return nil
	}
	fd, err := unix.Openat2(unix.AT_FDCWD, "/", &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC})
	if err == nil {
		_ = unix.Close(fd)
	}
	openat2 := missing(err)
	fd, err = unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
	if err == nil {
		_ = unix.Close(fd)
	}
	return []Probe{
		{"openat2", "5.6", openat2},
		{"fsopen", "5.2", missing(err)},
		{"mount_setattr", "5.12", missing(unix.MountSetattr(-1, "", unix.AT_EMPTY_PATH, &unix.MountAttr{}))},
	}
}

func maxPart() int {
	n, _ := strconv.Atoi(readLine("/sys/module/loop/parameters/max_part"))
	return n
}

// readLine reads a small file of proc or sysfs; "" when that fails.
func readLine(path string) string {
	b, _ := os.ReadFile(path)
	return strings.TrimSpace(string(b))
}

func onDevtmpfs(dir string) bool {
	for _, m := range mountsAbove(dir) {
		if m.Mountpoint == dir {
			return m.FSType == "devtmpfs"
		}
	}
	return false
}

// mountsAbove are the mounts on the way to a path.
func mountsAbove(path string) []*mountinfo.Info {
	all, err := mountinfo.GetMounts(mountinfo.ParentsFilter(path))
	if err != nil {
		return nil
	}
	return all
}

// propagation is that of the mount that a path is on.
func propagation(path string) string {
	if resolved, err := filepath.EvalSymlinks(path); err == nil {
		path = resolved
	}
	var on *mountinfo.Info
	for _, m := range mountsAbove(path) {
		if on == nil || len(m.Mountpoint) >= len(on.Mountpoint) {
			on = m
		}
	}
	if on == nil {
		return ""
	}
	return on.Optional
}

func filesystems() []string {
	var all []string
	for line := range strings.Lines(readLine("/proc/filesystems")) {
		if f := strings.Fields(line); len(f) > 0 {
			all = append(all, f[len(f)-1])
		}
	}
	return all
}

func capabilities() uint64 {
	for line := range strings.Lines(readLine("/proc/self/status")) {
		if set, ok := strings.CutPrefix(line, "CapEff:"); ok {
			n, _ := strconv.ParseUint(strings.TrimSpace(set), 16, 64)
			return n
		}
	}
	return 0
}

func lookForTool(ctx context.Context, t Tool) Tool {
	path, err := exec.LookPath(t.Name)
	if err != nil {
		return t
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	// Some write their version to standard error, and some end with a complaint.
	out, _ := exec.CommandContext(ctx, path, "-V").CombinedOutput()
	version, _, _ := strings.Cut(string(out), "\n")
	t.Path, t.Version = path, or(strings.TrimSpace(version), "of unknown version")
	return t
}

// serving asks whether the driver answers on its socket.
func serving(ctx context.Context, endpoint string) bool {
	path := strings.Replace(strings.TrimPrefix(endpoint, "unix:"), "//", "", 1)
	conn, err := grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return false
	}
	defer func() { _ = conn.Close() }()
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	_, err = csi.NewIdentityClient(conn).GetPluginInfo(ctx, &csi.GetPluginInfoRequest{})
	return err == nil
}
