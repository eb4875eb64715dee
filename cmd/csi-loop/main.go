// Command csi-loop is a CSI driver whose volumes are image files in a
// directory, attached through loop devices.
//
//	csi-loop serve     run the driver
//	csi-loop doctor    look for what is wrong with a node, and say what mends it
//	csi-loop volumes   list the volumes of a node
//	csi-loop snapshots list the snapshots of a node
//	csi-loop devices   list the loop devices of a node
//	csi-loop demo      show what it does, on this machine, in seconds
//	csi-loop nodes     list the nodes that a controller knows
//	csi-loop orphans   list volumes that Kubernetes has no use for, and remove them
//	csi-loop import    make a volume of an image file
//	csi-loop template  manage what new volumes may begin as
//	csi-loop adopt     move the PersistentVolumes of a pool to another node
//	csi-loop pool      look at a pool on a disk, or give a copied one an identity
//	csi-loop version   say what was built
//
// This package turns flags, environment and a configuration file into a plan
// (config.go, flags.go), and wires the packages of the driver together once
// (serve.go). A failure is one line on standard error that says what to do, and
// the exit status: 2 when what it was told cannot be meant (command line,
// environment, configuration file), 1 when the machine stands in the way. doctor
// has 3 for a problem that it found.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"k8s.io/klog/v2"
)

const (
	exitFailure = 1
	exitUsage   = 2
	exitUnwell  = 3
)

func main() {
	ctx, stop := withSignals(context.Background())
	err := newCommand(os.Stdout, os.Stderr).ExecuteContext(ctx)
	stop()
	klog.Flush()
	if err != nil {
		fmt.Fprintln(os.Stderr, "csi-loop: "+oneLine(err))
		os.Exit(exitCode(err))
	}
}

// newCommand makes the command line.
func newCommand(out, errOut io.Writer) *cobra.Command {
	root := &cobra.Command{
		Use:           "csi-loop",
		Short:         "Kubernetes volumes from image files on loop devices",
		SilenceErrors: true, // main prints them, on one line
		SilenceUsage:  true,
		Args:          cobra.NoArgs,
		RunE:          func(c *cobra.Command, _ []string) error { return failed(c.Help()) },
	}
	root.CompletionOptions.DisableDefaultCmd = true
	root.SetOut(out)
	root.SetErr(errOut)
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return usagef("%w (%s --help lists the flags)", err, c.CommandPath())
	})
	root.AddCommand(
		newServeCommand(), newDoctorCommand(), newVolumesCommand(), newSnapshotsCommand(), newDevicesCommand(), newNodesCommand(), newOrphansCommand(),
		newPoolCommand(), newImportCommand(), newTemplateCommand(), newAdoptCommand(), newForgetCommand(), newDemoCommand(), newVersionCommand(), newReferenceCommand(),
	)
	return root
}

// usageError is a mistake in what the program was told.
type usageError struct{ err error }

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

func usagef(format string, args ...any) error {
	return &usageError{fmt.Errorf(format, args...)}
}

// failure is what went wrong while doing what was asked for. Errors that are
// neither this nor usageError come from cobra, and are about usage as well.
type failure struct{ err error }

func (e *failure) Error() string { return e.err.Error() }
func (e *failure) Unwrap() error { return e.err }

// failed marks an error of a command's own work.
func failed(err error) error {
	if err == nil || errors.As(err, new(*usageError)) {
		return err
	}
	return &failure{err}
}

func exitCode(err error) int {
	if errors.As(err, new(*unwellError)) {
		return exitUnwell
	}
	if errors.As(err, new(*failure)) {
		return exitFailure
	}
	return exitUsage
}

// oneLine is an error's text without line breaks, which joined errors and the
// YAML parser put in.
func oneLine(err error) string {
	var parts []string
	for line := range strings.Lines(err.Error()) {
		if line = strings.TrimSpace(line); line != "" {
			parts = append(parts, line)
		}
	}
	text := strings.Join(parts, "; ")
	return strings.ReplaceAll(text, ":; ", ": ")
}

// withSignals returns a context that ends at the first SIGINT or SIGTERM. The
// second one ends the process at once: as PID 1 of a container it would be
// ignored if it were left to the kernel's default.
func withSignals(parent context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(parent)
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	done := make(chan struct{})
	go func() {
		select {
		case s := <-signals:
			cancel(fmt.Errorf("stopped by signal: %s", s))
		case <-done:
			return
		}
		select {
		case s := <-signals:
			fmt.Fprintf(os.Stderr, "csi-loop: second signal (%s): stopping at once\n", s)
			klog.Flush()
			os.Exit(exitFailure)
		case <-done:
		}
	}()
	return ctx, func() {
		signal.Stop(signals)
		close(done)
		cancel(nil)
	}
}

// completePath adds the directories of mkfs and its kin to PATH: a shell made by
// su may lack them.
func completePath() error {
	path := os.Getenv("PATH")
	for _, dir := range []string{"/usr/local/sbin", "/usr/sbin", "/sbin"} {
		if !strings.Contains(":"+path+":", ":"+dir+":") {
			path += ":" + dir
		}
	}
	return os.Setenv("PATH", strings.TrimPrefix(path, ":"))
}
