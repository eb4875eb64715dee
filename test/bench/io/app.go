//go:build linux

package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-loop/csi-loop/test/bench/lab"
)

// place is a directory that programs work in.
type place struct {
	name string
	dir  string
}

// apps runs programs in a plain directory of the pool and on volumes, in turn.
func (b *bench) apps(ctx context.Context, r *report) (err error) {
	plain := filepath.Join(b.pool.Dir, "plain")
	if err := os.Mkdir(plain, 0o755); err != nil {
		return err
	}
	places := []place{{"directory", plain}}
	for _, kind := range []string{"ext4", "xfs"} {
		v, err := b.d.NewVolume(ctx, "app-"+kind, kind, 4*lab.GiB, nil)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, v.Remove(ctx)) }()
		places = append(places, place{"volume with " + kind, v.Target})
	}
	for _, p := range places {
		r.names = append(r.names, p.name)
	}
	logs := job{name: "log-4k-fsync"}
	for range b.o.rounds {
		for _, p := range places {
			res, err := logWriter(ctx, p.dir, b.o.runtime)
			if err != nil {
				return fmt.Errorf("log in %s: %w", p.name, err)
			}
			r.add(logs, p.name, res)
		}
	}
	if err := b.postgres(ctx, r, places); err != nil {
		return fmt.Errorf("PostgreSQL: %w", err)
	}
	r.extra += b.appTable(r, append([]job{logs}, pgJobs...))
	r.names = nil // the table has its own form
	return nil
}

// appTable has rate and p99 of each place beside the directory.
func (b *bench) appTable(r *report, all []job) string {
	t := lab.Table{Head: []string{"", "where", "rate", "ratio", "p99", "ratio"}}
	for _, j := range all {
		base := j.name + "/" + r.names[0]
		for _, n := range r.names {
			key := j.name + "/" + n
			t.Add(j.name, n, amount(r.rate[key].Median(), false), lab.Ratio(r.rate[key].Median(), r.rate[base].Median()),
				micros(r.p99[key]), lab.Ratio(r.p99[key].Percentile(50), r.p99[base].Percentile(50)))
		}
	}
	r.jobs = nil
	return t.Markdown()
}

// logWriter appends 4 KiB and syncs, over and over.
func logWriter(ctx context.Context, dir string, runtime time.Duration) (res result, err error) {
	path := filepath.Join(dir, "log")
	f, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return res, err
	}
	defer func() { err = errors.Join(err, f.Close(), os.Remove(path)) }()
	var took lab.Durations
	record := make([]byte, 4096)
	start := time.Now()
	for last := start; time.Since(start) < runtime; {
		if err := ctx.Err(); err != nil {
			return res, err
		}
		if _, err := f.Write(record); err != nil {
			return res, err
		}
		if err := unix.Fdatasync(int(f.Fd())); err != nil {
			return res, err
		}
		now := time.Now()
		took, last = append(took, now.Sub(last)), now
	}
	res.ops = float64(len(took)) / time.Since(start).Seconds()
	res.bytes, res.p99 = res.ops*4096, took.Percentile(99)
	return res, nil
}

// pgJobs are what pgbench does: its TPC-B-like transactions by one and by eight clients.
var pgJobs = []job{
	{name: "pgbench-1", args: "--client=1"},
	{name: "pgbench-8", args: "--client=8 --jobs=2"},
}

// postgres runs pgbench against a server in each place, one server at a time.
func (b *bench) postgres(ctx context.Context, r *report, places []place) error {
	bin, err := pgBin()
	if err != nil {
		return err
	}
	servers := make([]*server, 0, len(places))
	for _, p := range places {
		s := &server{bin: bin, data: filepath.Join(p.dir, "pg")}
		if err := s.init(ctx); err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
		servers = append(servers, s)
	}
	for range b.o.rounds {
		for i, s := range servers {
			if err := s.start(ctx); err != nil {
				return err
			}
			for _, j := range pgJobs {
				res, err := s.bench(ctx, j.args, 3*b.o.runtime)
				if err != nil {
					return errors.Join(err, s.stop(ctx))
				}
				r.add(j, places[i].name, res)
			}
			if err := s.stop(ctx); err != nil {
				return err
			}
		}
	}
	return nil
}

// pgBin is the directory of the newest PostgreSQL that Debian's packages installed.
func pgBin() (string, error) {
	all, err := filepath.Glob("/usr/lib/postgresql/*/bin")
	if err != nil || len(all) == 0 {
		return "", errors.New("there is no PostgreSQL in /usr/lib/postgresql")
	}
	return all[len(all)-1], nil
}

// server is a PostgreSQL server.
type server struct{ bin, data string }

// as runs a program of PostgreSQL, which refuses to be root.
func (s *server) as(ctx context.Context, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, "runuser", append([]string{"-u", "postgres", "--", filepath.Join(s.bin, name)}, args...)...)
	cmd.Dir = "/"
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", name, err, out)
	}
	return nil
}

func (s *server) init(ctx context.Context) error {
	if err := os.Mkdir(s.data, 0o700); err != nil {
		return err
	}
	if _, err := lab.Run(ctx, "chown", "postgres:postgres", s.data); err != nil {
		return err
	}
	if err := s.as(ctx, "initdb", "-D", s.data, "-A", "trust", "--no-locale"); err != nil {
		return err
	}
	if err := s.start(ctx); err != nil {
		return err
	}
	err := s.as(ctx, "pgbench", s.address("-i", "-q", "-s", "20", "postgres")...)
	return errors.Join(err, s.stop(ctx))
}

// address adds where the server listens: a socket in its data directory.
func (s *server) address(args ...string) []string { return append([]string{"-h", s.data}, args...) }

func (s *server) start(ctx context.Context) error {
	return s.as(ctx, "pg_ctl", "-D", s.data, "-w", "-l", filepath.Join(s.data, "server.log"),
		"-o", "-c listen_addresses='' -c unix_socket_directories="+s.data+" -c shared_buffers=64MB", "start")
}

// stop ends the server, whatever else was interrupted.
func (s *server) stop(ctx context.Context) error {
	return s.as(context.WithoutCancel(ctx), "pg_ctl", "-D", s.data, "-w", "-m", "fast", "stop")
}

// bench runs pgbench once.
func (s *server) bench(ctx context.Context, args string, runtime time.Duration) (res result, err error) {
	prefix := filepath.Join(s.data, "pgbench")
	argv := append(strings.Fields(args), "-T", strconv.Itoa(int(runtime/time.Second)), "--log", "--log-prefix="+prefix, "postgres")
	if err := s.as(ctx, "pgbench", s.address(argv...)...); err != nil {
		return res, err
	}
	took, err := pgLog(prefix)
	if err != nil || len(took) == 0 {
		return res, errors.Join(errors.New("pgbench logged nothing"), err)
	}
	res.ops, res.p99 = float64(len(took))/runtime.Seconds(), took.Percentile(99)
	return res, nil
}

// pgLog reads and removes the logs of one run: the third word is the time that a
// transaction took, in microseconds.
func pgLog(prefix string) (took lab.Durations, err error) {
	paths, err := filepath.Glob(prefix + ".*")
	if err != nil {
		return nil, err
	}
	for _, path := range paths {
		f, err := os.Open(path)
		if err != nil {
			return nil, err
		}
		for lines := bufio.NewScanner(f); lines.Scan(); {
			words := strings.Fields(lines.Text())
			if len(words) < 3 {
				continue
			}
			n, err := strconv.ParseInt(words[2], 10, 64)
			if err != nil {
				return nil, errors.Join(err, f.Close())
			}
			took = append(took, time.Duration(n)*time.Microsecond)
		}
		if err := errors.Join(f.Close(), os.Remove(path)); err != nil {
			return nil, err
		}
	}
	return took, nil
}
