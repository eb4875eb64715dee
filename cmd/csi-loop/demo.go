package main

import (
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/csi-loop/csi-loop/cmd/csi-loop/demo"
)

func newDemoCommand() *cobra.Command {
	var dir string
	c := &cobra.Command{
		Use:   "demo",
		Short: "Show the whole life of volumes on this machine, in seconds",
		Long: `Show what csi-loop does on this machine's kernel, without Kubernetes: start the
driver, play a CSI client, and print for each step how long it took and what the
kernel shows. It needs root and about 1 GiB of free space for some seconds, and
leaves nothing, also when it is interrupted.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if err := completePath(); err != nil {
				return failed(fmt.Errorf("PATH: %w", err))
			}
			self, err := os.Executable()
			if err != nil {
				return failed(err)
			}
			return failed(demo.Run(c.Context(), demo.Options{
				Driver: []string{self, "serve"}, Dir: dir,
				Out: c.OutOrStdout(), Colour: wantsColour(os.Stdout, os.LookupEnv),
			}))
		},
	}
	c.Flags().StringVar(&dir, "dir", "", "where to make the demo's directory (default $TMPDIR, else /var/tmp)")
	return c
}

// wantsColour follows no-color.org: colours on a terminal, unless NO_COLOR is set.
func wantsColour(out *os.File, lookup func(string) (string, bool)) bool {
	if value, _ := lookup("NO_COLOR"); value != "" {
		return false
	}
	if value, _ := lookup("TERM"); value == "" || value == "dumb" {
		return false
	}
	st, err := out.Stat()
	return err == nil && st.Mode()&os.ModeCharDevice != 0
}
