package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
)

// crashChild in the environment makes this test binary run the scenario and kill
// itself: "<kill point's ordinal> <pool directory>".
const crashChild = "CSI_LOOP_IMAGE_CRASH_CHILD"

// step is one call of the scenario.
type step struct {
	verb string
	spec Spec // of Create; name and size of Grow
}

// scenario takes every path that changes a pool.
func scenario() []step {
	filesystem := ""
	if _, err := newTools(toolDirs()).find(context.Background(), "ext4"); err == nil {
		filesystem = "ext4"
	}
	return []step{
		{"create", Spec{Name: "thick", Size: 4 * MiB}},
		{"create", Spec{Name: "thin", Size: 4 * MiB, Allocation: Thin}},
		{"create", Spec{Name: "made/of fs", Size: 8 * MiB, Filesystem: filesystem}},
		{"create", Spec{Name: "proves", Size: 8 * MiB, Filesystem: filesystem}},
		{"create", Spec{Name: "templated", Size: 8 * MiB, Filesystem: filesystem}},
		{"remove", Spec{Name: "proves"}},
		{"grow", Spec{Name: "thick", Size: 7 * MiB}},
		{"grow", Spec{Name: "thin", Size: 64 * MiB}},
		{"tune", Spec{Name: "thin", Tuning: Tuning{ReadIOPS: new(int64(1000)), ReadAhead: new(int64(0))}}},
		{"snapshot", Spec{Name: "thick"}},
		{"snapshot", Spec{Name: "thin"}},
		{"group", Spec{Name: "all"}},
		{"unsnapshot", Spec{Name: "thin"}},
		{"copy", Spec{Name: "restored", Size: 8 * MiB, Source: &Source{Snapshot: "of thick"}}},
		{"copy", Spec{Name: "cloned", Size: 7 * MiB, Allocation: Thin, Source: &Source{Volume: "thick"}}},
		{"stream", Spec{Name: "streamed", Size: 8 * MiB}},
		{"stream", Spec{Name: "streamed thin", Size: 4 * MiB, Allocation: Thin}},
		{"remove", Spec{Name: "made/of fs"}},
		{"ungroup", Spec{Name: "all"}},
		{"create", Spec{Name: "made/of fs", Size: 9 * MiB, Filesystem: filesystem}},
		{"remove", Spec{Name: "thin"}},
	}
}

var pattern = bytes.Repeat([]byte("acknowledged data "), 1000)

func (s step) run(p *Pool) error {
	id := VolumeID(p.ID(), DirName(s.spec.Name))
	switch s.verb {
	case "create":
		if _, err := p.Create(ctx, s.spec); err != nil {
			return err
		}
		f, err := p.OpenImage(ctx, id, false)
		if err != nil {
			return err
		}
		defer f.Close()
		if _, err := f.WriteAt(pattern, 3*MiB); err != nil {
			return err
		}
		return f.Sync()
	case "copy":
		s.spec.Source = &Source{} // the scenario has names, not IDs
		if s.spec.Name == "restored" {
			s.spec.Source.Snapshot = VolumeID(p.ID(), DirName("of thick"))
		} else {
			s.spec.Source.Volume = VolumeID(p.ID(), "thick")
		}
		_, err := p.CreateFrom(ctx, s.spec, held)
		return err
	case "stream": // of another node
		s.spec.Source = &Source{Snapshot: VolumeID("aaaaaaaaaaaaaaaaaaaa", "elsewhere")}
		_, err := p.CreateFromInflow(ctx, s.spec, Spec{Size: 4 * MiB, BlockSize: 4096}, &halves{})
		return err
	case "snapshot":
		_, err := p.Snapshot(ctx, SnapshotSpec{Name: "of " + s.spec.Name, Source: id}, held)
		return err
	case "unsnapshot":
		return p.RemoveSnapshot(ctx, VolumeID(p.ID(), DirName("of "+s.spec.Name)))
	case "group":
		var sources []string
		for _, name := range []string{"thick", "thin"} {
			sources = append(sources, VolumeID(p.ID(), DirName(name)))
		}
		_, err := p.store.SnapshotGroup(ctx, GroupSpec{Name: s.spec.Name, Sources: sources}, held)
		return err
	case "ungroup":
		return p.store.RemoveGroup(ctx, VolumeID(p.ID(), DirName(s.spec.Name)))
	case "tune":
		_, err := p.Tune(ctx, id, s.spec.Tuning)
		return err
	case "grow":
		_, err := p.Grow(ctx, id, s.spec.Size)
		return err
	}
	return p.Remove(ctx, id)
}

// halves is an Inflow of the pattern in two pieces.
type halves struct{ came int }

func (h *halves) Next(context.Context) (int64, []byte, error) {
	half := len(pattern) / 2
	from := h.came * half
	if from >= len(pattern) {
		return 0, nil, io.EOF
	}
	h.came++
	return 3*MiB + int64(from), pattern[from : from+half], nil
}

// held is a Quiesce for what nobody writes to.
func held(context.Context) (func() error, error) { return func() error { return nil }, nil }

// after is the set of volumes and sizes when n steps are done.
func after(steps []step, n int) map[string]int64 {
	state := map[string]int64{}
	for _, s := range steps[:n] {
		switch name := s.spec.Name; s.verb {
		case "remove":
			delete(state, name)
			delete(state, "tuning of "+name)
		case "snapshot":
			state["snapshot of "+name] = state[name]
		case "unsnapshot":
			delete(state, "snapshot of "+name)
		case "group":
			state["group "+name] = state["thick"] + state["thin"]
		case "ungroup":
			delete(state, "group "+name)
		case "tune":
			state["tuning of "+name] = *s.spec.Tuning.ReadIOPS
		default:
			state[name] = s.spec.Size
		}
	}
	return state
}

// verifyCrash opens the pool after a crash in step number done, and runs the rest.
func verifyCrash(t *testing.T, dir string, steps []step, done int) {
	t.Helper()
	s, p, err := tryOpen(dir)
	if err != nil {
		t.Fatalf("after %d steps: %v", done, err)
	}
	defer s.Close()
	wantClean(t, dir)
	if len(p.Damaged()) > 0 || len(p.Health()) > 0 {
		t.Fatalf("after %d steps: %v %v", done, p.Damaged(), p.Health())
	}
	got := map[string]int64{}
	for _, v := range s.List() {
		got[v.Name] = v.Size
		if v.Tuning.ReadIOPS != nil {
			got["tuning of "+v.Name] = *v.Tuning.ReadIOPS
		}
	}
	for _, v := range s.ListSnapshots() {
		if v.Group != "" {
			got["group all"] += v.Volume.Size
			continue
		}
		got["snapshot "+v.Name] = v.Volume.Size
		wantSnapshotPattern(t, p, v)
	}
	if _, ok := s.FindGroup("all"); ok != (got["group all"] != 0) || p.snapshotEntries(t) != len(s.ListSnapshots()) {
		t.Fatalf("after %d steps: group %v, %d entries, snapshots %v", done, ok, p.snapshotEntries(t), s.ListSnapshots())
	}
	before, next := after(steps, done), after(steps, min(done+1, len(steps)))
	if fmt.Sprint(got) != fmt.Sprint(before) && fmt.Sprint(got) != fmt.Sprint(next) {
		t.Fatalf("after %d steps the pool has %v, neither %v nor %v", done, got, before, next)
	}
	for name := range before {
		if next[name] == 0 || strings.HasPrefix(name, "snapshot ") || strings.HasPrefix(name, "group ") || strings.HasPrefix(name, "tuning ") {
			continue // being removed, or looked at above
		}
		wantPattern(t, p, name)
	}
	wantAccount(t, s, p)
	wantBlocks(t, p)
	for i, rest := range steps[done:] {
		if err := rest.run(p); err != nil {
			t.Fatalf("step %d again: %v", done+i, err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s, p, err = tryOpen(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	wantClean(t, dir)
	if n := len(s.List()) + len(s.ListSnapshots()); n != len(after(steps, len(steps))) {
		t.Fatalf("%d volumes and snapshots at the end", n)
	}
	wantAccount(t, s, p)
}

func wantPattern(t *testing.T, p *Pool, name string) {
	t.Helper()
	f, err := p.OpenImage(ctx, VolumeID(p.ID(), DirName(name)), true)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, len(pattern))
	if _, err := f.ReadAt(b, 3*MiB); err != nil || !bytes.Equal(b, pattern) {
		t.Fatalf("%s lost acknowledged data: %v", name, err)
	}
}

func wantSnapshotPattern(t *testing.T, p *Pool, v Snapshot) {
	t.Helper()
	f, err := p.OpenSnapshot(ctx, v.ID)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, len(pattern))
	if _, err := f.ReadAt(b, 3*MiB); err != nil || !bytes.Equal(b, pattern) {
		t.Fatalf("snapshot %s lacks what was written before: %v", v.Name, err)
	}
}

// snapshotEntries counts what lies in snapshots/, listed or not.
func (p *Pool) snapshotEntries(t *testing.T) int {
	t.Helper()
	content, err := names(p.snapshots)
	if err != nil {
		t.Fatal(err)
	}
	return len(content)
}

// wantBlocks: a crashed Grow must not leave blocks past the end.
func wantBlocks(t *testing.T, p *Pool) {
	t.Helper()
	for _, v := range p.list() {
		_, dir, _ := p.store.Lookup(v.ID)
		st, err := statAt(p.volumes, dir+"/"+imageFile)
		if err != nil {
			t.Fatal(err)
		}
		most := withMetadata(v.Size)
		if v.Source != nil {
			most += 256 << 10 // XFS keeps some blocks for copy-on-write for a while
		}
		if st.Allocated > most {
			t.Fatalf("%s of %d bytes has %d bytes of blocks", v.ID, v.Size, st.Allocated)
		}
	}
}

var errCrash = errors.New("crash")

// TestCrashByPanic stops at every kill point in turn, within this process.
func TestCrashByPanic(t *testing.T) {
	t.Parallel()
	steps := scenario()
	points, stride := 0, int64(1)
	if testing.Short() {
		stride = 3
	}
	for n := int64(1); ; n += stride {
		dir := poolDir(t)
		var count atomic.Int64
		var armed atomic.Bool
		s, p, err := tryOpen(dir, withKill(func(point string) {
			if !armed.Load() || count.Add(1) < n {
				return
			}
			if strings.HasPrefix(point, "remove: unlink") {
				runtime.Goexit() // not on the caller's goroutine; the next point panics
			}
			panic(errCrash)
		}))
		if err != nil {
			t.Fatal(err)
		}
		armed.Store(true)
		done, crashed := runUntilCrash(t, p, steps)
		armed.Store(false)
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		verifyCrash(t, dir, steps, done)
		if !crashed {
			break
		}
		points++
	}
	if points*int(stride) < 30 {
		t.Errorf("only %d kill points were met", points)
	}
}

func runUntilCrash(t *testing.T, p *Pool, steps []step) (done int, crashed bool) {
	t.Helper()
	defer func() {
		if r := recover(); r != nil {
			if r != errCrash { //nolint:errorlint // a recovered value
				panic(r)
			}
			crashed = true
		}
	}()
	for _, s := range steps {
		if err := s.run(p); err != nil {
			t.Fatal(err)
		}
		done++
	}
	return done, false
}

// TestCrashByKill is the same with SIGKILL and a real process, from the making of
// the pool on.
func TestCrashByKill(t *testing.T) {
	t.Parallel()
	stride := 1
	if testing.Short() {
		stride = 6
	}
	crashByKill(t, poolDir, stride)
}

// crashByKill kills at every stride-th point.
func crashByKill(t *testing.T, newDir func(testing.TB) string, stride int) {
	t.Helper()
	steps := scenario()
	killed := 0
	for n := 1; ; n += stride {
		dir := filepath.Join(newDir(t), strconv.Itoa(n))
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		done, dead := runChild(t, n, dir)
		verifyCrash(t, dir, steps, done)
		if !dead {
			break
		}
		killed++
	}
	if killed*stride < 30 {
		t.Errorf("only %d kill points were met", killed)
	}
}

// runChild runs the scenario in another process, which kills itself at the n-th
// kill point, and returns how many steps it acknowledged.
func runChild(t *testing.T, n int, dir string) (done int, dead bool) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%d %s", crashChild, n, dir))
	var out, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &stderr
	err := cmd.Run()
	done = strings.Count(out.String(), "done\n")
	if err == nil {
		return done, false
	}
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		if status, ok := exit.Sys().(syscall.WaitStatus); ok && status.Signal() == syscall.SIGKILL {
			return done, true
		}
	}
	t.Fatalf("child %d: %v: %s", n, err, stderr.String())
	return 0, false
}

// TestCrashDuringRecovery: a growth whose record is missing is rolled forward by an
// Open that is killed as well.
func TestCrashDuringRecovery(t *testing.T) {
	for n := 1; n <= 3; n++ {
		dir := poolDir(t)
		s, p := openPool(t, dir)
		v := create(t, p, Spec{Name: "v", Size: 4 * MiB})
		data := fill(t, p, v.ID, 0, 1000)
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		image := filepath.Join(dir, volumesDir, "v", imageFile)
		if err := os.Truncate(image, 8*MiB); err != nil {
			t.Fatal(err)
		}
		if _, dead := runChild(t, n, dir); !dead {
			t.Fatal("no kill point in the recovery")
		}
		s, p = openPool(t, dir)
		got, err := s.Get(v.ID)
		if err != nil || got.Size != 8*MiB {
			t.Fatalf("after %d: %d, %v", n, got.Size, err)
		}
		f, err := p.OpenImage(ctx, v.ID, false)
		if err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 1000)
		if _, err := f.ReadAt(b, 0); err != nil || !bytes.Equal(b, data) {
			t.Fatal("data changed")
		}
		f.Close()
		if h := p.VolumeHealth(ctx, v.ID); len(h) > 0 {
			t.Fatal(h)
		}
		if entries, err := os.ReadDir(filepath.Dir(image)); err != nil || len(entries) != 2 {
			t.Fatal(entries, err)
		}
	}
}

func runCrashChild() int {
	ordinal, dir, _ := strings.Cut(os.Getenv(crashChild), " ")
	n, err := strconv.ParseInt(ordinal, 10, 64)
	if err != nil {
		return 2
	}
	var count atomic.Int64
	s, p, err := tryOpen(dir, withKill(func(string) {
		if count.Add(1) == n {
			_ = syscall.Kill(syscall.Getpid(), syscall.SIGKILL)
			select {} // dead any moment
		}
	}))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	for _, step := range scenario() {
		if err := step.run(p); err != nil {
			fmt.Fprintln(os.Stderr, step, err)
			return 1
		}
		fmt.Println("done")
	}
	if err := s.Close(); err != nil {
		return 1
	}
	return 0
}
