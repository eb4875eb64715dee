package main

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// grace is what the processes of a node have to end in a shutdown.
const grace = 30 * time.Second

// spawn enters the node's cgroups, starts its init in new namespaces, and prints
// its number. It is a process of its own, because cgroups are entered by processes
// and the cgroup namespace is rooted where its maker is.
func (c *cluster) spawn(n int) error {
	if err := c.enterCgroups(n); err != nil {
		return err
	}
	logFile, err := os.OpenFile(c.dir(n, "log/init.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer logFile.Close()
	cmd := exec.CommandContext(context.Background(), "/proc/self/exe",
		"-state="+c.state, "-bin="+c.bin, "-pool="+c.pool, "-proxy-mode="+c.proxy, "init", strconv.Itoa(n))
	cmd.Stdout, cmd.Stderr = logFile, logFile
	cmd.Env = []string{"PATH=" + c.bin + ":" + sbinPath, "HOME=/root", "TMPDIR=/tmp"}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setsid: true,
		Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWUTS | syscall.CLONE_NEWIPC | syscall.CLONE_NEWNET |
			syscall.CLONE_NEWPID | syscall.CLONE_NEWCGROUP,
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	fmt.Fprintln(os.Stdout, cmd.Process.Pid)
	return cmd.Process.Release()
}

// init is PID 1 of the node.
func (c *cluster) init(n int) error {
	if os.Getpid() != 1 {
		return errors.New("init is not for people")
	}
	// The caller's interrupt does not end this process, the machine's death of the
	// node's PID 1 does.
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGTERM)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	if err := c.makeRoot(ctx, n); err != nil {
		return fmt.Errorf("make the node's root: %w", err)
	}
	if err := identify(n); err != nil {
		return err
	}
	if err := ready(ctx, n); err != nil {
		return err
	}
	if err := waitFor(ctx, 30*time.Second, func() error {
		_, err := os.Stat(c.dir(n, "conf/connected"))
		return err
	}); err != nil {
		return fmt.Errorf("no network: %w", err)
	}
	s := newSupervisor(c, n)
	go s.reap()
	go c.runServices(ctx, s, n)
	<-signals
	cancel()
	s.shutdown()
	return nil
}

// runServices starts them in order. Clients of the API wait for it: earlier they
// would exit, or back off for seconds.
func (c *cluster) runServices(ctx context.Context, s *supervisor, n int) {
	var answers bool
	for _, svc := range c.services(n) {
		if svc.api && !answers {
			answers = c.waitForAPI(ctx) == nil
		}
		go s.supervise(ctx, svc)
	}
}

func (c *cluster) waitForAPI(ctx context.Context) error {
	pem, err := os.ReadFile(c.pki("ca.crt"))
	if err != nil {
		return err
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(pem)
	client := &http.Client{
		Timeout: 2 * time.Second,
		Transport: &http.Transport{
			TLSClientConfig:   &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12},
			DisableKeepAlives: true,
		},
	}
	return waitFor(ctx, 10*time.Minute, func() error {
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, apiServer()+"/readyz", nil)
		if err != nil {
			return err
		}
		response, err := client.Do(request)
		if err != nil {
			return err
		}
		_ = response.Body.Close()
		if response.StatusCode != http.StatusOK {
			return fmt.Errorf("the API server says %s", response.Status)
		}
		return nil
	})
}

// identify makes the node tell itself from the others.
func identify(n int) error {
	if err := syscall.Sethostname([]byte(nodeName(n))); err != nil {
		return err
	}
	id := sha256.Sum256([]byte("csi-loop-e2e " + nodeName(n)))
	files := map[string]string{
		"/etc/hostname":    nodeName(n) + "\n",
		"/etc/hosts":       "127.0.0.1 localhost\n" + nodeAddress(n) + " " + nodeName(n) + "\n",
		"/etc/machine-id":  hex.EncodeToString(id[:16]) + "\n",
		"/etc/resolv.conf": "nameserver " + dnsAddress + "\noptions ndots:1 timeout:1\n",
	}
	for name, text := range files {
		if err := os.RemoveAll(name); err != nil { // it may be a link into /run
			return err
		}
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// ready sets up what of the network is the node's own business.
func ready(ctx context.Context, n int) error {
	for _, argv := range [][]string{
		{"ip", "link", "set", "lo", "up"},
		{"ip", "addr", "add", dnsAddress + "/32", "dev", "lo"},
	} {
		if out, err := exec.CommandContext(ctx, argv[0], argv[1:]...).CombinedOutput(); err != nil {
			return fmt.Errorf("%s on %s: %w: %s", strings.Join(argv, " "), nodeName(n), err, out)
		}
	}
	return os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0o644)
}

// makeRoot builds the node's root directory and moves into it.
func (c *cluster) makeRoot(ctx context.Context, n int) error {
	root := c.dir(n, "root")
	if err := syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""); err != nil {
		return err
	}
	if err := syscall.Mount("tmpfs", root, "tmpfs", 0, "mode=755"); err != nil {
		return err
	}
	if err := copyTop(ctx, root); err != nil {
		return err
	}
	steps := []mountStep{
		{"proc", "/proc", "proc", 0, ""},
		{"sysfs", "/sys", "sysfs", 0, ""},
		{"/dev", "/dev", "", syscall.MS_BIND | syscall.MS_REC, ""},
		{"tmpfs", "/tmp", "tmpfs", 0, "mode=1777"},
		{"tmpfs", "/run", "tmpfs", 0, "mode=755"},
		{c.dir(n, "var"), "/var", "", syscall.MS_BIND, ""}, // the node's disk
		{c.bin, c.bin, "", syscall.MS_BIND, ""},
		{c.state, c.state, "", syscall.MS_BIND, ""}, // keys, configuration, logs
	}
	for _, m := range steps {
		if err := m.do(root); err != nil {
			return err
		}
	}
	if err := makeVar(root); err != nil {
		return err
	}
	if err := c.mountPool(ctx, n, root); err != nil {
		return err
	}
	if err := maskSysctls(root); err != nil {
		return err
	}
	if err := mountCgroups(root); err != nil {
		return err
	}
	old := filepath.Join(root, "run/old")
	if err := os.MkdirAll(old, 0o700); err != nil {
		return err
	}
	if err := syscall.PivotRoot(root, old); err != nil {
		return fmt.Errorf("pivot_root: %w", err)
	}
	if err := os.Chdir("/"); err != nil {
		return err
	}
	if err := syscall.Unmount("/run/old", syscall.MNT_DETACH); err != nil {
		return err
	}
	// Bidirectional mounts of pods need peers.
	return errors.Join(os.Remove("/run/old"), syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_SHARED, ""))
}

type mountStep struct {
	source, target, kind string
	flags                uintptr
	data                 string
}

func (m mountStep) do(root string) error {
	target := filepath.Join(root, m.target)
	if err := os.MkdirAll(target, 0o755); err != nil {
		return err
	}
	if err := syscall.Mount(m.source, target, m.kind, m.flags, m.data); err != nil {
		return fmt.Errorf("mount %s: %w", m.target, err)
	}
	return nil
}

// copyTop fills the top of the node's root: the machine's programs, read-only, a
// copy of its /etc, and the rest empty.
func copyTop(ctx context.Context, root string) error {
	entries, err := os.ReadDir("/")
	if err != nil {
		return err
	}
	for _, e := range entries {
		from, to := "/"+e.Name(), filepath.Join(root, e.Name())
		if e.Type()&os.ModeSymlink != 0 { // /bin and /lib, where /usr is merged
			link, err := os.Readlink(from)
			if err != nil {
				return err
			}
			if err := os.Symlink(link, to); err != nil {
				return err
			}
			continue
		}
		if !e.IsDir() {
			continue
		}
		if err := os.MkdirAll(to, 0o755); err != nil {
			return err
		}
		switch {
		case e.Name() == "etc":
			if out, err := exec.CommandContext(ctx, "cp", "-a", "/etc/.", to).CombinedOutput(); err != nil {
				return fmt.Errorf("copy /etc: %w: %s", err, out)
			}
		case e.Name() == "usr", e.Name() == "bin", e.Name() == "sbin", strings.HasPrefix(e.Name(), "lib"):
			if err := syscall.Mount(from, to, "", syscall.MS_BIND, ""); err != nil {
				return err
			}
			const flags = syscall.MS_REMOUNT | syscall.MS_BIND | syscall.MS_RDONLY
			if err := syscall.Mount("", to, "", flags, ""); err != nil {
				return err
			}
		}
	}
	return nil
}

// makeVar lays out an empty disk.
func makeVar(root string) error {
	for _, d := range []string{"cache", "lib/kubelet", "lib/etcd", "log/pods", "log/containers", "log/kubernetes", "tmp", poolMount[len("/var/"):], imageMount[len("/var/"):]} {
		if err := os.MkdirAll(filepath.Join(root, "var", d), 0o755); err != nil {
			return err
		}
	}
	if err := os.Symlink("/run", filepath.Join(root, "var/run")); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	return os.Chmod(filepath.Join(root, "var/tmp"), 0o777|os.ModeSticky)
}

// poolSize is of sparse files: the machine's disk has to hold what is written.
const poolSize = 32 << 30

// mountPool gives the node a filesystem of its own for csi-loop's pools, on a
// loop device, which goes when the node's mounts do.
func (c *cluster) mountPool(ctx context.Context, n int, root string) error {
	if c.pool == "" {
		return nil
	}
	image := c.dir(n, "pool.img")
	if _, err := os.Stat(image); errors.Is(err, os.ErrNotExist) {
		if err := os.WriteFile(image+".new", nil, 0o600); err != nil {
			return err
		}
		if err := os.Truncate(image+".new", poolSize); err != nil {
			return err
		}
		out, err := exec.CommandContext(ctx, "mkfs."+c.pool, "-q", image+".new").CombinedOutput()
		if err != nil {
			return fmt.Errorf("make the pool's %s: %w: %s", c.pool, err, out)
		}
		if err := os.Rename(image+".new", image); err != nil {
			return err
		}
	}
	out, err := exec.CommandContext(ctx, "mount", "-n", "-o", "loop", image, filepath.Join(root, poolMount)).CombinedOutput()
	if err != nil {
		return fmt.Errorf("mount the pool: %w: %s", err, out)
	}
	return nil
}

// maskSysctls: the kubelet sets three sysctls of the whole machine, and does not
// start when it cannot. It is shown files that already hold what it wants, and
// the machine keeps its values.
func maskSysctls(root string) error {
	for _, d := range []string{"/proc/sys/vm", "/proc/sys/kernel"} {
		dir := filepath.Join(root, d)
		if err := syscall.Mount(dir, dir, "", syscall.MS_BIND, ""); err != nil {
			return err
		}
	}
	shown := map[string]string{"vm/overcommit_memory": "1", "kernel/panic": "10", "kernel/panic_on_oops": "1"}
	for name, value := range shown {
		file := filepath.Join(root, "run", "sysctl-"+filepath.Base(name))
		if err := os.WriteFile(file, []byte(value+"\n"), 0o644); err != nil {
			return err
		}
		if err := syscall.Mount(file, filepath.Join(root, "proc/sys", name), "", syscall.MS_BIND, ""); err != nil {
			return err
		}
	}
	for _, d := range []string{"/proc/sys/vm", "/proc/sys/kernel"} {
		const flags = syscall.MS_REMOUNT | syscall.MS_BIND | syscall.MS_RDONLY
		if err := syscall.Mount("", filepath.Join(root, d), "", flags, ""); err != nil {
			return err
		}
	}
	return nil
}
