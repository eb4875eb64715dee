package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
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
			nodes := []report.Node{}
			for _, n := range r.Nodes {
				if o.node == "" || n.Name == o.node {
					n.Volumes, n.Snapshots, n.Templates, n.Copies = nil, nil, nil, nil
					nodes = append(nodes, n)
				}
			}
			return nil, o.show(c.OutOrStdout(), nodes, nodeRows(nodes, o.pool, o.output == "wide"))
		})
	}
	return c
}

func nodeRows(nodes []report.Node, pool string, wide bool) [][]cell {
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
			if pool != "" && p.Name != pool {
				continue
			}
			row := []cell{
				text(n.Name), state, text(p.Name), text(size(p.Size)), bar(p.Used, p.Size), text(size(p.Available)),
				text(strconv.Itoa(p.Volumes)), text(strconv.Itoa(p.Snapshots)), health(p.Problems, true),
			}
			if wide {
				row = append(row, text(p.Filesystem), text(size(p.Reserved)), text(p.ID), text(n.Version), text(age(n.Since)), text(n.Pod), text(messages(p.Problems)))
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
pool, USED what its filesystem uses. --namespace is for the claims' namespace, all by default.`,
	}
	o.outputFlag(c)
	c.Flags().BoolVar(&o.unhealthy, "unhealthy", false, "only those with problems")
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
		case o.node != "" && v.Node != o.node, o.pool != "" && v.Pool != o.pool, o.unhealthy && len(v.Problems) == 0 && v.Known,
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
			text(v.Namespace), text(v.Claim), text(strings.Join(v.Pods, ",")), text(v.Node), text(v.Device), text(whole(v.Size)), allocated, used, v.health(),
		}
		if wide {
			row = append(row, text(v.PV), text(v.Pool), text(kind), text(v.State), text(v.Class), text(age(v.Created)), text(v.ID), text(messages(v.Problems)))
		}
		rows = append(rows, row)
	}
	return rows
}

func (v *volume) health() cell {
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

func (o *options) newTop() *cobra.Command {
	once := false
	c := &cobra.Command{
		Use: "top", Short: "Show who reads and writes, refreshed", Args: cobra.NoArgs,
		Long: `Show which volumes are read and written, the busiest first, over and over until it is
interrupted. BUSY is the part of the time in which a request was under way.`,
	}
	c.Flags().DurationVar(&o.every, "interval", 5*time.Second, "between two looks, 3s at least")
	c.Flags().BoolVar(&once, "once", false, "show it once, after one interval")
	c.RunE = func(c *cobra.Command, _ []string) error {
		if err := o.check(c); err != nil {
			return err
		}
		if o.every < 3*time.Second {
			return fmt.Errorf("--interval %s: is below 3s, for which the controller repeats its last answer", o.every)
		}
		k, err := o.cluster()
		if err != nil {
			return err
		}
		return o.top(c.Context(), c.OutOrStdout(), k, once)
	}
	return c
}

func (o *options) top(ctx context.Context, w io.Writer, k *cluster, once bool) error {
	before, err := o.lookInTime(ctx, k)
	if err != nil {
		return err
	}
	tick := time.NewTicker(o.every)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
		now, err := o.lookInTime(ctx, k)
		if err != nil {
			return err
		}
		if !once && o.colours { // a terminal
			fmt.Fprint(w, "\x1b[H\x1b[2J")
		}
		if err := table(w, o.colours, topRows(before, now, func(v volume) bool { return len(o.choose([]volume{v}, nil, k.namespace)) > 0 })); err != nil || once {
			return err
		}
		before = now
	}
}

func (o *options) lookInTime(ctx context.Context, k *cluster) (*everything, error) {
	ctx, cancel := context.WithTimeout(ctx, o.timeout)
	defer cancel()
	return k.look(ctx)
}

// topRows compares two looks. A node's time counts, not ours: its report may have been
// made a moment before.
func topRows(before, now *everything, wanted func(volume) bool) [][]cell {
	times := func(e *everything) map[string]time.Time {
		m := map[string]time.Time{}
		for _, n := range e.report.Nodes {
			m[n.Name] = n.Time
		}
		return m
	}
	was, is := times(before), times(now)
	old := map[string]*report.IO{}
	for _, v := range before.volumes {
		old[v.Node+" "+v.ID] = v.IO
	}
	type rate struct {
		v                      volume
		reads, writes, in, out float64
		busy                   float64
	}
	var rates []rate
	for _, v := range now.volumes {
		last, seconds := old[v.Node+" "+v.ID], is[v.Node].Sub(was[v.Node]).Seconds()
		if v.IO == nil || !wanted(v) {
			continue
		}
		r := rate{v: v}
		// Counters begin anew when csi-loop does.
		if last != nil && seconds > 0 && v.IO.Reads >= last.Reads && v.IO.Writes >= last.Writes && v.IO.ReadBytes >= last.ReadBytes && v.IO.WriteBytes >= last.WriteBytes {
			r.reads, r.writes = float64(v.IO.Reads-last.Reads)/seconds, float64(v.IO.Writes-last.Writes)/seconds
			r.in, r.out = float64(v.IO.ReadBytes-last.ReadBytes)/seconds, float64(v.IO.WriteBytes-last.WriteBytes)/seconds
			r.busy = min(1, max(0, (v.IO.BusySeconds-last.BusySeconds)/seconds))
		}
		rates = append(rates, r)
	}
	slices.SortStableFunc(rates, func(a, b rate) int { return cmp.Or(cmp.Compare(b.busy, a.busy), cmp.Compare(b.in+b.out, a.in+a.out)) })
	rows := [][]cell{{text("NAMESPACE"), text("CLAIM"), text("POD"), text("NODE"), text("READ/S"), text("WRITE/S"), text("READS/S"), text("WRITES/S"), text("BUSY")}}
	for _, r := range rates {
		claim := r.v.Claim
		if claim == "" {
			claim = r.v.Name
		}
		rows = append(rows, []cell{
			text(r.v.Namespace), text(claim), text(strings.Join(r.v.Pods, ",")), text(r.v.Node), text(size(int64(r.in))), text(size(int64(r.out))),
			text(fmt.Sprintf("%.0f", r.reads)), text(fmt.Sprintf("%.0f", r.writes)), bar(int64(r.busy*1000), 1000),
		})
	}
	return rows
}
