package main

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const cgroupRoot = "/sys/fs/cgroup"

// hierarchies are cgroup v1's of this machine: the names of their controllers,
// and our own place in each. Empty on a machine with cgroup v2.
func hierarchies() (map[string]string, error) {
	content, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil, err
	}
	found := map[string]string{}
	for line := range strings.Lines(string(content)) {
		_, rest, _ := strings.Cut(strings.TrimSpace(line), ":")
		controllers, path, _ := strings.Cut(rest, ":")
		if controllers != "" && !strings.HasPrefix(controllers, "name=") {
			found[controllers] = path
		}
	}
	return found, nil
}

// cgroups are the directories of node n's own cgroup. A cgroup namespace makes
// them the node's roots.
func cgroups(n int) ([]string, error) {
	v1, err := hierarchies()
	if err != nil {
		return nil, err
	}
	own := cgroupOf + nodeName(n)
	if len(v1) == 0 {
		return []string{filepath.Join(cgroupRoot, own)}, nil
	}
	var dirs []string
	for controllers, path := range v1 {
		dirs = append(dirs, filepath.Join(cgroupRoot, controllers, path, own))
	}
	return dirs, nil
}

// makeCgroups makes them, and records them for the time when whoever looks for
// them is in another cgroup.
func (c *cluster) makeCgroups(n int) error {
	dirs, err := cgroups(n)
	if err != nil {
		return err
	}
	if err := c.writeFile(n, "cgroups", strings.Join(dirs, "\n")+"\n"); err != nil {
		return err
	}
	for _, dir := range dirs {
		parent := filepath.Dir(dir)
		if parent == cgroupRoot {
			if err := delegate(parent); err != nil {
				return err
			}
		}
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		// A new cpuset of v1 is empty, and no process can enter it.
		for _, name := range []string{"cpuset.cpus", "cpuset.mems"} {
			have, err := os.ReadFile(filepath.Join(dir, name))
			if err != nil || strings.TrimSpace(string(have)) != "" || parent == cgroupRoot {
				continue
			}
			want, err := os.ReadFile(filepath.Join(parent, name))
			if err != nil {
				return err
			}
			if err := os.WriteFile(filepath.Join(dir, name), want, 0o644); err != nil {
				return err
			}
		}
	}
	return nil
}

// delegate hands every controller of cgroup v2 down to dir's children. A cgroup
// that is not the machine's very root cannot do that while it has processes
// of its own; they move to a child, as they do in containers that run others.
func delegate(dir string) error {
	controllers, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return err
	}
	for controller := range strings.FieldsSeq(string(controllers)) {
		set := func() error {
			return os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+controller), 0o644)
		}
		err := set()
		if errors.Is(err, syscall.EBUSY) {
			if err := evacuate(dir, filepath.Join(dir, "init.scope")); err != nil {
				return err
			}
			err = set()
		}
		// Some controllers cannot be had below a root with real-time tasks; the kubelet
		// says what it misses.
		if err != nil && !errors.Is(err, syscall.EINVAL) && !errors.Is(err, syscall.EOPNOTSUPP) {
			return err
		}
	}
	return nil
}

func evacuate(from, to string) error {
	if err := os.MkdirAll(to, 0o755); err != nil {
		return err
	}
	pids, err := processes(from)
	if err != nil {
		return err
	}
	for _, pid := range pids {
		err := os.WriteFile(filepath.Join(to, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0o644)
		if err != nil && !errors.Is(err, syscall.ESRCH) && !errors.Is(err, syscall.EINVAL) { // gone, kernel thread
			return err
		}
	}
	return nil
}

func processes(dir string) ([]int, error) {
	f, err := os.Open(filepath.Join(dir, "cgroup.procs"))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var pids []int
	for s := bufio.NewScanner(f); s.Scan(); {
		pid, err := strconv.Atoi(s.Text())
		if err != nil {
			return nil, err
		}
		pids = append(pids, pid)
	}
	return pids, nil
}

// enterCgroups moves this process into node n's.
func (c *cluster) enterCgroups(n int) error {
	dirs, err := c.recordedCgroups(n)
	if err != nil {
		return err
	}
	for _, dir := range dirs {
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(os.Getpid())), 0o644); err != nil {
			return err
		}
	}
	return nil
}

func (c *cluster) recordedCgroups(n int) ([]string, error) {
	content, err := os.ReadFile(c.dir(n, "conf/cgroups"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return strings.Fields(string(content)), err
}

// removeCgroups kills what is left in node n's cgroups, such as what an interrupted
// start left behind, and removes them.
func (c *cluster) removeCgroups(n int) error {
	dirs, err := c.recordedCgroups(n)
	if err != nil {
		return err
	}
	var trouble error
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		trouble = nil
		for _, dir := range dirs {
			trouble = errors.Join(trouble, removeTree(dir))
		}
		if trouble == nil || time.Now().After(deadline) {
			break
		}
	}
	if trouble != nil {
		return fmt.Errorf("cgroups of %s: %w", nodeName(n), trouble)
	}
	return nil
}

func removeTree(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := removeTree(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	pids, err := processes(dir)
	if err != nil {
		return err
	}
	for _, pid := range pids {
		_ = syscall.Kill(pid, syscall.SIGKILL) // it may be gone already
	}
	return os.Remove(dir)
}

// mountCgroups gives the node, whose root is being built in root, its part of
// the hierarchies as its whole.
func mountCgroups(root string) error {
	v1, err := hierarchies()
	if err != nil {
		return err
	}
	target := filepath.Join(root, cgroupRoot)
	if len(v1) == 0 {
		if err := syscall.Mount("cgroup2", target, "cgroup2", 0, ""); err != nil {
			return fmt.Errorf("mount cgroup2: %w", err)
		}
		return delegate(target)
	}
	if err := syscall.Mount("tmpfs", target, "tmpfs", 0, "mode=755"); err != nil {
		return err
	}
	for controllers := range v1 {
		dir := filepath.Join(target, controllers)
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
		if err := syscall.Mount("cgroup", dir, "cgroup", 0, controllers); err != nil {
			return fmt.Errorf("mount cgroup %s: %w", controllers, err)
		}
	}
	return nil
}
