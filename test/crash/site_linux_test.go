package crash

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
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
	"github.com/csi-loop/csi-loop/test/crash/gate"
)

// site is a machine as a CO sees it: a driver under a gate with a pool, its socket,
// and directories for staging paths and targets.
type site struct {
	t                        testing.TB
	dir, pool, state, images string
	socket                   string
	args                     []string

	proc *gate.Process
	log  string // of the process
	conn *grpc.ClientConn

	trap trap

	volumes []*volume // those that exist, or are about to

	older map[string]bool // directories in /proc of processes older than the site
}

// newSite starts a driver whose pool is alone on a filesystem of that type. The
// test's clean-up stops it and checks that nothing is left.
func newSite(t testing.TB, poolFS string) *site {
	t.Helper()
	roottest.Require(t)
	_, err := binary()
	must(t, err)
	dir, err := os.MkdirTemp("", "c") //nolint:usetesting // short: a socket's path has 107 bytes
	must(t, err)
	s := &site{
		t: t, dir: dir, state: filepath.Join(dir, "state"), images: filepath.Join(dir, "images"), socket: filepath.Join(dir, "csi.sock"),
		pool: filepath.Join(roottest.Pool(t, poolFS, 4<<30), "csi"), older: map[string]bool{},
	}
	for _, p := range glob("/proc/[0-9]*") {
		s.older[p] = true
	}
	s.trap.ledger = ledger{root: s.pool, debts: map[string]debt{}}
	for _, d := range []string{s.pool, s.images, filepath.Join(dir, "stage"), filepath.Join(dir, "pods")} {
		must(t, os.Mkdir(d, 0o700))
	}
	s.args = []string{
		"serve", "--endpoint=unix://" + s.socket, "--node-id=" + filepath.Base(dir), "--pool=default=" + s.pool, "--state-dir=" + s.state,
		"--image-dir=" + s.images, "--ephemeral-max-size=1Gi", "--loop-devices-max=400", "--v=2",
		"--luks-pbkdf=pbkdf2", "--luks-pbkdf-time=1ms",
		mkfsAlways, // what a call does must not depend on the calls before it
	}
	t.Cleanup(s.close)
	must(t, s.start())
	return s
}

const mkfsAlways = "--mkfs-always"

// start starts the driver and waits until it is ready.
func (s *site) start() error {
	path, err := binary()
	if err != nil {
		return err
	}
	log, err := os.CreateTemp(s.dir, "log-*")
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(path, s.args...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // a Ctrl-C is for the test alone
	if s.proc, err = gate.Start(cmd, s.trap.judge); err != nil {
		return err
	}
	s.log = log.Name()
	s.conn, err = grpc.NewClient("unix://"+s.socket,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: 5 * time.Millisecond, Multiplier: 1.2, MaxDelay: 50 * time.Millisecond}, MinConnectTimeout: time.Second}))
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	go func(ended <-chan struct{}) {
		select {
		case <-ended:
			cancel()
		case <-ctx.Done():
		}
	}(s.proc.Ended())
	for {
		r, err := csi.NewIdentityClient(s.conn).Probe(ctx, &csi.ProbeRequest{}, grpc.WaitForReady(true))
		if err != nil {
			return fmt.Errorf("csi-loop does not come up: %w\n%s", err, s.tail(20))
		}
		if r.GetReady().GetValue() {
			return nil
		}
	}
}

// end ends the driver and returns its exit code, -1 if it was killed.
func (s *site) end(sig syscall.Signal) int {
	_ = s.conn.Close()
	_ = s.proc.Signal(sig)
	s.proc.Wait()
	return s.proc.State().ExitCode()
}

// restart ends the driver, if it still runs, with SIGKILL, and starts it.
func (s *site) restart() error {
	s.end(syscall.SIGKILL)
	return s.start()
}

// tail is the end of what the process printed.
func (s *site) tail(n int) string {
	b, _ := os.ReadFile(s.log)
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

func (s *site) controller() csi.ControllerClient { return csi.NewControllerClient(s.conn) }
func (s *site) node() csi.NodeClient             { return csi.NewNodeClient(s.conn) }

// close stops the driver and checks that nothing is left but volumes of tests that
// failed.
func (s *site) close() {
	t := s.t
	t.Helper()
	s.trap.disarm()
	if s.proc == nil {
		return
	}
	if t.Failed() {
		t.Logf("the end of the driver's log:\n%s", s.tail(12))
	}
	if s.proc.State() == nil {
		if code := s.end(syscall.SIGTERM); code != 0 && !t.Failed() {
			t.Errorf("csi-loop ends with exit code %d\n%s", code, s.tail(10))
		}
	}
	s.checkLogs()
	if !t.Failed() {
		if left := waitFor(settle, func() string { return strings.Join(s.leftovers(), "\n") }); left != "" {
			t.Errorf("left behind:\n%s", left)
		}
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

// scrub takes away what a failed test left, so that the temporary directory can be
// removed.
func (s *site) scrub() {
	_ = waitFor(patience/2, func() string {
		mounts := mountsBelow(s.dir)
		for _, m := range slices.Backward(mounts) {
			_ = syscall.Unmount(m, 0)
		}
		loops := s.loops()
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

// explain is an RPC's error with its code.
func explain(err error) string {
	return fmt.Sprintf("%s: %s", status.Code(err), status.Convert(err).Message())
}

// trap decides what happens to the system calls of the driver while an RPC is under
// way. It is the judge of the gate.
type trap struct {
	mu sync.Mutex
	// All below is guarded by mu.
	armed  bool
	spring spring
	calls  []gate.Call // since arm
	seen   map[string]int
	hit    *gate.Call // the call that was not simply run
	ledger ledger     // of the pool; kept whether armed or not
}

// spring decides what becomes of a call, the n-th of its label since the trap was
// armed, counted from 1.
type spring func(c gate.Call, n int) gate.Verdict

// arm lets f decide from now on, until it once decides otherwise than to run a call.
// nil runs all.
func (a *trap) arm(f spring) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.armed, a.spring, a.calls, a.seen, a.hit = true, f, nil, map[string]int{}, nil
}

// waits tells whether all calls since arm were simply run.
func (a *trap) waits() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.armed && a.hit == nil
}

// disarm returns what happened since arm.
func (a *trap) disarm() (hit *gate.Call, calls []gate.Call) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.armed = false
	return a.hit, a.calls
}

func (a *trap) judge(c gate.Call) gate.Verdict {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.isLook(c) {
		return gate.Verdict{}
	}
	v := a.decide(c)
	a.ledger.note(c, v)
	return v
}

// isLook says whether a call is of the look at the pool's health every half minute, which
// asks for a block of a file without a name: on a slow machine it can come in any step.
func (a *trap) isLook(c gate.Call) bool {
	return c.Name == "fallocate" && strings.HasPrefix(c.Path, a.ledger.root+"/#") && strings.HasSuffix(c.Path, " (deleted)")
}

// unsynced is the ledger's list.
func (a *trap) unsynced() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.ledger.unsynced()
}

// decide is judge without the ledger.
// Precondition: mu is held.
func (a *trap) decide(c gate.Call) gate.Verdict {
	if !a.armed {
		return gate.Verdict{}
	}
	a.calls = append(a.calls, c)
	a.seen[label(c)]++
	if a.hit != nil || a.spring == nil {
		return gate.Verdict{}
	}
	v := a.spring(c, a.seen[label(c)])
	if v != (gate.Verdict{}) {
		a.hit = &c
	}
	return v
}
