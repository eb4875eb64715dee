package main

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"k8s.io/apimachinery/pkg/util/duration"

	"github.com/csi-loop/csi-loop/pkg/report"
)

// with runs work over a look at the cluster, and says what was left out.
func (o *options) with(c *cobra.Command, work func(ctx context.Context, k *cluster) (notes []string, err error)) error {
	if err := o.check(c); err != nil {
		return err
	}
	k, err := o.cluster()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(c.Context(), o.timeout)
	defer cancel()
	notes, err := work(ctx, k)
	for _, n := range notes {
		fmt.Fprintln(c.ErrOrStderr(), "note: "+printable(n))
	}
	return err
}

func (o *options) newNodes() *cobra.Command {
	c := &cobra.Command{Use: "nodes", Short: "List nodes and their pools", Args: cobra.NoArgs}
	o.outputFlag(c)
	c.RunE = func(c *cobra.Command, _ []string) error {
		return o.with(c, func(ctx context.Context, k *cluster) ([]string, error) {
			r, err := k.report(ctx)
			if err != nil {
				return nil, err
			}
			nodes := o.chooseNodes(r.Nodes)
			return k.failed(r.Nodes), o.show(c.OutOrStdout(), nodes, nodeRows(nodes, o.output == "wide"))
		})
	}
	return c
}

// chooseNodes keeps the nodes and pools that were asked for, without what is in the pools.
// A node whose pools are not known may have one of that name, and is kept.
func (o *options) chooseNodes(all []report.Node) []report.Node {
	nodes := []report.Node{}
	for _, n := range all {
		n.Volumes, n.Snapshots, n.Templates, n.Copies = nil, nil, nil, nil
		if o.pool != "" { // the report's own list is left as it is
			n.Pools = slices.DeleteFunc(slices.Clone(n.Pools), func(p report.Pool) bool { return p.Name != o.pool })
		}
		known := n.State == report.Linked && n.Error == ""
		if (o.node == "" || n.Name == o.node) && (o.pool == "" || len(n.Pools) > 0 || !known) {
			nodes = append(nodes, n)
		}
	}
	return nodes
}

func nodeRows(nodes []report.Node, wide bool) [][]cell {
	rows := [][]cell{{text("NODE"), text("STATE"), text("POOL"), text("SIZE"), text("USED"), text("AVAILABLE"), text("VOLUMES"), text("SNAPSHOTS"), text("HEALTH")}}
	if wide {
		rows[0] = append(rows[0], text("FILESYSTEM"), text("RESERVED"), text("ID"), text("VERSION"), text("SINCE"), text("POD"), text("PROBLEMS"))
	}
	for _, n := range nodes {
		state := cell{n.State, green}
		if n.State != report.Linked {
			state.colour = red
		}
		if len(n.Pools) == 0 {
			rows = append(rows, []cell{text(n.Name), state, text(""), text(""), text(""), text(""), text(""), text(""), text(n.Error)})
		}
		for _, p := range n.Pools {
			problems := slices.Concat(n.Problems, p.Problems)
			row := []cell{
				text(n.Name), state, text(p.Name), text(size(p.Size)), bar(p.Used, p.Size), text(size(p.Available)),
				text(strconv.Itoa(p.Volumes)), text(strconv.Itoa(p.Snapshots)), health(problems, true),
			}
			if wide {
				row = append(row, text(p.Filesystem), text(size(p.Reserved)), text(p.ID), text(n.Version), text(age(n.Since)), text(n.Pod), text(messages(problems)))
			}
			rows = append(rows, row)
		}
	}
	return rows
}

func (o *options) newVolumes() *cobra.Command {
	c := &cobra.Command{
		Use: "volumes [NAME...]", Short: "List volumes: whose they are, where, and how they are",
		Long: `List volumes: whose they are, where they are, and how they are. A NAME is that of a claim,
of a PersistentVolume, or a volume ID. ALLOCATED are the blocks that a volume has in its
pool, USED what its filesystem uses. An inline ephemeral volume has no claim: the name that
its pod gives it is shown, as "inline:NAME". --namespace is for the namespace of claims and
pods, all by default.

HEALTH is "unknown" of volumes whose node did not answer; which node that was is said on
standard error. --unhealthy leaves them out.`,
	}
	o.outputFlag(c)
	c.Flags().BoolVar(&o.unhealthy, "unhealthy", false, "only those with problems, or on nodes that are away")
	c.RunE = func(c *cobra.Command, names []string) error {
		return o.with(c, func(ctx context.Context, k *cluster) ([]string, error) {
			e, err := k.look(ctx)
			if err != nil {
				return nil, err
			}
			volumes := o.choose(e.volumes, names, k.namespace)
			return e.notes, o.show(c.OutOrStdout(), volumes, volumeRows(volumes, o.output == "wide"))
		})
	}
	return c
}

// choose keeps the volumes that were asked for, in the order of claims.
func (o *options) choose(all []volume, names []string, namespace string) []volume {
	chosen := []volume{}
	for _, v := range all {
		switch {
		case o.node != "" && v.Node != o.node, o.pool != "" && v.Pool != o.pool, o.unhealthy && len(v.Problems) == 0 && (v.Known || v.Unanswered != ""),
			namespace != "" && v.Namespace != namespace,
			len(names) > 0 && !slices.ContainsFunc(names, func(n string) bool { return n == v.Claim || n == v.PV || n == v.ID || n == v.Name }):
			continue
		}
		chosen = append(chosen, v)
	}
	slices.SortStableFunc(chosen, func(a, b volume) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Claim, b.Claim), cmp.Compare(a.Node, b.Node), cmp.Compare(a.ID, b.ID))
	})
	return chosen
}

func volumeRows(volumes []volume, wide bool) [][]cell {
	rows := [][]cell{{text("NAMESPACE"), text("CLAIM"), text("POD"), text("NODE"), text("DEVICE"), text("SIZE"), text("ALLOCATED"), text("USED"), text("HEALTH")}}
	if wide {
		rows[0] = append(rows[0], text("PERSISTENTVOLUME"), text("POOL"), text("TYPE"), text("STATE"), text("CLASS"), text("AGE"), text("ID"), text("PROBLEMS"))
	}
	for _, v := range volumes {
		used := text("")
		if v.Used != nil {
			used = bar(*v.Used, v.Size)
		}
		kind := v.Filesystem
		if kind == "" {
			kind = "raw"
		}
		if v.Encryption != "" {
			kind += " in " + v.Encryption
		}
		allocated := text(size(v.Allocated))
		if !v.Known {
			allocated = text("")
		}
		row := []cell{
			text(v.Namespace), text(v.claim()), text(strings.Join(v.Pods, ",")), text(v.Node), text(v.Device), text(whole(v.Size)), allocated, used, v.health(),
		}
		if wide {
			row = append(row, text(v.PV), text(v.Pool), text(kind), text(v.State), text(v.Class), text(age(v.Created)), text(v.ID), text(cmp.Or(messages(v.Problems), v.Unanswered)))
		}
		rows = append(rows, row)
	}
	return rows
}

// claim is what people call a volume in its namespace.
func (v *volume) claim() string {
	if v.Claim == "" && v.Inline != "" {
		return "inline:" + v.Inline
	}
	return v.Claim
}

func (v *volume) health() cell {
	if v.Unanswered != "" {
		return cell{"unknown", yellow}
	}
	if !v.Known && len(v.Problems) == 0 {
		state := v.NodeState
		if state == "" {
			state = "unknown"
		}
		return cell{"node " + state, red}
	}
	return health(v.Problems, v.Known)
}

// health shows the reasons, worst first.
func health(problems []report.Problem, known bool) cell {
	if len(problems) == 0 && known {
		return cell{"ok", green}
	}
	c := cell{colour: yellow}
	var reasons []string
	for _, p := range problems {
		if !slices.Contains(reasons, p.Reason) {
			reasons = append(reasons, p.Reason)
		}
		if p.Kind != report.Degraded {
			c.colour = red
		}
	}
	c.text = strings.Join(reasons, ",")
	return c
}

func messages(problems []report.Problem) string {
	var all []string
	for _, p := range problems {
		all = append(all, p.Message)
	}
	return strings.Join(all, "; ")
}

func age(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return duration.HumanDuration(time.Since(t))
}

func (o *options) newSnapshots() *cobra.Command {
	c := &cobra.Command{
		Use: "snapshots", Short: "List snapshots", Args: cobra.NoArgs,
		Long: "List snapshots. ALLOCATED counts blocks that they share with their volumes too.",
	}
	o.outputFlag(c)
	c.RunE = func(c *cobra.Command, _ []string) error {
		return o.with(c, func(ctx context.Context, k *cluster) ([]string, error) {
			all, notes, err := k.snapshots(ctx)
			if err != nil {
				return nil, err
			}
			all = slices.DeleteFunc(all, func(s snapshot) bool {
				return o.node != "" && s.Node != o.node || o.pool != "" && s.Pool != o.pool || k.namespace != "" && s.Namespace != k.namespace
			})
			return notes, o.show(c.OutOrStdout(), all, snapshotRows(all, o.output == "wide"))
		})
	}
	return c
}

func snapshotRows(all []snapshot, wide bool) [][]cell {
	rows := [][]cell{{text("NAMESPACE"), text("SNAPSHOT"), text("NODE"), text("POOL"), text("SOURCE"), text("SIZE"), text("ALLOCATED"), text("AGE")}}
	if wide {
		rows[0] = append(rows[0], text("NAME"), text("GROUP"), text("REFLINKED"), text("ID"))
	}
	for _, s := range all {
		source := s.SourcePV
		if source == "" {
			source = s.Source
		}
		row := []cell{text(s.Namespace), text(s.Object), text(s.Node), text(s.Pool), text(source), text(whole(s.Size)), text(size(s.Allocated)), text(age(s.Created))}
		if wide {
			row = append(row, text(s.Name), text(s.Group), text(strconv.FormatBool(s.Reflinked)), text(s.ID))
		}
		rows = append(rows, row)
	}
	return rows
}
