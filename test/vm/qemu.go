package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/csi-loop/csi-loop/test/vm/plan"
)

// machine is one virtual machine and what it is made of.
type machine struct {
	kernel    kernel
	initramfs string
	disk      string
	sockets   []string // of further disks, served by the network block device protocol
	physical  int64    // size of their sectors, in bytes
	accel     string   // tcg needs nothing of the host; kvm is 10 to 30 times faster
	memoryMiB int
	timeout   time.Duration
}

// result is how one job ended.
type result struct {
	status  int
	took    time.Duration
	passed  int      // tests, each with all that is in it
	skipped []string // tests, and those in them
}

// boots is how often a machine is booted that the emulator misleads before it says
// anything.
const boots = 4

// boot runs the machine until it powers off and returns the results of the jobs
// that ended. An error means that the guest did not get to the end: it
// panicked, hung until the time-out, or could not prepare itself.
func (m machine) boot(ctx context.Context, p plan.Plan, out io.Writer) (results []result, err error) {
	for n := range boots {
		if n > 0 {
			fmt.Fprintln(out, "vm:", againWords)
		}
		var silent bool
		results, silent, err = m.bootOnce(ctx, p, out)
		if err == nil || !silent || !misled(m.console()) {
			break
		}
	}
	return results, err
}

const againWords = "booting again: the emulator ran an instruction that the kernel had replaced"

// misled says whether the guest's kernel died of a breakpoint of its own. While it
// replaces an instruction it puts one in its place, and qemu's threads at times still
// run that when it is gone. Seen twice, on 6.12, when the scheduler's clock is found to be
// stable, three seconds after the start.
func misled(console string) bool { return strings.Contains(tail(console, 100), "Oops: int3") }

func (m machine) console() string { return filepath.Join(filepath.Dir(m.disk), "console.log") }

// bootOnce is boot, once. silent says that the guest said nothing.
func (m machine) bootOnce(ctx context.Context, p plan.Plan, out io.Writer) (results []result, silent bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, m.timeout)
	defer cancel()
	console := m.console()
	cmd := m.command(ctx, console)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, false, err
	}
	if err := cmd.Start(); err != nil {
		return nil, false, err
	}
	said := bufio.NewReader(stdout)
	_, peekErr := said.Peek(1)
	results, finished, err := follow(said, p, out)
	if err != nil {
		cancel() // nobody reads on, so the guest could not end by itself
	}
	waitErr := cmd.Wait()
	if finished && err == nil {
		if slices.ContainsFunc(results, func(r result) bool { return r.status != 0 }) {
			fmt.Fprintf(out, "== the guest's last kernel messages\n%s\n", tail(console, 40))
		}
		return results, false, nil
	}
	switch {
	case err != nil:
	case ctx.Err() != nil:
		err = fmt.Errorf("the guest did not finish in %v", m.timeout)
	default:
		err = errors.New("the guest ended before its last test did")
	}
	err = errors.Join(err, waitErr, context.Cause(ctx))
	return results, peekErr != nil, fmt.Errorf("%w\n%s%s", err, stderr.String(), tail(console, 60))
}

// cheaper is what the kernel is told to leave out because it is dear to emulate. qemu's
// time-stamp counters agree, which Linux 6.1 does not trust an AMD processor to have: each
// look at the clock would be a call that reads the HPET.
const cheaper = "tsc=reliable mitigations=off init_on_alloc=0"

// command is qemu with the machine's console in a file and its second serial line as
// standard output.
func (m machine) command(ctx context.Context, console string) *exec.Cmd {
	args := []string{
		"-machine", "q35", "-accel", m.accel, "-cpu", "max", "-smp", "2", "-m", strconv.Itoa(m.memoryMiB),
		"-nodefaults", "-no-user-config", "-display", "none", "-nic", "none", "-no-reboot",
		"-kernel", m.kernel.Image, "-initrd", m.initramfs,
		// A panic ends qemu at once, and an oops is a panic: a test must not pass over one.
		"-append", "console=ttyS0 panic=-1 oops=panic " + cheaper,
		"-serial", "file:" + console, "-serial", "stdio",
		"-drive", "file=" + m.disk + ",if=none,id=disk,format=raw,cache=unsafe,discard=unmap", "-device", "virtio-blk-pci,drive=disk",
	}
	for i, socket := range m.sockets {
		id := fmt.Sprintf("disk%d", i)
		args = append(args, "-drive", "file=nbd+unix:///?socket="+socket+",if=none,id="+id+",format=raw,cache=writeback",
			"-device", fmt.Sprintf("virtio-blk-pci,drive=%s,physical_block_size=%d", id, m.physical))
	}
	return exec.CommandContext(ctx, "qemu-system-x86_64", args...)
}

// follow copies the tests' output to out and gathers the guest's reports, and the tests
// that were skipped, until the machine is off. finished says whether the guest ran
// everything.
func follow(r io.Reader, p plan.Plan, out io.Writer) (results []result, finished bool, err error) {
	lines := bufio.NewReader(r)
	var started time.Time
	var now result
	for {
		line, readErr := lines.ReadString('\n')
		before, report, ok := plan.Parse(p.Token, strings.TrimRight(line, "\r\n"))
		if name, ok := skippedTest(before); ok {
			now.skipped = append(now.skipped, name)
		}
		if strings.HasPrefix(before, "--- PASS: ") {
			now.passed++
		}
		if noise := p.Terse && isNoise(before); !noise && (before != "" || !ok && line != "") {
			fmt.Fprintln(out, before)
		}
		if ok {
			switch report.Event {
			case plan.Started:
				started, now = time.Now(), result{}
				fmt.Fprintf(out, "== %s\n", p.Jobs[report.Number].Name)
			case plan.Ended:
				if report.Number != len(results) {
					return results, false, fmt.Errorf("the guest reports job %d, expected %d", report.Number, len(results))
				}
				now.status, now.took = report.Status, time.Since(started)
				results = append(results, now)
			case plan.Finished:
				finished = len(results) == len(p.Jobs)
			case plan.Ledger: // not from tests
			case plan.Broken:
				return results, false, fmt.Errorf("the guest could not start: %s", report.Text)
			}
		}
		if readErr != nil {
			return results, finished, nil //nolint:nilerr // qemu is gone; its exit status tells the rest
		}
	}
}

// tail gives the last lines of the guest's console.
func tail(path string, n int) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	lines := strings.Split(strings.ReplaceAll(string(b), "\r", ""), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
