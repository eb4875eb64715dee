package partition

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const mib = int64(1) << 20

// entry writes one entry of an MBR, or of a link of the chain.
func entry(b []byte, table int64, slot int, kind byte, start, sectors uint32) {
	e := b[table+446+int64(slot)*16:]
	e[4] = kind
	binary.LittleEndian.PutUint32(e[8:], start)
	binary.LittleEndian.PutUint32(e[12:], sectors)
	copy(b[table+510:], []byte{0x55, 0xaa})
}

// mbrDisk has the partitions 1 and 3, and the logical ones 5, 6 and 7.
func mbrDisk() []byte {
	b := make([]byte, 32*mib)
	entry(b, 0, 0, 0x83, 2048, 4096)
	entry(b, 0, 1, 0x05, 16384, 32768)
	entry(b, 0, 2, 0x83, 8192, 2048)
	for i, at := range []int64{16384, 24576, 32768} {
		entry(b, at*512, 0, 0x83, 2048, 4096)
		if i < 2 {
			entry(b, at*512, 1, 0x05, uint32(8192*(i+1)), 8192)
		}
	}
	return b
}

type slot struct {
	number      int
	first, last uint64 // sectors
}

// gptDisk makes a GPT with right checksums around whatever the slots say.
func gptDisk(size int64, sector int, slots ...slot) []byte {
	b := make([]byte, size)
	le := binary.LittleEndian
	entry(b, 0, 0, 0xee, 1, uint32(size/int64(sector)-1))
	entries := b[2*sector : 2*sector+128*128]
	for _, s := range slots {
		e := entries[(s.number-1)*128:]
		copy(e, bytes.Repeat([]byte{0xaf}, 16))
		copy(e[16:], bytes.Repeat([]byte{byte(s.number)}, 16))
		le.PutUint64(e[32:], s.first)
		le.PutUint64(e[40:], s.last)
	}
	h := b[sector:]
	copy(h, "EFI PART\x00\x00\x01\x00")
	le.PutUint32(h[12:], 92)
	le.PutUint64(h[24:], 1)
	le.PutUint64(h[32:], uint64(size/int64(sector)-1))
	le.PutUint64(h[40:], 34)
	le.PutUint64(h[48:], uint64(size/int64(sector)-34))
	le.PutUint64(h[72:], 2)
	le.PutUint32(h[80:], 128)
	le.PutUint32(h[84:], 128)
	seal(b, sector)
	return b
}

// seal makes the checksums right.
func seal(b []byte, sector int) {
	le, h := binary.LittleEndian, b[sector:]
	entries := min(int64(le.Uint32(h[80:]))*128, int64(len(b)-2*sector))
	le.PutUint32(h[88:], crc32.ChecksumIEEE(b[2*sector:][:entries]))
	le.PutUint32(h[16:], 0)
	le.PutUint32(h[16:], crc32.ChecksumIEEE(h[:92]))
}

func TestTablesAreRead(t *testing.T) {
	for name, c := range map[string]struct {
		image []byte
		want  []Partition
	}{
		"MBR with logical partitions": {mbrDisk(), []Partition{
			{1, 2048 * 512, 4096 * 512},
			{3, 8192 * 512, 2048 * 512},
			{5, 18432 * 512, 4096 * 512},
			{6, 26624 * 512, 4096 * 512},
			{7, 34816 * 512, 4096 * 512},
		}},
		"GPT with a gap in its numbers": {gptDisk(8*mib, 512, slot{1, 2048, 4095}, slot{7, 4096, 8191}), []Partition{
			{1, mib, mib}, {7, 2 * mib, 2 * mib},
		}},
		"GPT out of order":             {gptDisk(8*mib, 512, slot{1, 4096, 8191}, slot{2, 2048, 4095}), []Partition{{1, 2 * mib, 2 * mib}, {2, mib, mib}}},
		"GPT of sectors of 4096 bytes": {gptDisk(8*mib, 4096, slot{2, 256, 511}), []Partition{{2, mib, mib}}},
		"GPT without a partition":      {gptDisk(8*mib, 512), nil},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := Read(bytes.NewReader(c.image), int64(len(c.image)))
			if diff := cmp.Diff(c.want, got); err != nil || diff != "" {
				t.Fatalf("%v\n%s", err, diff)
			}
			for _, p := range got {
				one, err := Find(bytes.NewReader(c.image), int64(len(c.image)), p.Number)
				if err != nil || one != p {
					t.Errorf("partition %d: %+v, %v", p.Number, one, err)
				}
			}
		})
	}
}

func TestMissingPartitionNamesThoseThatAreThere(t *testing.T) {
	b := mbrDisk()
	_, err := Find(bytes.NewReader(b), int64(len(b)), 2) // the extended one
	if !errors.Is(err, ErrNotFound) || !strings.Contains(err.Error(), "1, 3, 5, 6, 7") {
		t.Error(err)
	}
}

func TestWhatIsNoTableIsRefused(t *testing.T) {
	damaged := func(image []byte, damage func(b []byte)) []byte {
		damage(image)
		return image
	}
	le := binary.LittleEndian
	good := func() []byte { return gptDisk(8*mib, 512, slot{1, 2048, 4095}) }
	for name, c := range map[string]struct {
		image []byte
		want  error
		says  string
	}{
		"empty image":               {nil, ErrNoTable, ""},
		"short image":               {make([]byte, 511), ErrNoTable, ""},
		"zeros":                     {make([]byte, mib), ErrNoTable, "no signature"},
		"boot flag of another kind": {damaged(mbrDisk(), func(b []byte) { b[446] = 0x12 }), ErrTable, ""},
		"beyond the end":            {damaged(mbrDisk(), func(b []byte) { entry(b, 0, 2, 0x83, 8192, 1<<30) }), ErrTable, "the image has"},
		"overlap":                   {damaged(mbrDisk(), func(b []byte) { entry(b, 0, 2, 0x83, 4096, 4096) }), ErrTable, "1 and 3 overlap"},
		"over the table itself":     {damaged(mbrDisk(), func(b []byte) { entry(b, 0, 2, 0x83, 0, 16) }), ErrTable, "from byte 0"},
		"overlap with the extended": {damaged(mbrDisk(), func(b []byte) { entry(b, 0, 2, 0x83, 8192, 16384) }), ErrTable, "overlap"},
		"two extended ones":         {damaged(mbrDisk(), func(b []byte) { entry(b, 0, 2, 0x0f, 8192, 2048) }), ErrTable, "2 extended"},
		"chain in a circle":         {damaged(mbrDisk(), func(b []byte) { entry(b, 24576*512, 1, 0x05, 0, 8192) }), ErrTable, "does not end"},
		"chain that leaves":         {damaged(mbrDisk(), func(b []byte) { entry(b, 24576*512, 1, 0x05, 32768, 8192) }), ErrTable, "leaves"},
		"chain into nothing":        {damaged(mbrDisk(), func(b []byte) { entry(b, 24576*512, 1, 0x05, 1024, 8192) }), ErrTable, "no signature"},
		"logical outside":           {damaged(mbrDisk(), func(b []byte) { entry(b, 24576*512, 0, 0x83, 2048, 40960) }), ErrTable, "outside the extended"},
		"link with two partitions":  {damaged(mbrDisk(), func(b []byte) { entry(b, 24576*512, 2, 0x83, 2048, 8) }), ErrTable, "more than one"},

		"GPT: header checksum":      {damaged(good(), func(b []byte) { b[512+56]++ }), ErrTable, "Header Checksum"},
		"GPT: entries checksum":     {damaged(good(), func(b []byte) { b[1024+32]++ }), ErrTable, "Entry Checksum"},
		"GPT: none":                 {damaged(good(), func(b []byte) { clear(b[512:1024]) }), ErrTable, "announces"},
		"GPT: only a backup":        {damaged(good(), func(b []byte) { copy(b[len(b)-512:], b[512:1024]); clear(b[512:1024]) }), ErrTable, "announces"},
		"GPT: beyond the end":       {gptDisk(8*mib, 512, slot{1, 2048, 16384}), ErrTable, "the image has"},
		"GPT: end of a wrap-around": {gptDisk(8*mib, 512, slot{1, 2048, 1<<64 - 1}), ErrTable, "the image has"},
		"GPT: backwards":            {gptDisk(8*mib, 512, slot{1, 4095, 2048}), ErrTable, "sectors 4095 to 2048"},
		"GPT: overlap":              {gptDisk(8*mib, 512, slot{1, 2048, 4096}, slot{2, 4096, 8191}), ErrTable, "overlap"},
		"GPT: more entries than can be": {damaged(good(), func(b []byte) {
			le.PutUint32(b[512+80:], 1<<31)
			seal(b, 512)
		}), ErrTable, "entries"},
		"GPT: entries of no size": {damaged(good(), func(b []byte) {
			le.PutUint32(b[512+84:], 0)
			seal(b, 512)
		}), ErrTable, "entries of 0 bytes"},
		"GPT: entries elsewhere": {damaged(good(), func(b []byte) {
			le.PutUint64(b[512+72:], 1<<63)
			seal(b, 512)
		}), ErrTable, "outside"},
	} {
		t.Run(name, func(t *testing.T) {
			all, err := Read(bytes.NewReader(c.image), int64(len(c.image)))
			if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("%v, %v; want %v with %q", all, err, c.want, c.says)
			}
		})
	}
}

// failing is a disk that cannot be read from some byte on.
type failing struct {
	b    []byte
	from int64
}

var errBroken = errors.New("the disk is broken")

func (f failing) ReadAt(b []byte, at int64) (int, error) {
	if at+int64(len(b)) > f.from {
		return 0, errBroken
	}
	return bytes.NewReader(f.b).ReadAt(b, at)
}

func TestErrorOfTheDiskIsNoDamage(t *testing.T) {
	for name, image := range map[string][]byte{"MBR": mbrDisk(), "GPT": gptDisk(8*mib, 512, slot{1, 2048, 4095})} {
		for _, from := range []int64{0, 511, 600, 1030, 16384*512 + 100} {
			_, err := Read(failing{image, from}, int64(len(image)))
			if name == "GPT" && from > 1<<20 {
				continue // it is read by then
			}
			if !errors.Is(err, errBroken) || errors.Is(err, ErrTable) || errors.Is(err, ErrNoTable) {
				t.Errorf("%s, broken from byte %d: %v", name, from, err)
			}
		}
	}
}

// padded is an image that goes on with zeros.
type padded []byte

func (p padded) ReadAt(b []byte, at int64) (int, error) {
	clear(b)
	if at < int64(len(p)) {
		copy(b, p[at:])
	}
	return len(b), nil
}

// FuzzRead: whatever the image holds, partitions lie in it and apart from each other.
func FuzzRead(f *testing.F) {
	// Tables of four entries, so that mutations meet what is read.
	few := func(b []byte, sector int) []byte {
		b[sector+80] = 4
		seal(b, sector)
		return b[:2*sector+4*128]
	}
	f.Add(few(gptDisk(mib, 512, slot{1, 64, 127}, slot{2, 128, 255}), 512), false)
	f.Add(few(gptDisk(mib, 512, slot{1, 64, 127}, slot{4, 128, 255}), 512), true)
	f.Add(few(gptDisk(mib, 4096, slot{1, 64, 127}), 4096), true)
	small := make([]byte, 6<<10)
	entry(small, 0, 0, 0x83, 1, 1)
	entry(small, 0, 1, 0x05, 4, 20)
	entry(small, 4*512, 0, 0x83, 1, 2)
	entry(small, 4*512, 1, 0x05, 6, 8)
	entry(small, 10*512, 0, 0x83, 1, 2)
	f.Add(small, false)
	f.Add([]byte{}, false)
	f.Fuzz(func(t *testing.T, b []byte, repair bool) {
		// The checksums stand in the way of what is behind them.
		for _, sector := range gptSectors {
			if repair && len(b) >= 2*sector {
				b = bytes.Clone(b)
				seal(b, sector)
			}
		}
		size := int64(len(b)) + mib
		all, err := Read(padded(b), size)
		if err != nil {
			if !errors.Is(err, ErrTable) && !errors.Is(err, ErrNoTable) {
				t.Errorf("%v", err)
			}
			return
		}
		for i, p := range all {
			if p.Number < 1 || p.Offset <= 0 || p.Length <= 0 || p.Offset+p.Length > size || p.Offset+p.Length < 0 {
				t.Errorf("%+v in %d bytes", p, size)
			}
			for _, q := range all[:i] {
				if p.Offset < q.end() && q.Offset < p.end() {
					t.Errorf("%+v and %+v overlap", p, q)
				}
			}
		}
	})
}
