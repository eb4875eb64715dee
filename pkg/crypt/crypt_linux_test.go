package crypt

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

// device is a loop device over a new image, and a Crypt for it.
func device(t *testing.T, size int64) (c *Crypt, path, image string) {
	t.Helper()
	roottest.Require(t)
	c, err := New(cheap)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Available(); err != nil {
		if os.Getenv("CSI_LOOP_VM") != "" {
			t.Fatal(err) // the virtual machines have what it takes
		}
		t.Skip(err)
	}
	image = filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, size); err != nil {
		t.Fatal(err)
	}
	path = roottest.Losetup(t, image)
	t.Cleanup(func() {
		left, err := c.Over(filepath.Base(path))
		for _, m := range left {
			t.Errorf("mapping %+v is left", m)
			err = errors.Join(err, c.Close(context.Background(), m))
		}
		if err != nil {
			t.Error(err)
		}
		roottest.Run(t, "losetup", "--detach", path)
	})
	return c, path, image
}

func header(t *testing.T, image string) Header {
	t.Helper()
	f, err := os.Open(image)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h, err := ReadHeader(f)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestLifeOfAMapping(t *testing.T) {
	c, dev, image := device(t, 48*mib)
	ctx, key := t.Context(), []byte("a key\nwith a line\x00 and a NUL")
	must(t, c.Format(ctx, dev, key, FormatSpec{Offset: 16 * mib, BlockSize: 4096, Label: "one"}))
	if h := header(t, image); h.Label != "one" || len(h.UUID) != 36 {
		t.Fatalf("header %+v", h)
	}
	must(t, c.Relabel(ctx, dev, "two"))
	if h := header(t, image); h.Label != "two" {
		t.Fatalf("header %+v", h)
	}

	for _, wrong := range []string{"a key", string(key) + "\n"} {
		if _, err := c.Open(ctx, dev, []byte(wrong), OpenSpec{Name: "csi-loop-test"}); !errors.Is(err, ErrPassphrase) {
			t.Fatalf("opened with %q: %v", wrong, err)
		}
		if err := c.Verify(ctx, dev, []byte(wrong)); !errors.Is(err, ErrPassphrase) {
			t.Fatalf("verified %q: %v", wrong, err)
		}
	}
	must(t, c.Verify(ctx, dev, key))

	m, err := c.Open(ctx, dev, key, OpenSpec{Name: "csi-loop-test"})
	must(t, err)
	if size, err := c.Size(m); err != nil || size != 32*mib {
		t.Fatalf("mapping of %d bytes, %v", size, err)
	}
	if over, err := c.Over(filepath.Base(dev)); err != nil || len(over) != 1 || over[0] != m {
		t.Fatalf("over %s: %+v, %v, not %+v", dev, over, err, m)
	}
	if _, err := os.Lstat("/dev/mapper/csi-loop-test"); err == nil {
		t.Error("a node is left under /dev/mapper")
	}
	if _, err := c.Open(ctx, dev, key, OpenSpec{Name: "csi-loop-test"}); !errors.Is(err, ErrBusy) {
		t.Errorf("opened twice: %v", err)
	}
	text := bytes.Repeat([]byte("plain text "), 400)
	must(t, os.WriteFile(m.Path, text, 0o600))
	roottest.Run(t, "blockdev", "--flushbufs", m.Path)
	if b, err := os.ReadFile(image); err != nil || bytes.Contains(b, []byte("plain text")) {
		t.Fatalf("the image shows the text: %v", err)
	}
	must(t, c.SetReadAhead(m, 64<<10))
	if n, err := c.ReadAhead(m); err != nil || n != 64<<10 {
		t.Errorf("reads %d ahead, %v", n, err)
	}

	must(t, os.Truncate(image, 64*mib))
	roottest.Run(t, "losetup", "--set-capacity", dev)
	must(t, c.Resize(ctx, m))
	if size, err := c.Size(m); err != nil || size != 48*mib {
		t.Fatalf("mapping of %d bytes, %v", size, err)
	}
	must(t, c.Close(ctx, m))
	must(t, c.Close(ctx, m)) // again is success

	m, err = c.Open(ctx, dev, key, OpenSpec{Name: "csi-loop-test", ReadOnly: true})
	must(t, err)
	if err := os.WriteFile(m.Path, text, 0o600); err == nil {
		t.Error("wrote to a read-only mapping")
	}
	if b, err := os.ReadFile(m.Path); err != nil || !bytes.HasPrefix(b, text) {
		t.Errorf("what was written is not read: %v", err)
	}
	must(t, c.Close(ctx, m))
}

func TestCloseWaitsForTheLastUser(t *testing.T) {
	c, dev, _ := device(t, 32*mib)
	ctx, key := t.Context(), []byte("0123456789abcdef")
	must(t, c.Format(ctx, dev, key, FormatSpec{Offset: 16 * mib, BlockSize: 512}))
	m, err := c.Open(ctx, dev, key, OpenSpec{Name: "csi-loop-test"})
	must(t, err)
	user, err := os.Open(m.Path)
	must(t, err)
	soon, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
	defer cancel()
	if err := c.Close(soon, m); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("closed what is in use: %v", err)
	}
	must(t, c.CloseLast(m))
	if over, err := c.Over(filepath.Base(dev)); err != nil || len(over) != 1 {
		t.Fatalf("%+v, %v", over, err)
	}
	must(t, c.CloseLast(m))
	must(t, user.Close())
	deadline := time.Now().Add(10 * time.Second)
	for {
		over, err := c.Over(filepath.Base(dev))
		must(t, err)
		if len(over) == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%+v stays", over)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// The default costs memory and time, so that one try is all that a test makes.
func TestArgon2(t *testing.T) {
	c, dev, image := device(t, 32*mib)
	var err error
	c.options, err = Options{Memory: 32 << 20, Time: time.Millisecond}.normalise()
	must(t, err)
	must(t, c.Format(t.Context(), dev, []byte("0123456789abcdef"), FormatSpec{Offset: 16 * mib, BlockSize: 4096}))
	b, err := os.ReadFile(image)
	must(t, err)
	for _, want := range []string{`"type":"argon2id"`, `"memory":32768`, `"cpus":1`, `"encryption":"aes-xts-plain64"`, `"sector_size":4096`, `"key_size":64`, `"offset":"16777216"`} {
		if !bytes.Contains(b[:areaBytes], []byte(want)) {
			t.Errorf("the header does not say %s: %s", want, b[headerBytes:headerBytes+2048])
		}
	}
}
