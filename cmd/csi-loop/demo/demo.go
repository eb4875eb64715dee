// Package demo shows what csi-loop does on the machine it runs on: it starts the
// driver, plays a CSI client, and prints for each step what the kernel shows.
//
// What is printed after a call is read from the kernel (sysfs, mountinfo,
// statfs, the files), never taken from the driver's answer. Everything lives
// below one temporary directory. When a step fails, or the context ends, all of
// it is taken back: by the driver if it can, else by the demo itself, and only
// what lies below that directory.
package demo

import (
	"context"
	_ "embed"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"
)

//go:embed demo.yaml
var driverConfig []byte

// Options are what Run needs.
type Options struct {
	// Driver is the command that runs "csi-loop serve", without flags.
	Driver []string
	// Dir is where the demo makes its directory; empty for the default, $TMPDIR or
	// /var/tmp (which is on a disk where /tmp is in memory).
	Dir string
	// Out is where the story is told, in colours when Colour is set.
	Out    io.Writer
	Colour bool

	// After is called at the end of each step with its number, when it is not nil.
	// Its error is the step's: the way to see what a failure leaves.
	After func(step int) error
}

// demo is one run.
type demo struct {
	opts   Options
	out    *printer
	dir    string // all of it is below here
	driver *process
	client *client
	cast   cast
}

// Run plays the whole story. It returns nil only if every step succeeded and
// nothing is left.
func Run(ctx context.Context, opts Options) (err error) {
	needs, err := prepare()
	if err != nil {
		return err
	}
	base := opts.Dir
	if base == "" {
		base = tempDir()
	}
	dir, err := os.MkdirTemp(base, "csi-loop-demo-")
	if err != nil {
		return fmt.Errorf("make a directory: %w: choose another place with --dir", err)
	}
	// Mount points are compared with what mountinfo shows, which has no links.
	if dir, err = filepath.EvalSymlinks(dir); err != nil {
		return err
	}
	d := &demo{opts: opts, out: newPrinter(opts.Out, opts.Colour, dir), dir: dir, cast: newCast(dir, needs)}
	defer func() {
		if err != nil {
			err = d.rescue(ctx, err)
		}
	}()
	if err := d.setUp(needs); err != nil {
		return err
	}
	return d.play(ctx)
}

func tempDir() string {
	if dir := os.Getenv("TMPDIR"); dir != "" {
		return dir
	}
	return "/var/tmp"
}

// Directories below the demo's.
func (d *demo) poolDir() string    { return filepath.Join(d.dir, "pool") }
func (d *demo) imageDir() string   { return filepath.Join(d.dir, "images") }
func (d *demo) stateDir() string   { return filepath.Join(d.dir, "state") }
func (d *demo) socket() string     { return filepath.Join(d.dir, "run", "csi.sock") }
func (d *demo) configFile() string { return filepath.Join(d.dir, "demo.yaml") }

// needed is the free space the demo wants, in bytes: its volumes at their
// largest, and what the filesystem needs for itself.
const needed = 1 << 30

// setUp makes the directories and says what the demo runs on.
func (d *demo) setUp(n needs) error {
	for _, dir := range []string{d.poolDir(), d.imageDir()} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			return err
		}
	}
	if err := os.WriteFile(d.configFile(), driverConfig, 0o600); err != nil {
		return err
	}
	fsType, free, err := fileSystem(d.poolDir())
	if err != nil {
		return err
	}
	if free < needed {
		return fmt.Errorf("%s has %s free and the demo wants %s: choose another directory with --dir", d.dir, bytesText(free), bytesText(needed))
	}
	d.out.title("csi-loop demo: volumes from image files on this machine's kernel, no Kubernetes")
	d.out.factf("kernel", "%s", n.kernel)
	d.out.factf("directory", "%s, shown as %s (%s, %s free)", d.dir, short, fsType, bytesText(free))
	d.out.factf("shown", "after each call: what sysfs, mountinfo, statfs and the files say, not the driver")
	if !n.sysResource {
		d.out.factf("note", "CAP_SYS_RESOURCE is withheld here, so the kernel refuses to grow a mounted ext4: growth is shown with xfs")
	}
	return nil
}

// play runs the steps in order.
func (d *demo) play(ctx context.Context) error {
	start := time.Now()
	for i, s := range d.steps() {
		if err := d.step(ctx, i+1, s); err != nil {
			return err
		}
	}
	d.out.endf("Done in %.1f s: every step as it should be, and nothing is left.", time.Since(start).Seconds())
	return nil
}

// step runs one step and tells it.
func (d *demo) step(ctx context.Context, number int, s step) error {
	d.out.begin(number, s.title)
	err := context.Cause(ctx)
	if err == nil {
		err = s.run(ctx)
	}
	if err == nil && d.opts.After != nil {
		err = d.opts.After(number)
	}
	// A call that was interrupted fails with whatever it met; the reason is why.
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	d.out.finish(err == nil)
	if err != nil {
		return fmt.Errorf("step %d (%s): %w", number, s.title, err)
	}
	return nil
}
