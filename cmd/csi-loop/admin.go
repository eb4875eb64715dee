package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/util/duration"

	"github.com/csi-loop/csi-loop/pkg/router"
)

// operator holds the flags of the commands that ask a running controller.
type operator struct {
	endpoint string
	output   string
	timeout  time.Duration
}

const operatorHelp = `
It asks the controller over its CSI socket, so it is run in the controller's
container, where CSI_ENDPOINT says where that is:

  kubectl -n csi-loop exec deploy/csi-loop-controller -c csi-loop -- csi-loop `

// flags registers the flags on a command and those below it.
func (o *operator) flags(c *cobra.Command, output bool) {
	c.PersistentFlags().StringVar(&o.endpoint, "endpoint", "", "CSI socket of the controller (default: the environment's CSI_ENDPOINT)")
	c.PersistentFlags().DurationVar(&o.timeout, "timeout", time.Minute, "how long the controller may take to answer")
	if output {
		c.Flags().StringVarP(&o.output, "output", "o", "table", "table or json")
	}
}

// ask runs work with a client of the controller.
func (o *operator) ask(ctx context.Context, work func(context.Context, router.Admin) error) error {
	if err := o.checkOutput(); err != nil {
		return err
	}
	endpoint := o.endpoint
	if endpoint == "" {
		endpoint = os.Getenv("CSI_ENDPOINT")
	}
	switch {
	case endpoint == "":
		return usagef("no endpoint: give --endpoint=unix:///DIR/csi.sock, or set CSI_ENDPOINT, as in the controller's container")
	case !strings.HasPrefix(endpoint, "unix:"):
		endpoint = "unix:" + endpoint
	}
	conn, err := grpc.NewClient(endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return usagef("--endpoint: %w", err)
	}
	defer func() { _ = conn.Close() }()
	ctx, cancel := context.WithTimeout(ctx, o.timeout)
	defer cancel()
	return failed(work(ctx, router.Admin{Conn: conn}))
}

func (o *operator) checkOutput() error {
	if o.output != "" && o.output != "table" && o.output != "json" {
		return usagef("--output %q: is neither table nor json", o.output)
	}
	return nil
}

// show prints v as JSON, or a table.
func (o *operator) show(out io.Writer, v any, table func(w io.Writer)) error {
	if o.output == "json" {
		e := json.NewEncoder(out)
		e.SetIndent("", "  ")
		return e.Encode(v)
	}
	w := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	table(w)
	return w.Flush()
}

// row writes one of a table. Nodes, which may be anybody's, chose some of the words.
func row(w io.Writer, cells ...string) {
	for i := range cells {
		cells[i] = printable(cells[i])
	}
	fmt.Fprintln(w, strings.Join(cells, "\t"))
}

func age(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return duration.HumanDuration(time.Since(t))
}

func size(n int64) string { return resource.NewQuantity(n, resource.BinarySI).String() }

func newNodesCommand() *cobra.Command {
	var o operator
	c := &cobra.Command{
		Use:   "nodes",
		Short: "List the nodes that a controller knows, and their pools",
		Long: `List the nodes that have, had or should have a link to the controller, and the pools
that they brought. A node is linked, away (it had a link), or missing (the driver
is registered there, and the node has not linked since this controller started).
` + operatorHelp + "nodes",
		Args: cobra.NoArgs,
	}
	o.flags(c, true)
	c.RunE = func(c *cobra.Command, _ []string) error {
		return o.ask(c.Context(), func(ctx context.Context, a router.Admin) error {
			nodes, err := a.Nodes(ctx)
			if err != nil {
				return err
			}
			return o.show(c.OutOrStdout(), nodes, func(w io.Writer) { nodeTable(w, nodes) })
		})
	}
	return c
}

func nodeTable(w io.Writer, nodes []router.Node) {
	fmt.Fprintln(w, "NODE\tSTATE\tFOR\tVERSION\tPOOL\tID\tVOLUMES\tFREE")
	for _, n := range nodes {
		version := or(n.Version, "-")
		if len(n.Pools) == 0 {
			row(w, n.Name, n.State, age(n.Since), version, "-", "-", "-", "-")
		}
		for _, p := range n.Pools {
			free := size(p.Free)
			if p.ServedBy != "" {
				free = "refused: a copy of the pool on " + p.ServedBy
			}
			row(w, n.Name, n.State, age(n.Since), version, p.Name, p.ID, strconv.Itoa(p.Volumes), free)
		}
	}
}

func or(s, instead string) string {
	if s == "" {
		return instead
	}
	return s
}
