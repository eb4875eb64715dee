package integration

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// soakClients is how many volumes of a soak are in their lives at the same time.
const soakClients = 32

// soakKinds are the volumes whose lives are a soak's cycles.
var soakKinds = []kind{
	{name: "ext4", fs: "ext4", size: 32 * mib, reader: true},
	{name: "ext4-thin", fs: "ext4", size: 64 * mib, thin: true},
	{name: "block", size: 8 * mib, grown: 12 * mib, reader: true},
	{name: "xfs-thin", fs: "xfs", size: 300 * mib, grown: 320 * mib, thin: true},
	{name: "block-thin", size: 16 * mib, grown: 32 * mib, thin: true},
	{name: "btrfs", fs: "btrfs", size: 128 * mib, reader: true},
	{name: "mapped", fs: "ext4", size: 16 * mib, mapped: true},
	{name: "xfs", fs: "xfs", size: 300 * mib},
	{name: "btrfs-thin", fs: "btrfs", size: 128 * mib, grown: 320 * mib, thin: true},
	{name: "ephemeral", fs: "ext4", size: 32 * mib, ephemeral: true},
}

// soak is what the clients of TestSoak share.
type soak struct {
	*site
	cycles int64
	until  time.Time // no cycle begins after that; never, if it is zero
	kept   []*volume // published from the beginning to the end

	begun, lived, copies atomic.Int64
	failed               atomic.Pointer[error] // the first error; no cycle begins after it
}

// TestSoak takes many volumes of all kinds through their lives, 32 at the same time, and
// kills the driver every few seconds, while thin volumes are trimmed all the time. What
// fails is repeated as a CO does. At the end nothing is left, the account is exact, and
// what was in use all the time has its data.
func TestSoak(t *testing.T) {
	s := &soak{site: newSite(t, siteConfig{poolFS: "xfs", poolSize: 12 << 30, args: []string{"--trim-interval=400ms", "--trim-jitter=200ms"}})}
	s.configure()
	seeds := random(t)
	before, free := s.entries(), s.free()
	for _, k := range []kind{{name: "ext4-thin", fs: "ext4", size: 64 * mib, thin: true}, xfs, btrfs, block, {name: "block-thin", size: 16 * mib, thin: true}} {
		v := s.volume(k, "kept-"+k.name).up()
		v.step("write", v.write(0))
		s.kept = append(s.kept, v)
	}
	began := time.Now()
	ended := make(chan struct{})
	var clients sync.WaitGroup
	for range soakClients {
		clients.Go(s.client)
	}
	go func() {
		clients.Wait()
		close(ended)
	}()
	kills := 0
	for over := false; !over; {
		select {
		case <-ended:
			over = true
		case <-time.After(time.Second + time.Duration(seeds.Int64N(int64(4*time.Second)))):
		}
		s.kill() // also after the last cycle: the account is that of a fresh start
		kills++
		if err := s.tryStart(); err != nil {
			s.fail(err)
			break
		}
		s.useKept(kills)
	}
	<-ended
	t.Logf("%d cycles in %v, %d of them with copies; %d kills; %s",
		s.lived.Load(), time.Since(began).Round(time.Second), s.copies.Load(), kills, s.trims())
	if err := s.failed.Load(); err != nil {
		t.Fatal(*err)
	}
	if s.until.IsZero() && s.lived.Load() != s.cycles {
		t.Errorf("%d cycles were made, want %d", s.lived.Load(), s.cycles)
	}
	s.finish(before, free)
}

// finish looks at what was kept, removes it, and compares what is left with what was
// there before.
func (s *soak) finish(before []string, free int64) {
	t := s.t
	t.Helper()
	eventually(t, s.unaccounted)
	for _, v := range s.kept {
		v.step("read", v.read(0, 0))
		v.step("size", v.checkSize())
		v.down()
	}
	s.checkClean()
	if after := s.entries(); !slices.Equal(before, after) {
		t.Errorf("the directories have %q, they had %q", after, before)
	}
	eventually(t, s.unaccounted)
	// What XFS needs for itself, such as its inodes, it gives back later.
	if after := s.free(); after < free-64*mib {
		t.Errorf("%d bytes of the pool are free, %d were", after, free)
	}
}

// configure reads how long the soak is.
func (s *soak) configure() {
	s.cycles = int64(times(20, 40, 1000))
	if n := os.Getenv("CSI_LOOP_SOAK"); n != "" {
		var err error
		s.cycles, err = strconv.ParseInt(n, 10, 64)
		must(s.t, err)
	}
	if limit := os.Getenv("CSI_LOOP_FOR"); limit != "" {
		d, err := time.ParseDuration(limit)
		must(s.t, err)
		s.until = time.Now().Add(d)
	}
}

func (s *soak) fail(err error) { s.failed.CompareAndSwap(nil, &err) }

// client makes cycles until there are enough of them.
func (s *soak) client() {
	for s.failed.Load() == nil && (s.until.IsZero() || time.Now().Before(s.until)) {
		n := s.begun.Add(1) - 1
		if n >= s.cycles {
			return
		}
		if err := s.cycle(n); err != nil {
			s.fail(fmt.Errorf("cycle %d: %w", n, err))
			return
		}
		if lived := s.lived.Add(1); lived%500 == 0 {
			s.t.Logf("%d cycles, %d with copies", lived, s.copies.Load())
		}
	}
}

// cycle is one life of a volume. In each fourth round through the kinds it is copied
// while it is in use, and each eighth cycle copies a volume that all share.
func (s *soak) cycle(n int64) error {
	kinds := int64(len(soakKinds))
	k := soakKinds[n%kinds]
	v := s.volume(k, fmt.Sprintf("%s-%d", k.name, n))
	copied := (n/kinds)%4 == 0 && !k.mapped && !k.ephemeral
	for _, e := range k.life() {
		if err := s.repeat(func() error { return e.do(v) }); err != nil {
			return fmt.Errorf("%q of %s: %s", e.name, v.id, explain(err))
		}
		if e.name == "write" && copied {
			if err := s.copyOf(v, fmt.Sprint("copy-", n)); err != nil {
				return err
			}
		}
	}
	if n%8 == 7 {
		return s.copyOf(s.kept[n/8%int64(len(s.kept))], fmt.Sprint("copy-of-kept-", n))
	}
	return nil
}

// copyOf takes a snapshot of a published volume, and a volume that is restored from it
// through its life.
func (s *soak) copyOf(v *volume, name string) error {
	var made *csi.Snapshot
	r := s.volume(v.kind, name)
	r.seed = v.seed
	for _, e := range []event{
		{name: "snapshot", do: func(*volume) (err error) {
			made, err = v.snapshot("of-" + name)
			return err
		}},
		{name: "restore", do: func(r *volume) error {
			r.source = &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: made.GetSnapshotId()}}}
			return r.create()
		}},
		{name: "delete snapshot", do: func(*volume) error { return s.deleteSnapshot(made.GetSnapshotId()) }},
		{name: "stage", do: (*volume).stage},
		{name: "publish", do: func(r *volume) error { return r.publish(0, false) }},
		{name: "read", do: func(r *volume) error { return r.read(0, 0) }},
		{name: "check size", do: (*volume).checkSize},
		{name: "write", do: func(r *volume) error { return r.write(1) }},
		{name: "unpublish", do: func(r *volume) error { return r.unpublish(0) }},
		{name: "unstage", do: (*volume).unstage},
		{name: "delete", do: (*volume).remove},
	} {
		if err := s.repeat(func() error { return e.do(r) }); err != nil {
			return fmt.Errorf("%q of %s, a copy of %s: %s", e.name, r.id, v.id, explain(err))
		}
	}
	s.copies.Add(1)
	return nil
}

// repeat makes a call again after a pause, which gets longer, as a CO does; after
// minutes there is no end in sight.
func (s *soak) repeat(do func() error) error {
	last := time.Now().Add(5 * time.Minute)
	for pause := 10 * time.Millisecond; ; pause = min(2*pause, time.Second) {
		err := do()
		if err == nil || !slices.Contains(uncertain, status.Code(err)) && !s.shownElsewhere(err) {
			return err
		}
		if time.Now().After(last) || s.failed.Load() != nil {
			return fmt.Errorf("no end in sight: %w", err)
		}
		<-time.After(pause)
	}
}

// shownElsewhere says whether an unstage is refused for a mount that is none of the
// site's. Another test on this kernel detaches devices by hand while targets of its own
// show their nodes; a number may become that of a volume here before they are unmounted.
func (s *soak) shownElsewhere(err error) bool {
	return status.Code(err) == codes.FailedPrecondition && strings.Contains(err.Error(), "is still published at") && !strings.Contains(err.Error(), s.dir+"/")
}

// useKept writes to the filesystems that are kept, and reads: none is frozen.
func (s *soak) useKept(n int) {
	done := make(chan error, 1)
	go func() {
		var all error
		for _, v := range s.kept {
			if !v.block() {
				all = errors.Join(all, v.write(1+n%4), v.read(1+n%4, 0))
			}
			all = errors.Join(all, v.read(0, 0))
		}
		done <- all
	}()
	select {
	case err := <-done:
		if err != nil {
			s.fail(fmt.Errorf("kept volumes after kill %d: %w", n, err))
		}
	case <-time.After(5 * time.Minute):
		s.fail(fmt.Errorf("kept volumes after kill %d: a read or a write hangs", n))
	}
}

// entries lists all paths of the pool, the state directory and where clients put
// things, in order.
func (s *soak) entries() []string {
	s.t.Helper()
	var all []string
	for _, dir := range []string{s.pool, s.state, s.images, filepath.Join(s.dir, "stage"), filepath.Join(s.dir, "pods")} {
		must(s.t, filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
			all = append(all, path)
			return err
		}))
	}
	return all
}

// free is what the pool's filesystem has left, in bytes.
func (s *soak) free() int64 {
	s.t.Helper()
	var st syscall.Statfs_t
	must(s.t, syscall.Statfs(s.pool, &st))
	return int64(st.Bavail) * st.Bsize
}

// unaccounted says how GetCapacity differs from what the pool's filesystem has free,
// less what the volumes of the records may still take, less 1 MiB and what is kept back of
// large filesystems (fact 106), in whole MiB. No volume shares blocks with a snapshot.
func (s *soak) unaccounted() string {
	r, err := s.controller().GetCapacity(context.Background(), &csi.GetCapacityRequest{})
	if err != nil {
		return explain(err)
	}
	var fs syscall.Statfs_t
	must(s.t, syscall.Statfs(s.pool, &fs))
	want := s.free() - mib - max(0, int64(fs.Blocks)*fs.Bsize/200-8*mib)
	records, _ := filepath.Glob(s.pool + "/volumes/*/volume.json")
	for _, path := range records {
		var record struct {
			Size int64 `json:"size"`
		}
		b, err := os.ReadFile(path)
		if err == nil {
			err = json.Unmarshal(b, &record)
		}
		var st syscall.Stat_t
		if err == nil {
			err = syscall.Stat(filepath.Join(filepath.Dir(path), "disk.img"), &st)
		}
		if err != nil {
			return err.Error()
		}
		want -= max(0, record.Size-st.Blocks*512)
	}
	if got := r.GetAvailableCapacity(); got != want/mib*mib {
		return fmt.Sprintf("among %d volumes GetCapacity says %d, the pool has %d", len(records), got, want/mib*mib)
	}
	return ""
}

// trims counts in the driver's logs what its trims did.
func (s *soak) trims() string {
	logs, _ := filepath.Glob(s.dir + "/log-*")
	whole, deferred := 0, 0
	for _, l := range logs {
		b, err := os.ReadFile(l)
		must(s.t, err)
		whole += bytes.Count(b, []byte("Trimmed a thin volume"))
		deferred += bytes.Count(b, []byte("A trim is put off"))
	}
	return strings.Join([]string{strconv.Itoa(whole), "trims,", strconv.Itoa(deferred), "put off"}, " ")
}
