// Command kubectl-csi_loop is a plugin of kubectl, which shows what csi-loop has in a
// cluster:
//
//	kubectl csi-loop nodes      what nodes there are, and their pools
//	kubectl csi-loop volumes    what volumes there are, whose, and how they are
//	kubectl csi-loop snapshots  what snapshots there are
//	kubectl csi-loop templates  what volumes may begin as
//	kubectl csi-loop copies     what is being copied, and how far it is
//	kubectl csi-loop top        who reads and writes, refreshed
//
// It changes nothing. What the nodes know (device, blocks, use, health) it asks of the
// controller, through the API server's proxy to one Service; whose a volume is, of
// PersistentVolumes and pods. The chart has a ClusterRole for it (viewer.create). What
// the user may not read is left out, with a word on standard error; so is what a node does
// not tell, because it is away or does not answer.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/csi-loop/csi-loop/internal/kubeapi"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := newCommand(os.Stdout, os.Stderr).ExecuteContext(ctx)
	stop()
	if err != nil && !errors.Is(err, context.Canceled) {
		fmt.Fprintln(os.Stderr, "kubectl csi-loop: "+err.Error())
		os.Exit(1)
	}
}

// options are what all commands take.
type options struct {
	overrides  clientcmd.ConfigOverrides
	kubeconfig string
	install    string // namespace of csi-loop
	service    string
	driver     string
	output     string
	node, pool string
	unhealthy  bool
	every      time.Duration
	colours    bool
	timeout    time.Duration
	tick       func(time.Duration) (ticks <-chan time.Time, stop func()) // of time, but for tests
}

// ticker is the tick of time.
func ticker(every time.Duration) (ticks <-chan time.Time, stop func()) {
	t := time.NewTicker(every)
	return t.C, t.Stop
}

func newCommand(out, errOut io.Writer) *cobra.Command {
	o := &options{tick: ticker}
	c := &cobra.Command{
		Use: "kubectl-csi_loop", Short: "Show what csi-loop has in this cluster",
		Long: `Show what csi-loop has in this cluster: nodes and pools, volumes, snapshots,
templates, copies that go on, and who reads and writes. It changes nothing.`,
		Annotations:   map[string]string{cobra.CommandDisplayNameAnnotation: "kubectl csi-loop"},
		SilenceErrors: true, SilenceUsage: true,
	}
	c.SetOut(out)
	c.SetErr(errOut)
	fs := c.PersistentFlags()
	fs.StringVar(&o.kubeconfig, "kubeconfig", "", "kubeconfig file (default: as kubectl)")
	clientcmd.BindOverrideFlags(&o.overrides, fs, clientcmd.RecommendedConfigOverrideFlags(""))
	fs.StringVar(&o.install, "csi-loop-namespace", "csi-loop", "namespace where csi-loop is installed")
	fs.StringVar(&o.service, "csi-loop-service", "csi-loop-controller", "Service of its controller")
	fs.StringVar(&o.driver, "driver", "csi-loop.io", "name of the driver")
	fs.DurationVar(&o.timeout, "timeout", 30*time.Second, "how long the cluster may take to answer")
	fs.StringVar(&o.node, "node", "", "only what is on this node")
	fs.StringVar(&o.pool, "pool", "", "only what is in pools of this name")
	c.AddCommand(o.newNodes(), o.newVolumes(), o.newSnapshots(), o.newTemplates(), o.newCopies(), o.newTop(), newKubectlCompletion(), newReference())
	_ = c.RegisterFlagCompletionFunc("node", o.completeNodes)
	return c
}

// outputFlag adds -o.
func (o *options) outputFlag(c *cobra.Command) {
	c.Flags().StringVarP(&o.output, "output", "o", "", "wide, json or yaml (default: a table)")
	_ = c.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"wide", "json", "yaml"}, cobra.ShellCompDirectiveNoFileComp))
}

func (o *options) check(c *cobra.Command) error {
	if !slices.Contains([]string{"", "wide", "json", "yaml"}, o.output) {
		return fmt.Errorf("--output %q: is none of wide, json and yaml", o.output)
	}
	o.colours = screenOf(c).colours
	return nil
}

// cluster makes the clients.
func (o *options) cluster() (*cluster, error) {
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.ExplicitPath = o.kubeconfig
	loader := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, &o.overrides)
	config, err := loader.ClientConfig()
	if err != nil {
		return nil, err
	}
	config.QPS, config.Burst = 50, 100
	client, err := kubeapi.NewForConfig(config)
	if err != nil {
		return nil, err
	}
	anything, err := dynamic.NewForConfig(config)
	if err != nil {
		return nil, err
	}
	k := &cluster{client: client, dynamic: anything, install: o.install, service: o.service, driver: o.driver, node: o.node}
	if namespace, explicit, err := loader.Namespace(); err == nil && explicit && o.overrides.Context.Namespace != "" {
		k.namespace = namespace
	}
	return k, nil
}

func (o *options) completeNodes(c *cobra.Command, _ []string, prefix string) ([]string, cobra.ShellCompDirective) {
	k, err := o.cluster()
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	ctx, cancel := context.WithTimeout(c.Context(), 3*time.Second)
	defer cancel()
	r, err := k.report(ctx)
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	var names []string
	for _, n := range r.Nodes {
		if strings.HasPrefix(n.Name, prefix) {
			names = append(names, n.Name)
		}
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

// newKubectlCompletion prints what makes kubectl complete the plugin's arguments.
func newKubectlCompletion() *cobra.Command {
	return &cobra.Command{
		Use: "kubectl-completion", Short: "Print the program by which kubectl completes this plugin",
		Long: `Print the program by which kubectl completes this plugin. Put it into the PATH as
kubectl_complete-csi_loop:

  kubectl csi-loop kubectl-completion > ~/bin/kubectl_complete-csi_loop
  chmod +x ~/bin/kubectl_complete-csi_loop

"completion" is for a shell that calls kubectl-csi_loop itself.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			_, err := fmt.Fprint(c.OutOrStdout(), "#!/bin/sh\nexec kubectl-csi_loop __complete \"$@\"\n")
			return err
		},
	}
}
