package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"
)

var errDied = errors.New("it died")

// up is idempotent: what is up stays, what is down is started.
func (c *cluster) up(ctx context.Context) error {
	if err := c.check(); err != nil {
		return err
	}
	if err := os.MkdirAll(c.state, 0o755); err != nil {
		return err
	}
	unlock, err := c.lock()
	if err != nil {
		return err
	}
	defer unlock()
	// down removes nothing without it.
	if err := os.WriteFile(filepath.Join(c.state, marker), nil, 0o600); err != nil {
		return err
	}
	if err := errors.Join(c.remember(), c.makePKI()); err != nil {
		return err
	}
	var work sync.WaitGroup
	failures := make([]error, c.size+1)
	for n := 1; n <= c.size; n++ {
		_, running := c.pid(n)
		if err := c.start(ctx, n); err != nil {
			work.Wait()
			return err
		}
		if !running {
			logf("%s is up", nodeName(n))
			work.Go(func() { failures[n] = c.loadAll(ctx, n) })
		}
	}
	work.Wait()
	if err := errors.Join(failures...); err != nil {
		return err
	}
	if err := c.settle(ctx); err != nil {
		return err
	}
	logf("the cluster is up: export KUBECONFIG=%s", c.kubeconfig())
	return nil
}

// check names what is missing before anything is started.
func (c *cluster) check() error {
	if os.Geteuid() != 0 {
		return errors.New("nodes are made of namespaces, and that needs root")
	}
	if _, err := os.Stat(c.binary("hyperkube")); err != nil {
		return fmt.Errorf("-bin is not a directory of binaries, run build first: %w", err)
	}
	for _, program := range []string{"ip", "nsenter", "cp", "nft", "iptables"} {
		if _, err := exec.LookPath(program); err != nil {
			return err
		}
	}
	return nil
}

// settle waits until pods can be created.
func (c *cluster) settle(ctx context.Context) error {
	err := waitFor(ctx, 2*time.Minute, func() error {
		return c.kubectl(ctx, "get", "--raw=/readyz").Run()
	})
	if err != nil {
		return fmt.Errorf("the API server is not ready: %w, see %s", err, c.dir(1, "log"))
	}
	apply := c.kubectl(ctx, "apply", "-f", "-")
	apply.Stdin = strings.NewReader(dnsRules)
	var nodes []string
	for _, n := range c.running() {
		nodes = append(nodes, "node/"+nodeName(n))
	}
	steps := []*exec.Cmd{
		apply,
		c.kubectl(ctx, append([]string{"wait", "--for=create", "--timeout=60s"}, nodes...)...),
		c.kubectl(ctx, append([]string{"wait", "--for=condition=Ready", "--timeout=120s"}, nodes...)...),
		c.kubectl(ctx, "label", "--overwrite", "node/node1", "node-role.kubernetes.io/control-plane="),
		c.kubectl(ctx, "wait", "--for=create", "serviceaccount/default", "--namespace=default", "--timeout=60s"),
	}
	for _, cmd := range steps {
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, out)
		}
	}
	return nil
}

const marker = ".csi-loop-e2e"

// down removes all that up and the nodes made, and says what it could not.
func (c *cluster) down(ctx context.Context) error {
	if _, err := os.Stat(filepath.Join(c.state, marker)); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			logf("there is no cluster in %s", c.state)
			return nil
		}
		return err
	}
	unlock, err := c.lock()
	if err != nil {
		return err
	}
	defer unlock()
	var trouble error
	for n := maxNodes; n >= 1; n-- {
		trouble = errors.Join(trouble, c.kill(ctx, n))
	}
	if out, err := exec.CommandContext(ctx, "ip", "link", "del", hostLink).CombinedOutput(); err != nil {
		if _, missing := os.Stat("/sys/class/net/" + hostLink); missing == nil {
			trouble = errors.Join(trouble, fmt.Errorf("remove %s: %w: %s", hostLink, err, out))
		}
	}
	if trouble != nil {
		return trouble // with the state, so that the next down knows what to look for
	}
	if err := os.RemoveAll(c.state); err != nil {
		return err
	}
	logf("the cluster is down")
	return nil
}

func (c *cluster) lock() (func(), error) {
	f, err := os.OpenFile(filepath.Join(c.state, ".lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return func() { _ = f.Close() }, nil
}

func (c *cluster) status(ctx context.Context) error {
	nodes := c.running()
	if len(nodes) == 0 {
		return errors.New("the cluster is down")
	}
	for _, n := range nodes {
		pid, _ := c.pid(n)
		fmt.Fprintf(os.Stdout, "%s: init is process %s, logs in %s\n", nodeName(n), pid, c.dir(n, "log"))
	}
	return interactive(c.kubectl(ctx, "get", "nodes", "--output=wide"))
}

func (c *cluster) kubectl(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, c.binary("hyperkube"), append([]string{"kubectl"}, args...)...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+c.kubeconfig())
	return cmd
}

// loadEverywhere imports archives on every node that is up.
func (c *cluster) loadEverywhere(ctx context.Context, files []string) error {
	nodes := c.running()
	failures := make([]error, len(nodes))
	var work sync.WaitGroup
	for i, n := range nodes {
		work.Go(func() { failures[i] = c.load(ctx, n, files) })
	}
	work.Wait()
	return errors.Join(failures...)
}

// loadAll imports what the node's disk does not have yet, which after a crash is
// nothing.
func (c *cluster) loadAll(ctx context.Context, n int) error {
	files, err := filepath.Glob(filepath.Join(c.images, "*.tar"))
	if err != nil {
		return err
	}
	record := c.dir(n, "conf/loaded")
	loaded, err := os.ReadFile(record)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, name := range files {
		info, err := os.Stat(name)
		if err != nil {
			return err
		}
		line := name + " " + info.ModTime().Format(time.RFC3339Nano) + "\n"
		if strings.Contains(string(loaded), line) {
			continue
		}
		if err := c.load(ctx, n, []string{name}); err != nil {
			return err
		}
		loaded = append(loaded, line...)
	}
	return os.WriteFile(record, loaded, 0o600)
}

// load imports image archives, of docker's or OCI's form, into one node.
func (c *cluster) load(ctx context.Context, n int, files []string) error {
	for _, name := range files {
		if err := c.loadOne(ctx, n, name); err != nil {
			return fmt.Errorf("load %s on %s: %w", name, nodeName(n), err)
		}
	}
	return nil
}

func (c *cluster) loadOne(ctx context.Context, n int, name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	cmd := c.in(ctx, n, c.binary("ctr"), "--namespace=k8s.io", "images", "import", "--local", "--digests=false", "-")
	cmd.Stdin = f
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

// interactive runs a command for the caller and hands its exit code on.
func interactive(cmd *exec.Cmd) error {
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	err := cmd.Run()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		return exitError(exit.ExitCode())
	}
	return err
}

// waitFor calls f until it succeeds; the error is f's last. errDied ends it.
func waitFor(ctx context.Context, limit time.Duration, f func() error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		err := f()
		if err == nil || errors.Is(err, errDied) {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return err
		}
	}
}

var begin = time.Now()

func logf(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "cluster: %5.1fs "+format+"\n",
		append([]any{time.Since(begin).Seconds()}, args...)...)
}
