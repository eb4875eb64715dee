package driver

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/csi-loop/csi-loop/pkg/image"
	"github.com/csi-loop/csi-loop/pkg/transfer"
)

// otherNode offers what another driver has, over a pipe instead of a network.
type otherNode struct {
	n       *node
	request transfer.Request
	// spoil changes what is sent; it may be nil.
	spoil func(w io.Writer) io.Writer

	mu     sync.Mutex
	opened int // guarded by mu
	wg     sync.WaitGroup
}

func (o *otherNode) offer(t *testing.T) *transfer.Offer {
	t.Helper()
	source, err := o.n.d.Sources().Describe(t.Context(), o.request)
	if err != nil {
		t.Fatal(err)
	}
	return &transfer.Offer{Source: source, Open: func(ctx context.Context) (io.ReadCloser, error) {
		o.mu.Lock()
		o.opened++
		o.mu.Unlock()
		r, w := io.Pipe()
		stop := context.AfterFunc(ctx, func() { _ = r.CloseWithError(ctx.Err()) })
		o.wg.Go(func() {
			defer stop()
			var out io.Writer = w
			if o.spoil != nil {
				out = o.spoil(w)
			}
			_ = o.n.d.Sources().Send(context.WithoutCancel(ctx), o.request, out)
			_ = w.Close()
		})
		return r, nil
	}}
}

func (o *otherNode) times() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.opened
}

// fetch calls CreateVolume as the link does, with an offer or without.
func (n *node) fetch(ctx context.Context, name string, o *transfer.Offer, src *csi.VolumeContentSource, size int64, c *csi.VolumeCapability) (*csi.Volume, error) {
	if o != nil {
		ctx = transfer.WithOffer(ctx, o)
	}
	resp, err := (&controllerServer{d: n.d}).CreateVolume(ctx, &csi.CreateVolumeRequest{
		Name: name, CapacityRange: &csi.CapacityRange{RequiredBytes: size}, VolumeContentSource: src, VolumeCapabilities: []*csi.VolumeCapability{c},
	})
	return resp.GetVolume(), toStatus(err)
}

// twoDrivers are a node with a raw block volume of some data, a snapshot of it, and
// another node.
func twoDrivers(t *testing.T) (a, b *node, v volume, snapshot string, data []byte) {
	t.Helper()
	a, b = newFake(t), newFake(t)
	v = a.create("v", 8*mib, blockCap(oneWriter), nil)
	data = bytes.Repeat([]byte("some data "), 200_000)
	f, err := os.OpenFile(a.imagePath(v.id), os.O_WRONLY, 0)
	a.must(err)
	_, err = f.WriteAt(data, mib)
	a.must(err)
	a.must(f.Close())
	s, err := v.snapshot("s")
	a.must(err)
	return a, b, v, s.GetSnapshotId(), data
}

func (n *node) imagePath(id string) string {
	_, dir, _ := image.ParseID(id)
	return filepath.Join(n.pool[0].Path, "volumes", dir, "disk.img")
}

// clean fails when the pool has more than it should.
func (n *node) clean(t *testing.T) {
	t.Helper()
	if left, err := filepath.Glob(n.pool[0].Path + "/.*"); err != nil || len(left) > 0 {
		t.Errorf("left: %v (%v)", left, err)
	}
}

func TestFetch(t *testing.T) {
	a, b, v, snapshot, data := twoDrivers(t)
	for name, c := range map[string]struct {
		src *csi.VolumeContentSource
		req transfer.Request
	}{
		"restored": {fromSnapshot(snapshot), transfer.Request{Snapshot: snapshot}},
		"cloned":   {v.asSource(), transfer.Request{Volume: v.id}},
	} {
		o := &otherNode{n: a, request: c.req}
		made, err := b.fetch(t.Context(), name, o.offer(t), c.src, 9*mib, blockCap(oneWriter))
		b.must(err)
		o.wg.Wait()
		got, err := os.ReadFile(b.imagePath(made.GetVolumeId()))
		if err != nil || len(got) != int(9*mib) || !bytes.Equal(got[mib:mib+int64(len(data))], data) || csiSource(parsed(t, c.src)).String() != made.GetContentSource().String() {
			t.Errorf("%s: %d bytes, %v, %v", name, len(got), made, err)
		}
		// Neither an offer nor the source is needed for what is there.
		again, err := b.fetch(t.Context(), name, nil, c.src, 9*mib, blockCap(oneWriter))
		if b.must(err); again.GetVolumeId() != made.GetVolumeId() || o.times() != 1 {
			t.Errorf("%s: %v, fetched %d times", name, again, o.times())
		}
	}
	sent, _ := a.d.Flows()
	_, received := b.d.Flows()
	for _, s := range []FlowStats{sent, received} {
		if s.Done != 2 || s.Failed != 0 || s.Bytes < 2*int64(len(data)) || len(s.Running) > 0 {
			t.Errorf("%+v", s)
		}
	}
	a.clean(t)
	b.clean(t)
}

func parsed(t *testing.T, s *csi.VolumeContentSource) *image.Source {
	t.Helper()
	src, err := parseSource(s)
	if err != nil {
		t.Fatal(err)
	}
	return src
}

func TestFetchRefusals(t *testing.T) {
	a, b, _, snapshot, _ := twoDrivers(t)
	src, block := fromSnapshot(snapshot), blockCap(oneWriter)
	o := &otherNode{n: a, request: transfer.Request{Snapshot: snapshot}}
	good := o.offer(t)
	described := func(change func(d *transfer.Description)) *transfer.Offer {
		bad := *good
		change(&bad.Source)
		return &bad
	}
	for name, c := range map[string]struct {
		offer *transfer.Offer
		size  int64
		cap   *csi.VolumeCapability
		want  codes.Code
	}{
		"no offer":                 {nil, 8 * mib, block, codes.Unavailable},
		"smaller":                  {good, 7 * mib, block, codes.OutOfRange},
		"a filesystem":             {good, 8 * mib, mountCap("ext4", oneWriter), codes.InvalidArgument},
		"more than there is":       {good, 1 << 50, block, codes.ResourceExhausted},
		"described smaller":        {described(func(d *transfer.Description) { d.Size = mib }), 8 * mib, block, codes.Aborted},
		"described of no size":     {described(func(d *transfer.Description) { d.Size = 0 }), 8 * mib, block, codes.Unavailable},
		"described of odd blocks":  {described(func(d *transfer.Description) { d.BlockSize = 1000 }), 8 * mib, block, codes.Unavailable},
		"described of other kind":  {described(func(d *transfer.Description) { d.Filesystem = "ntfs" }), 8 * mib, block, codes.Unavailable},
		"options that are refused": {described(func(d *transfer.Description) { d.Filesystem, d.MkfsOptions = "ext4", []string{"-d", "/etc"} }), 8 * mib, mountCap("ext4", oneWriter), codes.Unavailable},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := b.fetch(t.Context(), "c", c.offer, src, c.size, c.cap)
			code(t, err, c.want)
		})
	}
	o.wg.Wait()
	b.clean(t)
	if all := b.store.List(); len(all) > 0 {
		t.Error(all)
	}
	for _, r := range []transfer.Request{{}, {Snapshot: snapshot, Volume: snapshot}, {Snapshot: "none"}, {Volume: image.VolumeID(a.store.Pools()[0].ID(), "none")}} {
		if _, err := a.d.Sources().Describe(t.Context(), r); status.Code(err) != codes.InvalidArgument && status.Code(err) != codes.NotFound {
			t.Errorf("%+v: %v", r, err)
		}
	}
}

// What the sender says of itself keeps its code where another try would not change it,
// and never makes Kubernetes choose another node.
func TestFetchFromAVolumeInUse(t *testing.T) {
	a, b := newFake(t), newFake(t)
	v := a.create("v", 16*mib, mountCap("ext4", oneWriter), nil).up("pod")
	o := &otherNode{n: a, request: transfer.Request{Volume: v.id}}
	if a.copies() {
		_, err := b.fetch(t.Context(), "c", o.offer(t), v.asSource(), 16*mib, v.cap)
		code(t, err, codes.FailedPrecondition)
		o.wg.Wait()
	}
	o.request.Parameters = map[string]string{"copyInUse": "true", "freezeTimeout": "1m", "pool": "ignored"}
	_, err := b.fetch(t.Context(), "c", o.offer(t), v.asSource(), 16*mib, v.cap)
	b.must(err)
	o.wg.Wait()
	if a.fake.froze != 1 || len(a.fake.frozen) > 0 {
		t.Errorf("%d freezes, %v", a.fake.froze, a.fake.frozen)
	}
	for code, want := range map[codes.Code]codes.Code{
		codes.ResourceExhausted: codes.Unavailable, codes.OK: codes.Unavailable, codes.Internal: codes.Unavailable, 99: codes.Unavailable,
		codes.NotFound: codes.NotFound, codes.Aborted: codes.Aborted,
	} {
		if got := codeOf(failure(&transfer.SenderError{Code: uint32(code)})); got != want {
			t.Errorf("%v: %v", code, got)
		}
	}
	v.down("pod")
	a.clean(t)
}

// held holds a stream up until it is let go.
type heldStream struct {
	io.Writer

	at   int
	gate chan struct{}
}

func (h *heldStream) Write(b []byte) (int, error) {
	if h.at -= len(b); h.at < 0 {
		<-h.gate
	}
	return h.Writer.Write(b)
}

// A copy goes on without its call; a repeated call joins it, with an offer or without;
// what nobody asks for is dropped and leaves nothing.
func TestFetchIsAJob(t *testing.T) {
	a, b, _, snapshot, data := twoDrivers(t)
	b.d.jobs.patience = time.Minute // the first call ends before
	gate := make(chan struct{})
	o := &otherNode{n: a, request: transfer.Request{Snapshot: snapshot}, spoil: func(w io.Writer) io.Writer {
		return &heldStream{Writer: w, at: 100, gate: gate}
	}}
	src := fromSnapshot(snapshot)
	canceled, cancel := context.WithCancel(t.Context())
	time.AfterFunc(10*time.Millisecond, cancel)
	_, err := b.fetch(canceled, "c", o.offer(t), src, 8*mib, blockCap(oneWriter))
	code(t, err, codes.Canceled)
	b.d.jobs.patience = 50 * time.Millisecond
	var told []bool
	stop := b.d.ObserveCopies(func(name string, making bool) {
		if name == "c" {
			told = append(told, making)
		}
	})
	for _, offer := range []*transfer.Offer{o.offer(t), nil} {
		_, err = b.fetch(t.Context(), "c", offer, src, 8*mib, blockCap(oneWriter))
		code(t, err, codes.Aborted)
	}
	_, err = b.fetch(t.Context(), "c", o.offer(t), src, 9*mib, blockCap(oneWriter))
	code(t, err, codes.Aborted) // something else under the name
	close(gate)
	b.d.jobs.patience = time.Minute
	made, err := b.fetch(t.Context(), "c", nil, src, 8*mib, blockCap(oneWriter))
	b.must(err)
	got, err := os.ReadFile(b.imagePath(made.GetVolumeId()))
	if err != nil || !bytes.Equal(got[mib:mib+int64(len(data))], data) || o.times() != 1 {
		t.Errorf("fetched %d times, %v", o.times(), err)
	}
	stop()
	if len(told) < 2 || !told[0] || told[len(told)-1] {
		t.Errorf("told %v", told)
	}

	gate = make(chan struct{})
	o.spoil = func(w io.Writer) io.Writer { return &heldStream{Writer: w, at: 100, gate: gate} }
	b.d.jobs.patience, b.d.jobs.interest = 50*time.Millisecond, 50*time.Millisecond
	_, err = b.fetch(t.Context(), "dropped", o.offer(t), src, 8*mib, blockCap(oneWriter))
	code(t, err, codes.Aborted)
	deadline := time.After(20 * time.Second)
	for len(b.d.receiving.count().Running) > 0 {
		select {
		case <-deadline:
			t.Fatal("it goes on though nobody asks")
		case <-time.After(5 * time.Millisecond):
		}
	}
	close(gate)
	o.wg.Wait()
	b.d.jobs.stop()
	b.clean(t)
	if _, ok := b.store.Find("dropped"); ok {
		t.Error("it was made")
	}
	if sent, _ := a.d.Flows(); len(sent.Running) > 0 {
		t.Errorf("%+v", sent)
	}
}

// cutting ends a stream, or spoils it.
type cutting struct {
	io.Writer

	at   int
	flip bool
}

func (c *cutting) Write(b []byte) (int, error) {
	if c.at -= len(b); c.at < 0 && c.at+len(b) >= 0 {
		if !c.flip {
			return 0, errors.New("cut")
		}
		b = bytes.Clone(b)
		b[len(b)-1] ^= 1
	}
	return c.Writer.Write(b)
}

// A stream that is cut or changed is UNAVAILABLE and leaves nothing; the next call
// begins anew.
func TestFetchIsCut(t *testing.T) {
	for name, flip := range map[string]bool{"cut": false, "changed": true} {
		t.Run(name, func(t *testing.T) {
			a, b, _, snapshot, _ := twoDrivers(t)
			o := &otherNode{n: a, request: transfer.Request{Snapshot: snapshot}, spoil: func(w io.Writer) io.Writer {
				return &cutting{Writer: w, at: 300, flip: flip}
			}}
			_, err := b.fetch(t.Context(), "c", o.offer(t), fromSnapshot(snapshot), 8*mib, blockCap(oneWriter))
			code(t, err, codes.Unavailable)
			o.wg.Wait()
			b.clean(t)
			o.spoil = nil
			_, err = b.fetch(t.Context(), "c", o.offer(t), fromSnapshot(snapshot), 8*mib, blockCap(oneWriter))
			b.must(err)
			o.wg.Wait()
			if _, received := b.d.Flows(); received.Done != 1 || received.Failed != 1 {
				t.Errorf("%+v", received)
			}
		})
	}
}

func TestFlowBounds(t *testing.T) {
	var f flows
	var all []*flow
	for range maxFlows {
		w, err := f.begin("x")
		if err != nil {
			t.Fatal(err)
		}
		w.total.Store(5)
		all = append(all, w)
	}
	if _, err := f.begin("x"); codeOf(err) != codes.Aborted {
		t.Error(err)
	}
	if s := f.count(); len(s.Running) != 1 || s.Running[0].Total != 5*maxFlows {
		t.Errorf("%+v", s) // one metric for each name
	}
	f.end(all[0], errors.New("failed"))
	if _, err := f.begin("y"); err != nil {
		t.Error(err)
	}
}

// What the controller offers is the source, also if a pool of its ID is open here: that is
// a copy of the source's pool, and its content another by now.
func TestFetchOfWhatIsHereToo(t *testing.T) {
	a, b, _, snapshot, data := twoDrivers(t)
	own, err := b.create("own", 8*mib, blockCap(oneWriter), nil).snapshot("own")
	b.must(err)
	o := &otherNode{n: a, request: transfer.Request{Snapshot: snapshot}}
	made, err := b.fetch(t.Context(), "restored", o.offer(t), fromSnapshot(own.GetSnapshotId()), 8*mib, blockCap(oneWriter))
	b.must(err)
	o.wg.Wait()
	got, err := os.ReadFile(b.imagePath(made.GetVolumeId()))
	if err != nil || !bytes.Equal(got[mib:mib+int64(len(data))], data) || o.times() != 1 {
		t.Errorf("it was made of what is here: %v, fetched %d times", err, o.times())
	}
}
