package main

import (
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/csi-loop/csi-loop/internal/reference"
)

//go:generate go run . reference ../../docs/reference

// newReference writes the plugin's page of the reference.
func newReference() *cobra.Command {
	return &cobra.Command{
		Use: "reference DIR", Short: "Write the page of the reference", Hidden: true, Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			p := reference.NewPage("Commands and flags of kubectl csi-loop",
				"The flags of the first section may be given to every command. How the plugin is installed is in [operations](../operations.md).")
			p.Commands(c.Root(), func(*cobra.Command, *pflag.Flag) string { return "" })
			return p.Write(args[0], "kubectl-csi-loop.md")
		},
	}
}
