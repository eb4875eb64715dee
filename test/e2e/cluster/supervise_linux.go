package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// supervisor runs the services of a node, and as PID 1 buries every orphan. Only
// reap waits for processes: os/exec would steal from it, and it from os/exec.
type supervisor struct {
	conf, log string
	bin       string

	mu       sync.Mutex
	services map[int]chan struct{} // guarded by mu; by process, closed at its end
	stopping bool                  // guarded by mu
}

func newSupervisor(c *cluster, n int) *supervisor {
	return &supervisor{
		conf: c.dir(n, "conf"), log: c.dir(n, "log"), bin: c.bin,
		services: map[int]chan struct{}{},
	}
}

// supervise runs a service again and again, unless it is held down.
func (s *supervisor) supervise(ctx context.Context, svc service) {
	hold := filepath.Join(s.conf, svc.name+stopSuffix)
	for ctx.Err() == nil {
		if _, err := os.Stat(hold); err != nil {
			if err := s.run(svc); err != nil {
				fmt.Fprintf(os.Stderr, "%s: %v\n", svc.name, err)
			}
		}
		select {
		case <-ctx.Done():
		case <-time.After(500 * time.Millisecond):
		}
	}
}

func (s *supervisor) run(svc service) error {
	out, err := os.OpenFile(filepath.Join(s.log, svc.name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer out.Close()
	fmt.Fprintf(out, "=== %s starts\n", time.Now().Format(time.RFC3339Nano))
	null, err := os.Open(os.DevNull)
	if err != nil {
		return err
	}
	defer null.Close()
	ended, pid, err := s.fork(svc, []uintptr{null.Fd(), out.Fd(), out.Fd()})
	if err != nil {
		return err
	}
	file := filepath.Join(s.conf, svc.name+".pid")
	if err := os.WriteFile(file, []byte(strconv.Itoa(pid)), 0o600); err != nil {
		return err
	}
	<-ended
	return os.Remove(file)
}

// fork starts the process with mu held, so that reap cannot bury it unknown.
func (s *supervisor) fork(svc service, files []uintptr) (<-chan struct{}, int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopping {
		return nil, 0, context.Canceled
	}
	pid, err := syscall.ForkExec(svc.argv[0], svc.argv, &syscall.ProcAttr{
		Dir: "/", Env: os.Environ(), Files: files, Sys: &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return nil, 0, err
	}
	ended := make(chan struct{})
	s.services[pid] = ended
	return ended, pid, nil
}

// reap waits for every child for as long as the node lives.
func (s *supervisor) reap() {
	children := make(chan os.Signal, 64)
	signal.Notify(children, syscall.SIGCHLD)
	tick := time.Tick(time.Second) // signals may be merged
	for {
		for {
			pid, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil)
			if err != nil || pid <= 0 {
				break
			}
			s.mu.Lock()
			if ended, ok := s.services[pid]; ok {
				close(ended)
				delete(s.services, pid)
			}
			s.mu.Unlock()
		}
		select {
		case <-children:
		case <-tick:
		}
	}
}

// shutdown ends what runs in containers, then everything.
func (s *supervisor) shutdown() {
	s.mu.Lock()
	s.stopping = true
	s.mu.Unlock()
	deadline := time.Now().Add(grace)
	for {
		pods := s.podProcesses()
		if len(pods) == 0 || time.Now().After(deadline) {
			break
		}
		for _, pid := range pods {
			_ = syscall.Kill(pid, syscall.SIGTERM) // it may be gone already
		}
		time.Sleep(500 * time.Millisecond)
	}
	_ = syscall.Kill(-1, syscall.SIGTERM) // all but this process
	time.Sleep(500 * time.Millisecond)
	// This process ends now, and the kernel kills the rest.
}

// podProcesses are those that are neither services nor a container's shim.
func (s *supervisor) podProcesses() []int {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var pids []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == 1 {
			continue
		}
		if _, ok := s.services[pid]; ok {
			continue
		}
		// The kernel's own and the dead have no command line.
		argv, err := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline"))
		if err != nil || len(argv) == 0 || strings.HasPrefix(string(argv), s.bin) {
			continue
		}
		pids = append(pids, pid)
	}
	return pids
}
