package main

import (
	"bytes"
	"encoding/binary"
	"io"
	"math/rand/v2"
	"net"
	"testing"
)

// filled is n sectors of one byte.
func filled(b byte, n int) []byte { return bytes.Repeat([]byte{b}, n*sector) }

func (d *disk) first() byte {
	b := make([]byte, sector)
	d.read(b, 0)
	return b[0]
}

func TestCutLosesWhatWasNotFlushed(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	d := newDisk(mib)
	d.write(filled(1, 8), 0, false)
	d.flush()
	d.write(filled(2, 8), 0, false)
	if got := d.first(); got != 2 {
		t.Errorf("the disk reads %d, 2 was written", got)
	}
	for l, want := range map[loss]byte{loseAll: 1, loseNone: 2} {
		if got := d.cut(l, r).first(); got != want {
			t.Errorf("after a cut with loss %d there is %d, want %d", l, got, want)
		}
	}
	seen := map[byte]bool{}
	for range 64 {
		seen[d.cut(loseSome, r).first()] = true
	}
	if !seen[1] || !seen[2] {
		t.Errorf("of 64 cuts that lose some, the first sector is one of %v", seen)
	}
	d.flush()
	if got := d.cut(loseAll, r).first(); got != 2 {
		t.Errorf("what was flushed is %d after a cut", got)
	}
}

func TestAtomIsNotTorn(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for _, c := range []struct {
		name string
		atom int64
		at   int64 // of the write, in sectors
		torn bool
	}{
		{"4096, aligned", atom4K, 8, false},
		{"4096, over the border of two", atom4K, 4, true},
		{"512", sector, 8, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			torn := false
			for range 64 {
				d := newDisk(mib)
				d.atom = c.atom
				d.write(filled(1, 8), c.at*sector, false)
				b := make([]byte, 8*sector)
				d.cut(loseSome, r).read(b, c.at*sector)
				torn = torn || b[0] != b[len(b)-1]
			}
			if torn != c.torn {
				t.Errorf("torn: %v, want %v", torn, c.torn)
			}
		})
	}
}

func TestWriteThroughIsNotOvertaken(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	d := newDisk(mib)
	d.write(filled(1, 1), 0, false)
	d.write(filled(2, 1), 0, true)
	for _, l := range []loss{loseAll, loseSome, loseNone} {
		if got := d.cut(l, r).first(); got != 2 {
			t.Errorf("after a cut with loss %d there is %d, and 2 was written through", l, got)
		}
	}
}

func TestDiskThatLies(t *testing.T) {
	d := newDisk(mib)
	d.lies = true
	d.write(filled(1, 1), 0, true)
	d.flush()
	if got := d.cut(loseAll, rand.New(rand.NewPCG(1, 2))).first(); got != 0 {
		t.Errorf("a disk that lies kept %d", got)
	}
}

func TestDiskOverTheWire(t *testing.T) {
	d := newDisk(mib)
	ours, theirs := net.Pipe()
	served := make(chan error, 1)
	go func() { served <- d.serve(theirs) }()
	send := func(v any) {
		t.Helper()
		if err := binary.Write(ours, binary.BigEndian, v); err != nil {
			t.Fatal(err)
		}
	}
	receive := func(n int) []byte {
		t.Helper()
		b := make([]byte, n)
		if _, err := io.ReadFull(ours, b); err != nil {
			t.Fatal(err)
		}
		return b
	}
	receive(18)
	send(uint32(1))
	send(struct {
		Magic        uint64
		Kind, Length uint32
	}{nbdOption, nbdGo, 0})
	info := receive(20 + 12)
	if size := binary.BigEndian.Uint64(info[22:]); size != uint64(mib) {
		t.Fatalf("the export has %d bytes", size)
	}
	receive(20)
	send(nbdHeader{Magic: nbdRequest, Type: 1, Handle: 7, Offset: 4096, Length: sector})
	send(filled(9, 1))
	if reply := receive(16); !bytes.Equal(reply[4:], []byte{0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7}) {
		t.Errorf("reply to a write: %v", reply)
	}
	send(nbdHeader{Magic: nbdRequest, Type: 0, Handle: 8, Offset: 4096, Length: sector})
	if got := receive(16 + sector); !bytes.Equal(got[16:], filled(9, 1)) {
		t.Error("what was written is not read")
	}
	send(nbdHeader{Magic: nbdRequest, Type: 0, Handle: 9, Offset: uint64(mib), Length: sector})
	if reply := receive(16); reply[7] != nbdInvalid {
		t.Errorf("reply to a read past the end: %v", reply)
	}
	send(nbdHeader{Magic: nbdRequest, Type: 2})
	if err := <-served; err != nil {
		t.Error(err)
	}
}
