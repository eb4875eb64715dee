// Command vm runs Go tests as root on other Linux kernels, in virtual machines.
//
//	go run ./test/vm [flags] PACKAGE... [-- TEST-FLAG...]
//	go run ./test/vm -cuts N [flags]
//
// It needs neither root nor KVM: qemu emulates the processor, and the guest is
// made of nothing but a Debian cloud kernel, which apt downloads into a cache,
// and an initramfs with the compiled tests and this machine's mkfs and friends.
// The guest has every capability, which containers often have not.
//
// With -cuts it cuts the power of the machine instead, N times for each filesystem:
// see powercut.go.
//
// The exit status is 0 if every test passed on every kernel. A guest that
// panics, hangs or says nothing is a failure. Where apt has no such kernel the
// run is skipped with a note; CSI_LOOP_VM_TESTS=1 makes that a failure.
package main

import (
	"context"
	"crypto/rand"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/csi-loop/csi-loop/test/vm/plan"
)

// promise is the environment variable that forbids skipping.
const promise = "CSI_LOOP_VM_TESTS"

func main() {
	var h harness
	kernels := flag.String("kernels", "6.1,6.12", "series of `kernels` to run on, by comma")
	flag.StringVar(&h.accel, "accel", "tcg", "qemu's `accelerator`: tcg or kvm")
	flag.IntVar(&h.memoryMiB, "memory", 2048, "the guest's memory in `MiB`")
	flag.DurationVar(&h.timeout, "timeout", 20*time.Minute, "`limit` for everything on one kernel")
	flag.Int64Var(&h.diskGiB, "disk", 16, "the scratch disk's size in `GiB`, allocated as it is written")
	flag.StringVar(&h.cache, "cache", "", "`directory` for kernels (default: csi-loop in the user's cache)")
	flag.IntVar(&h.cuts, "cuts", 0, "instead of tests, cut the power of each pool `times`, under a churn of volumes")
	flag.Int64Var(&h.atom, "atom", atom4K, "what the disk writes whole when the power goes, in `bytes`: 512 to 4096")
	pools := flag.String("pools", "ext4,xfs,btrfs", "filesystems of the pools whose power is cut, by comma")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	h.packages, h.testFlags = splitArgs(flag.Args())
	h.pools = strings.Split(*pools, ",")
	err := h.main(ctx, strings.Split(*kernels, ","))
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "vm:", err)
		os.Exit(1)
	}
}

// splitArgs separates packages from what follows "--". A "--" before the first
// package is eaten by package flag.
func splitArgs(args []string) (packages, testFlags []string) {
	for i, a := range args {
		if a == "--" {
			return args[:i], args[i+1:]
		}
	}
	return args, nil
}

type harness struct {
	accel     string
	memoryMiB int
	timeout   time.Duration
	diskGiB   int64
	cache     string
	packages  []string
	testFlags []string
	cuts      int
	atom      int64
	pools     []string
}

// testBinary is a compiled test and the job that runs it in the guest. Without a name
// the job is not run: the tests do.
type testBinary struct {
	path   string // on this machine
	source string // the package's directory, for its testdata
	job    plan.Job
}

func (h harness) main(ctx context.Context, series []string) (err error) {
	if len(h.packages) == 0 && h.cuts == 0 {
		return errors.New("no package to test")
	}
	if h.cache, err = cacheDir(h.cache); err != nil {
		return err
	}
	work, err := os.MkdirTemp("", "csi-loop-vm-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(work)) }()

	var summary []string
	failed := false
	var tests []testBinary
	for _, s := range series {
		k, err := findKernel(h.cache, s)
		if errors.Is(err, errNoKernel) {
			word := "SKIP"
			if os.Getenv(promise) == "1" {
				word, failed = "FAIL", true
			}
			summary = append(summary, fmt.Sprintf("%s\tkernel %s: %v", word, s, err))
			continue
		}
		if err != nil {
			return err
		}
		if tests == nil && h.cuts == 0 { // compiled once, and not at all if there is no kernel
			if tests, err = h.compile(ctx, work); err != nil {
				return err
			}
		}
		run := func() ([]string, bool, error) { return h.run(ctx, work, k, tests) }
		if h.cuts > 0 {
			run = func() ([]string, bool, error) { return h.cutPower(ctx, work, k) }
		}
		lines, ok, err := run()
		summary = append(summary, lines...)
		if err != nil {
			fmt.Println("vm:", err)
		}
		failed = failed || !ok || err != nil
	}
	fmt.Println("== summary of virtual machines")
	fmt.Println(strings.Join(summary, "\n"))
	if failed {
		return errors.New("not every test passed on every kernel")
	}
	return nil
}

// compile builds the init program and the test binaries, all static.
func (h harness) compile(ctx context.Context, work string) ([]testBinary, error) {
	build := func(args ...string) error { return goCommand(ctx, args...) }
	if err := buildInit(ctx, work); err != nil {
		return nil, err
	}
	list, err := output("go", append([]string{"list", "-f", "{{.ImportPath}} {{.Dir}} {{len .TestGoFiles}} {{len .XTestGoFiles}}"}, h.packages...)...)
	if err != nil {
		return nil, err
	}
	var tests []testBinary
	for line := range strings.Lines(string(list)) {
		fields := strings.Fields(line)
		if len(fields) != 4 || fields[2] == "0" && fields[3] == "0" {
			continue
		}
		name := fields[0]
		binary := filepath.Join(work, strings.ReplaceAll(name, "/", "_")+".test")
		if err := build("test", "-c", "-o", binary, name); err != nil {
			return nil, fmt.Errorf("compile the tests of %s: %w", name, err)
		}
		dir := path.Join("/tests", name)
		argv := []string{path.Join(dir, path.Base(name)+".test"), "-test.timeout=" + h.timeout.String(), "-test.v"}
		tests = append(tests, testBinary{path: binary, source: fields[1], job: plan.Job{
			Name: name,
			Dir:  dir,
			Argv: append(argv, h.testFlags...),
		}})
	}
	if len(tests) == 0 {
		return nil, errors.New("the packages have no tests")
	}
	for _, pattern := range alsoRead {
		names, err := filepath.Glob(pattern)
		if err != nil || len(names) == 0 {
			return nil, fmt.Errorf("nothing is %s: %w", pattern, errors.Join(err, fs.ErrNotExist))
		}
		for _, name := range names {
			tests = append(tests, testBinary{path: name, source: work, job: plan.Job{Argv: []string{path.Join(checkout, name)}}})
		}
	}
	if !slices.ContainsFunc(tests, func(t testBinary) bool { return runsDriver[path.Base(t.job.Name)] }) {
		return tests, nil
	}
	driver := filepath.Join(work, "csi-loop")
	if err := build("build", "-ldflags=-s -w", "-o", driver, "./cmd/csi-loop"); err != nil {
		return nil, fmt.Errorf("compile csi-loop: %w", err)
	}
	return append(tests, testBinary{path: driver, source: work, job: plan.Job{Argv: []string{driverPath}}}), nil
}

// alsoRead are files that tests read which are not in their package's testdata.
var alsoRead = []string{
	"README.md", "CONTRIBUTING.md", "docs/*.md", "docs/reference/*.md", "test/e2e/README.md",
	"charts/csi-loop/README.md", "charts/csi-loop/values.schema.json",
}

// checkout is where the guest has what it has of the repository.
const checkout = "/tests/github.com/csi-loop/csi-loop"

// runsDriver are the packages whose tests run the csi-loop binary, which is at
// driverPath in the guest: there is no compiler.
var runsDriver = map[string]bool{"integration": true, "crash": true, "csi-loop": true}

const driverPath = "/tests/bin/csi-loop"

// cacheDir is where kernels are kept; given, if it is not empty.
func cacheDir(given string) (string, error) {
	if given != "" {
		return given, nil
	}
	dir, err := os.UserCacheDir()
	return filepath.Join(dir, "csi-loop", "kernels"), err
}

// goCommand runs go for the guest: what it makes is static.
func goCommand(ctx context.Context, args ...string) error {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux")
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	return cmd.Run()
}

func buildInit(ctx context.Context, work string) error {
	if err := goCommand(ctx, "build", "-o", filepath.Join(work, "init"), "./test/vm/init"); err != nil {
		return fmt.Errorf("compile init: %w", err)
	}
	return nil
}

// run boots one kernel with all tests. It returns a summary line for each test
// in go test's form, and whether all passed. The error says why the guest did
// not reach the end.
func (h harness) run(ctx context.Context, work string, k kernel, tests []testBinary) (lines []string, ok bool, err error) {
	p := plan.Plan{
		Token: rand.Text(), Terse: !slices.ContainsFunc(h.testFlags, func(f string) bool { return strings.HasPrefix(f, "-test.v") }),
		Env: []string{"CSI_LOOP_ROOT_TESTS=1", "CSI_LOOP_VM=" + k.Release, "CSI_LOOP_BIN=" + driverPath, "GINKGO_NO_COLOR=TRUE"},
	}
	files := tests
	tests = slices.DeleteFunc(slices.Clone(tests), func(t testBinary) bool { return t.job.Name == "" })
	for _, t := range tests {
		p.Jobs = append(p.Jobs, t.job)
	}
	start := time.Now()
	results, err := func() ([]result, error) {
		modules, err := loadModules(k.Modules)
		if err != nil {
			return nil, err
		}
		m := machine{
			kernel:    k,
			initramfs: filepath.Join(work, "initramfs"),
			disk:      filepath.Join(work, "disk"),
			accel:     h.accel,
			memoryMiB: h.memoryMiB,
			timeout:   h.timeout,
		}
		if err := buildInitramfs(m.initramfs, filepath.Join(work, "init"), modules, files, p); err != nil {
			return nil, err
		}
		if err := makeDisk(m.disk, h.diskGiB<<30); err != nil {
			return nil, err
		}
		fmt.Printf("vm: booting %s\n", k.Release)
		return m.boot(ctx, p, os.Stdout)
	}()
	ok = err == nil
	for i, t := range tests {
		var r *result
		if i < len(results) {
			r = &results[i]
		}
		line, good := verdict(t.job.Name, k.Release, r)
		lines, ok = append(lines, line), ok && good
	}
	fmt.Printf("vm: %s took %.1fs\n", k.Release, time.Since(start).Seconds())
	return lines, ok, err
}

// verdict is the summary line of a package, in go test's form; r is nil if it did not end.
func verdict(name, release string, r *result) (line string, ok bool) {
	if r == nil {
		return fmt.Sprintf("FAIL\t%s\t[%s: did not end]", name, release), false
	}
	word, notes := "ok  ", []string{release, fmt.Sprintf("%d tests passed", r.passed)}
	if r.status != 0 {
		word, notes = "FAIL", append(notes, fmt.Sprintf("exit status %d", r.status))
	} else if r.passed == 0 {
		word = "FAIL" // whoever chose the tests meant some
	}
	if wrong := wrongly(r.skipped); len(wrong) > 0 {
		word, notes = "FAIL", append(notes, fmt.Sprintf("skipped, and nothing is missing here: %q", wrong))
	} else if len(r.skipped) > 0 {
		notes = append(notes, fmt.Sprintf("skipped: %q", r.skipped))
	}
	return fmt.Sprintf("%s\t%s\t%.3fs [%s]", word, name, r.took.Seconds(), strings.Join(notes, ": ")), word == "ok  "
}

// makeDisk writes a fresh sparse disk with an ext4 for the guest's TMPDIR.
func makeDisk(path string, size int64) error {
	if err := os.RemoveAll(path); err != nil {
		return err
	}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	if err := errors.Join(f.Truncate(size), f.Close()); err != nil {
		return err
	}
	mkfs, err := lookTool("mkfs.ext4")
	if err != nil {
		return err
	}
	_, err = output(mkfs, "-q", "-F", "-E", "lazy_itable_init=1", path)
	return err
}
