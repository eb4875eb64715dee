package image

import (
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"testing"
)

// piped is the content of a source as it would come from another node.
type piped struct {
	c   *Content
	buf []byte
	// before is called before each piece, with its number.
	before func(n int) error
	n      int
}

func (p *piped) Next(ctx context.Context) (int64, []byte, error) {
	if p.before != nil {
		if err := p.before(p.n); err != nil {
			return 0, nil, err
		}
	}
	p.n++
	if p.buf == nil {
		p.buf = make([]byte, 64<<10)
	}
	offset, n, err := p.c.Next(ctx, p.buf)
	return offset, p.buf[:n], err
}

func openContent(t *testing.T, s *Store, src Source, quiesce Quiesce) *Content {
	t.Helper()
	c, err := s.OpenContent(ctx, src, quiesce)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// A volume is made of what another store's source holds, which may change and go
// meanwhile.
func TestContentGoesElsewhere(t *testing.T) {
	here, there := poolDir(t), poolDir(t)
	a, pa := openPool(t, here)
	b, pb := openPool(t, there)
	v := create(t, pa, Spec{Name: "v", Size: 4 * MiB, Allocation: Thin})
	first := fill(t, pa, v.ID, MiB, 300_000)
	last := fill(t, pa, v.ID, 4*MiB-5, 5)
	one := snap(t, pa, "one", v.ID)
	for name, c := range map[string]struct {
		source Source
		spec   Spec
	}{
		"restored-thick":  {Source{Snapshot: one.ID}, Spec{}},
		"restored-thin":   {Source{Snapshot: one.ID}, Spec{Allocation: Thin}},
		"restored-larger": {Source{Snapshot: one.ID}, Spec{Size: 9 * MiB}},
		"cloned-thick":    {Source{Volume: v.ID}, Spec{Size: 5 * MiB}},
		"cloned-thin":     {Source{Volume: v.ID}, Spec{Allocation: Thin}},
	} {
		t.Run(name, func(t *testing.T) {
			c.spec.Name, c.spec.Source = name, &c.source
			if c.spec.Size == 0 {
				c.spec.Size = 4 * MiB
			}
			content := openContent(t, a, c.source, held)
			if content.Spec.Size != 4*MiB || content.Bytes < 300_000 || content.Bytes > 2*MiB {
				t.Errorf("%d of %d bytes", content.Bytes, content.Spec.Size)
			}
			fill(t, pa, v.ID, MiB, 10_000) // it is not what is read
			defer func() { restoreRange(t, pa, v.ID, MiB, first) }()
			in := &piped{c: content}
			made, err := pb.CreateFromInflow(ctx, c.spec, content.Spec, in)
			if err != nil {
				t.Fatal(err)
			}
			want := make([]byte, c.spec.Size)
			copy(want[MiB:], first)
			copy(want[4*MiB-5:], last)
			if got := volumeContent(t, pb, made.ID, 0, len(want)); !bytes.Equal(got, want) {
				t.Error("the content differs")
			}
			if made.Allocation == Thick {
				wantWhole(t, pb, made.ID)
			}
			again, err := pb.CreateFromInflow(ctx, c.spec, content.Spec, &piped{before: func(int) error { return errors.New("read again") }})
			if err != nil || again.ID != made.ID {
				t.Errorf("%+v, %v", again, err)
			}
			content.Close()
			wantAccount(t, a, pa)
			wantAccount(t, b, pb)
		})
	}
	wantClean(t, here)
	wantClean(t, there)
}

// restoreRange puts back what a test wrote over.
func restoreRange(t *testing.T, p *Pool, id string, offset int64, data []byte) {
	t.Helper()
	f, err := p.OpenImage(ctx, id, false)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(data, offset); err != nil {
		t.Fatal(err)
	}
}

// A snapshot that goes while it is read stays readable, and the store waits for who
// reads.
func TestContentOutlivesItsSource(t *testing.T) {
	dir := poolDir(t)
	s, p := openPool(t, dir)
	v := create(t, p, Spec{Name: "v", Size: MiB})
	data := fill(t, p, v.ID, 0, 1000)
	one := snap(t, p, "one", v.ID)
	restored, cloned := openContent(t, s, Source{Snapshot: one.ID}, nil), openContent(t, s, Source{Volume: v.ID}, nil)
	if err := errors.Join(p.RemoveSnapshot(ctx, one.ID), p.Remove(ctx, v.ID)); err != nil {
		t.Fatal(err)
	}
	wantClean(t, dir)
	closed := make(chan error)
	go func() { closed <- s.Close() }()
	b := make([]byte, MiB)
	for _, c := range []*Content{restored, cloned} {
		if _, n, err := c.Next(ctx, b); err != nil || !bytes.HasPrefix(b[:n], data) {
			t.Error(n, err)
		}
		c.Close()
		c.Close()
	}
	if err := <-closed; err != nil {
		t.Error(err)
	}
}

// inflow is an Inflow of given pieces.
type inflow []arrival

type arrival struct {
	offset int64
	data   string
	err    error
}

func (i *inflow) Next(context.Context) (int64, []byte, error) {
	if len(*i) == 0 {
		return 0, nil, io.EOF
	}
	p := (*i)[0]
	*i = (*i)[1:]
	return p.offset, []byte(p.data), p.err
}

// Of what is cut off, or cannot be the content of the source, nothing stays.
func TestInflowRefusals(t *testing.T) {
	dir := poolDir(t)
	s, p := openPool(t, dir)
	src := &Source{Snapshot: VolumeID(strings.Repeat("a", 20), "elsewhere")}
	of := Spec{Size: 2 * MiB, BlockSize: 4096}
	cut := errors.New("cut")
	for name, c := range map[string]struct {
		in   inflow
		spec Spec
		want error
	}{
		"cut at the start":          {inflow{{err: cut}}, Spec{}, cut},
		"cut after some":            {inflow{{offset: 0, data: "x"}, {err: cut}}, Spec{}, cut},
		"beyond the source":         {inflow{{offset: 2*MiB - 1, data: "xy"}}, Spec{Size: 4 * MiB}, ErrInflow},
		"far beyond":                {inflow{{offset: 1 << 62, data: "x"}}, Spec{}, ErrInflow},
		"before the start":          {inflow{{offset: -1, data: "x"}}, Spec{}, ErrInflow},
		"backwards":                 {inflow{{offset: 10, data: "x"}, {offset: 5, data: "x"}}, Spec{}, ErrInflow},
		"overlapping":               {inflow{{offset: 10, data: "xy"}, {offset: 11, data: "x"}}, Spec{}, ErrInflow},
		"smaller than the source":   {nil, Spec{Size: MiB}, ErrSize},
		"another filesystem":        {nil, Spec{Size: 16 * MiB, Filesystem: "ext4"}, ErrSource},
		"blocks of another size":    {nil, Spec{BlockSize: 512}, ErrSource},
		"more than there is (thin)": {nil, Spec{Size: 1 << 50, Allocation: Thin}, ErrNoSpace},
	} {
		t.Run(name, func(t *testing.T) {
			c.spec.Name, c.spec.Source = "c", src
			if c.spec.Size == 0 {
				c.spec.Size = 2 * MiB
			}
			_, err := p.CreateFromInflow(ctx, c.spec, of, &c.in)
			wantError(t, err, c.want)
			wantClean(t, dir)
			wantAccount(t, s, p)
			if all := s.List(); len(all) > 0 {
				t.Error(all)
			}
		})
	}
	_, err := p.CreateFromInflow(ctx, Spec{Name: "c", Size: MiB}, of, &inflow{})
	if _, ok := errors.AsType[*SpecError](err); !ok {
		t.Error(err)
	}
	canceled, cancel := context.WithCancel(ctx)
	v := create(t, p, Spec{Name: "v", Size: MiB})
	fill(t, p, v.ID, 0, 1000)
	content := openContent(t, s, Source{Volume: v.ID}, nil)
	_, err = p.CreateFromInflow(canceled, Spec{Name: "c", Size: MiB, Source: src}, content.Spec, &piped{c: content, before: func(n int) error {
		if n == 1 {
			cancel()
		}
		return nil
	}})
	wantError(t, err, context.Canceled)
	wantClean(t, dir)
}

// What is allocated and holds zeros is not sent, wherever it lies.
func TestContentLeavesZerosOut(t *testing.T) {
	s, p := openPool(t, poolDir(t))
	v := create(t, p, Spec{Name: "v", Size: 4 * MiB})
	want := make([]byte, 4*MiB)
	for _, at := range []int64{0, 5000, MiB - 1, MiB + 70_000, 2 * MiB, 4*MiB - 1} {
		want[at] = 1
	}
	restoreRange(t, p, v.ID, 0, want) // zeros are written, too
	for _, size := range []int{64 << 10, 100_000, 512 << 10} {
		c := openContent(t, s, Source{Volume: v.ID}, nil)
		got, sent := make([]byte, len(want)), 0
		for at, b := int64(0), make([]byte, size); ; {
			offset, n, err := c.Next(ctx, b)
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil || n == 0 || offset < at {
				t.Fatal(offset, n, err)
			}
			at, sent = offset+int64(n), sent+n
			copy(got[offset:], b[:n])
		}
		if !bytes.Equal(got, want) || sent > 6*80_000 {
			t.Errorf("in pieces of %d: %d bytes were sent, equal %t", size, sent, bytes.Equal(got, want))
		}
		c.Close()
	}
}
