package crypt

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
)

// formatted is an image with the header that cryptsetup writes, which needs no device.
func formatted(t *testing.T) []byte {
	t.Helper()
	if _, err := find(); err != nil {
		t.Skip(err)
	}
	path := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(path, make([]byte, 18*mib), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := New(cheap)
	if err != nil {
		t.Fatal(err)
	}
	key := []byte("0123456789abcdef")
	if err := c.Format(t.Context(), path, key, FormatSpec{Offset: 16 * mib, BlockSize: 4096, Label: "first"}); err != nil {
		if errors.As(err, new(*exec.ExitError)) && os.Getenv("CSI_LOOP_VM") == "" {
			t.Skip(err) // neither the kernel's ciphers for programs nor dm-crypt
		}
		t.Fatal(err)
	}
	if err := c.Relabel(t.Context(), path, "second"); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestReadHeader(t *testing.T) {
	whole := formatted(t)
	damage := func(places ...int) []byte {
		b := bytes.Clone(whole)
		for _, at := range places {
			b[at] ^= 1
		}
		return b
	}
	for _, test := range []struct {
		name string
		b    []byte
		ok   bool
	}{
		{"whole", whole, true},
		{"first copy damaged", damage(100), true},
		{"first copy's text damaged", damage(headerBytes + 10), true},
		{"second copy damaged", damage(areaBytes + 100), true},
		{"both damaged", damage(100, areaBytes+headerBytes+10), false},
		{"nothing but zeros", make([]byte, mib), false},
		{"too short", whole[:areaBytes/2], false},
		{"second copy in the first's place", append(bytes.Clone(whole[areaBytes:2*areaBytes]), make([]byte, mib)...), false},
	} {
		t.Run(test.name, func(t *testing.T) {
			h, err := ReadHeader(bytes.NewReader(test.b))
			switch {
			case test.ok && (err != nil || h.Label != "second" || len(h.UUID) != 36):
				t.Errorf("got %+v, %v", h, err)
			case !test.ok && !errors.Is(err, ErrNoHeader):
				t.Errorf("got %+v, %v", h, err)
			}
		})
	}
}

// headerCopy is one copy of a header, as far as it is read.
func headerCopy(number int, sequence uint64, label string) []byte {
	b := make([]byte, areaBytes)
	copy(b, magics[number])
	binary.BigEndian.PutUint16(b[atVersion:], 2)
	binary.BigEndian.PutUint64(b[atHeaderSize:], areaBytes)
	binary.BigEndian.PutUint64(b[atSequence:], sequence)
	copy(b[atLabel:], label)
	copy(b[atChecksumAlg:], "sha256")
	binary.BigEndian.PutUint64(b[atOffset:], uint64(number*areaBytes))
	sum := sha256.Sum256(b)
	copy(b[atChecksum:], sum[:])
	return b
}

func TestReadCopies(t *testing.T) {
	broken := make([]byte, areaBytes)
	for name, test := range map[string]struct {
		first, second []byte
		want          []string
	}{
		"alike":               {headerCopy(0, 4, "a"), headerCopy(1, 4, "a"), []string{"a", "a"}},
		"the first is newer":  {headerCopy(0, 5, "new"), headerCopy(1, 4, "old"), []string{"new", "old"}},
		"the second is newer": {headerCopy(0, 4, "old"), headerCopy(1, 5, "new"), []string{"new", "old"}},
		"first damaged":       {broken, headerCopy(1, 4, "old"), []string{"old"}},
		"second damaged":      {headerCopy(0, 5, "new"), broken, []string{"new"}},
		"both damaged":        {broken, broken, nil},
	} {
		copies, err := ReadCopies(bytes.NewReader(append(test.first, test.second...)))
		var labels []string
		for _, h := range copies {
			labels = append(labels, h.Label)
		}
		if !slices.Equal(labels, test.want) || errors.Is(err, ErrNoHeader) != (test.want == nil) {
			t.Errorf("%s: %q, %v, want %q", name, labels, err, test.want)
		}
	}
}

// What cryptsetup makes with other options is not taken for nothing.
func TestForeignHeader(t *testing.T) {
	if _, err := find(); err != nil {
		t.Skip(err)
	}
	for name, args := range map[string][]string{
		"version 1":    {"--type", "luks1"},
		"other copies": {"--type", "luks2", "--luks2-metadata-size", "32k"},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "disk.img")
			if err := os.WriteFile(path, make([]byte, 18*mib), 0o600); err != nil {
				t.Fatal(err)
			}
			c, err := New(cheap)
			if err != nil {
				t.Fatal(err)
			}
			args = append([]string{"luksFormat", "--batch-mode", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--key-file", "-"}, args...)
			if err := c.run(t.Context(), []byte("0123456789abcdef"), append(args, path)...); err != nil {
				if errors.As(err, new(*exec.ExitError)) && os.Getenv("CSI_LOOP_VM") == "" {
					t.Skip(err) // neither the kernel's ciphers for programs nor dm-crypt
				}
				t.Fatal(err)
			}
			f, err := os.Open(path)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if h, err := ReadHeader(f); !errors.Is(err, ErrForeign) {
				t.Errorf("got %+v, %v", h, err)
			}
		})
	}
}

func TestOptions(t *testing.T) {
	for _, o := range []Options{
		{PBKDF: "scrypt"}, {Memory: 1}, {Memory: 8 << 30}, {Time: -1}, {Time: 1e12},
	} {
		if _, err := New(o); err == nil {
			t.Errorf("%+v is accepted", o)
		}
	}
}

// Whatever an image begins with: nothing but an error, or copies with what a header has.
func FuzzReadCopies(f *testing.F) {
	f.Add([]byte{})
	f.Add(append(headerCopy(0, 7, "label"), make([]byte, areaBytes)...))
	f.Add(append(headerCopy(0, 7, "a"), headerCopy(1, 8, "b")...))
	f.Fuzz(func(t *testing.T, b []byte) {
		copies, err := ReadCopies(bytes.NewReader(b))
		if (err == nil) != (len(copies) > 0) {
			t.Errorf("%d copies, %v", len(copies), err)
		}
		for _, h := range copies {
			if len(h.Label) > 48 || len(h.UUID) > 40 {
				t.Errorf("%+v is more than a header has room for", h)
			}
		}
	})
}
