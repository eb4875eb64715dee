package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"k8s.io/klog/v2"

	"github.com/csi-loop/csi-loop/pkg/driver"
	"github.com/csi-loop/csi-loop/pkg/image"
	"github.com/csi-loop/csi-loop/pkg/loop"
	"github.com/csi-loop/csi-loop/pkg/mount"
)

const stewardHelp = `

It takes the flags, the environment and the file of serve. Where none names a pool and
process 1 is csi-loop serve, as in its container, that process' flags are used:

  kubectl exec -n csi-loop csi-loop-node-x7x2p -- csi-loop %s

A csi-loop that runs is asked on its socket (--endpoint), since one process serves a
pool; it has to see the file under the same path. When none runs, the pool is opened
for as long as the command takes.`

// steward is who changes pools: a driver that runs, or one that was made for that.
type steward interface {
	TakeIn(ctx context.Context, r driver.TakeInRequest) (driver.TakeInProgress, error)
	Templates(ctx context.Context, pool string) ([]driver.Template, error)
	RemoveTemplate(ctx context.Context, pool, name string) error
}

// stewardCommand is what the commands that change pools have in common.
type stewardCommand struct {
	flags *serveFlags
	set   *pflag.FlagSet
	pool  string
}

// newStewardCommand adds the flags of serve to a command.
func newStewardCommand(c *cobra.Command, name string) *stewardCommand {
	s := &stewardCommand{set: c.Flags()}
	s.flags = newServeFlags(c.Flags())
	matter := []string{"config", "pool", "state-dir", "node-id", "endpoint", "driver-name"}
	c.Flags().VisitAll(func(f *pflag.Flag) { f.Hidden = !slices.Contains(matter, f.Name) })
	c.Flags().StringVar(&s.pool, "into", "", "name of the pool (default: the default pool)")
	c.Long += fmt.Sprintf(stewardHelp, name)
	return s
}

// with runs work with whoever has the pools.
func (s *stewardCommand) with(ctx context.Context, work func(context.Context, steward) error) (err error) {
	c, err := s.flags.loadNear(s.set)
	if err != nil {
		return err
	}
	if err := s.flags.applyLogging(c); err != nil {
		return err
	}
	if c.Mode == modeController {
		return usagef("the controller has no pools: run this on a node")
	}
	if c.Endpoint != "" {
		err := served(ctx, c.Endpoint, work)
		if !errors.Is(err, driver.ErrNotServed) {
			return err
		}
		klog.FromContext(ctx).V(2).Info("No csi-loop runs; opening the pool", "err", err.Error())
	}
	return s.alone(ctx, c, work)
}

// served asks the driver that answers on a socket.
func served(ctx context.Context, endpoint string, work func(context.Context, steward) error) error {
	if !strings.HasPrefix(endpoint, "unix:") {
		endpoint = "unix:" + endpoint
	}
	conn, err := grpc.NewClient(endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return usagef("--endpoint: %w", err)
	}
	defer func() { _ = conn.Close() }()
	return work(ctx, driver.Admin{Conn: conn})
}

// alone opens the pool as serve does, and serves nobody.
func (s *stewardCommand) alone(ctx context.Context, c config, work func(context.Context, steward) error) (err error) {
	c.Mode = modeAll
	c.linkConfig = defaultLinkConfig()
	asked := c.Endpoint != ""
	if !asked {
		c.Endpoint = "unix:///none.sock" // not opened
	}
	p, err := c.resolve(thisBuild().Version)
	if err != nil {
		return err
	}
	if err := completePath(); err != nil {
		return err
	}
	for i := range p.pools {
		p.pools[i].Expect.Existing = true // a pool is made by serve
	}
	loops, err := loop.New(ctx, loop.WithWarm(0), loop.WithMax(p.max))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, loops.Close()) }()
	images, err := image.Open(ctx, p.pools, image.WithRefresh(0))
	if err != nil {
		if !asked {
			return fmt.Errorf("no csi-loop was asked, as no --endpoint and no --config name its socket, and the pools cannot be opened: %w", err)
		}
		return fmt.Errorf("no csi-loop answers on its socket, and the pools cannot be opened: %w", err)
	}
	defer func() { err = errors.Join(err, images.Close()) }()
	dirs, err := images.OpenDirs(nil)
	if err != nil {
		return err
	}
	d, err := driver.New(p.driver, images, dirs, loops, mount.New())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	return work(ctx, d)
}

// contentFlags say which bytes of a file are meant, and how they are taken.
type contentFlags struct {
	partition      int
	offset, length string
	size           string
	raw            bool
	method         string
	blockSize      int
}

func (f *contentFlags) register(set *pflag.FlagSet, methods string) {
	set.IntVar(&f.partition, "partition", 0, "number of a partition of the image (GPT or MBR), instead of a range")
	set.StringVar(&f.offset, "offset", "0", "first byte")
	set.StringVar(&f.length, "length", "0", "number of bytes (default: to the end)")
	set.StringVar(&f.size, "size", "0", "size of the volume, at least (default: that of the content, rounded up to 1 MiB)")
	set.BoolVar(&f.raw, "raw", false, "do not look for a filesystem: it is a raw block volume")
	set.StringVar(&f.method, "method", "auto", methods)
	set.IntVar(&f.blockSize, "block-size", 0, "logical block size of the volume's device in bytes (default: what the filesystem needs)")
}

// request is what the flags ask for of a file.
func (f *contentFlags) request(path string) (r driver.TakeInRequest, err error) {
	r = driver.TakeInRequest{Partition: f.partition, Raw: f.raw, Method: image.Method(f.method), BlockSize: f.blockSize}
	for flag, v := range map[string]struct {
		text string
		to   *int64
	}{"--offset": {f.offset, &r.Offset}, "--length": {f.length, &r.Length}, "--size": {f.size, &r.Size}} {
		if *v.to, err = parseSize(flag, v.text); err != nil {
			return r, err
		}
	}
	if r.File, err = filepath.Abs(path); err != nil {
		return r, err
	}
	resolved, err := filepath.EvalSymlinks(r.File)
	if errors.Is(err, os.ErrNotExist) && r.Method == image.Move {
		r.File = whereItWas(r.File)
		return r, nil // it may have been moved before
	}
	if err != nil {
		return r, failed(err)
	}
	r.File = resolved
	file, err := os.Open(r.File)
	if err != nil {
		return r, failed(err)
	}
	defer file.Close()
	id, err := loop.FileIDOf(file)
	r.Dev, r.Ino = id.Dev, id.Ino
	if err != nil || r.Method == image.Move {
		return r, failed(err)
	}
	st, err := file.Stat()
	if err != nil {
		return r, failed(err)
	}
	r.Modified = st.ModTime().UnixNano()
	return r, nil
}

// whereItWas is what filepath.EvalSymlinks made of a path while there was a file: a volume
// remembers that of the file that was moved into it.
func whereItWas(path string) string {
	for range 40 { // links may form a circle; the kernel follows as many
		dir, base := filepath.Split(path)
		dir, err := filepath.EvalSymlinks(dir)
		if err != nil {
			return path
		}
		path = filepath.Join(dir, base)
		target, err := os.Readlink(path)
		if err != nil {
			return path
		}
		if !filepath.IsAbs(target) {
			target = dir + "/" + target // not cleaned: what is before a ".." may be a link
		}
		path = target
	}
	return path
}

// takeIn repeats a request until it is done, and shows on a terminal how far it is. When
// ctx ends, what was done is taken back.
func takeIn(ctx context.Context, s steward, r driver.TakeInRequest, show io.Writer) (driver.TakeInProgress, error) {
	bar := newProgress(show)
	defer bar.end()
	r.Begin = true
	for {
		p, err := s.TakeIn(ctx, r)
		r.Begin = false
		if err == nil && !p.Done {
			bar.show(p.Copied, p.All)
			continue
		}
		if ctx.Err() != nil {
			r.Cancel = true
			undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
			_, cancelErr := s.TakeIn(undo, r)
			cancel()
			return p, errors.Join(context.Cause(ctx), cancelErr)
		}
		return p, err
	}
}
