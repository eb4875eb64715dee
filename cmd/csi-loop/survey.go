package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/csi-loop/csi-loop/cmd/csi-loop/survey"
)

const surveyHelp = `

It takes the flags, the environment and the file of serve, and uses what it needs
of them: the pools, the state directory, the node's name. Where none names a pool
and process 1 is csi-loop serve, as in its container, that process' flags are used:

  kubectl exec -n csi-loop csi-loop-node-x7x2p -- csi-loop %s

It works while the driver runs, and while it does not, and changes nothing.`

// surveyCommand is what doctor and the lists have in common.
type surveyCommand struct {
	flags  *serveFlags
	set    *pflag.FlagSet
	output string
}

// newSurveyCommand adds the flags of serve and --output to a command.
func newSurveyCommand(c *cobra.Command, formats string) *surveyCommand {
	s := &surveyCommand{set: c.Flags()}
	s.flags = newServeFlags(c.Flags())
	// All are taken, so that serve's command line can be given; these matter.
	matter := []string{"config", "pool", "state-dir", "node-id", "endpoint", "registration-dir"}
	c.Flags().VisitAll(func(f *pflag.Flag) { f.Hidden = !slices.Contains(matter, f.Name) })
	c.Flags().StringVarP(&s.output, "output", "o", "text", formats)
	c.Long += fmt.Sprintf(surveyHelp, c.Name())
	return s
}

// check refuses an output format that is not there.
func (s *surveyCommand) check(formats ...string) error {
	if !slices.Contains(formats, s.output) {
		return usagef("--output %q: use one of %s", s.output, strings.Join(formats, ", "))
	}
	return nil
}

// loadNear is load, or what process 1 was told if that is csi-loop serve and nothing
// names a pool. Flags that were given count more than those of process 1.
func (f *serveFlags) loadNear(set *pflag.FlagSet) (config, error) {
	return f.loadBeside("/proc/1", set)
}

func (f *serveFlags) loadBeside(proc string, set *pflag.FlagSet) (config, error) {
	var given []*pflag.Flag
	set.Visit(func(flag *pflag.Flag) { given = append(given, flag) }) // before the environment sets others
	c, err := f.load(set, os.LookupEnv)
	args := serveArguments(proc)
	if err != nil || len(c.Pools) > 0 || args == nil {
		return c, err
	}
	theirs := pflag.NewFlagSet("serve", pflag.ContinueOnError)
	f = newServeFlags(theirs)
	if err := theirs.Parse(args); err != nil {
		return c, usagef("flags of process 1: %w", err)
	}
	if err := layOver(theirs, given); err != nil {
		return c, usagef("%w", err)
	}
	return f.load(theirs, os.LookupEnv)
}

// layOver sets the flags of set that were given elsewhere to the values they have there.
func layOver(set *pflag.FlagSet, given []*pflag.Flag) error {
	var errs []error
	for _, from := range given {
		to := set.Lookup(from.Name)
		if to == nil { // one of the command alone
			continue
		}
		have, isList := from.Value.(pflag.SliceValue)
		if list, ok := to.Value.(pflag.SliceValue); ok && isList {
			to.Changed = true
			errs = append(errs, list.Replace(have.GetSlice()))
			continue
		}
		errs = append(errs, set.Set(from.Name, from.Value.String()))
	}
	return errors.Join(errs...)
}

// config is what there is to look at.
func (s *surveyCommand) config() (survey.Config, error) {
	c, err := s.flags.loadNear(s.set)
	if err != nil {
		return survey.Config{}, err
	}
	if err := s.flags.applyLogging(c); err != nil {
		return survey.Config{}, err
	}
	return c.survey()
}

// survey takes what a look needs out of a configuration.
func (c *config) survey() (survey.Config, error) {
	if c.Mode == modeController {
		return survey.Config{}, usagef("the controller has no volumes and no devices: run this on a node")
	}
	if err := absolute("--state-dir", c.StateDir); err != nil {
		return survey.Config{}, err
	}
	pools, err := c.resolvePools()
	if err != nil {
		return survey.Config{}, err
	}
	return survey.Config{
		Pools: pools, StateDir: c.StateDir, NodeID: c.NodeID, Endpoint: c.Endpoint,
		KubeletDir: c.kubeletDir(), MaxDevices: c.LoopDevicesMax,
	}, nil
}

// kubeletDir is where the kubelet keeps what it mounts: two above the registration's
// sockets, or its usual place, or "".
func (c *config) kubeletDir() string {
	if c.RegistrationDir != "" {
		return filepath.Dir(filepath.Clean(c.RegistrationDir))
	}
	const usual = "/var/lib/kubelet"
	if st, err := os.Stat(usual); err == nil && st.IsDir() {
		return usual
	}
	return ""
}

// serveArguments are the flags of a process if it is csi-loop serve, else nil.
func serveArguments(proc string) []string {
	b, err := os.ReadFile(filepath.Join(proc, "cmdline"))
	if err != nil {
		return nil
	}
	args := strings.Split(strings.TrimSuffix(string(b), "\x00"), "\x00")
	if len(args) < 2 || filepath.Base(args[0]) != "csi-loop" || args[1] != "serve" {
		return nil
	}
	return args[2:]
}

// printJSON writes v for programs.
func printJSON(out io.Writer, v any) error {
	enc := json.NewEncoder(out)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

// printTable writes rows for people, the first of them the head.
func printTable(out io.Writer, rows [][]string) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	for _, row := range rows {
		for i, cell := range row {
			row[i] = printable(cell)
		}
		fmt.Fprintln(w, strings.TrimRight(strings.Join(row, "\t"), "\t"))
	}
	return w.Flush()
}

// printable is text as a terminal can show it: names and paths are others' words,
// and may hold what moves the cursor.
func printable(s string) string {
	clean := strings.Map(func(r rune) rune {
		if r < ' ' || r >= 0x7f && r < 0xa0 {
			return '?'
		}
		return r
	}, s)
	if clean == "" {
		return "-"
	}
	return clean
}
