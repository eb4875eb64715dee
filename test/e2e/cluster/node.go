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
	"syscall"
	"time"
)

// start boots node n and waits until containerd answers. A node that is up
// stays as it is.
func (c *cluster) start(ctx context.Context, n int) error {
	if _, ok := c.pid(n); ok {
		return nil
	}
	if _, ok := c.pid(1); n != 1 && !ok {
		return errors.New("node 1 is down, and through it the nodes meet: start it first")
	}
	// What a crash left: a node's loop devices would be taken for somebody else's.
	if err := c.clear(ctx, n); err != nil {
		return err
	}
	if err := c.writeConfig(n); err != nil {
		return err
	}
	if err := c.makeCgroups(n); err != nil {
		return err
	}
	pid, err := c.spawnInit(ctx, n)
	if err != nil {
		return fmt.Errorf("%s: %w", nodeName(n), err)
	}
	if err := c.connect(ctx, n, pid); err != nil {
		return err
	}
	if err := os.WriteFile(c.dir(n, "conf/connected"), nil, 0o600); err != nil {
		return err
	}
	// The links of the other nodes went down with node 1.
	for m := 2; n == 1 && m <= maxNodes; m++ {
		if other, ok := c.pid(m); ok {
			if err := c.connect(ctx, m, other); err != nil {
				return err
			}
		}
	}
	err = waitFor(ctx, 60*time.Second, func() error {
		if _, ok := c.pid(n); !ok {
			return errDied
		}
		return c.in(ctx, n, c.binary("ctr"), "version").Run()
	})
	if err != nil {
		return fmt.Errorf("%s: containerd does not answer (%w), see %s", nodeName(n), err, c.dir(n, "log"))
	}
	return nil
}

// spawnInit starts PID 1 of the node and records it, with its PID namespace: a
// number alone may belong to somebody else tomorrow.
func (c *cluster) spawnInit(ctx context.Context, n int) (string, error) {
	cmd := exec.CommandContext(ctx, "/proc/self/exe",
		"-state="+c.state, "-bin="+c.bin, "-pool="+c.pool, "-proxy-mode="+c.proxy, "spawn", strconv.Itoa(n))
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%w, see %s", err, c.dir(n, "log/init.log"))
	}
	pid := strings.TrimSpace(string(out))
	namespace, err := os.Readlink("/proc/" + pid + "/ns/pid_for_children")
	if err != nil {
		return "", fmt.Errorf("init died (%w), see %s", err, c.dir(n, "log/init.log"))
	}
	return pid, c.writeFile(n, "pid", pid+" "+namespace+"\n")
}

// pid of the node's init, as the machine sees it, if the node is up.
func (c *cluster) pid(n int) (string, bool) {
	content, err := os.ReadFile(c.dir(n, "conf/pid"))
	if err != nil {
		return "", false
	}
	pid, want, _ := strings.Cut(strings.TrimSpace(string(content)), " ")
	have, err := os.Readlink("/proc/" + pid + "/ns/pid_for_children")
	return pid, err == nil && have == want
}

// up lists the nodes that are up.
func (c *cluster) running() []int {
	var nodes []int
	for n := 1; n <= maxNodes; n++ {
		if _, ok := c.pid(n); ok {
			nodes = append(nodes, n)
		}
	}
	return nodes
}

// in is a command inside the node, in all its namespaces.
func (c *cluster) in(ctx context.Context, n int, argv ...string) *exec.Cmd {
	pid, ok := c.pid(n)
	if !ok {
		pid = "0" // nsenter fails and says so
	}
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{"--target", pid, "--all", "--"}, argv...)...)
	cmd.Env = append(os.Environ(), "PATH="+c.bin+":"+sbinPath, "TMPDIR=/tmp", "HOME=/root")
	return cmd
}

const sbinPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// connect gives the node its network. Node 1 has the bridge where all meet, and a
// link to the machine.
func (c *cluster) connect(ctx context.Context, n int, pid string) error {
	inside := func(pid string, args ...string) []string {
		return append([]string{"nsenter", "--target", pid, "--net", "--", "ip"}, args...)
	}
	var steps [][]string
	device, gateway := "eth0", nodeAddress(1)
	if n == 1 {
		device, gateway = bridge, network+"1"
		_ = exec.CommandContext(ctx, "ip", "link", "del", hostLink).Run() // of a node 1 that died
		steps = [][]string{
			{"ip", "link", "add", hostLink, "mtu", mtu, "type", "veth", "peer", "name", "eth0", "netns", pid},
			{"ip", "addr", "add", network + "1/24", "dev", hostLink},
			{"ip", "link", "set", hostLink, "up"},
			{"ip", "route", "replace", podNetworks, "via", nodeAddress(1), "dev", hostLink},
			{"ip", "route", "replace", services, "via", nodeAddress(1), "dev", hostLink},
			inside(pid, "link", "add", bridge, "mtu", mtu, "type", "bridge"),
			inside(pid, "link", "set", "eth0", "master", bridge, "up"),
		}
	} else {
		first, _ := c.pid(1)
		port := "port" + strconv.Itoa(n)
		steps = [][]string{
			inside(first, "link", "add", port, "mtu", mtu, "type", "veth", "peer", "name", "eth0", "netns", pid),
			inside(first, "link", "set", port, "master", bridge, "up"),
		}
	}
	steps = append(steps,
		inside(pid, "addr", "add", nodeAddress(n)+"/24", "dev", device),
		inside(pid, "link", "set", device, "up"),
		inside(pid, "route", "replace", "default", "via", gateway),
	)
	for m := 1; m <= maxNodes; m++ {
		if m != n {
			steps = append(steps, inside(pid, "route", "replace", podNetwork(m), "via", nodeAddress(m)))
		}
	}
	for _, argv := range steps {
		if out, err := exec.CommandContext(ctx, argv[0], argv[1:]...).CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", strings.Join(argv, " "), err, out)
		}
	}
	return nil
}

// kill ends node n as a power cut would: what it had on disk stays.
func (c *cluster) kill(ctx context.Context, n int) error {
	if pid, ok := c.pid(n); ok {
		number, err := strconv.Atoi(pid)
		if err != nil {
			return err
		}
		if err := syscall.Kill(number, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			return err
		}
		if err := c.gone(ctx, n, 30*time.Second); err != nil {
			return err
		}
	}
	return c.clear(ctx, n)
}

// stop shuts node n down: its pods get the time to end.
func (c *cluster) stop(ctx context.Context, n int) error {
	if pid, ok := c.pid(n); ok {
		number, err := strconv.Atoi(pid)
		if err != nil {
			return err
		}
		if err := syscall.Kill(number, syscall.SIGTERM); err != nil && !errors.Is(err, syscall.ESRCH) {
			return err
		}
		if err := c.gone(ctx, n, 2*grace); err != nil {
			return err
		}
	}
	return c.clear(ctx, n)
}

func (c *cluster) gone(ctx context.Context, n int, limit time.Duration) error {
	return waitFor(ctx, limit, func() error {
		if pid, ok := c.pid(n); ok {
			return fmt.Errorf("%s: process %s is still there", nodeName(n), pid)
		}
		return nil
	})
}

// clear removes what a dead node leaves in the kernel.
func (c *cluster) clear(ctx context.Context, n int) error {
	if _, err := os.Stat(c.dir(n)); err != nil {
		return nil //nolint:nilerr // there never was such a node
	}
	for _, name := range []string{"pid", "connected"} {
		if err := os.RemoveAll(c.dir(n, "conf", name)); err != nil {
			return err
		}
	}
	stops, err := filepath.Glob(c.dir(n, "conf", "*"+stopSuffix))
	if err != nil {
		return err
	}
	for _, f := range stops {
		if err := os.Remove(f); err != nil {
			return err
		}
	}
	return errors.Join(c.removeCgroups(n), clearLoops(ctx, c.dir(n)))
}

const stopSuffix = ".stop"

// stopService ends a service of the node and keeps it down.
func (c *cluster) stopService(ctx context.Context, n int, name string) error {
	if err := c.writeFile(n, name+stopSuffix, ""); err != nil {
		return err
	}
	if err := c.signalService(ctx, n, name, "TERM"); err != nil {
		return err
	}
	return waitFor(ctx, 30*time.Second, func() error {
		if _, err := os.Stat(c.dir(n, "conf", name+".pid")); err == nil {
			return fmt.Errorf("%s of %s is still running", name, nodeName(n))
		}
		return nil
	})
}

func (c *cluster) startService(n int, name string) error {
	return os.RemoveAll(c.dir(n, "conf", name+stopSuffix))
}

func (c *cluster) signalService(ctx context.Context, n int, name, signal string) error {
	pid, err := os.ReadFile(c.dir(n, "conf", name+".pid"))
	if err != nil {
		return fmt.Errorf("%s runs no %s: %w", nodeName(n), name, err)
	}
	return c.in(ctx, n, "kill", "-"+signal, strings.TrimSpace(string(pid))).Run()
}
