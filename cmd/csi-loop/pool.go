package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/csi-loop/csi-loop/pkg/image"
	"github.com/csi-loop/csi-loop/pkg/loop"
)

func newPoolCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "pool",
		Short: "Look at a pool on a disk, or give a copied one an identity of its own",
		Args:  cobra.NoArgs,
		RunE:  func(c *cobra.Command, _ []string) error { return failed(c.Help()) },
	}
	c.AddCommand(newPoolShowCommand(), newPoolReinitCommand())
	return c
}

func newPoolShowCommand() *cobra.Command {
	var o operator
	c := &cobra.Command{
		Use:   "show DIR...",
		Short: "Show what the pools in these directories are",
		Long: `Show the identity of the pools in these directories, and what is in them. Nothing
is changed; it works while they are served, and needs root as the pool is private.`,
		Args: cobra.MinimumNArgs(1),
	}
	c.Flags().StringVarP(&o.output, "output", "o", "table", "table or json")
	c.RunE = func(c *cobra.Command, dirs []string) error {
		if err := o.checkOutput(); err != nil {
			return err
		}
		pools := []image.Summary{}
		var errs []error
		for _, dir := range dirs {
			s, err := inspect(dir)
			if err != nil {
				errs = append(errs, err)
				continue
			}
			pools = append(pools, s)
		}
		if len(pools) > 0 {
			errs = append(errs, o.show(c.OutOrStdout(), pools, func(w io.Writer) { poolTable(w, pools) }))
		}
		return failed(errors.Join(errs...))
	}
	return c
}

func inspect(dir string) (image.Summary, error) {
	path, err := filepath.Abs(dir)
	if err != nil {
		return image.Summary{}, err
	}
	return image.Summarize(path)
}

func poolTable(w io.Writer, pools []image.Summary) {
	fmt.Fprintln(w, "PATH\tID\tFILESYSTEM\tVOLUMES\tSNAPSHOTS\tAGE\tSERVED")
	for _, p := range pools {
		served := "no"
		if p.Served {
			served = "yes"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%d\t%s\t%s\n", p.Path, p.ID, p.Filesystem, p.Volumes, p.Snapshots, age(p.Created), served)
	}
}

func newPoolReinitCommand() *cobra.Command {
	var yes bool
	c := &cobra.Command{
		Use:   "reinit DIR",
		Short: "Give a copied pool an identity of its own",
		Long: `Give the pool in DIR a new ID. It is the way out when a disk or a machine image with a
pool was copied: both copies have one ID, of which only one is served.

The volumes stay where they are, with their data, under new IDs: what came before
the first dot changes. PersistentVolumes name a volume by its ID, so they go on to
mean the volume in the other copy, or none if there is no other. The volumes here
are then orphans, which csi-loop orphans lists on the controller.

So do it to the copy that nobody uses, and to no pool that is the only one of its
ID. The old identity is kept in DIR/pool.json.old-ID. To take the change back, stop
csi-loop and rename that file to pool.json. Otherwise remove it: it is a key with
which this machine can pass for the place of the other copy.

csi-loop must be stopped on this machine, and no image in use.`,
		Args: cobra.ExactArgs(1),
	}
	c.Flags().BoolVar(&yes, "yes", false, "do not ask")
	c.RunE = func(c *cobra.Command, args []string) error {
		before, err := inspect(args[0])
		if err != nil {
			return failed(err)
		}
		fmt.Fprintf(c.OutOrStdout(), "Pool %s at %s: %d volumes, %d snapshots.\nIts ID will change. PersistentVolumes with a volumeHandle that begins with %q\nwill not find their volumes here any more.\n",
			before.ID, before.Path, before.Volumes, before.Snapshots, before.ID+".")
		if !yes {
			if err := confirm(c.InOrStdin(), c.OutOrStdout(), "Is there another copy of this pool, which is the one in use, and shall this one get a new ID?"); err != nil {
				return failed(err)
			}
		}
		ctx := c.Context()
		_, id, err := image.Reinit(ctx, before.Path, func(images []image.ImageFile) error { return unattached(ctx, images) })
		if err != nil {
			return failed(err)
		}
		fmt.Fprintf(c.OutOrStdout(), "It is pool %s now. The old identity is in %s/pool.json.old-%s.\n", id, before.Path, before.ID)
		return nil
	}
	return c
}

// unattached refuses images that a loop device shows.
func unattached(ctx context.Context, images []image.ImageFile) (err error) {
	if len(images) == 0 {
		return nil
	}
	loops, err := loop.New(ctx, loop.WithWarm(0))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, loops.Close()) }()
	bound, silent, err := loops.Survey(ctx)
	if err != nil {
		return err
	}
	for _, s := range silent {
		for _, i := range images {
			if s.MayBe(i.Path) {
				return fmt.Errorf("%s over %q may show %s: %w", s.Path, s.BackingPath, i.Path, loop.ErrSilent)
			}
		}
	}
	in := make(map[loop.FileID]string, len(images))
	for _, i := range images {
		in[loop.FileID{Dev: i.Dev, Ino: i.Ino}] = i.Path
	}
	for _, b := range bound {
		if path, ok := in[b.Image]; ok {
			return fmt.Errorf("%s is attached to %s: unmount it, and detach it with losetup -d", path, b.Path)
		}
	}
	return nil
}
