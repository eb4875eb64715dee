//go:build linux

// Command io measures the data plane: what fio, PostgreSQL and a log writer get from a
// volume, beside a file on the pool, the loop device that losetup makes when it is tuned
// by hand, and a loop device without direct I/O.
//
// All of them take turns, run by run, so that a machine whose speed drifts does so for
// all; what is to be quoted are the ratios of the medians. It works in pieces, each of
// some minutes, whose names say what is measured: the pool's filesystem and the volume's
// ("block" is a raw block volume), "app" for programs, "knobs" for settings of a loop
// device. Each piece writes a table and a plot to the directory of -out. Lines beginning
// with "Benchmark" can be given to benchstat.
//
//	io -driver bin/csi-loop [-dir DIR] [-pieces ext4-block,...] [-rounds N] [-runtime 1s] [-out DIR]
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/csi-loop/csi-loop/test/bench/lab"
)

type options struct {
	driver, dir, out string
	pieces           []string
	jobs             *regexp.Regexp
	rounds           int
	runtime          time.Duration
	size             int64
}

// allPieces are what can be measured, in the order in which it is.
var allPieces = []string{
	"ext4-block", "ext4-ext4", "ext4-xfs", "ext4-app", "ext4-knobs",
	"xfs-block", "xfs-ext4", "xfs-xfs", "xfs-app",
}

func main() {
	var o options
	flag.StringVar(&o.driver, "driver", "bin/csi-loop", "the driver's binary")
	flag.StringVar(&o.dir, "dir", "", "where pools are made; default a temporary directory")
	flag.StringVar(&o.out, "out", "", "a directory for the tables and plots")
	flag.IntVar(&o.rounds, "rounds", 5, "how often each is run")
	flag.DurationVar(&o.runtime, "runtime", time.Second, "how long a run takes, whole seconds")
	size := flag.Int64("size", 256, "size of what is read and written, MiB")
	pieces := flag.String("pieces", strings.Join(allPieces, ","), "which pieces, of these")
	only := flag.String("jobs", "", "only those of fio's jobs whose name this regular expression matches")
	flag.Parse()
	var err error
	if o.jobs, err = regexp.Compile(*only); err != nil {
		fmt.Fprintln(os.Stderr, "io: -jobs:", err)
		os.Exit(2)
	}
	o.size, o.pieces = *size*lab.MiB, strings.Split(*pieces, ",")
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err = run(ctx, o)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "io:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, o options) error {
	if os.Geteuid() != 0 {
		return errors.New("loop devices and mounts need root")
	}
	for _, p := range o.pieces {
		if !slices.Contains(allPieces, p) {
			return fmt.Errorf("there is no piece %q", p)
		}
	}
	for _, p := range o.pieces {
		if err := runPiece(ctx, o, p); err != nil {
			return fmt.Errorf("%s: %w", p, err)
		}
	}
	return nil
}

// bench is one piece that is measured.
type bench struct {
	o     options
	piece string
	kind  string // of the volume: "block" or a filesystem
	dir   string // for mount points
	pool  *lab.Pool
	d     *lab.Driver
	next  int
}

func runPiece(ctx context.Context, o options, piece string) (err error) {
	dir, remove, err := lab.Scratch(ctx, o.dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, remove()) }()
	if err := os.Chmod(dir, 0o711); err != nil { // PostgreSQL is not root
		return err
	}
	fs, kind, _ := strings.Cut(piece, "-")
	b := &bench{o: o, piece: piece, kind: kind, dir: dir}
	if b.pool, err = b.newPool(ctx, dir, fs); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.pool.Close()) }()
	if err := os.Chmod(b.pool.Dir, 0o711); err != nil {
		return err
	}
	b.d, err = lab.StartDriver(ctx, o.driver, filepath.Join(dir, "driver"), filepath.Join(b.pool.Dir, "pool"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.d.Stop()) }()
	if err := os.Chmod(filepath.Join(dir, "driver"), 0o711); err != nil {
		return err
	}
	on := "the machine's disk"
	if b.pool.Device != "" {
		on = "a loop device over a file on the machine's disk"
	}
	r := &report{
		title: piece,
		head: fmt.Sprintf("%s, commit %s, %s pool on %s, %d runs of %v each in turn, %d MiB",
			lab.Kernel(), lab.Commit(ctx), b.pool.Kind, on, o.rounds, o.runtime, o.size/lab.MiB),
	}
	fmt.Printf("\n%s: %s\n\n", piece, r.head)
	switch kind {
	case "app":
		err = b.apps(ctx, r)
	case "knobs":
		err = b.knobs(ctx, r)
	default:
		err = b.fio(ctx, r)
	}
	if err != nil {
		return err
	}
	return r.write(o.out)
}

// newPool takes the machine's own disk if that has the filesystem, for it has a layer less.
func (b *bench) newPool(ctx context.Context, dir, fs string) (*lab.Pool, error) {
	p, err := lab.NewPool(ctx, dir, "", 0, false)
	if err != nil || p.Kind == fs {
		return p, err
	}
	return lab.NewPool(ctx, dir, fs, 28*b.volumeSize()+2*lab.GiB, true)
}
