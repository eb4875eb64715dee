package crypt

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

// A device is held if the kernel says, for the numbers of what was opened, that it is the
// mapping. A loop device stands for one here, and files for what the kernel says.
func TestHoldProvesWhatItOpened(t *testing.T) {
	roottest.Require(t)
	dir := t.TempDir()
	image := filepath.Join(dir, "disk.img")
	must(t, os.WriteFile(image, make([]byte, mib), 0o600))
	node := roottest.Losetup(t, image)
	t.Cleanup(func() { roottest.Run(t, "losetup", "--detach", node) })
	numbers := strings.TrimSpace(roottest.Run(t, "cat", filepath.Join("/sys/block", filepath.Base(node), "dev")))
	m := Mapping{Name: "csi-loop-loop3-7", UUID: "CRYPT-LUKS2-one-csi-loop-loop3-7", Number: 5, Path: node}

	for name, test := range map[string]struct {
		dm   map[string]string // what is in sysfs for its numbers
		path string
		gone bool
	}{
		"it is the one":   {dm: map[string]string{"name": m.Name, "uuid": m.UUID}},
		"another name":    {dm: map[string]string{"name": "csi-loop-loop4-9", "uuid": m.UUID}, gone: true},
		"another UUID":    {dm: map[string]string{"name": m.Name, "uuid": "CRYPT-LUKS2-two-csi-loop-loop3-7"}, gone: true},
		"no mapping":      {gone: true},
		"no node":         {path: filepath.Join(dir, "dm-5"), gone: true},
		"no block device": {path: image, gone: true},
	} {
		t.Run(name, func(t *testing.T) {
			c, err := New(cheap)
			must(t, err)
			c.sys = t.TempDir()
			at := filepath.Join(c.sys, "dev/block", numbers, "dm")
			for file, text := range test.dm {
				must(t, os.MkdirAll(at, 0o700))
				must(t, os.WriteFile(filepath.Join(at, file), []byte(text+"\n"), 0o600))
			}
			of := m
			if test.path != "" {
				of.Path = test.path
			}
			held, err := c.Hold(of)
			if test.gone != errors.Is(err, ErrGone) || !test.gone && err != nil {
				t.Fatal(err)
			}
			if err == nil {
				must(t, held.Close())
			}
		})
	}
}

// What is held neither ends nor gives its number away; when it has, it is not taken for
// what got the number.
func TestHeldMappingStays(t *testing.T) {
	c, dev, _ := device(t, 32*mib)
	ctx, key := t.Context(), []byte("0123456789abcdef")
	must(t, c.Format(ctx, dev, key, FormatSpec{Offset: 16 * mib, BlockSize: 512}))
	m, err := c.Open(ctx, dev, key, OpenSpec{Name: "csi-loop-test"})
	must(t, err)
	held, err := c.Hold(m)
	must(t, err)
	soon, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
	defer cancel()
	if err := c.Close(soon, m); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("closed what is held: %v", err)
	}
	must(t, held.Close())
	must(t, c.Close(ctx, m))
	if _, err := c.Hold(m); !errors.Is(err, ErrGone) {
		t.Errorf("held what is gone: %v", err)
	}
	other, err := c.Open(ctx, dev, key, OpenSpec{Name: "csi-loop-other"})
	must(t, err)
	if other.Path != m.Path {
		t.Errorf("%s got another node than %s", other.Path, m.Path) // then this test shows nothing
	}
	if _, err := c.Hold(m); !errors.Is(err, ErrGone) {
		t.Errorf("took %+v for %+v: %v", other, m, err)
	}
	must(t, c.Close(ctx, other))
}

// What an Open left that was cut short between the steps of making a mapping is none: it
// is ended by the next. What has a table and a user stays.
func TestHollowMappings(t *testing.T) {
	c, dev, _ := device(t, 32*mib)
	t.Setenv("DM_DISABLE_UDEV", "1") // dmsetup makes the nodes itself
	const name = "csi-loop-test"
	ctx, key := t.Context(), []byte("0123456789abcdef")
	must(t, c.Format(ctx, dev, key, FormatSpec{Offset: 16 * mib, BlockSize: 512}))
	for step, load := range map[string]bool{"made": false, "loaded and not in force": true} {
		roottest.Run(t, "dmsetup", "create", name, "--notable")
		if load {
			roottest.Run(t, "dmsetup", "load", name, "--table", "0 2048 linear "+dev+" 32768")
		}
		all, err := c.Hollow("csi-loop-")
		if err != nil || len(all) != 1 || all[0].Name != name {
			t.Fatalf("%s: %+v, %v", step, all, err)
		}
		if all, err := c.Hollow("csi-loop-tester"); err != nil || len(all) > 0 {
			t.Fatalf("%s: of another name: %+v, %v", step, all, err)
		}
		m, err := c.Open(ctx, dev, key, OpenSpec{Name: name})
		must(t, err)
		if size, err := c.Size(m); err != nil || size != 16*mib {
			t.Errorf("%s: mapping of %d bytes, %v", step, size, err)
		}
		if all, err := c.Hollow("csi-loop-"); err != nil || len(all) > 0 {
			t.Errorf("%s: %+v has a table, %v", step, all, err)
		}
		if _, err := c.Open(ctx, dev, key, OpenSpec{Name: name}); !errors.Is(err, ErrBusy) {
			t.Errorf("%s: what is whole was made anew: %v", step, err)
		}
		must(t, c.Close(ctx, m))
	}
	if left := roottest.Run(t, "dmsetup", "ls"); strings.Contains(left, "csi-loop-") {
		t.Errorf("left: %s", left)
	}
}
