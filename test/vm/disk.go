package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
)

// sector is the smallest unit of a request, in bytes.
const sector = 512

// disk is a disk with a cache that loses power: what was written and not flushed
// may be lost, sector by sector. It is all in memory.
type disk struct {
	size int64
	// atom is what the disk writes whole or not at all, in bytes, when it is aligned.
	atom int64
	mu   sync.Mutex
	// All below is guarded by mu. Sectors are never changed, only replaced.
	durable map[int64]*[sector]byte // by number; those that are missing are zero
	cached  map[int64]*[sector]byte // what is read
	pending []pendingSector         // written since the last flush, in order
	// lies: it says that it flushed, and does not.
	lies bool
	// sampled is what a cut at one of the writes and flushes would leave, if that is wanted.
	sampled *sample

	writes, flushes int
}

type pendingSector struct {
	number int64
	data   *[sector]byte
	// torn: it may be lost alone; else it shares the fate of the one before.
	torn bool
}

// atom4K is what disks write whole since they have such sectors, whatever they tell.
const atom4K = 4096

func newDisk(size int64) *disk {
	return &disk{size: size, atom: atom4K, durable: map[int64]*[sector]byte{}, cached: map[int64]*[sector]byte{}}
}

// loss says what a cut does to what was not flushed.
type loss int

const (
	loseAll  loss = iota
	loseSome      // each atom of each write by a coin; of two writes to one, the first may stay
	loseNone
)

// cut returns the disk as it is after a power cut now. The disk itself goes on.
func (d *disk) cut(l loss, r *rand.Rand) *disk {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.cutLocked(l, r)
}

// cutLocked is cut with mu held.
func (d *disk) cutLocked(l loss, r *rand.Rand) *disk {
	after := newDisk(d.size)
	after.atom = d.atom
	maps.Copy(after.durable, d.durable)
	kept := false
	for _, p := range d.pending {
		if p.torn {
			kept = r.IntN(2) == 0
		}
		if l == loseNone || l == loseSome && kept {
			after.durable[p.number] = p.data
		}
	}
	maps.Copy(after.cached, after.durable)
	return after
}

func (d *disk) read(b []byte, at int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i := int64(0); i < int64(len(b)); i += sector {
		if s := d.cached[(at+i)/sector]; s != nil {
			copy(b[i:i+sector], s[:])
		} else {
			clear(b[i : i+sector])
		}
	}
}

// write puts data into the cache, and on the disk if that is asked for.
func (d *disk) write(b []byte, at int64, through bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.sampleLocked()
	d.writes++
	for i := int64(0); i < int64(len(b)); i += sector {
		p := pendingSector{number: (at + i) / sector, data: new([sector]byte), torn: i == 0 || (at+i)%d.atom == 0}
		copy(p.data[:], b[i:i+sector])
		d.cached[p.number] = p.data
		if !through || d.lies {
			d.pending = append(d.pending, p)
			continue
		}
		d.durable[p.number] = p.data
		// Older data of this sector must not come after it.
		d.pending = slices.DeleteFunc(d.pending, func(o pendingSector) bool { return o.number == p.number })
	}
}

func (d *disk) flush() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.sampleLocked()
	d.flushes++
	if d.lies {
		return
	}
	for _, p := range d.pending {
		d.durable[p.number] = p.data
	}
	d.pending = nil
}

// The network block device protocol, as far as qemu needs it:
// https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md
const (
	nbdMagic        = 0x4e42444d41474943 // NBDMAGIC
	nbdOption       = 0x49484156454f5054 // IHAVEOPT
	nbdOptionReply  = 0x3e889045565a9
	nbdRequest      = 0x25609513
	nbdReply        = 0x67446698
	nbdFixed        = 1               // newstyle negotiation
	nbdFlags        = 1 | 1<<2 | 1<<3 // has flags, flush, FUA
	nbdAck          = 1
	nbdInfo         = 3
	nbdUnsupported  = 1<<31 | 1
	nbdGo           = 7
	nbdAbort        = 2
	nbdCommandFUA   = 1
	nbdInvalid      = 22 // EINVAL
	maxRequestBytes = 32 << 20
)

type nbdHeader struct {
	Magic  uint32
	Flags  uint16
	Type   uint16
	Handle uint64
	Offset uint64
	Length uint32
}

// serve serves the disk on a connection until the client goes.
func (d *disk) serve(c net.Conn) error {
	defer func() { _ = c.Close() }()
	if err := d.negotiate(c); err != nil {
		return err
	}
	for {
		var h nbdHeader
		if err := binary.Read(c, binary.BigEndian, &h); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		if h.Magic != nbdRequest || h.Length > maxRequestBytes {
			return fmt.Errorf("nbd: request %+v", h)
		}
		done, err := d.request(c, h)
		if done || err != nil {
			return err
		}
	}
}

// request answers one request; done if it was the last.
func (d *disk) request(c net.Conn, h nbdHeader) (done bool, err error) {
	const (
		read = iota
		write
		disconnect
		flush
	)
	var failed uint32
	var data []byte
	whole := h.Offset%sector == 0 && h.Length%sector == 0 && h.Offset+uint64(h.Length) <= uint64(d.size)
	if h.Type == write {
		data = make([]byte, h.Length)
		if _, err := io.ReadFull(c, data); err != nil {
			return true, err
		}
	}
	switch {
	case h.Type == disconnect:
		return true, nil
	case h.Type == flush:
		d.flush()
	case h.Type == read && whole:
		data = make([]byte, h.Length)
		d.read(data, int64(h.Offset))
	case h.Type == write && whole:
		d.write(data, int64(h.Offset), h.Flags&nbdCommandFUA != 0)
		data = nil
	default:
		failed, data = nbdInvalid, nil
	}
	reply := binary.BigEndian.AppendUint32(nil, nbdReply)
	reply = binary.BigEndian.AppendUint32(reply, failed)
	reply = binary.BigEndian.AppendUint64(reply, h.Handle)
	_, err = c.Write(append(reply, data...))
	return false, err
}

// negotiate is fixed newstyle: it knows one export, whatever its name.
func (d *disk) negotiate(c net.Conn) error {
	hello := binary.BigEndian.AppendUint64(nil, nbdMagic)
	hello = binary.BigEndian.AppendUint64(hello, nbdOption)
	if _, err := c.Write(binary.BigEndian.AppendUint16(hello, nbdFixed)); err != nil {
		return err
	}
	var flags uint32
	if err := binary.Read(c, binary.BigEndian, &flags); err != nil {
		return err
	}
	for {
		var option struct {
			Magic        uint64
			Kind, Length uint32
		}
		if err := binary.Read(c, binary.BigEndian, &option); err != nil {
			return err
		}
		if option.Magic != nbdOption || option.Length > 4096 {
			return fmt.Errorf("nbd: option %+v", option)
		}
		if _, err := io.CopyN(io.Discard, c, int64(option.Length)); err != nil {
			return err
		}
		reply := func(kind uint32, data []byte) error {
			b := binary.BigEndian.AppendUint64(nil, nbdOptionReply)
			b = binary.BigEndian.AppendUint32(b, option.Kind)
			b = binary.BigEndian.AppendUint32(b, kind)
			b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
			_, err := c.Write(append(b, data...))
			return err
		}
		switch option.Kind {
		case nbdGo:
			export := binary.BigEndian.AppendUint16(nil, 0) // NBD_INFO_EXPORT
			export = binary.BigEndian.AppendUint64(export, uint64(d.size))
			export = binary.BigEndian.AppendUint16(export, nbdFlags)
			if err := reply(nbdInfo, export); err != nil {
				return err
			}
			return reply(nbdAck, nil)
		case nbdAbort:
			return errors.Join(reply(nbdAck, nil), io.EOF)
		default:
			if err := reply(nbdUnsupported, nil); err != nil {
				return err
			}
		}
	}
}
