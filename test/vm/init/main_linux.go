// Command init is process 1 of the test machine: it loads the file systems'
// modules, mounts what tests expect, runs the jobs of its plan one after the
// other, reports on the second serial line and powers off.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/csi-loop/csi-loop/test/vm/plan"
)

// line is the serial line that the host reads; the first one has the kernel's
// messages, which must not tear the tests' output apart.
const line = "/dev/ttyS1"

func main() {
	var p plan.Plan
	out := os.Stderr
	err := func() error {
		if err := mountKernel(); err != nil {
			return err
		}
		serial, err := openRaw(line)
		if err != nil {
			return err
		}
		out = serial
		b, err := os.ReadFile(plan.Path)
		if err != nil {
			return err
		}
		if err := json.Unmarshal(b, &p); err != nil {
			return fmt.Errorf("read %s: %w", plan.Path, err)
		}
		if err := prepare(p); err != nil {
			return err
		}
		for i, j := range p.Jobs {
			report(out, p, plan.Report{Event: plan.Started, Number: i})
			report(out, p, plan.Report{Event: plan.Ended, Number: i, Status: run(out, p, j)})
		}
		return nil
	}()
	if err != nil {
		report(out, p, plan.Report{Event: plan.Broken, Text: err.Error()})
	} else {
		report(out, p, plan.Report{Event: plan.Finished})
	}
	unix.Sync()
	// Process 1 must not return: the kernel would panic.
	if err := unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF); err != nil {
		fmt.Fprintln(os.Stderr, "init: power off:", err)
	}
	select {}
}

func report(out *os.File, p plan.Plan, r plan.Report) {
	fmt.Fprintln(out, r.Line(p.Token))
}

// mountKernel mounts the file systems that the kernel itself provides.
func mountKernel() error {
	for _, m := range []struct{ fstype, target string }{
		{"proc", "/proc"},
		{"sysfs", "/sys"},
		{"devtmpfs", "/dev"},
		{"tmpfs", "/run"},
		{"tmpfs", "/tmp"},
		{"tmpfs", "/dev/shm"},
		{"cgroup2", "/sys/fs/cgroup"},
	} {
		if err := os.MkdirAll(m.target, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.fstype, m.target, m.fstype, 0, ""); err != nil {
			return fmt.Errorf("mount %s: %w", m.target, err)
		}
	}
	return nil
}

// openRaw opens a serial line that passes bytes on as they are.
func openRaw(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	fd := int(f.Fd())
	t, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return nil, fmt.Errorf("read the settings of %s: %w", path, err)
	}
	t.Oflag &^= unix.OPOST
	t.Lflag &^= unix.ECHO | unix.ICANON | unix.ISIG
	if err := unix.IoctlSetTermios(fd, unix.TCSETS, t); err != nil {
		return nil, fmt.Errorf("make %s raw: %w", path, err)
	}
	return f, nil
}

// prepare loads the modules, mounts the scratch disk and gives the machine a name, which
// csi-loop takes for its node's.
func prepare(p plan.Plan) error {
	if err := unix.Sethostname([]byte("guest")); err != nil {
		return fmt.Errorf("set the name: %w", err)
	}
	for _, m := range p.Modules {
		if err := load(m); err != nil {
			return fmt.Errorf("load %s: %w", filepath.Base(m), err)
		}
	}
	// Mounts of one test's making are seen by another's process as on a real machine.
	if err := unix.Mount("", "/", "", unix.MS_SHARED|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("share mounts: %w", err)
	}
	if err := os.MkdirAll(plan.Scratch, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(plan.Disk, plan.Scratch, "ext4", 0, ""); err != nil {
		return fmt.Errorf("mount %s: %w", plan.Disk, err)
	}
	// Without a loopback interface a test that opens a TCP port would fail for the wrong reason.
	if out, err := exec.Command("/bin/busybox", "ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
		return fmt.Errorf("bring up lo: %w: %s", err, out)
	}
	return nil
}

func load(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	err = unix.FinitModule(int(f.Fd()), "", 0)
	if errors.Is(err, unix.EEXIST) {
		return nil // loaded as the dependency of another
	}
	return err
}

// run runs one job and returns its exit status, or 128 and the number of the
// signal that ended it.
func run(out *os.File, p plan.Plan, j plan.Job) int {
	cmd := exec.Command(j.Argv[0], j.Argv[1:]...)
	cmd.Dir = j.Dir
	cmd.Stdout, cmd.Stderr = out, out
	cmd.Env = append([]string{
		"PATH=/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin",
		"HOME=/root",
		"TMPDIR=" + plan.Scratch,
	}, p.Env...)
	status, err := reap(cmd)
	switch {
	case err != nil:
		fmt.Fprintf(out, "init: run %s: %v\n", j.Name, err)
		return 127
	case status.Signaled():
		return 128 + int(status.Signal())
	}
	return status.ExitStatus()
}

// reap runs cmd and returns how it ended. Meanwhile it does what process 1 is for: it
// reaps the orphans. Before Linux 6.11 a process keeps its seccomp filter until then, and
// whoever waits for the end of all that are under one would wait forever.
func reap(cmd *exec.Cmd) (unix.WaitStatus, error) {
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return 0, fmt.Errorf("wait: %w", err)
		case pid == cmd.Process.Pid:
			return status, cmd.Process.Release()
		}
	}
}
