//go:build linux

// Command snapshot measures snapshots of a mounted volume in use, restores, clones and
// lists of changed blocks, beside a floor and a ceiling: the bare sequence FIFREEZE,
// FICLONE, FITHAW on the same image, and a full copy of the image's data.
//
// While it measures, a writer appends to a log on the volume, 4 KiB and a sync at a
// time. Its longest gap around each snapshot is the stall. Driver and floor take turns
// on the same volume. Lines beginning with "Benchmark" can be given to benchstat.
//
//	snapshot -driver bin/csi-loop [-dir DIR] [-n ROUNDS] [-cases 4G-fresh,...] [-out FILE]
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/csi-loop/csi-loop/test/bench/lab"
)

type options struct {
	driver, dir, out string
	rounds           int
	cases            []string
	pool, filesystem string
	writes           int
}

// situation is a volume to measure with.
type situation struct {
	name       string
	size       int64
	allocation string
	fragmented bool
}

var situations = []situation{
	{name: "4G-fresh", size: 4 * lab.GiB, allocation: "thick"},
	{name: "4G-fragmented", size: 4 * lab.GiB, allocation: "thick", fragmented: true},
	{name: "64G-fresh", size: 64 * lab.GiB, allocation: "thin"},
	{name: "64G-fragmented", size: 64 * lab.GiB, allocation: "thin", fragmented: true},
}

func main() {
	var o options
	var names []string
	for _, s := range situations {
		names = append(names, s.name)
	}
	flag.StringVar(&o.driver, "driver", "bin/csi-loop", "the driver's binary")
	flag.StringVar(&o.dir, "dir", "", "where the pool's disk is made, a sparse file; default a temporary directory")
	flag.StringVar(&o.out, "out", "", "a file for the tables, in Markdown")
	flag.IntVar(&o.rounds, "n", 30, "snapshots of each way")
	flag.IntVar(&o.writes, "writes", 50_000, "random writes of 4 KiB that fragment an image")
	flag.StringVar(&o.pool, "pool", "xfs", "the pool's filesystem: xfs or btrfs")
	flag.StringVar(&o.filesystem, "filesystem", "ext4", "the volume's filesystem")
	cases := flag.String("cases", strings.Join(names, ","), "which volumes, of these")
	flag.Parse()
	o.cases = strings.Split(*cases, ",")
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, o)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "snapshot:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, o options) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("loop devices and mounts need root")
	}
	for _, c := range o.cases {
		if !slices.ContainsFunc(situations, func(s situation) bool { return s.name == c }) {
			return fmt.Errorf("there is no case %q", c)
		}
	}
	dir, remove, err := lab.Scratch(ctx, o.dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, remove()) }()
	pool, err := lab.NewPool(ctx, dir, o.pool, 200*lab.GiB, false)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, pool.Close()) }()
	d, err := lab.StartDriver(ctx, o.driver, filepath.Join(dir, "driver"), filepath.Join(pool.Dir, "pool"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Stop()) }()
	head := fmt.Sprintf("%s, commit %s, %s pool on a loop device, %s in the volumes, %d rounds", lab.Kernel(), lab.Commit(ctx), o.pool, o.filesystem, o.rounds)
	fmt.Printf("%s\n\n", head)
	r := newReport()
	for _, s := range situations {
		if !slices.Contains(o.cases, s.name) {
			continue
		}
		c := &bench{o: o, s: s, d: d, pool: pool, r: r}
		if err := c.run(ctx); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
	}
	fmt.Printf("\n%s", r.markdown())
	return lab.Save(o.out, fmt.Sprintf("<!-- Written by make bench-snapshot. -->\n\n%s.\n\n%s", head, r.markdown()))
}
