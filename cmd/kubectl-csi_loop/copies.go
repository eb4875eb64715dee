package main

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/csi-loop/csi-loop/pkg/report"
)

// copying is a copy with its node.
type copying struct {
	report.Copy

	Node string `json:"node"`
}

func (o *options) newCopies() *cobra.Command {
	watch := false
	c := &cobra.Command{
		Use: "copies", Short: "Show what is being copied, and how far it is", Args: cobra.NoArgs,
		Long: `Show the copies of data that go on: restores, clones and snapshots on pools that cannot
share blocks, images that are taken in, and volumes that are sent from one node to
another, at both ends. NAME is that of the PersistentVolume that is being made, or of the
snapshot or template; of what is sent, the ID of its source.

--watch shows them until there is none left: on a terminal as bars that are drawn anew,
else as lines.`,
	}
	o.outputFlag(c)
	c.Flags().BoolVarP(&watch, "watch", "w", false, "until there is none left")
	c.Flags().DurationVar(&o.every, "interval", 5*time.Second, "between two looks of --watch, 3s at least")
	c.RunE = func(c *cobra.Command, _ []string) error {
		if watch && o.output != "" {
			return fmt.Errorf("--watch is for people, and --output %s is not", o.output)
		}
		if !watch {
			return o.with(c, func(ctx context.Context, k *cluster) ([]string, error) {
				all, err := o.copies(ctx, k)
				if err != nil {
					return nil, err
				}
				return nil, o.show(c.OutOrStdout(), all, copyRows(all))
			})
		}
		if err := o.check(c); err != nil {
			return err
		}
		if o.every < 3*time.Second {
			return fmt.Errorf("--interval %s: is below 3s, for which the controller repeats its last answer", o.every)
		}
		k, err := o.cluster()
		if err != nil {
			return err
		}
		return o.watchCopies(c.Context(), c.OutOrStdout(), k)
	}
	return c
}

// copies asks for the copies that go on.
func (o *options) copies(ctx context.Context, k *cluster) ([]copying, error) {
	ctx, cancel := context.WithTimeout(ctx, o.timeout)
	defer cancel()
	r, err := k.report(ctx)
	if err != nil {
		return nil, err
	}
	all := []copying{}
	for _, n := range r.Nodes {
		for _, x := range n.Copies {
			// What goes between two nodes is of no pool that could be named.
			if (o.node == "" || n.Name == o.node) && (o.pool == "" || x.Pool == o.pool) {
				all = append(all, copying{x, n.Name})
			}
		}
	}
	return all, nil
}

// watchCopies shows the copies until there is none.
func (o *options) watchCopies(ctx context.Context, w io.Writer, k *cluster) error {
	tick := time.NewTicker(o.every)
	defer tick.Stop()
	for {
		all, err := o.copies(ctx, k)
		if err != nil {
			return err
		}
		if err := o.drawCopies(w, all); err != nil || len(all) == 0 {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
}

// drawCopies shows the copies: over the last ones on a terminal, else below them.
func (o *options) drawCopies(w io.Writer, all []copying) error {
	if o.colours {
		fmt.Fprint(w, "\x1b[H\x1b[2J")
		if len(all) > 0 {
			return table(w, true, copyRows(all))
		}
	}
	for _, c := range all {
		fmt.Fprintf(w, "%s %s %s: %s of %s\n", c.Node, c.Kind, printable(c.Name), size(c.Done), ofTotal(c))
	}
	if len(all) == 0 {
		_, err := fmt.Fprintln(w, "Nothing is being copied.")
		return err
	}
	return nil
}

// ofTotal is how much there is to copy.
func ofTotal(c copying) string {
	if c.Total == 0 {
		return "an unknown size"
	}
	return size(c.Total)
}

func copyRows(all []copying) [][]cell {
	rows := [][]cell{{text("NODE"), text("KIND"), text("POOL"), text("NAME"), text("DONE"), text("TOTAL"), text("PROGRESS")}}
	for _, c := range all {
		total, progress := text(""), text("")
		if c.Total > 0 {
			total, progress = text(size(c.Total)), bar(c.Done, c.Total)
			progress.colour = green // nothing is wrong with a copy that is nearly done
		}
		rows = append(rows, []cell{text(c.Node), text(c.Kind), text(c.Pool), text(c.Name), text(size(c.Done)), total, progress})
	}
	return rows
}
