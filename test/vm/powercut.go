package main

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/csi-loop/csi-loop/test/vm/plan"
)

// How power cuts work. The pool is on a disk that this program serves to qemu and
// keeps in memory, as a disk with a volatile cache: what the guest wrote and did not
// flush is lost at a cut, or some of it is, in any order. qemu's own cache modes
// cannot do that: what qemu has written to a file outlives it.
//
// The guest changes volumes and says what it begins and what was acknowledged, and
// qemu is killed at a random moment. At other random moments before, a copy is made
// of what a cut would leave. The next boot checks all of these disks, one after the
// other, and goes on with the one of the machine that was really killed. The recovery of
// some of them is cut again; see recovery.go.
//
// At the end a disk that lies about flushes must be found out.

const (
	poolSize = int64(3) << 30
	// copies is how many cuts a boot is good for at most, beside the one that ends it:
	// booting takes longer than checking some disks.
	copies = 9
	// The guest's churn lasts between these.
	leastChurn, mostChurn = 8 * time.Second, 25 * time.Second
	// patience is how long an acknowledgement is waited for.
	patience = 5 * time.Second
)

// cutTest is the test of one filesystem on one kernel.
type cutTest struct {
	harness harness
	machine machine
	token   string
	plan    plan.CutPlan // of the next boot
	pool    *disk
	check   []*disk // copies to check at the next boot
	random  *mathrand.Rand
	cuts    int // made
	total   int // of them checked, and of those in recoveries

	mu       sync.Mutex
	onAck    func()       // called with mu held; guarded by mu
	entries  []plan.Entry // guarded by mu
	problems []string     // guarded by mu
	checked  int          // guarded by mu
	said     bool         // in this boot; guarded by mu

	recovery recoveries // guarded by mu
}

// cutPower tests each filesystem. It returns a summary line for each, and whether
// nothing was lost.
func (h harness) cutPower(ctx context.Context, work string, k kernel) (lines []string, ok bool, err error) {
	if err := buildInit(ctx, work); err != nil {
		return nil, false, err
	}
	for _, name := range []string{"./test/vm/churn", "./cmd/csi-loop"} {
		if err := goCommand(ctx, "build", "-ldflags=-s -w", "-o", work, name); err != nil {
			return nil, false, fmt.Errorf("compile %s: %w", name, err)
		}
	}
	modules, err := loadModules(k.Modules)
	if err != nil {
		return nil, false, err
	}
	token := rand.Text()
	m := machine{
		kernel: k, initramfs: filepath.Join(work, "initramfs"), disk: filepath.Join(work, "disk"),
		accel: h.accel, memoryMiB: h.memoryMiB, timeout: h.timeout,
	}
	program := func(name string) testBinary {
		return testBinary{path: filepath.Join(work, name), source: work, job: plan.Job{Name: name, Dir: "/", Argv: []string{"/tests/bin/" + name}}}
	}
	churn := program("churn")
	err = buildInitramfs(m.initramfs, filepath.Join(work, "init"), modules, []testBinary{churn, program("csi-loop")}, plan.Plan{Token: token, Jobs: []plan.Job{churn.job}})
	if err != nil {
		return nil, false, err
	}
	ok = true
	for _, fs := range h.pools {
		seed := mathrand.Uint64()
		fmt.Printf("vm: power cuts, %s on %s, seed %d\n", fs, k.Release, seed)
		t := cutTest{harness: h, machine: m, token: token, pool: newDisk(poolSize), random: mathrand.New(mathrand.NewPCG(seed, 0))}
		t.pool.atom = h.atom
		t.plan = plan.CutPlan{Token: token, Filesystem: fs}
		start := time.Now()
		err := t.run(ctx)
		word := "ok  "
		if err != nil {
			fmt.Println("vm:", err)
			word, ok = "FAIL", false
		}
		lines = append(lines, fmt.Sprintf("%s\tpower cuts, %s\t%.3fs [%s: %d cuts, %s, %d checked, at last %d writes, %d flushes]",
			word, fs, time.Since(start).Seconds(), k.Release, t.cuts, &t.recovery, t.total, t.pool.writes, t.pool.flushes))
	}
	return lines, ok, ctx.Err()
}

func (t *cutTest) run(ctx context.Context) error {
	for t.cuts < t.harness.cuts {
		if err := t.boot(ctx); err != nil {
			return err
		}
	}
	// The last cuts are checked in a boot whose disk then lies.
	if err := t.boot(ctx, func() { t.pool.mu.Lock(); t.pool.lies = true; t.pool.mu.Unlock() }); err != nil {
		return err
	}
	t.plan.CheckOnly = true
	err := t.boot(ctx)
	found, others := ofTheLiar(t.problems)
	switch {
	case len(others) > 0:
		return err
	case found == "":
		return errors.Join(err, errors.New("the disk lied about its flushes, and nothing was found missing: the checks do not see what they should"))
	case t.recovery.cuts == 0:
		return errors.New("no recovery was cut")
	}
	fmt.Printf("vm: the disk that lied was found out: %s\n", found)
	return nil
}

// boot boots the machine and, unless the plan is to check only, cuts its power. lie
// is called when the checks are over.
func (t *cutTest) boot(ctx context.Context, lie ...func()) (err error) {
	t.plan.Entries, t.plan.Seed = t.entries, t.random.Uint64()
	t.cutRecoveries()
	for n := range boots {
		if n > 0 {
			fmt.Println("vm:", againWords)
		}
		t.said = false
		if err = t.bootOnce(ctx, lie...); err == nil || t.said || !misled(t.machine.console()) {
			break
		}
	}
	return err
}

// bootOnce is boot, once.
func (t *cutTest) bootOnce(ctx context.Context, lie ...func()) error {
	ctx, cancel := context.WithTimeout(ctx, t.machine.timeout)
	defer cancel()
	work := filepath.Dir(t.machine.disk)
	if err := makeDisk(t.machine.disk, 1<<30); err != nil {
		return err
	}
	ledger, err := ledgerDisk(t.plan)
	if err != nil {
		return err
	}
	served, err := serveDisks(work, append([]*disk{t.pool, ledger}, t.check...))
	if err != nil {
		return err
	}
	defer served.close()
	m := t.machine
	m.sockets, m.physical = served.sockets, t.pool.atom
	console := m.console()
	cmd := m.command(ctx, console)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	churning, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		t.follow(stdout, churning)
	}()
	t.checked = 0
	start := time.Now()
	var ready time.Duration // when the checks were over
	var cuts []plan.Cut
	var left []*disk
	select {
	case <-churning:
		ready = time.Since(start)
		for _, f := range lie {
			f()
		}
		cuts, left = t.churn(ctx, ended)
	case <-ended:
	}
	_ = cmd.Process.Kill()
	<-ended // everything that the guest said has been read
	waitErr := cmd.Wait()
	if len(t.problems) > 0 {
		return fmt.Errorf("after %d cuts: %s", t.cuts, strings.Join(t.problems, "\n"))
	}
	if want := max(1, len(t.plan.Check)); t.checked < want || !t.plan.CheckOnly && left == nil {
		return fmt.Errorf("the guest checked %d of %d disks: %w %w\n%s%s", t.checked, want, waitErr, ctx.Err(), stderr.String(), tail(console, 60))
	}
	t.total += len(t.plan.Check)
	fmt.Printf("vm: boot %d: %d disks checked after %.0fs, cut after %.0fs, %d lines in the ledger\n",
		t.plan.Boot, len(t.plan.Check), ready.Seconds(), time.Since(start).Seconds(), len(t.entries))
	t.next(cuts, left, len(lie) > 0)
	return nil
}

// churn lets the guest work, and returns what cuts at random moments would leave; every
// second one is of the very moment in which something was acknowledged. left is nil when
// the guest ended before.
func (t *cutTest) churn(ctx context.Context, ended <-chan struct{}) (cuts []plan.Cut, left []*disk) {
	total := leastChurn + time.Duration(t.random.Int64N(int64(mostChurn-leastChurn)))
	var moments []time.Duration
	for range min(copies, t.harness.cuts-t.cuts-1) {
		moments = append(moments, time.Duration(t.random.Int64N(int64(total))))
	}
	slices.Sort(moments)
	left = []*disk{}
	start := time.Now()
	for i, at := range append(moments, total) {
		select {
		case <-ended: // too early: the caller sees why
			return nil, nil
		case <-ctx.Done():
			return nil, nil
		case <-time.After(time.Until(start.Add(at))):
		}
		if at == total {
			break // the machine itself
		}
		after, acked := t.copy(i%2 == 0)
		left = append(left, after)
		<-time.After(plan.InFlight)
		t.mu.Lock()
		cuts = append(cuts, plan.Cut{Acked: acked, Begun: len(t.entries)})
		t.mu.Unlock()
	}
	return cuts, left
}

// copy returns what a cut would leave now, or when the guest next says that more than a
// write was acknowledged, and how many lines of the ledger came before.
func (t *cutTest) copy(whenAcked bool) (after *disk, acked int) {
	l, random := loss(t.random.IntN(3)), mathrand.New(mathrand.NewPCG(t.random.Uint64(), 0))
	done := make(chan struct{})
	take := sync.OnceFunc(func() {
		after, acked = t.pool.cut(l, random), len(t.entries)
		close(done)
	})
	if whenAcked {
		t.mu.Lock()
		t.onAck = take
		t.mu.Unlock()
		select {
		case <-done:
		case <-time.After(patience):
		}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.onAck = nil
	take()
	return after, acked
}

// next plans the boot after a cut.
func (t *cutTest) next(cuts []plan.Cut, left []*disk, lied bool) {
	l := loss(t.random.IntN(3))
	if lied {
		l = loseAll
	}
	after := t.pool.cut(l, t.random)
	after.writes, after.flushes = t.pool.writes, t.pool.flushes
	if !lied {
		t.cuts += len(cuts) + 1
	}
	recovered, recovering := t.recovery.take()
	cuts = append(cuts, recovered...)
	t.pool, t.check = after, slices.Concat(left, recovering)
	t.plan.Boot++
	t.plan.Check = nil
	for i, c := range cuts {
		c.Device = checkDevice(i)
		t.plan.Check = append(t.plan.Check, c)
	}
	t.plan.Check = append(t.plan.Check, plan.Cut{Device: plan.PoolDisk, Acked: len(t.entries), Begun: len(t.entries)})
}

// checkDevice is the guest's name of a copy to check.
func checkDevice(i int) string { return fmt.Sprintf("/dev/vd%c", 'd'+i) }

// follow reads what the guest says until it is dead.
func (t *cutTest) follow(r io.Reader, churning chan<- struct{}) {
	lines := bufio.NewReader(r)
	for {
		line, err := lines.ReadString('\n')
		if err != nil {
			return // a line that was cut off was not said
		}
		t.mu.Lock()
		t.said = true
		t.mu.Unlock()
		before, report, ok := plan.Parse(t.token, strings.TrimRight(line, "\r\n"))
		if before != "" {
			fmt.Println(before)
		}
		if !ok {
			continue
		}
		t.hear(report, churning)
	}
}

// hear takes one report.
func (t *cutTest) hear(r plan.Report, churning chan<- struct{}) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if r.Event == plan.Broken {
		t.problems = append(t.problems, r.Text)
	}
	if r.Event != plan.Ledger {
		return
	}
	e, err := plan.ParseEntry(r.Text)
	switch {
	case err != nil:
		t.problems = append(t.problems, err.Error())
	case e.Op == plan.OpProblem:
		t.problems = append(t.problems, e.Text)
	case e.Op == plan.OpMounted:
		t.recovery.mounted(e.Text)
	case e.Op == plan.OpRecovered:
		t.recovery.recovered(e.Text)
	case e.Op == plan.OpChecked:
		t.checked++
	case e.Op == plan.OpChurn:
		close(churning)
	default:
		t.entries = append(t.entries, e)
		if e.Acked && e.Op != plan.OpWrite && t.onAck != nil {
			t.onAck()
		}
	}
}

// ledgerDisk is a disk with the plan on it.
func ledgerDisk(p plan.CutPlan) (*disk, error) {
	b, err := json.Marshal(p)
	if err != nil {
		return nil, err
	}
	size := (int64(len(b)) + mib) / mib * mib
	d := newDisk(size)
	d.write(append(b, make([]byte, int(size)-len(b))...), 0, true)
	return d, nil
}

const mib = int64(1) << 20

// servedDisks are disks behind sockets.
type servedDisks struct {
	sockets   []string
	listeners []net.Listener
	work      sync.WaitGroup
}

func serveDisks(dir string, disks []*disk) (*servedDisks, error) {
	s := &servedDisks{}
	for i, d := range disks {
		socket := filepath.Join(dir, fmt.Sprintf("disk-%d.sock", i))
		if err := os.RemoveAll(socket); err != nil {
			return nil, err
		}
		l, err := net.Listen("unix", socket)
		if err != nil {
			s.close()
			return nil, err
		}
		s.sockets, s.listeners = append(s.sockets, socket), append(s.listeners, l)
		s.work.Go(func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return // closed
				}
				// qemu is killed in the middle of a request.
				s.work.Go(func() { _ = d.serve(c) })
			}
		})
	}
	return s, nil
}

// close ends the service; clients must be gone.
func (s *servedDisks) close() {
	for _, l := range s.listeners {
		_ = l.Close()
	}
	s.work.Wait()
}
