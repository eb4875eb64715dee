package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/csi-loop/csi-loop/internal/reference"
)

//go:generate go run . reference ../../docs/reference

// newReferenceCommand writes the pages of the reference that this package knows.
func newReferenceCommand() *cobra.Command {
	return &cobra.Command{
		Use: "reference DIR", Short: "Write pages of the reference", Hidden: true, Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error { return failed(writeReference(c.Root(), args[0])) },
	}
}

func writeReference(root *cobra.Command, dir string) error {
	commands := reference.NewPage("Commands and flags of csi-loop",
		"Every flag of `csi-loop serve` may be given by an environment variable or the [configuration file](configuration.md) too.")
	commands.Commands(root, func(c *cobra.Command, f *pflag.Flag) string {
		if c.Name() != "serve" {
			return ""
		}
		return envName(f.Name)
	})
	if err := commands.Write(dir, "csi-loop.md"); err != nil {
		return err
	}
	file := reference.NewPage("Configuration file", "What `csi-loop serve --example-config` prints: every key, with its default where it has one.")
	file.Printf("\n```yaml\n%s\n```\n", strings.TrimSpace(exampleConfig))
	if err := file.Write(dir, "configuration.md"); err != nil {
		return err
	}
	shown := reference.NewPage("Metrics", `
"Node" metrics are those of `+"`--mode=node` and `--mode=all`, \"controller\" ones those of each replica of `--mode=controller`"+`. How they are
scraped and what they cost is in [operations](../operations.md#metrics).`)
	var rows [][]string
	for _, g := range metricGroups {
		for _, x := range g.metrics {
			labels := ""
			if len(x.labels) > 0 {
				labels = "`" + strings.Join(x.labels, "`, `") + "`"
			}
			rows = append(rows, []string{reference.Code(x.name), x.kind, labels, g.where, x.help})
		}
	}
	shown.Table([]string{"Metric", "Type", "Labels", "Where", "Meaning"}, rows)
	shown.Printf("\nGo's and the process' own metrics come with them (`go_...`, `process_...`).\n")
	if err := shown.Write(dir, "metrics.md"); err != nil {
		return fmt.Errorf("metrics: %w", err)
	}
	return nil
}
