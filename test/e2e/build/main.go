// Command build compiles what a cluster is made of, from Go modules: Kubernetes,
// etcd, containerd, runc, CoreDNS, the CSI sidecars, helm and the storage suite.
//
// The binaries go to a directory in the user's cache that is named by a hash of
// everything they depend on, so that a second run takes seconds. Its path is
// the only thing printed to standard output. A cold build takes 20 minutes on
// two cores and leaves 5 GB in Go's own cache.
//
//	build [-print] [cluster|sidecars|suite|helm]...
package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"
)

// kept is how many builds stay in the cache; branches with other dependencies
// take turns.
const kept = 2

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "build:", err)
		os.Exit(1) //nolint:gocritic // nothing is left to stop
	}
}

func run(ctx context.Context) error {
	only := flag.Bool("print", false, "print the directory and build nothing")
	root := flag.String("root", "", "directory of this module (default: found through go.mod)")
	flag.Parse()
	if *root == "" {
		mod, err := output(ctx, ".", "go", "env", "GOMOD")
		if err != nil {
			return err
		}
		*root = filepath.Dir(mod)
	}
	dir, err := cacheDir(ctx, *root)
	if err != nil {
		return err
	}
	fmt.Fprintln(os.Stdout, dir)
	if *only {
		return nil
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	unlock, err := lock(dir)
	if err != nil {
		return err
	}
	defer unlock()
	for _, t := range targets() {
		if flag.NArg() > 0 && !slices.Contains(flag.Args(), t.group) {
			continue
		}
		if err := t.build(ctx, *root, dir); err != nil {
			return fmt.Errorf("%s: %w", strings.Join(t.outputs(), ", "), err)
		}
	}
	return prune(dir)
}

// cacheDir is named by what all the binaries are made from: the modules, our own
// few sources, and the compiler. How each is compiled is in its stamp.
func cacheDir(ctx context.Context, root string) (string, error) {
	version, err := output(ctx, root, "go", "env", "GOVERSION")
	if err != nil {
		return "", err
	}
	sum := sha256.New()
	fmt.Fprintln(sum, version, runtime.GOARCH)
	files := []string{"go.mod", "go.sum", "provisioner/go.mod", "provisioner/go.sum"}
	for _, pattern := range []string{"coredns/*.go", "hyperkube/*.go", "pause/*.go", "suite/*.go"} {
		found, err := filepath.Glob(filepath.Join(root, pattern))
		if err != nil {
			return "", err
		}
		for _, f := range found {
			name, err := filepath.Rel(root, f)
			if err != nil {
				return "", err
			}
			files = append(files, name)
		}
	}
	for _, name := range files {
		content, err := os.ReadFile(filepath.Join(root, name))
		if err != nil {
			return "", err
		}
		if filepath.Base(name) == "go.mod" {
			content = versions(content)
		}
		fmt.Fprintf(sum, "%s %x\n", name, sha256.Sum256(content))
	}
	cache, err := os.UserCacheDir() // honours XDG_CACHE_HOME
	if err != nil {
		return "", err
	}
	return filepath.Join(cache, "csi-loop", "e2e", hex.EncodeToString(sum.Sum(nil))[:16]), nil
}

// versions are the lines of a go.mod in an order of their own, without comments:
// that our tests begin to import a module directly changes no binary.
func versions(mod []byte) []byte {
	var lines []string
	for line := range strings.Lines(string(mod)) {
		line, _, _ = strings.Cut(line, "//")
		if line = strings.TrimSpace(strings.TrimPrefix(line, "require ")); len(strings.Fields(line)) > 1 {
			lines = append(lines, line)
		}
	}
	slices.Sort(lines)
	return []byte(strings.Join(slices.Compact(lines), "\n"))
}

// build compiles what is missing. A binary appears under its name only when it
// is complete, so an interrupted run goes on where it stopped.
func (t target) build(ctx context.Context, root, dir string) error {
	if t.built(dir) {
		return nil
	}
	scratch, err := os.MkdirTemp(dir, ".building-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(scratch) }()
	start := time.Now()
	args := []string{"build"}
	to := scratch + "/"
	if t.test != "" {
		args, to = []string{"test", "-c"}, filepath.Join(scratch, t.test)
	}
	args = append(args, "-trimpath", "-buildvcs=false", "-ldflags", strings.TrimSpace("-s -w "+t.ldflags), "-o", to)
	if t.tags != "" {
		args = append(args, "-tags", t.tags)
	}
	cmd := exec.CommandContext(ctx, "go", append(args, t.packages...)...)
	cmd.Dir = filepath.Join(root, t.module)
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	cgo := "CGO_ENABLED=0"
	if t.cgo {
		cgo = "CGO_ENABLED=1"
	}
	cmd.Env = append(os.Environ(), cgo)
	if os.Getenv("GOGC") == "" {
		cmd.Env = append(cmd.Env, "GOGC=400") // a sixth less time for some memory
	}
	if err := cmd.Run(); err != nil {
		return err
	}
	for _, name := range t.outputs() {
		if err := os.Rename(filepath.Join(scratch, name), filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	if err := os.WriteFile(t.stampFile(dir), []byte(t.stamp()), 0o644); err != nil {
		return err
	}
	fmt.Fprintf(os.Stderr, "build: %s in %s\n", strings.Join(t.outputs(), ", "), time.Since(start).Round(time.Second))
	return nil
}

// built reports whether all outputs are there, and made as they would be now.
func (t target) built(dir string) bool {
	for _, name := range t.outputs() {
		if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
			return false
		}
	}
	stamp, err := os.ReadFile(t.stampFile(dir))
	return err == nil && string(stamp) == t.stamp()
}

func (t target) stamp() string { return fmt.Sprintf("%+v\n", t) }

func (t target) stampFile(dir string) string { return filepath.Join(dir, ".stamp-"+t.outputs()[0]) }

// lock keeps a second build of the same binaries waiting. The lock goes with the
// process.
func lock(dir string) (func(), error) {
	f, err := os.OpenFile(filepath.Join(dir, ".lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return func() { _ = f.Close() }, nil
}

// prune removes all but the builds used last.
func prune(dir string) error {
	now := time.Now()
	if err := os.Chtimes(dir, now, now); err != nil {
		return err
	}
	entries, err := os.ReadDir(filepath.Dir(dir))
	if err != nil {
		return err
	}
	type build struct {
		path string
		used time.Time
	}
	var builds []build
	for _, e := range entries {
		// Only what cacheDir named: other things may live here too.
		if _, err := hex.DecodeString(e.Name()); err != nil || len(e.Name()) != 16 {
			continue
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		builds = append(builds, build{filepath.Join(filepath.Dir(dir), e.Name()), info.ModTime()})
	}
	slices.SortFunc(builds, func(a, b build) int { return b.used.Compare(a.used) })
	for _, b := range builds[min(kept, len(builds)):] {
		if err := os.RemoveAll(b.path); err != nil {
			return err
		}
	}
	return nil
}

func output(ctx context.Context, dir, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir, cmd.Stderr = dir, os.Stderr
	pipe, err := cmd.StdoutPipe()
	if err != nil {
		return "", err
	}
	if err := cmd.Start(); err != nil {
		return "", err
	}
	out, err := io.ReadAll(pipe)
	return strings.TrimSpace(string(out)), errors.Join(err, cmd.Wait())
}
