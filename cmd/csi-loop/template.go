package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/csi-loop/csi-loop/cmd/csi-loop/survey"
	"github.com/csi-loop/csi-loop/pkg/driver"
)

func newTemplateCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "template",
		Short: "Manage what new volumes may begin as: golden images in a pool",
		Args:  cobra.NoArgs,
		RunE:  func(c *cobra.Command, _ []string) error { return failed(c.Help()) },
	}
	c.AddCommand(newTemplateAddCommand(), newTemplateListCommand(), newTemplateRemoveCommand())
	return c
}

const templateAddHelp = `Make a template of the content of an image file. Volumes of StorageClasses with the
parameter "template: NAME" begin with that content: as reflinks, which share its blocks,
or as copies where the pool cannot, or the volume is thick. They grow to their size and
have a filesystem identity of their own. The content is taken as csi-loop import takes
it; the template is one more file in the pool, which nobody writes to.

A template is in one pool of one node. Volumes are only made on nodes that have it.`

func newTemplateAddCommand() *cobra.Command {
	var f contentFlags
	c := &cobra.Command{Use: "add NAME FILE", Short: "Make a template of an image file", Long: templateAddHelp, Args: cobra.ExactArgs(2)}
	s := newStewardCommand(c, "template add NAME FILE")
	f.register(c.Flags(), "auto, copy or reflink")
	c.RunE = func(c *cobra.Command, args []string) error {
		r, err := f.request(args[1])
		if err != nil {
			return err
		}
		r.Name, r.Pool, r.Template = args[0], s.pool, true
		return failed(s.with(c.Context(), func(ctx context.Context, who steward) error {
			p, err := takeIn(ctx, who, r, c.ErrOrStderr())
			if err == nil {
				fmt.Fprintf(c.OutOrStdout(), "Template %s in pool %s: %s, %s\n", p.Template.Name, p.Template.Pool, survey.Bytes(p.Template.Size), or(p.Template.Filesystem, "raw"))
			}
			return err
		}))
	}
	return c
}

func newTemplateListCommand() *cobra.Command {
	output := ""
	c := &cobra.Command{
		Use: "ls", Short: "List the templates of this node",
		Long: `List the templates of this node's pools, or of the one that --into names. VOLUMES counts
the volumes that were made of a template; they do not need it any more.`, Args: cobra.NoArgs,
	}
	s := newStewardCommand(c, "template ls")
	c.Flags().Lookup("into").Usage = "name of the pool (default: all)"
	c.Flags().StringVarP(&output, "output", "o", "text", "text or json")
	c.RunE = func(c *cobra.Command, _ []string) error {
		if output != "text" && output != "json" {
			return usagef("--output %q: use one of text, json", output)
		}
		return failed(s.with(c.Context(), func(ctx context.Context, who steward) error {
			all, err := who.Templates(ctx, s.pool)
			if err != nil {
				return err
			}
			if output == "json" {
				return printJSON(c.OutOrStdout(), all)
			}
			rows := [][]string{{"NAME", "POOL", "SIZE", "TYPE", "BLOCK", "VOLUMES", "AGE", "SOURCE"}}
			for _, t := range all {
				rows = append(rows, []string{
					t.Name, t.Pool, survey.Bytes(t.Size), or(t.Filesystem, "raw"), strconv.Itoa(t.BlockSize),
					strconv.Itoa(t.Volumes), age(t.Created), t.Source,
				})
			}
			return printTable(c.OutOrStdout(), rows)
		}))
	}
	return c
}

func newTemplateRemoveCommand() *cobra.Command {
	c := &cobra.Command{
		Use: "rm NAME...", Short: "Remove templates",
		Long: `Remove templates. Volumes that were made of them stay, and those that are being made
are completed: none needs its template.`, Args: cobra.MinimumNArgs(1),
	}
	s := newStewardCommand(c, "template rm NAME")
	c.RunE = func(c *cobra.Command, names []string) error {
		return failed(s.with(c.Context(), func(ctx context.Context, who steward) error {
			var errs []error
			for _, name := range names {
				err := who.RemoveTemplate(ctx, s.pool, name)
				if errors.Is(err, driver.ErrNotServed) {
					return err
				}
				errs = append(errs, err)
			}
			return errors.Join(errs...)
		}))
	}
	return c
}
