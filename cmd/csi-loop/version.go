package main

import (
	"encoding/json"
	"fmt"
	"io"
	"runtime"
	"runtime/debug"
	"strings"

	"github.com/spf13/cobra"
)

// Set by the linker: -ldflags '-X main.version=v1.2.3 -X main.commit=0123abc'.
var (
	version string
	commit  string
)

// csiModule is where the CSI version is taken from.
const csiModule = "github.com/container-storage-interface/spec"

const unknown = "unknown"

// build says what this program was made from.
type build struct {
	Version  string `json:"version"`
	Commit   string `json:"commit"`
	Go       string `json:"go"`
	CSI      string `json:"csi"`
	Platform string `json:"platform"`
}

// thisBuild takes from the linker's variables, else from what the Go toolchain
// recorded in the binary.
func thisBuild() build {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		info = &debug.BuildInfo{}
	}
	return describeBuild(version, commit, info)
}

func describeBuild(version, commit string, info *debug.BuildInfo) build {
	b := build{
		Version: version, Commit: commit, CSI: unknown,
		Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH,
	}
	if b.Version == "" && info.Main.Version != "(devel)" {
		b.Version = info.Main.Version
	}
	settings := make(map[string]string, len(info.Settings))
	for _, s := range info.Settings {
		settings[s.Key] = s.Value
	}
	if b.Commit == "" {
		b.Commit = settings["vcs.revision"]
		if b.Commit != "" && settings["vcs.modified"] == "true" {
			b.Commit += " (modified)"
		}
	}
	for _, m := range info.Deps {
		if m.Path == csiModule {
			b.CSI = strings.TrimPrefix(m.Version, "v")
		}
	}
	for _, s := range []*string{&b.Version, &b.Commit} {
		if *s == "" {
			*s = unknown
		}
	}
	return b
}

func (b build) print(out io.Writer, format string) error {
	switch format {
	case "json":
		enc := json.NewEncoder(out)
		enc.SetIndent("", "  ")
		return enc.Encode(b)
	case "text":
		_, err := fmt.Fprintf(out, "csi-loop  %s\ncommit    %s\nGo        %s\nCSI       %s\nplatform  %s\n", b.Version, b.Commit, b.Go, b.CSI, b.Platform)
		return err
	default:
		return usagef("--output %q: use text or json", format)
	}
}

func newVersionCommand() *cobra.Command {
	format := "text"
	c := &cobra.Command{
		Use:   "version",
		Short: "Print the version, and what it was built from",
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			return failed(thisBuild().print(c.OutOrStdout(), format))
		},
	}
	c.Flags().StringVarP(&format, "output", "o", format, "text or json")
	return c
}
