package main

import (
	"context"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/csi-loop/csi-loop/pkg/report"
)

// template is a template with its node.
type template struct {
	report.Template

	Node string `json:"node"`
}

func (o *options) newTemplates() *cobra.Command {
	c := &cobra.Command{
		Use: "templates", Short: "List what volumes may begin as", Args: cobra.NoArgs,
		Long: `List the templates in the pools of all nodes. VOLUMES counts the volumes that were made of
one; they do not need it any more.`,
	}
	o.outputFlag(c)
	c.RunE = func(c *cobra.Command, _ []string) error {
		return o.with(c, func(ctx context.Context, k *cluster) ([]string, error) {
			r, err := k.report(ctx)
			if err != nil {
				return nil, err
			}
			all := []template{}
			for _, n := range r.Nodes {
				for _, t := range n.Templates {
					if (o.node == "" || n.Name == o.node) && (o.pool == "" || t.Pool == o.pool) {
						all = append(all, template{t, n.Name})
					}
				}
			}
			return k.silent(r.Nodes), o.show(c.OutOrStdout(), all, templateRows(all, o.output == "wide"))
		})
	}
	return c
}

func templateRows(all []template, wide bool) [][]cell {
	rows := [][]cell{{text("NODE"), text("POOL"), text("TEMPLATE"), text("SIZE"), text("TYPE"), text("VOLUMES"), text("AGE")}}
	if wide {
		rows[0] = append(rows[0], text("ID"))
	}
	for _, t := range all {
		kind := t.Filesystem
		if kind == "" {
			kind = "raw"
		}
		row := []cell{text(t.Node), text(t.Pool), text(t.Name), text(whole(t.Size)), text(kind), text(strconv.Itoa(t.Volumes)), text(age(t.Created))}
		if wide {
			row = append(row, text(t.ID))
		}
		rows = append(rows, row)
	}
	return rows
}
