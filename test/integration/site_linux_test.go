package integration

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

// site is a machine as a CO sees it: a driver process with a pool, its socket,
// and a directory for staging paths and targets.
type site struct {
	t    testing.TB
	name string
	// dir holds everything but the pool; pool is the pool's directory, on a file
	// system of its own if one was asked for.
	dir, pool, state, socket, images string
	args                             []string

	mu   sync.Mutex
	conn *grpc.ClientConn // to the process that runs now; guarded by mu
	proc *process         // guarded by mu

	foreign []string // loop devices below dir that the test bound itself
	keep    bool     // volumes may be left in the pool
}

// siteConfig says what is not as usual.
type siteConfig struct {
	poolFS   string // file system of the pool; "" is that of the temporary directory
	poolSize int64  // default 4 GiB, sparse
	pool     string // the pool's directory, if it is there already
	args     []string
	noStart  bool
}

// newSite starts a driver. The test's clean-up stops it and checks that nothing is left.
func newSite(t testing.TB, c siteConfig) *site {
	t.Helper()
	roottest.Require(t)
	if _, err := binary(); err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "s") //nolint:usetesting // short: a socket's path has 107 bytes
	must(t, err)
	s := &site{
		t: t, name: filepath.Base(dir), dir: dir, state: filepath.Join(dir, "state"),
		socket: filepath.Join(dir, "csi.sock"), images: filepath.Join(dir, "images"), pool: filepath.Join(dir, "pool"),
	}
	for _, d := range []string{"images", "stage", "pods", "pool"} {
		must(t, os.Mkdir(filepath.Join(dir, d), 0o750))
	}
	if c.pool != "" {
		s.pool = c.pool
	}
	if c.poolFS != "" {
		if c.poolSize == 0 {
			c.poolSize = 4 << 30
		}
		s.pool = filepath.Join(roottest.Pool(t, c.poolFS, c.poolSize), "csi")
		must(t, os.Mkdir(s.pool, 0o700))
	}
	s.args = append([]string{
		"--endpoint=unix://" + s.socket, "--node-id=" + s.name, "--pool=default=" + s.pool, "--state-dir=" + s.state,
		"--image-dir=" + s.images, "--ephemeral-max-size=1Gi", "--loop-devices-max=400", "--v=2",
	}, c.args...)
	t.Cleanup(s.close)
	if !c.noStart {
		s.start()
	}
	return s
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// process is one run of the driver.
type process struct {
	cmd  *exec.Cmd
	log  string
	done chan struct{} // closed when it has ended
	err  error         // of Wait; read after done
}

// spawn starts csi-loop with arguments of its own.
func (s *site) spawn(args ...string) (*process, error) {
	path, err := binary()
	if err != nil {
		return nil, err
	}
	log, err := os.CreateTemp(s.dir, "log-*")
	if err != nil {
		return nil, err
	}
	defer log.Close()
	p := &process{cmd: exec.Command(path, args...), log: log.Name(), done: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = log, log
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // a Ctrl-C is for the test alone
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

// tail is the end of what the process printed.
func (p *process) tail(n int) string {
	b, _ := os.ReadFile(p.log)
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

// ended waits for the end of the process and returns its exit code.
func (p *process) ended(t testing.TB) int {
	t.Helper()
	select {
	case <-p.done:
	case <-time.After(patience):
		t.Errorf("csi-loop does not end\n%s", p.tail(20))
		_ = p.cmd.Process.Kill()
		<-p.done
	}
	return p.cmd.ProcessState.ExitCode()
}

// start starts the driver and waits until it is ready.
func (s *site) start() {
	s.t.Helper()
	if err := s.tryStart(); err != nil {
		s.t.Fatal(err)
	}
}

func (s *site) tryStart() error {
	p, err := s.spawn(append([]string{"serve"}, s.args...)...)
	if err != nil {
		return err
	}
	conn, err := grpc.NewClient("unix://"+s.socket,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: 5 * time.Millisecond, Multiplier: 1.2, MaxDelay: 50 * time.Millisecond}, MinConnectTimeout: time.Second}))
	if err != nil {
		return err
	}
	s.mu.Lock()
	if s.conn != nil {
		_ = s.conn.Close() // again, if the process was ended with end
	}
	s.proc, s.conn = p, conn
	s.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	go func() {
		select {
		case <-p.done:
			cancel()
		case <-ctx.Done():
		}
	}()
	for {
		r, err := csi.NewIdentityClient(conn).Probe(ctx, &csi.ProbeRequest{}, grpc.WaitForReady(true))
		if err != nil {
			return fmt.Errorf("csi-loop does not come up: %w\n%s", err, p.tail(20))
		}
		if r.GetReady().GetValue() {
			return nil
		}
	}
}

// kill ends the driver with SIGKILL, in the middle of whatever it does.
func (s *site) kill() { s.end(syscall.SIGKILL) }

// stop ends the driver with SIGTERM, which must succeed.
func (s *site) stop() {
	if code := s.end(syscall.SIGTERM); code != 0 {
		s.t.Errorf("csi-loop ends with exit code %d\n%s", code, s.process().tail(10))
	}
}

func (s *site) end(sig syscall.Signal) int {
	s.mu.Lock()
	p, conn := s.proc, s.conn
	s.mu.Unlock()
	if p == nil {
		return 0
	}
	if conn != nil && sig != syscall.SIGKILL {
		_ = conn.Close()
	}
	_ = p.cmd.Process.Signal(sig)
	code := p.ended(s.t)
	if conn != nil {
		_ = conn.Close()
	}
	return code
}

func (s *site) process() *process {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.proc
}

func (s *site) client() *grpc.ClientConn {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.conn
}

func (s *site) controller() csi.ControllerClient { return csi.NewControllerClient(s.client()) }
func (s *site) node() csi.NodeClient             { return csi.NewNodeClient(s.client()) }

// close checks that nothing is left, stops the driver, and checks again.
func (s *site) close() {
	t := s.t
	t.Helper()
	if !s.keep && !t.Failed() {
		s.checkClean()
	}
	p := s.process()
	running := false
	if p != nil {
		select {
		case <-p.done:
		default:
			running = true
		}
	}
	if running {
		s.stop()
	} else if c := s.client(); c != nil {
		_ = c.Close()
	}
	s.checkLogs()
	if t.Failed() && p != nil {
		t.Logf("the end of the driver's log:\n%s", p.tail(12))
	}
	if !s.keep && !t.Failed() {
		s.checkClean()
	}
	s.scrub()
}

// bugs are what a log must not have. Names in it that chance made can end with "BUG".
var bugs = regexp.MustCompile(`DATA RACE|\b(?:BUG|panic): |goroutine 1 \[`)

// checkLogs fails the test when a driver process met a bug that no answer shows.
func (s *site) checkLogs() {
	s.t.Helper()
	logs, _ := filepath.Glob(s.dir + "/log-*")
	for _, l := range logs {
		b, err := os.ReadFile(l)
		must(s.t, err)
		if at := bugs.FindIndex(b); at != nil {
			line := bytes.LastIndexByte(b[:at[0]], '\n') + 1
			s.t.Errorf("the driver's log has %q:\n%s", b[at[0]:at[1]], b[line:min(len(b), at[0]+4000)])
		}
	}
}

// checkClean fails the test when something is left.
func (s *site) checkClean() {
	s.t.Helper()
	var left []string
	last := waitFor(patience/2, func() string {
		left = s.leftovers()
		return strings.Join(left, "\n")
	})
	if last != "" {
		s.t.Errorf("left behind:\n%s", last)
	}
}

// leftovers lists loop devices over files of the site, mounts, volumes and work in
// progress in the pool, stage records, targets, and processes that work there.
func (s *site) leftovers() []string {
	left := s.loops()
	for _, dir := range []string{s.dir, s.pool} {
		for _, m := range mountsBelow(dir) {
			left = append(left, "mount "+m)
		}
	}
	for _, pattern := range []string{
		s.pool + "/volumes/*", s.pool + "/snapshots/*", s.pool + "/groups/*", s.pool + "/.new-*", s.pool + "/.gone-*", s.state + "/*/*", s.dir + "/stage/*", s.dir + "/pods/*",
	} {
		found, _ := filepath.Glob(pattern)
		left = append(left, found...)
	}
	var p *os.Process
	if proc := s.process(); proc != nil {
		p = proc.cmd.Process
	}
	return append(left, s.strays(p)...)
}

// loops lists loop devices over files of the site, but for those that the test
// bound itself.
func (s *site) loops() []string {
	all := roottest.Loops(s.dir)
	if !strings.HasPrefix(s.pool, s.dir+"/") {
		all = append(all, roottest.Loops(s.pool)...)
	}
	return slices.DeleteFunc(all, func(line string) bool {
		name, _, _ := strings.Cut(line, " ")
		return slices.Contains(s.foreign, "/dev/"+name)
	})
}

// strays lists processes other than the test and the driver that work on files of
// the site: mkfs, fsck, whatever a killed driver left running.
func (s *site) strays(driver *os.Process) []string {
	var found []string
	procs, _ := filepath.Glob("/proc/[0-9]*")
	for _, p := range procs {
		pid := filepath.Base(p)
		if pid == strconv.Itoa(os.Getpid()) || driver != nil && pid == strconv.Itoa(driver.Pid) {
			continue
		}
		cmdline, _ := os.ReadFile(p + "/cmdline")
		uses := bytes.Contains(cmdline, []byte(s.dir+"/")) || bytes.Contains(cmdline, []byte(s.pool+"/"))
		fds, _ := filepath.Glob(p + "/fd/*")
		for _, fd := range append(fds, p+"/cwd") {
			to, err := os.Readlink(fd)
			uses = uses || err == nil && (strings.HasPrefix(to, s.dir+"/") || strings.HasPrefix(to, s.pool+"/"))
		}
		if uses {
			found = append(found, "process "+pid+" "+strings.ReplaceAll(string(cmdline), "\x00", " "))
		}
	}
	return found
}

// scrub takes away what a failed test left, so that the next ones are not
// disturbed and the temporary directory can be removed.
func (s *site) scrub() {
	_ = waitFor(patience/2, func() string {
		mounts := mountsBelow(s.dir)
		slices.Reverse(mounts)
		for _, m := range mounts {
			_ = syscall.Unmount(m, 0)
		}
		loops := append(roottest.Loops(s.dir), roottest.Loops(s.pool)...)
		for _, l := range loops {
			name, _, _ := strings.Cut(l, " ")
			_ = exec.Command("losetup", "-d", "/dev/"+name).Run()
		}
		return strings.Join(append(mounts, loops...), "\n")
	})
	if len(mountsBelow(s.dir)) == 0 {
		_ = os.RemoveAll(s.dir)
	}
}

// mountsBelow lists mount points below dir.
func mountsBelow(dir string) []string {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil
	}
	var found []string
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], dir+"/") {
			found = append(found, f[4])
		}
	}
	return found
}

// call makes a context for one RPC.
func (v *volume) call() (context.Context, context.CancelFunc) {
	limit := 2 * time.Minute
	if v.limit != nil {
		limit = v.limit()
	}
	return context.WithTimeout(context.Background(), limit)
}

// explain is an RPC's error with its code.
func explain(err error) string {
	return fmt.Sprintf("%s: %s", status.Code(err), status.Convert(err).Message())
}
