package main

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/csi-loop/csi-loop/pkg/report"
)

func (o *options) newTop() *cobra.Command {
	once := false
	c := &cobra.Command{
		Use: "top", Short: "Show who reads and writes, refreshed", Args: cobra.NoArgs,
		Long: `Show which volumes are read and written, the busiest first, over and over until it is
interrupted. BUSY is the part of the time in which a request was under way. Rates are known
from the second look on, and "-" before. On a terminal as many rows are shown as it has; a
look that fails leaves the last picture, with a note.`,
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
		return o.top(c.Context(), screenOf(c), k, once)
	}
	return c
}

// top shows rates until ctx ends; once: the first ones, and an error ends it.
func (o *options) top(ctx context.Context, s *screen, k *cluster, once bool) error {
	m, looks := meter{}, 0
	return o.watch(ctx, watched{
		look: func(ctx context.Context) (picture, bool, error) {
			e, err := k.look(ctx)
			if err == nil {
				err = e.reportErr // what Kubernetes knows says nothing of reads and writes
			}
			if err != nil {
				return picture{}, false, err
			}
			looks++
			m.read(e)
			wanted := slices.DeleteFunc(slices.Clone(e.volumes), func(v volume) bool { return len(o.choose([]volume{v}, nil, k.namespace)) == 0 })
			return picture{m.rows(wanted), e.notes, "that are less busy"}, once && looks == 2, nil
		},
		draw: func(p picture, fresh bool) error {
			switch {
			case once && looks == 1:
				return nil
			case !fresh && !s.redraw:
				s.tell(p.notes)
				return nil
			}
			return s.show(p)
		},
		strict: once,
	})
}

// rate is what happens in a second.
type rate struct{ reads, writes, in, out, busy float64 }

// reading is what a node said last of a volume's counters.
type reading struct {
	node string
	at   time.Time // the node's own: its report may have been made a moment before
	io   report.IO
	rate *rate // since the reading before; nil: nothing can be said
}

// meter has the last readings, by node and volume.
type meter map[string]reading

func (v *volume) key() string { return v.Node + " " + v.ID }

// read takes over what a report says. One that is handed out again leaves the rates as
// they are; of a node that does not answer the readings are kept, and compared with what
// it says later.
func (m meter) read(e *everything) {
	times, told := map[string]time.Time{}, map[string]bool{}
	for _, n := range e.report.Nodes {
		times[n.Name], told[n.Name] = n.Time, n.State == report.Linked && n.Error == ""
	}
	here := map[string]bool{}
	for i := range e.volumes {
		v := &e.volumes[i]
		if v.IO == nil {
			continue
		}
		here[v.key()] = true
		last, seen := m[v.key()]
		r := reading{node: v.Node, at: times[v.Node], io: *v.IO}
		if seen && !r.at.After(last.at) {
			continue
		}
		if seen {
			r.rate = rateOf(last, r)
		}
		m[v.key()] = r
	}
	maps.DeleteFunc(m, func(key string, r reading) bool { return !here[key] && told[r.node] })
}

// rateOf compares two readings. Counters begin anew when csi-loop does: then nothing can be
// said.
func rateOf(a, b reading) *rate {
	if b.io.Reads < a.io.Reads || b.io.Writes < a.io.Writes || b.io.ReadBytes < a.io.ReadBytes || b.io.WriteBytes < a.io.WriteBytes {
		return nil
	}
	seconds := b.at.Sub(a.at).Seconds()
	return &rate{
		reads: float64(b.io.Reads-a.io.Reads) / seconds, writes: float64(b.io.Writes-a.io.Writes) / seconds,
		in: float64(b.io.ReadBytes-a.io.ReadBytes) / seconds, out: float64(b.io.WriteBytes-a.io.WriteBytes) / seconds,
		busy: min(1, max(0, (b.io.BusySeconds-a.io.BusySeconds)/seconds)),
	}
}

// rows are those of the volumes that are attached, the busiest first, those without a rate
// last.
func (m meter) rows(volumes []volume) [][]cell {
	volumes = slices.DeleteFunc(slices.Clone(volumes), func(v volume) bool { return v.IO == nil })
	rateOr := func(v volume) rate {
		if r := m[v.key()].rate; r != nil {
			return *r
		}
		return rate{busy: -1}
	}
	slices.SortStableFunc(volumes, func(v, w volume) int {
		a, b := rateOr(v), rateOr(w)
		return cmp.Or(cmp.Compare(b.busy, a.busy), cmp.Compare(b.in+b.out, a.in+a.out))
	})
	rows := [][]cell{{text("NAMESPACE"), text("CLAIM"), text("POD"), text("NODE"), text("READ/S"), text("WRITE/S"), text("READS/S"), text("WRITES/S"), text("BUSY")}}
	for _, v := range volumes {
		row := []cell{text(v.Namespace), text(cmp.Or(v.claim(), v.Name)), text(strings.Join(v.Pods, ",")), text(v.Node)}
		if r := m[v.key()].rate; r != nil {
			row = append(row, text(size(int64(r.in))), text(size(int64(r.out))), text(fmt.Sprintf("%.0f", r.reads)), text(fmt.Sprintf("%.0f", r.writes)), bar(int64(r.busy*1000), 1000))
		} else {
			row = append(row, text(""), text(""), text(""), text(""), text(""))
		}
		rows = append(rows, row)
	}
	return rows
}
