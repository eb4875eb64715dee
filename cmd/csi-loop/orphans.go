package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/csi-loop/csi-loop/pkg/router"
)

func newOrphansCommand() *cobra.Command {
	var o operator
	c := &cobra.Command{
		Use:   "orphans",
		Short: "List volumes that Kubernetes has no use for",
		Long: `List the volumes on the linked nodes that Kubernetes has no use for. They are
"unclaimed", which have neither claim nor PersistentVolume, or "elsewhere", whose
claim has another volume. They come about when a provisioner is restarted in the
middle of its work, when a PersistentVolume with reclaim policy Retain is deleted,
and on a copied disk that was given an identity of its own. They keep their space
until somebody removes them.
` + operatorHelp + "orphans",
		Args: cobra.NoArgs,
	}
	o.flags(c, true)
	c.RunE = func(c *cobra.Command, _ []string) error {
		return o.ask(c.Context(), func(ctx context.Context, a router.Admin) error {
			report, err := a.Orphans(ctx)
			if err != nil {
				return err
			}
			err = o.show(c.OutOrStdout(), report, func(w io.Writer) { orphanTable(w, report) })
			if len(report.Unseen) > 0 {
				fmt.Fprintln(c.ErrOrStderr(), "Not looked at, because they are not linked or did not answer: "+printable(strings.Join(report.Unseen, ", ")))
			}
			return err
		})
	}
	c.AddCommand(newRemoveOrphansCommand(&o))
	return c
}

func orphanTable(w io.Writer, report router.OrphanReport) {
	switch {
	case len(report.Orphans) > 0:
	case len(report.Unseen) > 0:
		fmt.Fprintln(w, "No orphans on the nodes that were looked at.")
		return
	default:
		fmt.Fprintln(w, "No orphans.")
		return
	}
	fmt.Fprintln(w, "NODE\tVOLUME\tSIZE\tKNOWN FOR\tREASON")
	for _, v := range report.Orphans {
		reason := v.Reason
		if v.PV != "" {
			reason += ": its claim has " + v.PV
		}
		row(w, v.Node, v.ID, size(v.Size), age(v.Since), reason)
	}
}

func newRemoveOrphansCommand(o *operator) *cobra.Command {
	var yes bool
	c := &cobra.Command{
		Use:   "remove ID...",
		Short: "Remove orphans, with their data",
		Long: `Remove orphans, with their data, by their volume IDs. The controller looks once more
whether each is one, and has been for a minute; what is in use on its node stays.
It asks before it removes anything; --yes says yes.`,
		Args: cobra.MinimumNArgs(1),
	}
	c.Flags().BoolVar(&yes, "yes", false, "do not ask")
	c.RunE = func(c *cobra.Command, ids []string) error {
		var chosen []router.Orphan
		err := o.ask(c.Context(), func(ctx context.Context, a router.Admin) error {
			report, err := a.Orphans(ctx)
			if err == nil {
				chosen, err = choose(report, ids)
			}
			return err
		})
		if err != nil {
			return err
		}
		if err := (&operator{}).show(c.OutOrStdout(), nil, func(w io.Writer) { orphanTable(w, router.OrphanReport{Orphans: chosen}) }); err != nil {
			return failed(err)
		}
		if !yes {
			if err := confirm(c.InOrStdin(), c.OutOrStdout(), "Remove these volumes and what is in them?"); err != nil {
				return failed(err)
			}
		}
		return o.ask(c.Context(), func(ctx context.Context, a router.Admin) error { return removeOrphans(ctx, a, c.OutOrStdout(), chosen) })
	}
	return c
}

// choose finds the orphans that are meant; none is removed if one is not an orphan.
func choose(report router.OrphanReport, ids []string) ([]router.Orphan, error) {
	var chosen []router.Orphan
	for _, id := range ids {
		i := slices.IndexFunc(report.Orphans, func(v router.Orphan) bool { return v.ID == id })
		if i < 0 {
			return nil, fmt.Errorf("%s is not an orphan: it has a claim or a PersistentVolume, or is not on a linked node; nothing was removed", id)
		}
		chosen = append(chosen, report.Orphans[i])
	}
	return chosen, nil
}

func removeOrphans(ctx context.Context, a router.Admin, out io.Writer, chosen []router.Orphan) error {
	var errs []error
	for _, v := range chosen {
		if err := a.RemoveOrphan(ctx, v.ID); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", v.ID, err))
			continue
		}
		fmt.Fprintln(out, "Removed "+v.ID)
	}
	return errors.Join(errs...)
}

// confirm asks a person. Without one the answer has to be given by --yes.
func confirm(in io.Reader, out io.Writer, question string) error {
	if f, ok := in.(*os.File); ok {
		if st, err := f.Stat(); err != nil || st.Mode()&os.ModeCharDevice == 0 {
			return usagef("there is no terminal to ask on: give --yes (with kubectl exec: -it)")
		}
	}
	fmt.Fprint(out, question+" Type yes: ")
	line, err := bufio.NewReader(in).ReadString('\n')
	if strings.TrimSpace(line) != "yes" {
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		return errors.New("nothing was changed")
	}
	return nil
}
