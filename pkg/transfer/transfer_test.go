package transfer

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"io"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

// got is what a stream was read as.
type got struct {
	head    Description
	content []byte
	err     error
}

func read(r io.Reader) (g got) {
	in := NewReader(r)
	if g.head, g.err = in.Head(); g.err != nil {
		return g
	}
	g.content = make([]byte, min(g.head.Size, 16<<20))
	for {
		offset, data, err := in.Next()
		if errors.Is(err, io.EOF) {
			return g
		}
		if err != nil {
			g.err = err
			return g
		}
		copy(g.content[offset:], data)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// stream is a good one: text, noise, and holes.
func stream(t *testing.T) (b []byte, want []byte, d Description) {
	t.Helper()
	d = Description{Size: 4 << 20, Filesystem: "ext4", BlockSize: 4096, MkfsOptions: []string{"-N", "5"}, Bytes: MaxPiece + 2000}
	want = make([]byte, d.Size)
	copy(want[4096:], bytes.Repeat([]byte("compressible "), 100))
	_, _ = rand.Read(want[2<<20 : 2<<20+MaxPiece])
	want[d.Size-1] = 1
	var out bytes.Buffer
	w := NewWriter(&out)
	must(t, w.Head(d))
	for _, p := range [][2]int64{{4096, 1300}, {2 << 20, MaxPiece}, {d.Size - 1, 1}} {
		must(t, w.Data(p[0], want[p[0]:p[0]+p[1]]))
	}
	must(t, w.End())
	return out.Bytes(), want, d
}

func TestStream(t *testing.T) {
	b, want, d := stream(t)
	if len(b) > MaxPiece+1500 {
		t.Errorf("%d bytes for %d of noise and some that compress", len(b), MaxPiece)
	}
	for name, r := range map[string]io.Reader{"at once": bytes.NewReader(b), "byte by byte": iotest.OneByteReader(bytes.NewReader(b))} {
		t.Run(name, func(t *testing.T) {
			g := read(r)
			if g.err != nil || !bytes.Equal(g.content, want) || !cmp.Equal(g.head, d) {
				t.Error(g.err, cmp.Diff(g.head, d))
			}
		})
	}
}

// A stream that is cut anywhere, or of which any byte is changed, is not whole.
func TestStreamDamage(t *testing.T) {
	d := Description{Size: 1 << 20, BlockSize: 4096}
	var out bytes.Buffer
	w := NewWriter(&out)
	must(t, w.Head(d))
	must(t, w.Data(10, bytes.Repeat([]byte("x"), 1000)))
	must(t, w.Data(5000, []byte("noise?")))
	must(t, w.End())
	b := out.Bytes()
	if g := read(bytes.NewReader(b)); g.err != nil {
		t.Fatal(g.err)
	}
	for n := range b {
		if g := read(bytes.NewReader(b[:n])); !errors.Is(g.err, ErrCut) {
			t.Fatalf("cut after %d bytes: %v", n, g.err)
		}
		for bit := range 8 {
			bad := bytes.Clone(b)
			bad[n] ^= 1 << bit
			if g := read(bytes.NewReader(bad)); !errors.Is(g.err, ErrCorrupt) && !errors.Is(g.err, ErrCut) {
				t.Fatalf("bit %d of byte %d: %v", bit, n, g.err)
			}
		}
	}
	lost := errors.New("lost")
	if g := read(io.MultiReader(bytes.NewReader(b[:100]), iotest.ErrReader(lost))); !errors.Is(g.err, lost) || !errors.Is(g.err, ErrCut) {
		t.Error(g.err)
	}
}

// frames are those that no Writer writes, with good checksums.
func TestLyingSender(t *testing.T) {
	frame := func(kind byte, offset int64, payload string) []byte { return pack(nil, kind, offset, []byte(payload)) }
	head := frame(kindHead, 0, `{"size":1000,"blockSize":4096}`)
	huge := header{kind: kindData, length: 1 << 31, stored: 1 << 30}.encode()
	bomb := header{kind: kindData, length: 100, stored: 5}
	bombed := bomb.encode()
	long := binary.AppendUvarint(nil, 1<<40)
	for name, frames := range map[string][][]byte{
		"no head":                {frame(kindData, 0, "x")},
		"a head that is no JSON": {frame(kindHead, 0, "{")},
		"a negative size":        {frame(kindHead, 0, `{"size":-1}`)},
		"two heads":              {head, head},
		"beyond the source":      {head, frame(kindData, 999, "xy")},
		"far beyond":             {head, frame(kindData, 1<<62, "x")},
		"backwards":              {head, frame(kindData, 9, "x"), frame(kindData, 8, "x")},
		"overlapping":            {head, frame(kindData, 9, "xy"), frame(kindData, 10, "x")},
		"an empty piece":         {head, frame(kindData, 9, "")},
		"an unknown frame":       {head, frame('?', 9, "x")},
		"an end that lies":       {head, frame(kindData, 9, "x"), frame(kindEnd, 0, string(make([]byte, 32)))},
		"an end of nothing":      {head, frame(kindEnd, 0, "")},
		"a failure of no JSON":   {head, frame(kindFail, 0, "x")},
		"a frame without end":    {head, huge[:]},
		"a frame that unpacks to more than it says": {head, bombed[:], long},
	} {
		t.Run(name, func(t *testing.T) {
			g := read(io.MultiReader(bytes.NewReader([]byte(magic)), bytes.NewReader(bytes.Join(frames, nil))))
			if !errors.Is(g.err, ErrCorrupt) {
				t.Errorf("%v", g.err)
			}
		})
	}
	if g := read(bytes.NewReader([]byte("HTTP/1.1 400 Bad Request"))); !errors.Is(g.err, ErrCorrupt) {
		t.Error(g.err)
	}
}

func TestFailure(t *testing.T) {
	var out bytes.Buffer
	w := NewWriter(&out)
	must(t, w.Fail(SenderError{Code: 9, Message: "in use"}))
	if err := w.End(); err == nil {
		t.Error("a frame behind the last")
	}
	g := read(&out)
	if f, ok := errors.AsType[*SenderError](g.err); !ok || f.Code != 9 || f.Message != "in use" {
		t.Error(g.err)
	}
}

// A sender that is busy says so, and finds out that nobody listens.
func TestBeats(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, out := io.Pipe()
		w := NewWriter(out)
		ctx, stop := w.Beating(t.Context(), BeatEvery)
		heads := make(chan got)
		go func() { heads <- read(r) }()
		time.Sleep(5 * BeatEvery)
		must(t, w.Head(Description{Size: 5}))
		time.Sleep(3 * BeatEvery)
		must(t, w.End())
		if g := <-heads; g.err != nil || g.head.Size != 5 {
			t.Errorf("%+v", g)
		}
		time.Sleep(2 * BeatEvery)
		stop()
		if ctx.Err() == nil {
			t.Error("it goes on")
		}

		r, out = io.Pipe()
		gone := errors.New("gone")
		must(t, r.CloseWithError(gone))
		ctx, stop = NewWriter(out).Beating(t.Context(), BeatEvery)
		defer stop()
		<-ctx.Done()
		if !errors.Is(context.Cause(ctx), gone) {
			t.Error(context.Cause(ctx))
		}
	})
}

func FuzzReader(f *testing.F) {
	var out bytes.Buffer
	w := NewWriter(&out)
	_ = w.Head(Description{Size: 1000})
	_ = w.Data(10, bytes.Repeat([]byte("x"), 100))
	_ = w.End()
	f.Add(out.Bytes())
	out.Reset()
	_ = NewWriter(&out).Fail(SenderError{Code: 1, Message: "m"})
	f.Add(out.Bytes())
	f.Add([]byte(magic))
	f.Fuzz(func(t *testing.T, b []byte) {
		in := bytes.NewReader(b)
		r := NewReader(in)
		d, err := r.Head()
		for end := int64(0); err == nil; {
			var offset int64
			var data []byte
			if offset, data, err = r.Next(); err != nil {
				break
			}
			if offset < end || offset+int64(len(data)) > d.Size || len(data) > MaxPiece {
				t.Fatalf("%d bytes at %d after %d of %d", len(data), offset, end, d.Size)
			}
			end = offset + int64(len(data))
		}
		// Who only follows sees the end of what is whole.
		seen := NewFollower()
		_, _ = seen.Write(b[:len(b)-in.Len()])
		if errors.Is(err, io.EOF) && !seen.Ended() {
			t.Fatal("it does not end for who follows")
		}
	})
}
