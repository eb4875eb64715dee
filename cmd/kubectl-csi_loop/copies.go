package main

import (
	"context"
	"fmt"
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
else as lines. While a node does not answer, or is away that was copying, it waits.`,
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
				r, err := k.report(ctx)
				if err != nil {
					return nil, err
				}
				all := o.copies(r)
				return k.silent(r.Nodes), o.show(c.OutOrStdout(), all, copyRows(all))
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
		return o.watchCopies(c.Context(), screenOf(c), k)
	}
	return c
}

// copies are those of a report that were asked for.
func (o *options) copies(r report.Cluster) []copying {
	all := []copying{}
	for _, n := range r.Nodes {
		for _, x := range n.Copies {
			// What goes between two nodes is of no pool that could be named.
			if (o.node == "" || n.Name == o.node) && (o.pool == "" || x.Pool == o.pool) {
				all = append(all, copying{x, n.Name})
			}
		}
	}
	return all
}

// watchCopies shows the copies until there is none.
func (o *options) watchCopies(ctx context.Context, s *screen, k *cluster) error {
	var all []copying
	done, copied := false, map[string]bool{} // what nodes did when they last told
	return o.watch(ctx, watched{
		look: func(ctx context.Context) (picture, bool, error) {
			r, err := k.report(ctx)
			if err != nil {
				return picture{}, false, err
			}
			all = o.copies(r)
			done = len(all) == 0
			for _, n := range r.Nodes {
				switch {
				case o.node != "" && n.Name != o.node:
				case n.State == report.Linked && n.Error == "":
					copied[n.Name] = len(n.Copies) > 0
				case n.State == report.Linked || copied[n.Name]:
					done = false // it may be copying
				}
			}
			return picture{rows: copyRows(all), notes: k.silent(r.Nodes)}, done, nil
		},
		draw: func(p picture, fresh bool) error {
			if s.redraw && !done {
				return s.show(p)
			}
			if fresh {
				if err := drawCopies(s, all, done); err != nil {
					return err
				}
			}
			s.tell(p.notes)
			return nil
		},
	})
}

// drawCopies shows the copies as lines, and their end.
func drawCopies(s *screen, all []copying, done bool) error {
	for _, c := range all {
		if _, err := fmt.Fprintf(s.out, "%s %s %s: %s of %s\n", c.Node, c.Kind, printable(c.Name), size(c.Done), ofTotal(c)); err != nil {
			return err
		}
	}
	if !done {
		return nil
	}
	if s.redraw {
		fmt.Fprint(s.out, wipe)
	}
	_, err := fmt.Fprintln(s.out, "Nothing is being copied.")
	return err
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
