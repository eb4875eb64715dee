package driver

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/csi-loop/csi-loop/pkg/cgroup"
	"github.com/csi-loop/csi-loop/pkg/loop"
	"github.com/csi-loop/csi-loop/pkg/mount"
)

// fakeKernel behaves like loop devices and mounts for tests without root: a
// binding lives as long as something has it open (autoclear) or until it is
// cleared, a mount keeps its device open, and numbers are reused while disk
// sequence numbers are not.
type fakeKernel struct {
	mu      sync.Mutex
	seq     uint64
	devices map[int]*fakeDevice // guarded by mu
	mounts  []mount.Mount       // guarded by mu; later ones cover earlier ones
	mounted int                 // how often; guarded by mu
	// fail makes the named step ("attach", "mount", "bind", "unmount", ...) fail
	// once with the error.
	fail          map[string]error      // guarded by mu
	frozen        map[string]bool       // paths; guarded by mu
	limit         int                   // of devices; 0 is 16; guarded by mu
	hurried       bool                  // by Freeze, which was killed in the middle; guarded by mu
	thawAnywhere  bool                  // what is frozen is thawed by any path; guarded by mu
	froze, synced int                   // how often; guarded by mu
	small         bool                  // the filesystems are smaller than their devices; guarded by mu
	counted       map[int]loop.Counters // by number; guarded by mu
	readAhead     map[int]int64         // by number, also of what is not bound; guarded by mu
	grown         []mount.GrowSpec      // filesystems that were to grow; guarded by mu
	silent        map[int]string        // the paths of what devices show that do not say it, by number; guarded by mu
	stuck         bool                  // nothing can be unmounted; guarded by mu
}

type fakeDevice struct {
	info    loop.Info
	openers int // our descriptors
	cleared bool
	path    string // image, read anew for Grow
	limit   int64
}

// fakeMajor is a major number that no real device of a test machine has.
const fakeMajor = 4000

// nodeMinor is the minor number in the path of a fake node; nonsense for others.
func nodeMinor(path string) uint32 {
	n, err := strconv.ParseUint(strings.TrimPrefix(path, "/dev/loop"), 10, 32)
	if err != nil {
		return 1 << 20
	}
	return uint32(n)
}

func newFakeKernel() *fakeKernel {
	return &fakeKernel{devices: make(map[int]*fakeDevice), fail: make(map[string]error), frozen: make(map[string]bool), readAhead: make(map[int]int64)}
}

func (k *fakeKernel) failOnce(step string, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.fail[step] = err
}

func (k *fakeKernel) failing(step string) error {
	err := k.fail[step]
	delete(k.fail, step)
	return err
}

// used counts what keeps a device open. Precondition: k.mu is held.
func (k *fakeKernel) used(n int) int {
	users := k.devices[n].openers
	for _, m := range k.mounts {
		if m.Source == k.devices[n].info.Path {
			users++ // a filesystem; a bind-mounted node is no opener (fact 36)
		}
	}
	return users
}

// settle unbinds what nobody uses and was to go. Precondition: k.mu is held.
func (k *fakeKernel) settle() {
	for n, d := range k.devices {
		if (d.info.Autoclear || d.cleared) && k.used(n) == 0 {
			delete(k.devices, n)
		}
	}
}

type fakeAttached struct {
	k      *fakeKernel
	dev    *fakeDevice
	info   loop.Info
	reused bool
	once   sync.Once
}

func (a *fakeAttached) Info() loop.Info { return a.info }
func (a *fakeAttached) Reused() bool    { return a.reused }
func (a *fakeAttached) Close() error {
	a.once.Do(func() {
		a.k.mu.Lock()
		defer a.k.mu.Unlock()
		a.dev.openers--
		a.k.settle()
	})
	return nil
}

func (a *fakeAttached) Release() error {
	a.k.mu.Lock()
	if a.dev.info.Ref != a.info.Ref {
		a.dev.cleared = true
	}
	a.k.mu.Unlock()
	return a.Close()
}

// exchange is LOOP_CHANGE_FD.
func (k *fakeKernel) exchange(number int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.seq++
	k.devices[number].info.DiskSeq = k.seq
	k.devices[number].info.Image.Ino++
}

func (k *fakeKernel) Attach(_ context.Context, backing *os.File, m loop.Mapping) (attached, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.failing("attach"); err != nil {
		return nil, err
	}
	st, err := backing.Stat()
	if err != nil {
		return nil, err
	}
	if err := m.Validate(st.Size()); err != nil {
		return nil, err
	}
	id, err := loop.FileIDOf(backing)
	if err != nil {
		return nil, err
	}
	for n, d := range k.devices {
		same := d.info.Offset == m.Offset && d.limit == m.SizeLimit && d.info.ReadOnly == m.ReadOnly
		switch {
		case d.info.Image != id:
		case d.cleared || d.info.Autoclear && !m.Autoclear:
			return nil, fmt.Errorf("loop%d: %w", n, loop.ErrBusy)
		case same:
			d.openers++
			return &fakeAttached{k: k, dev: d, info: d.info, reused: true}, nil
		case !m.ReadOnly && !d.info.ReadOnly:
			return nil, &loop.ConflictError{Ref: d.info.Ref}
		}
	}
	n := 0
	for k.devices[n] != nil {
		n++
	}
	k.seq++
	size := st.Size() - m.Offset
	if m.SizeLimit > 0 {
		size = min(size, m.SizeLimit)
	}
	info := loop.Info{
		Ref: loop.Ref{Number: n, DiskSeq: k.seq}, State: loop.Bound, Path: fmt.Sprintf("/dev/loop%d", n), Image: id,
		Major: fakeMajor, Minor: uint32(n),
		Offset: m.Offset, SizeLimit: m.SizeLimit, Size: size, BlockSize: m.BlockSize, ReadOnly: m.ReadOnly,
		Autoclear: m.Autoclear, Discard: m.Discard, Tag: m.Tag,
	}
	k.devices[n] = &fakeDevice{info: info, openers: 1, path: backing.Name(), limit: m.SizeLimit}
	return &fakeAttached{k: k, dev: k.devices[n], info: info}, nil
}

func (k *fakeKernel) Hold(_ context.Context, ref loop.Ref) (attached, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	d, ok := k.devices[ref.Number]
	if !ok || d.info.Ref != ref {
		return nil, loop.ErrNotBound
	}
	d.openers++
	return &fakeAttached{k: k, dev: d, info: d.info, reused: true}, nil
}

func (k *fakeKernel) Detach(_ context.Context, ref loop.Ref) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.failing("detach"); err != nil {
		return err
	}
	d, ok := k.devices[ref.Number]
	if !ok || d.info.Ref != ref {
		return nil
	}
	d.cleared, d.info.Autoclear = true, true // what LOOP_CLR_FD does to a device in use
	k.settle()
	if k.devices[ref.Number] != nil {
		return fmt.Errorf("loop%d: %w", ref.Number, loop.ErrBusy)
	}
	return nil
}

func (k *fakeKernel) WaitUnbound(_ context.Context, ref loop.Ref) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.settle()
	if d, ok := k.devices[ref.Number]; ok && d.info.Ref == ref {
		return fmt.Errorf("loop%d: %w", ref.Number, loop.ErrBusy)
	}
	return nil
}

func (k *fakeKernel) Grow(_ context.Context, ref loop.Ref) (int64, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	d, ok := k.devices[ref.Number]
	if !ok || d.info.Ref != ref {
		return 0, loop.ErrNotBound
	}
	st, err := os.Stat(d.path)
	if err != nil {
		return 0, err
	}
	d.info.Size = st.Size() - d.info.Offset
	return d.info.Size, nil
}

func (k *fakeKernel) DropCache(_ context.Context, ref loop.Ref) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if d, ok := k.devices[ref.Number]; !ok || d.info.Ref != ref {
		return loop.ErrNotBound
	}
	return k.failing("drop")
}

func (k *fakeKernel) Find(_ context.Context, backing *os.File) ([]loop.Info, error) {
	id, err := loop.FileIDOf(backing)
	if err != nil {
		return nil, err
	}
	all, err := k.FindAll(context.Background())
	return slices.DeleteFunc(all, func(i loop.Info) bool { return i.Image != id }), err
}

func (k *fakeKernel) FindAll(context.Context) ([]loop.Info, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	var all []loop.Info
	for _, n := range slices.Sorted(maps.Keys(k.devices)) {
		all = append(all, k.devices[n].info)
	}
	return all, nil
}

// Survey is FindAll, but for the devices that are silent.
func (k *fakeKernel) Survey(ctx context.Context) (bound, silent []loop.Info, err error) {
	all, err := k.FindAll(ctx)
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, i := range all {
		if path, ok := k.silent[i.Number]; ok {
			silent = append(silent, loop.Info{Ref: i.Ref, State: i.State, Path: i.Path, Major: i.Major, Minor: i.Minor, BackingPath: path})
		} else {
			bound = append(bound, i)
		}
	}
	return bound, silent, err
}

func (k *fakeKernel) Status(_ context.Context, ref loop.Ref) (loop.Info, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	d, ok := k.devices[ref.Number]
	if !ok || d.info.Ref != ref {
		return loop.Info{}, loop.ErrNotBound
	}
	if _, ok := k.silent[ref.Number]; ok {
		return loop.Info{}, loop.ErrSilent
	}
	return d.info, nil
}

// Counters are those of the number: they go on over a bind.
func (k *fakeKernel) Counters(ref loop.Ref) (loop.Counters, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if d, ok := k.devices[ref.Number]; !ok || d.info.Ref != ref {
		return loop.Counters{}, loop.ErrNotBound
	}
	return k.counted[ref.Number], nil
}

func (k *fakeKernel) Sync(_ context.Context, ref loop.Ref) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if d, ok := k.devices[ref.Number]; !ok || d.info.Ref != ref {
		return loop.ErrNotBound
	}
	k.synced++
	return k.failing("sync")
}

// fakeFrozen is what Freeze returns.
type fakeFrozen struct {
	k     *fakeKernel
	paths []string
}

// EndHelper has nothing to end.
func (k *fakeKernel) EndHelper() error { return nil }

// CanExpedite says whether nothing is hurried yet.
func (k *fakeKernel) CanExpedite() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return !k.hurried
}

// EndExpedite notes that nothing is hurried any more.
func (k *fakeKernel) EndExpedite() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.hurried = false
	return nil
}

// Freeze stops nobody, and notes what is frozen.
func (k *fakeKernel) Freeze(_ context.Context, s mount.FreezeSpec) (frozen, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.failing("freeze"); err != nil {
		return nil, err
	}
	for _, path := range s.Paths {
		if _, ok := k.top(path); !ok {
			return nil, os.ErrNotExist
		}
		if k.frozen[path] {
			return nil, mount.ErrBusy
		}
	}
	for _, path := range s.Paths {
		k.frozen[path] = true
		k.froze++
	}
	return &fakeFrozen{k, s.Paths}, nil
}

func (f *fakeFrozen) Thaw() error {
	for _, path := range f.paths {
		if err := f.k.Thaw(path); err != nil {
			return err
		}
	}
	return nil
}

func (k *fakeKernel) Thaw(path string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.failing("thaw"); err != nil {
		return err
	}
	if k.thawAnywhere {
		k.frozen = make(map[string]bool)
	}
	delete(k.frozen, path)
	return nil
}

func (k *fakeKernel) Limit() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return cmp.Or(k.limit, 16)
}

func (k *fakeKernel) Attached() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return len(k.devices)
}

const fakeReadAhead = 128 << 10

func (k *fakeKernel) ReadAhead(_ context.Context, ref loop.Ref) (int64, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if d, ok := k.devices[ref.Number]; !ok || d.info.Ref != ref {
		return 0, loop.ErrNotBound
	}
	return k.readsAhead(ref.Number), nil
}

// readsAhead of a number. Precondition: k.mu is held.
func (k *fakeKernel) readsAhead(number int) int64 {
	if n, ok := k.readAhead[number]; ok {
		return n
	}
	return fakeReadAhead
}

// SetReadAhead sticks to the number, as on older kernels.
func (k *fakeKernel) SetReadAhead(_ context.Context, ref loop.Ref, bytes int64) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if d, ok := k.devices[ref.Number]; !ok || d.info.Ref != ref {
		return loop.ErrNotBound
	}
	if err := k.failing("readahead"); err != nil {
		return err
	}
	k.readAhead[ref.Number] = bytes
	return nil
}

// fakePods are the cgroups of pods: of all but those that are absent.
type fakePods struct {
	mu     sync.Mutex
	absent map[string]bool              // guarded by mu
	broken error                        // what Limit answers; guarded by mu
	limits map[string]map[string]string // by UID and device; guarded by mu
	see    func(cgroup.Limits)          // told of each that is set; guarded by mu
	hold   func(uid string)             // Limit waits for it, without mu, if it is not nil; guarded by mu
}

func newFakePods() *fakePods {
	return &fakePods{absent: make(map[string]bool), limits: make(map[string]map[string]string)}
}

func (p *fakePods) Limit(uid string, d cgroup.Device, l cgroup.Limits) error {
	p.mu.Lock()
	hold := p.hold
	p.mu.Unlock()
	if hold != nil {
		hold(uid)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.see != nil {
		p.see(l)
	}
	if p.broken != nil {
		return p.broken
	}
	if p.absent[uid] {
		return cgroup.ErrNoPod
	}
	key := uid + " " + d.String()
	if p.limits[key] == nil {
		p.limits[key] = make(map[string]string)
	}
	for name, value := range map[string]*int64{"riops": l.ReadIOPS, "wiops": l.WriteIOPS, "rbps": l.ReadBandwidth, "wbps": l.WriteBandwidth} {
		switch {
		case value == nil:
		case *value == 0:
			delete(p.limits[key], name)
		default:
			p.limits[key][name] = strconv.FormatInt(*value, 10)
		}
	}
	return nil
}

// of lists what holds for a pod on a device.
func (p *fakePods) of(uid string, d cgroup.Device) map[string]string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return maps.Clone(p.limits[uid+" "+d.String()])
}

func (p *fakePods) set(broken error, absent ...string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.broken = broken
	clear(p.absent)
	for _, uid := range absent {
		p.absent[uid] = true
	}
}

// top finds the uppermost mount at a path. Precondition: k.mu is held.
func (k *fakeKernel) top(path string) (mount.Mount, bool) {
	path = filepath.Clean(path)
	for _, m := range slices.Backward(k.mounts) {
		if m.Path == path {
			return m, true
		}
	}
	return mount.Mount{}, false
}

func (k *fakeKernel) Mount(_ context.Context, s mount.Spec) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.failing("mount"); err != nil {
		return err
	}
	if _, err := mount.ParseOptions(s.FSType, s.Options); err != nil {
		return err
	}
	if m, ok := k.top(s.Target); ok {
		if m.Source == s.Source {
			return nil
		}
		return &mount.ForeignError{}
	}
	if err := os.MkdirAll(s.Target, 0o750); err != nil {
		return err
	}
	k.mounted++
	k.mounts = append(k.mounts, mount.Mount{
		ID: k.mounted, Path: filepath.Clean(s.Target), Root: "/", FSType: s.FSType, Source: s.Source, Major: fakeMajor, Minor: nodeMinor(s.Source),
		ReadOnly: s.ReadOnly || slices.Contains(s.Options, "ro"), SuperOptions: slices.Clone(s.Options),
	})
	return nil
}

func (k *fakeKernel) Bind(_ context.Context, s mount.BindSpec) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.failing("bind"); err != nil {
		return err
	}
	// The kernel numbers the bind of a node by the filesystem of the node, and
	// mount.IsOf looks at the node. Here there is none to look at.
	m := mount.Mount{Path: filepath.Clean(s.Target), Root: s.Source, FSType: "devtmpfs", Source: "devtmpfs", Major: fakeMajor, Minor: nodeMinor(s.Source)}
	if from, ok := k.top(s.Source); ok {
		if s.Mount != from.ID {
			return &mount.OpError{Op: "bind from", Path: s.Source, Err: mount.ErrBusy}
		}
		m = from
		m.Path = filepath.Clean(s.Target)
	}
	m.ReadOnly = m.ReadOnly || s.ReadOnly
	if have, ok := k.top(s.Target); ok {
		if have.Source == m.Source && have.Root == m.Root && have.ReadOnly == m.ReadOnly {
			return nil
		}
		return &mount.ForeignError{}
	}
	if m.FSType == "devtmpfs" {
		f, err := os.Create(s.Target)
		if err != nil {
			return err
		}
		_ = f.Close()
	} else if err := os.MkdirAll(s.Target, 0o750); err != nil {
		return err
	}
	k.mounts = append(k.mounts, m)
	return nil
}

func (k *fakeKernel) Unmount(_ context.Context, target string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.failing("unmount"); err != nil {
		return err
	}
	if k.stuck {
		return mount.ErrBusy
	}
	target = filepath.Clean(target)
	k.mounts = slices.DeleteFunc(k.mounts, func(m mount.Mount) bool { return m.Path == target })
	k.settle()
	return nil
}

func (k *fakeKernel) Remove(ctx context.Context, target string) error {
	if err := k.Unmount(ctx, target); err != nil {
		return err
	}
	if err := os.Remove(target); err != nil && !os.IsNotExist(err) {
		return err
	}
	return nil
}

// mountGrower and the rest of the mount side.
type fakeMounts struct{ *fakeKernel }

func (m fakeMounts) Grow(_ context.Context, s mount.GrowSpec) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.grown = append(m.grown, s)
	return m.failing("growfs")
}

// grownHow says how often the filesystem on a device was to grow, mounted or not.
func (k *fakeKernel) grownHow(device string) (all []string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, s := range k.grown {
		switch {
		case s.Device != device:
		case s.Path != "":
			all = append(all, "mounted")
		default:
			all = append(all, "unmounted")
		}
	}
	return all
}

func (m fakeMounts) Check(context.Context, string, string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.failing("check")
}

func (k *fakeKernel) NeedsGrow(mount.GrowSpec) (bool, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.small, nil
}

func (k *fakeKernel) At(path string) (mount.Mount, bool, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	m, ok := k.top(path)
	return m, ok, nil
}

func (k *fakeKernel) OfDevice(d mount.Device) ([]mount.Mount, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(k.mounts), func(m mount.Mount) bool { return m.Major != d.Major || m.Minor != d.Minor }), nil
}

func (k *fakeKernel) DeviceAt(path string) (mount.Device, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return mount.Device{Major: fakeMajor, Minor: nodeMinor(path), NodeMajor: fakeMajor + 1}, k.failing("device")
}

func (k *fakeKernel) Stats(path string) (mount.Stats, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return mount.Stats{}, err
	}
	return mount.Stats{Total: 1 << 40, Available: 1 << 39, Used: 1 << 39, Inodes: 10, InodesFree: 5, InodesUsed: 5}, nil
}

// clean fails the test when something is left.
func (k *fakeKernel) clean(t *testing.T) {
	t.Helper()
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.devices) > 0 || len(k.mounts) > 0 || len(k.frozen) > 0 {
		t.Errorf("left behind: %d devices, mounts %v, frozen %v", len(k.devices), k.mounts, k.frozen)
	}
}
