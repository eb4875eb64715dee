package loop

import (
	"errors"
	"math"
	"strings"
	"testing"
)

func TestValidate(t *testing.T) {
	const file = 1 << 20
	ok := Mapping{BlockSize: 4096}
	for _, c := range []struct {
		name  string
		edit  func(*Mapping)
		size  int64
		field string // "" = valid
	}{
		{"the whole file", func(*Mapping) {}, file, ""},
		{"a range inside", func(m *Mapping) { m.Offset, m.SizeLimit = 4096, 8192 }, file, ""},
		{"a range up to the end", func(m *Mapping) { m.Offset, m.SizeLimit = file-4096, 4096 }, file, ""},
		{"no block size", func(m *Mapping) { m.BlockSize = 0 }, file, "BlockSize"},
		{"a block size that is no power of two", func(m *Mapping) { m.BlockSize = 1000 }, file, "BlockSize"},
		{"a block size above the page size", func(m *Mapping) { m.BlockSize = 8192 }, file, "BlockSize"},
		{"a negative block size", func(m *Mapping) { m.BlockSize = -512 }, file, "BlockSize"},
		{"a negative offset", func(m *Mapping) { m.Offset = -4096 }, file, "Offset"},
		{"an offset off the block grid", func(m *Mapping) { m.Offset = 512 }, file, "Offset"},
		{"the same offset with smaller blocks", func(m *Mapping) { m.Offset, m.BlockSize = 512, 512 }, file, ""},
		{"an offset at the end of the file", func(m *Mapping) { m.Offset = file }, file, "Offset"},
		{"an offset beyond the file", func(m *Mapping) { m.Offset = 2 * file }, file, "Offset"},
		{"an empty file", func(*Mapping) {}, 0, "Offset"},
		{"a negative limit", func(m *Mapping) { m.SizeLimit = -4096 }, file, "SizeLimit"},
		{"a limit off the block grid", func(m *Mapping) { m.SizeLimit = 4097 }, file, "SizeLimit"},
		{"a limit above the file", func(m *Mapping) { m.SizeLimit = file + 4096 }, file, "SizeLimit"},
		{"a range beyond the file", func(m *Mapping) { m.Offset, m.SizeLimit = 4096, file }, file, "SizeLimit"},
		{"an overflow", func(m *Mapping) { m.Offset, m.SizeLimit = 8192, math.MaxInt64-4095 }, file, "SizeLimit"},
		{"a file that is no multiple of the block size", func(*Mapping) {}, file + 512, "SizeLimit"},
		{"the same with a limit", func(m *Mapping) { m.SizeLimit = file }, file + 512, ""},
		{"the same with small blocks", func(m *Mapping) { m.BlockSize = 512 }, file + 512, ""},
		{"unknown direct I/O", func(m *Mapping) { m.DirectIO = 3 }, file, "DirectIO"},
		{"the longest tag", func(m *Mapping) { m.Tag = strings.Repeat("x", 63) }, file, ""},
		{"a tag too long", func(m *Mapping) { m.Tag = strings.Repeat("x", 64) }, file, "Tag"},
		{"a tag with a NUL", func(m *Mapping) { m.Tag = "a\x00b" }, file, "Tag"},
		{"a tag with a line end", func(m *Mapping) { m.Tag = "a\nb" }, file, "Tag"},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := ok
			c.edit(&m)
			err := m.Validate(c.size)
			var me *MappingError
			switch {
			case c.field == "" && err != nil:
				t.Errorf("refused: %v", err)
			case c.field != "" && (!errors.As(err, &me) || me.Field != c.field):
				t.Errorf("error %v, want one of field %s", err, c.field)
			}
		})
	}
}

func TestOverlaps(t *testing.T) {
	for _, c := range []struct {
		name               string
		offA, limA, oB, lB int64
		want               bool
	}{
		{"equal", 0, 8, 0, 8, true},
		{"adjacent", 0, 8, 8, 8, false},
		{"one byte shared", 0, 9, 8, 8, true},
		{"inside", 0, 100, 10, 1, true},
		{"apart", 0, 8, 100, 8, false},
		{"open end reaches all behind it", 0, 0, 100, 8, true},
		{"open end does not reach before it", 8, 0, 0, 8, false},
		{"two open ends", 8, 0, 100, 0, true},
		{"the end of the number range", math.MaxInt64 - 1, math.MaxInt64, 0, 8, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := overlaps(c.offA, c.limA, c.oB, c.lB); got != c.want {
				t.Errorf("overlaps = %v", got)
			}
			if got := overlaps(c.oB, c.lB, c.offA, c.limA); got != c.want {
				t.Errorf("the other way round = %v", got)
			}
		})
	}
}

func FuzzValidate(f *testing.F) {
	f.Add(int64(0), int64(0), 4096, int64(1<<20))
	f.Add(int64(512), int64(math.MaxInt64), 512, int64(math.MaxInt64))
	f.Fuzz(func(t *testing.T, offset, limit int64, block int, size int64) {
		m := Mapping{Offset: offset, SizeLimit: limit, BlockSize: block}
		if m.Validate(size) != nil {
			return
		}
		if got := m.size(size); got <= 0 || got > size-offset || got%int64(block) != 0 {
			t.Errorf("%+v over %d bytes passes and has size %d", m, size, got)
		}
	})
}
