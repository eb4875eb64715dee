package loop

import (
	"errors"
	"math"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// The facts about loop devices that the package relies on, each held against the
// fakes and the running kernel alike. Facts that are about programs or file systems
// and not about the kernel interface (udev, libmount, journals) have no case here.
var contract = []struct {
	name string
	test func(*testing.T, *machine)
}{
	{"fact 1: GET_FREE gives an unbound number and reserves nothing", func(t *testing.T, m *machine) {
		for range 20 { // others on this kernel may bind in between
			a, b := must(m.GetFree())(t), must(m.GetFree())(t)
			if a == b {
				return
			}
		}
		t.Error("two callers in a row never got the same number")
	}},
	{"fact 3: LOOP_CONFIGURE looks at the descriptor first", func(t *testing.T, m *machine) {
		n, h := m.bind(t, config{File: m.image(t, "a"), BlockSize: 4096}, forWriting)
		wantErr(t, "bad descriptor, bound", h.Configure(config{}), syscall.EBADF)
		m.release(t, n, h)
		m.onFree(t, func(h handle) error {
			err := h.Configure(config{})
			if err == nil {
				t.Fatal("a bad descriptor is taken")
			}
			wantErr(t, "bad descriptor, unbound", err, syscall.EBADF)
			return nil
		})
	}},
	{"fact 3: bad flags, block sizes and a directory are EINVAL", func(t *testing.T, m *machine) {
		f := m.image(t, "a")
		dir, err := os.Open(m.dir)
		check(t, err)
		defer dir.Close()
		for name, c := range map[string]config{
			"flags":          {File: f, BlockSize: 4096, Flags: 0x40},
			"block size 511": {File: f, BlockSize: 511},
			"directory":      {File: dir, BlockSize: 4096},
		} {
			m.onFree(t, func(h handle) error { return unlessBusy(t, name, h.Configure(c), syscall.EINVAL) })
		}
	}},
	{"fact 4: a bound device is EBUSY", func(t *testing.T, m *machine) {
		f := m.image(t, "a")
		n, h := m.bind(t, config{File: f, BlockSize: 4096}, forWriting)
		wantErr(t, "second bind", h.Configure(config{File: f, BlockSize: 4096}), syscall.EBUSY)
		m.release(t, n, h)
	}},
	{"fact 4: a claimed device is EBUSY to others", func(t *testing.T, m *machine) {
		f := m.image(t, "a")
		for range 50 {
			n := must(m.GetFree())(t)
			claim, err := m.node(n, forClaim)
			if err != nil {
				continue
			}
			other, err := m.node(n, forWriting)
			check(t, err)
			err = other.Configure(config{File: f, BlockSize: 4096})
			if err == nil {
				_ = other.Clear()
			}
			wantErr(t, "bind under another's claim", err, syscall.EBUSY)
			check(t, errors.Join(other.Close(), claim.Close()))
			return
		}
		t.Error("no free device to claim")
	}},
	{"fact 4: offset and limit beyond 2^63-1 are EOVERFLOW", func(t *testing.T, m *machine) {
		f := m.image(t, "a")
		m.onFree(t, func(h handle) error {
			return unlessBusy(t, "offset", h.Configure(config{File: f, BlockSize: 4096, Offset: 1 << 63}), syscall.EOVERFLOW)
		})
		m.onFree(t, func(h handle) error {
			return unlessBusy(t, "limit", h.Configure(config{File: f, BlockSize: 4096, SizeLimit: math.MaxUint64}), syscall.EOVERFLOW)
		})
	}},
	{"fact 6: read-only by the flag, by the file, and by the node", func(t *testing.T, m *machine) {
		m.image(t, "a")
		rw, ro := m.reopen(t, "a", os.O_RDWR), m.reopen(t, "a", os.O_RDONLY)
		for name, c := range map[string]struct {
			config
			how  access
			want bool
		}{
			"nothing": {config{File: rw, BlockSize: 4096}, forWriting, false},
			"flag":    {config{File: rw, BlockSize: 4096, Flags: flagReadOnly}, forWriting, true},
			"file":    {config{File: ro, BlockSize: 4096}, forWriting, true},
			"node":    {config{File: rw, BlockSize: 4096}, forReading, true},
		} {
			n, h := m.bind(t, c.config, c.how)
			st, err := h.Status()
			check(t, err)
			if got := st.Flags&flagReadOnly != 0; got != c.want {
				t.Errorf("%s: read-only %v, want %v", name, got, c.want)
			}
			m.release(t, n, h)
		}
	}},
	{"fact 7: a read-only handle is enough to set the capacity", func(t *testing.T, m *machine) {
		n, h := m.bind(t, config{File: m.image(t, "a"), BlockSize: 4096}, forWriting)
		r := must(m.node(n, forReading))(t)
		check(t, h.Close())
		check(t, r.SetCapacity())
		m.release(t, n, r)
	}},
	{"fact 9: ADD and REMOVE", func(t *testing.T, m *machine) {
		n := must(m.Add(-1))(t)
		_, err := m.Add(n)
		wantErr(t, "add again", err, syscall.EEXIST)
		h := must(m.node(n, forReading))(t)
		wantErr(t, "remove while open", m.Remove(n), syscall.EBUSY)
		check(t, h.Close())
		check(t, m.Remove(n))
		wantErr(t, "remove again", m.Remove(n), syscall.ENODEV)
		wantErr(t, "remove -1", m.Remove(-1), syscall.EINVAL)
		n, h = m.bind(t, config{File: m.image(t, "a"), BlockSize: 4096}, forWriting)
		wantErr(t, "remove while bound", m.Remove(n), syscall.EBUSY)
		m.release(t, n, h)
	}},
	{"fact 10: sysfs names the device number", func(t *testing.T, m *machine) {
		id := must(m.Attr(must(m.GetFree())(t), attrDev))(t)
		if !strings.HasPrefix(id, "7:") {
			t.Errorf("dev = %q", id)
		}
		_, err := m.Attr(1<<20-1, attrDev)
		wantErr(t, "no such device", err, syscall.ENOENT)
	}},
	{"fact 11: a private node works, and a wrong one is noticed", func(t *testing.T, m *machine) {
		n, h := m.bind(t, config{File: m.image(t, "a"), BlockSize: 4096, Tag: "private"}, forWriting)
		id := must(m.Attr(n, attrDev))(t)
		path := filepath.Join(m.dir, "nodes", "node")
		_, err := m.Open(path, id, forReading)
		wantErr(t, "no node", err, syscall.ENOENT)
		check(t, m.MakeNode(path, "7:1048575"))
		check(t, m.MakeNode(path, id)) // replaces
		p := must(m.Open(path, id, forReading))(t)
		if st, err := p.Status(); err != nil || st.Tag != "private" {
			t.Errorf("status by the private node: %+v, %v", st, err)
		}
		check(t, p.Close())
		_, err = m.Open(path, "7:1048574", forReading)
		wantErr(t, "node of another device", err, errNotNode)
		m.release(t, n, h)
	}},
	{"fact 13: size is clamped to the file", func(t *testing.T, m *machine) {
		f := m.image(t, "a")
		for name, c := range map[string]struct {
			offset, limit uint64
			want          int64
		}{
			"all":                   {0, 0, testSize},
			"offset":                {8192, 0, testSize - 8192},
			"window":                {8192, 4096, 4096},
			"limit above the file":  {0, 2 * testSize, testSize},
			"offset past the end":   {2 * testSize, 0, 0},
			"window across the end": {testSize - 4096, 8192, 4096},
		} {
			n, h := m.bind(t, config{File: f, BlockSize: 512, Offset: c.offset, SizeLimit: c.limit}, forWriting)
			size, _, err := h.Geometry()
			check(t, err)
			st, err := h.Status()
			check(t, err)
			if size != c.want || st.Offset != c.offset || st.SizeLimit != c.limit {
				t.Errorf("%s: size %d, want %d; offset %d, limit %d as reported", name, size, c.want, st.Offset, st.SizeLimit)
			}
			m.release(t, n, h)
		}
	}},
	{"fact 14: buffered mode takes any offset", func(t *testing.T, m *machine) {
		n, h := m.bind(t, config{File: m.image(t, "a"), BlockSize: 512, Offset: 100}, forWriting)
		if size, _, err := h.Geometry(); err != nil || size != testSize-512 {
			t.Errorf("size %d, %v", size, err)
		}
		m.release(t, n, h)
	}},
	{"fact 16: the size need not be a multiple of the block size", func(t *testing.T, m *machine) {
		f := m.image(t, "odd")
		check(t, f.Truncate(10*4096+512+100))
		n, h := m.bind(t, config{File: f, BlockSize: 4096}, forWriting)
		if size, block, err := h.Geometry(); err != nil || size != 41472 || block != 4096 {
			t.Errorf("size %d, block %d, %v; want 41472, 4096", size, block, err)
		}
		m.release(t, n, h)
	}},
	{"fact 61: the block size passed is the block size got", func(t *testing.T, m *machine) {
		f := m.image(t, "a")
		for _, want := range []int{512, 1024, 2048, 4096} {
			n, h := m.bind(t, config{File: f, BlockSize: uint32(want)}, forWriting)
			if _, got, err := h.Geometry(); err != nil || got != want {
				t.Errorf("block size %d, %v; want %d", got, err, want)
			}
			m.release(t, n, h)
		}
	}},
	{"fact 19: direct I/O with an unaligned offset is dropped silently", func(t *testing.T, m *machine) {
		n, h := m.bind(t, config{File: m.image(t, "a"), BlockSize: 512, Offset: 100, Flags: flagDirectIO}, forWriting)
		if st, err := h.Status(); err != nil || st.Flags&flagDirectIO != 0 {
			t.Errorf("status %+v, %v", st, err)
		}
		m.release(t, n, h)
	}},
	{"fact 22: the tag holds 63 bytes and comes back", func(t *testing.T, m *machine) {
		tag := strings.Repeat("0123456", 9)
		n, h := m.bind(t, config{File: m.image(t, "a"), BlockSize: 4096, Tag: tag}, forWriting)
		if st, err := h.Status(); err != nil || st.Tag != tag || st.Number != n {
			t.Errorf("status %+v, %v", st, err)
		}
		m.release(t, n, h)
	}},
	{"fact 23: backing_file exists only while bound", func(t *testing.T, m *machine) {
		f := m.image(t, "a")
		n, h := m.bind(t, config{File: f, BlockSize: 4096}, forWriting)
		if got, err := m.Attr(n, attrBackingFile); err != nil || got != f.Name() {
			t.Errorf("backing_file %q, %v; want %q", got, err, f.Name())
		}
		check(t, h.Clear())
		if m.fake == nil || !m.fake.clearAtOnce {
			// fact 27: still there while the device is running down
			if _, err := m.Attr(n, attrBackingFile); err != nil && !errors.Is(err, syscall.ENOENT) {
				t.Error(err)
			}
		}
		check(t, h.Close())
		m.gone(t, n, f)
	}},
	{"fact 24, 25: identity is device and inode, whatever happens to the name", func(t *testing.T, m *machine) {
		f := m.image(t, "a")
		n, h := m.bind(t, config{File: f, BlockSize: 4096}, forWriting)
		id := must(FileIDOf(f))(t)
		check(t, os.Rename(f.Name(), f.Name()+".moved"))
		other := must(FileIDOf(m.image(t, "a")))(t) // a new file at the old path
		if st, err := h.Status(); err != nil || st.Image != id || st.Image == other {
			t.Errorf("image %v, %v; want %v, not %v", st.Image, err, id, other)
		}
		m.release(t, n, h)
	}},
	{"fact 28: diskseq changes on bind and on unbind", func(t *testing.T, m *machine) {
		f := m.image(t, "a")
		n, h := m.bind(t, config{File: f, BlockSize: 4096}, forWriting)
		bound := must(h.DiskSeq())(t)
		m.release(t, n, h)
		h = must(m.node(n, forReading))(t)
		defer h.Close()
		if after := must(h.DiskSeq())(t); after == bound {
			t.Errorf("diskseq %d before and after the unbind", bound)
		}
	}},
	{"fact 29: any number of devices over one file", func(t *testing.T, m *machine) {
		f := m.image(t, "a")
		n, h := m.bind(t, config{File: f, BlockSize: 4096}, forWriting)
		n2, h2 := m.bind(t, config{File: f, BlockSize: 4096}, forWriting)
		if n == n2 {
			t.Errorf("loop%d twice", n)
		}
		m.release(t, n, h)
		m.release(t, n2, h2)
	}},
	{"fact 31, 32: clear by the only opener ends with its close", func(t *testing.T, m *machine) {
		f := m.image(t, "a")
		n, h := m.clearAlone(t, f)
		if other, err := m.node(n, forReading); err != nil { // from 6.11 on
			wantErr(t, "open after clear", err, syscall.ENXIO)
			wantErr(t, "bind after clear", h.Configure(config{File: f, BlockSize: 4096}), syscall.EBUSY)
		} else {
			_ = other.Close()
			if m.fake != nil && !m.fake.clearAtOnce {
				t.Error("a cleared device can be opened")
			}
		}
		wantErr(t, "clear again", h.Clear(), syscall.ENXIO)
		check(t, h.Close())
		m.gone(t, n, f)
	}},
	{"fact 33: cleared with another opener it stays bound and usable", func(t *testing.T, m *machine) {
		f := m.image(t, "a")
		n, h := m.bind(t, config{File: f, BlockSize: 4096}, forWriting)
		other := must(m.node(n, forReading))(t)
		check(t, errors.Join(h.Clear(), h.Close()))
		st, err := other.Status()
		if err != nil || st.Flags&flagAutoclear == 0 {
			t.Errorf("status %+v, %v; want bound with autoclear", st, err)
		}
		third := must(m.node(n, forReading))(t) // still open to newcomers
		check(t, errors.Join(third.Close(), other.Close()))
		m.gone(t, n, f)
	}},
	{"fact 35: autoclear unbinds at the last close", func(t *testing.T, m *machine) {
		f := m.image(t, "a")
		n, h := m.bind(t, config{File: f, BlockSize: 4096, Flags: flagAutoclear}, forWriting)
		r := must(m.node(n, forReading))(t)
		check(t, h.Close())
		if _, err := r.Status(); err != nil {
			t.Errorf("gone before the last close: %v", err)
		}
		check(t, r.Close())
		m.gone(t, n, f)
	}},
	{"fact 40: capacity follows the file, unless there is a limit", func(t *testing.T, m *machine) {
		for limit, want := range map[uint64]int64{0: 2 * testSize, testSize: testSize} {
			f := m.image(t, "a")
			check(t, f.Truncate(testSize))
			n, h := m.bind(t, config{File: f, BlockSize: 4096, SizeLimit: limit}, forWriting)
			check(t, f.Truncate(2*testSize))
			if size, _, _ := h.Geometry(); size != testSize {
				t.Errorf("size %d before SET_CAPACITY", size)
			}
			check(t, h.SetCapacity())
			if size, _, _ := h.Geometry(); size != want {
				t.Errorf("limit %d: size %d, want %d", limit, size, want)
			}
			m.release(t, n, h)
		}
	}},
	{"fact 41: a truncated file leaves the device its size", func(t *testing.T, m *machine) {
		f := m.image(t, "a")
		n, h := m.bind(t, config{File: f, BlockSize: 4096}, forWriting)
		check(t, f.Truncate(4096))
		if size, _, _ := h.Geometry(); size != testSize {
			t.Errorf("size %d", size)
		}
		m.release(t, n, h)
	}},
	{"fact 42: a bound file can be unlinked, and flock does not matter", func(t *testing.T, m *machine) {
		f := m.image(t, "a")
		lock := must(m.Lock(f))(t)
		n, h := m.bind(t, config{File: f, BlockSize: 4096}, forWriting)
		check(t, lock.Close())
		check(t, os.Remove(f.Name()))
		if st, err := h.Status(); err != nil || st.Image != must(FileIDOf(f))(t) {
			t.Errorf("status %+v, %v", st, err)
		}
		m.release(t, n, h)
	}},
	{"fact 63: the discard mask holds, and is gone after REMOVE and ADD", func(t *testing.T, m *machine) {
		f := m.image(t, "a")
		n, h := m.bind(t, config{File: f, BlockSize: 4096}, forWriting)
		if limit := must(m.Attr(n, attrDiscardLimit))(t); limit == "0" {
			t.Skip("the file system below cannot punch holes")
		}
		check(t, m.SetAttr(n, attrDiscard, "0"))
		if got := must(m.Attr(n, attrDiscard))(t); got != "0" {
			t.Errorf("masked: %s", got)
		}
		m.release(t, n, h)
		if err := m.Remove(n); err != nil {
			t.Skip("somebody else on this kernel took the device:", err)
		}
		if got, err := m.Add(n); err != nil || got != n {
			t.Skip("somebody else on this kernel took the number:", err)
		}
		h = must(m.node(n, forWriting))(t)
		if err := h.Configure(config{File: f, BlockSize: 4096}); err != nil {
			_ = h.Close()
			t.Skip("somebody else on this kernel took the device:", err)
		}
		if got := must(m.Attr(n, attrDiscard))(t); got == "0" {
			t.Error("the mask survived REMOVE and ADD")
		}
		m.release(t, n, h)
	}},
	{"fact 107: whether a discard would reach the image is told, and none does", func(t *testing.T, m *machine) {
		f := m.image(t, "a")
		for _, masked := range []bool{false, true} { // a mask may stay with the number (fact 63)
			n, h := m.bind(t, config{File: f, BlockSize: 4096, NoDiscard: masked}, forWriting)
			limit := must(m.Attr(n, attrDiscardLimit))(t)
			if masked {
				check(t, m.SetAttr(n, attrDiscard, "0"))
			}
			if must(m.Attr(n, attrDiscard))(t) == "0" != masked && limit != "0" {
				masked = true // an earlier test's
			}
			if through := must(h.Discards())(t); through != (!masked && limit != "0") {
				t.Errorf("masked: %t, limit %s, and discards go through: %t", masked, limit, through)
			}
			m.release(t, n, h)
		}
	}},
	{"lease: granted alone, refused beside any other open file", func(t *testing.T, m *machine) {
		m.image(t, "a")
		for _, flags := range []int{os.O_RDWR, os.O_RDONLY} {
			// A file of its own, closed first, so that nothing else is open.
			path := filepath.Join(t.TempDir(), "b")
			check(t, os.WriteFile(path, make([]byte, testSize), 0o600))
			f, err := os.OpenFile(path, flags, 0)
			check(t, err)
			defer f.Close()
			if sole, err := m.Sole(f, looking); !sole {
				t.Fatalf("alone: %v", err)
			}
			for _, other := range []int{os.O_RDWR, os.O_RDONLY} {
				o, err := os.OpenFile(path, other, 0)
				check(t, err)
				if sole, _ := m.Sole(f, looking); sole {
					t.Error("granted beside an open file")
				}
				n, h := m.bind(t, config{File: o, BlockSize: 4096}, forWriting)
				check(t, o.Close())
				if sole, _ := m.Sole(f, looking); sole {
					t.Error("granted beside a loop device")
				}
				check(t, errors.Join(h.Clear(), h.Close()))
				m.gone(t, n, f)
				if sole, err := m.Sole(f, looking); !sole {
					t.Errorf("alone again: %v", err)
				}
			}
		}
	}},
	{"lease: granted to the very open file that a device keeps, so it is marked", func(t *testing.T, m *machine) {
		path := filepath.Join(t.TempDir(), "b")
		check(t, os.WriteFile(path, make([]byte, testSize), 0o600))
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		check(t, err)
		defer f.Close()
		ask := func(use leaseUse, want bool) {
			t.Helper()
			if sole, err := m.Sole(f, use); sole != want {
				t.Errorf("sole %v (%v), want %v", sole, err, want)
			}
		}
		ask(looking, true)
		ask(looking, true)
		ask(beforeBind, true)
		ask(beforeBind, false) // somebody else has been given the same open file
		n, h := m.bind(t, config{File: f, BlockSize: 4096}, forWriting)
		ask(looking, false)
		ask(afterBind, true) // if the kernel refused, the mark would not be needed
		ask(looking, false)  // and it survives the lease
		m.release(t, n, h)
	}},
}

func TestContract(t *testing.T) {
	for _, c := range contract {
		t.Run(c.name, func(t *testing.T) { onEveryMachine(t, c.test) })
	}
}

// release clears a device and proves it unbound.
func (m *machine) release(t *testing.T, number int, h handle) {
	t.Helper()
	st, err := h.Status()
	check(t, err)
	check(t, errors.Join(h.Clear(), h.Close()))
	m.goneID(t, number, st.Image)
}

func (m *machine) gone(t *testing.T, number int, f *os.File) {
	t.Helper()
	m.goneID(t, number, must(FileIDOf(f))(t))
}

// goneID proves that the device does not show the file any more; it may show one of
// somebody else's by now. On the running kernel a passer-by may be the last to close.
func (m *machine) goneID(t *testing.T, number int, id FileID) {
	t.Helper()
	deadline := time.Now().Add(5 * time.Second)
	for m.shows(t, number, id) {
		if m.fake != nil || time.Now().After(deadline) {
			t.Errorf("loop%d is still bound", number)
			return
		}
		time.Sleep(time.Millisecond)
	}
}

func (m *machine) shows(t *testing.T, number int, id FileID) bool {
	t.Helper()
	h, err := m.node(number, forReading)
	switch {
	case errors.Is(err, syscall.ENXIO): // running down
		return m.fake == nil
	case errors.Is(err, syscall.ENOENT):
		return false
	case err != nil:
		t.Error(err)
		return false
	}
	defer h.Close()
	st, err := h.Status()
	return err == nil && st.Image == id
}

// clearAlone binds a device and clears it as its only opener. A passer-by makes that
// something else, so it is tried again.
func (m *machine) clearAlone(t *testing.T, f *os.File) (int, handle) {
	t.Helper()
	for range 20 {
		n, h := m.bind(t, config{File: f, BlockSize: 4096}, forWriting)
		check(t, h.Clear())
		if _, err := h.Status(); errors.Is(err, syscall.ENXIO) {
			return n, h
		}
		check(t, h.Close())
		m.gone(t, n, f)
		if m.fake != nil {
			break
		}
	}
	t.Fatal("cleared by its only opener, the device is still bound")
	return 0, nil
}

// onFree runs try with a free device until it does not say EBUSY.
func (m *machine) onFree(t *testing.T, try func(handle) error) {
	t.Helper()
	for range 50 {
		h, err := m.node(must(m.GetFree())(t), forWriting)
		if err != nil {
			continue
		}
		err = try(h)
		_ = h.Close()
		if err == nil {
			return
		}
	}
	t.Error("no free device")
}

// unlessBusy lets onFree go on if somebody else bound the device.
func unlessBusy(t *testing.T, what string, err, want error) error {
	t.Helper()
	if errors.Is(err, syscall.EBUSY) {
		return err
	}
	wantErr(t, what, err, want)
	return nil
}
