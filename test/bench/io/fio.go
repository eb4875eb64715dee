//go:build linux

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/csi-loop/csi-loop/test/bench/lab"
)

// job is something that fio does.
type job struct {
	name    string
	args    string
	targets int  // at once
	fresh   bool // on a new target each time, whose blocks were never written
	large   bool // shown in MiB/s and not in operations
}

var jobs = []job{
	{name: "read-4k-1", args: "--rw=randread --bs=4k --iodepth=1", targets: 1},
	{name: "read-4k-32", args: "--rw=randread --bs=4k --iodepth=32", targets: 1},
	{name: "write-4k-1", args: "--rw=randwrite --bs=4k --iodepth=1", targets: 1},
	{name: "write-4k-32", args: "--rw=randwrite --bs=4k --iodepth=32", targets: 1},
	{name: "read-1M", args: "--rw=read --bs=1M --iodepth=8", targets: 1, large: true},
	{name: "write-1M", args: "--rw=write --bs=1M --iodepth=8", targets: 1, large: true},
	{name: "mixed-70/30-fsync", args: "--rw=randrw --rwmixread=70 --bs=4k --iodepth=8 --fsync=16", targets: 1},
	{name: "write-4k-8-of-4", args: "--rw=randwrite --bs=4k --iodepth=8", targets: several},
	{name: "fresh-write-4k-1", args: "--rw=randwrite --bs=4k --iodepth=1", targets: 1, fresh: true},
	{name: "fresh-write-4k-32", args: "--rw=randwrite --bs=4k --iodepth=32", targets: 1, fresh: true},
	{name: "write-4k-fsync", args: "--rw=randwrite --bs=4k --iodepth=1 --fsync=1", targets: 1},
	{name: "fresh-write-4k-fsync", args: "--rw=randwrite --bs=4k --iodepth=1 --fsync=1", targets: 1, fresh: true},
	{name: "fresh-write-1M", args: "--rw=write --bs=1M --iodepth=8", targets: 1, fresh: true, large: true},
}

// several is how many volumes are used at once by the job for that.
const several = 4

// result is what one run came to.
type result struct {
	bytes, ops float64       // a second
	p99        time.Duration // of the slower direction
}

// fio runs every job on every contender, in turn.
func (b *bench) fio(ctx context.Context, r *report) (err error) {
	all := b.contenders()
	written := map[string][]*target{}
	defer func() {
		for _, ts := range written {
			for _, t := range ts {
				err = errors.Join(err, t.close())
			}
		}
	}()
	for _, c := range all {
		for range several {
			t, err := b.writtenTarget(ctx, c)
			if err != nil {
				return fmt.Errorf("%s: %w", c.name, err)
			}
			written[c.name] = append(written[c.name], t)
		}
		r.names = append(r.names, c.name)
	}
	for i := range b.o.rounds {
		for _, j := range b.chosen(jobs) {
			if err := b.turns(ctx, j, i, all, written, r); err != nil {
				return err
			}
		}
	}
	return nil
}

// turns runs a job once on every contender; each round begins with another one.
func (b *bench) turns(ctx context.Context, j job, round int, all []contender, written map[string][]*target, r *report) error {
	for k := range all {
		c := all[(round+k)%len(all)]
		if err := ctx.Err(); err != nil {
			return err
		}
		res, err := b.one(ctx, c, j, written[c.name])
		if err != nil {
			return fmt.Errorf("%s on %s: %w", j.name, c.name, err)
		}
		r.add(j, c.name, res)
	}
	return nil
}

// chosen are those of the jobs that -jobs allows.
func (b *bench) chosen(all []job) []job {
	return slices.DeleteFunc(slices.Clone(all), func(j job) bool { return !b.o.jobs.MatchString(j.name) })
}

func (b *bench) name(c contender) string {
	b.next++
	return fmt.Sprintf("%s-%d", c.name, b.next)
}

// writtenTarget makes a target and writes all of it once.
func (b *bench) writtenTarget(ctx context.Context, c contender) (*target, error) {
	t, err := c.make(ctx, b.name(c))
	if err != nil {
		return nil, err
	}
	if _, err := b.runFio(ctx, "--rw=write --bs=1M --iodepth=8 --end_fsync=1", false, t); err != nil {
		return nil, errors.Join(err, t.close())
	}
	return t, nil
}

// one is one run of a job.
func (b *bench) one(ctx context.Context, c contender, j job, written []*target) (res result, err error) {
	if !j.fresh {
		return b.runFio(ctx, j.args, true, written[:j.targets]...)
	}
	t, err := c.make(ctx, b.name(c))
	if err != nil {
		return res, err
	}
	defer func() { err = errors.Join(err, t.close()) }()
	return b.runFio(ctx, j.args, true, t)
}

// runFio runs fio on the targets at once, for the runtime or once over all of them.
func (b *bench) runFio(ctx context.Context, args string, timed bool, targets ...*target) (result, error) {
	argv := append(strings.Fields(args), "--direct=1", "--ioengine=libaio", "--size="+strconv.FormatInt(b.o.size, 10),
		"--fallocate=none", "--randrepeat=0", "--norandommap", "--group_reporting", "--output-format=json")
	if timed {
		argv = append(argv, "--time_based", "--runtime="+strconv.Itoa(max(1, int(b.o.runtime/time.Second))))
	}
	for i, t := range targets {
		argv = append(argv, "--name=t"+strconv.Itoa(i), "--filename="+t.path)
	}
	out, err := exec.CommandContext(ctx, "fio", argv...).Output()
	if err != nil {
		return result{}, fmt.Errorf("fio: %w: %s", err, out)
	}
	return parseFio(out)
}

// parseFio reads what fio says of one group.
func parseFio(out []byte) (res result, err error) {
	type direction struct {
		Bytes float64 `json:"bw_bytes"`
		IOPS  float64 `json:"iops"`
		Clat  struct {
			Percentile map[string]float64 `json:"percentile"`
		} `json:"clat_ns"`
	}
	var said struct {
		Jobs []struct {
			Error int       `json:"error"`
			Read  direction `json:"read"`
			Write direction `json:"write"`
		} `json:"jobs"`
	}
	if err := json.Unmarshal(out, &said); err != nil {
		return res, fmt.Errorf("fio's output: %w", err)
	}
	if len(said.Jobs) != 1 || said.Jobs[0].Error != 0 {
		return res, fmt.Errorf("fio's output has %d groups or an error: %s", len(said.Jobs), out)
	}
	for _, d := range []direction{said.Jobs[0].Read, said.Jobs[0].Write} {
		res.bytes += d.Bytes
		res.ops += d.IOPS
		res.p99 = max(res.p99, time.Duration(d.Clat.Percentile["99.000000"]))
	}
	if res.ops == 0 {
		return res, errors.New("fio did nothing")
	}
	return res, nil
}

// knob is a setting of a loop device's queue, or of losetup.
type knob struct {
	name        string
	attr, value string
	losetup     []string
}

var knobs = []knob{
	{name: "scheduler mq-deadline", attr: "scheduler", value: "mq-deadline"},
	{name: "wbt off", attr: "wbt_lat_usec", value: "0"},
	{name: "no merges", attr: "nomerges", value: "2"},
	{name: "rq_affinity 0", attr: "rq_affinity", value: "0"},
	{name: "rq_affinity 2", attr: "rq_affinity", value: "2"},
	{name: "no iostats", attr: "iostats", value: "0"},
	{name: "depth 32", attr: "nr_requests", value: "32"},
	{name: "read-ahead 4 MiB", attr: "read_ahead_kb", value: "4096"},
	{name: "512-byte blocks", losetup: []string{"--sector-size=512"}},
}

// knobs compares a loop device with direct I/O as the kernel makes it with the same
// after each setting.
func (b *bench) knobs(ctx context.Context, r *report) (err error) {
	b.kind = "block"
	plain := contender{"as made", func(ctx context.Context, name string) (*target, error) {
		return b.tuned(ctx, name, knob{})
	}}
	all := []contender{plain}
	for _, k := range knobs {
		all = append(all, contender{k.name, func(ctx context.Context, name string) (*target, error) { return b.tuned(ctx, name, k) }})
	}
	image, err := b.writtenTarget(ctx, contender{onFile, func(_ context.Context, name string) (*target, error) { return b.file(name, b.o.size) }})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, image.close()) }()
	for _, c := range all {
		r.names = append(r.names, c.name)
	}
	for i := range b.o.rounds {
		for _, j := range b.chosen(jobs[:6]) {
			for k := range all {
				c := all[(i*3+k)%len(all)] // no setting always follows the same one
				t, err := c.make(ctx, image.path)
				if err != nil {
					return fmt.Errorf("%s: %w", c.name, err)
				}
				res, err := b.runFio(ctx, j.args, true, t)
				if err = errors.Join(err, t.close(), ctx.Err()); err != nil {
					return fmt.Errorf("%s with %s: %w", j.name, c.name, err)
				}
				r.add(j, c.name, res)
			}
		}
	}
	return nil
}

// tuned shows a file by a loop device with a setting, which is taken back at the end,
// for it would stay with the device's number.
func (b *bench) tuned(ctx context.Context, path string, k knob) (_ *target, err error) {
	args := k.losetup
	if args == nil {
		args = []string{"--sector-size=4096"}
	}
	device, err := lab.Losetup(ctx, path, append([]string{"--direct-io=on"}, args...)...)
	if err != nil {
		return nil, err
	}
	t := &target{path: device, device: device, undo: []func() error{func() error { return lab.Detach(ctx, device) }}}
	if k.attr == "" {
		return t, nil
	}
	before, err := os.ReadFile(queue(device, k.attr))
	if err == nil {
		err = setQueue(device, k.attr, k.value)
	}
	if err != nil {
		return nil, errors.Join(err, t.close())
	}
	was := strings.TrimSpace(string(before))
	if from, rest, ok := strings.Cut(was, "["); ok && k.attr == "scheduler" {
		_ = from
		was, _, _ = strings.Cut(rest, "]")
	}
	t.undo = append(t.undo, func() error { return setQueue(device, k.attr, was) })
	return t, nil
}
