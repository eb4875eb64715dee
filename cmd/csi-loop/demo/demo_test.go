package demo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func TestParseMounts(t *testing.T) {
	//nolint:dupword // as the kernel writes it
	const text = `22 27 0:21 / /proc rw,relatime - proc proc rw
36 27 7:1 / /d/staging/files rw,noatime shared:3 master:1 - xfs /dev/loop1 rw,attr2
37 27 7:1 /sub\040dir /d/pods/a\040b ro,relatime - ext4 /dev/loop1 rw
38 27 0:6 /loop2 /d/pods/raw rw - devtmpfs devtmpfs rw
39 27 7:3 / /d-other rw - ext4 /dev/loop3 rw
nonsense
`
	want := []mountLine{
		{root: "/", path: "/d/staging/files", options: "rw,noatime", fsType: "xfs", source: "/dev/loop1"},
		{root: "/sub dir", path: "/d/pods/a b", options: "ro,relatime", fsType: "ext4", source: "/dev/loop1"},
		{root: "/loop2", path: "/d/pods/raw", options: "rw", fsType: "devtmpfs", source: "devtmpfs"},
	}
	if diff := cmp.Diff(want, parseMounts(text, "/d"), cmp.AllowUnexported(mountLine{})); diff != "" {
		t.Error(diff)
	}
}

func TestHasCapability(t *testing.T) {
	for set, want := range map[string]bool{
		"000001ffffffffff": true,
		"000001fffeffffff": false, // all but CAP_SYS_RESOURCE
		"0000000000000000": false,
		"nonsense":         false,
	} {
		status := "Name:\tx\nCapPrm:\t000001ffffffffff\nCapEff:\t" + set + "\nCapBnd:\t000001ffffffffff\n"
		if got := hasCapability(status, capSysResource); got != want {
			t.Errorf("%s: %v", set, got)
		}
	}
	if hasCapability("", capSysResource) {
		t.Error("no line, yet a capability")
	}
}

func TestMissingProgramsAreNamedWithTheirPackages(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	for name, c := range map[string]struct {
		needs needs
		want  string
	}{
		"growth is shown with xfs":  {needs{}, "missing mkfs.ext4, mkfs.xfs, xfs_growfs: install e2fsprogs xfsprogs (apt-get install e2fsprogs xfsprogs)"},
		"growth is shown with ext4": {needs{sysResource: true}, "missing mkfs.ext4, resize2fs: install e2fsprogs (apt-get install e2fsprogs)"},
	} {
		t.Run(name, func(t *testing.T) {
			err := checkPrograms(c.needs)
			if err == nil || err.Error() != c.want {
				t.Errorf("got %v, want %s", err, c.want)
			}
		})
	}
}

func TestPrograms(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("PATH", dir)
	for _, program := range []string{"mkfs.ext4", "mkfs.xfs", "xfs_growfs"} {
		if err := os.WriteFile(filepath.Join(dir, program), []byte("#!/bin/sh\n"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := checkPrograms(needs{}); err != nil {
		t.Error(err)
	}
}

func TestBytesText(t *testing.T) {
	for n, want := range map[int64]string{
		0: "0 bytes", 1: "1 bytes", 1<<20 - 1: "1048575 bytes", 300 << 20: "300 MiB", 300<<20 + 4096: "300.0 MiB", 10 << 30: "10.0 GiB",
	} {
		if got := bytesText(n); got != want {
			t.Errorf("%d: %s, want %s", n, got, want)
		}
	}
}

func TestPrinter(t *testing.T) {
	for name, c := range map[string]struct {
		colour bool
		want   string
	}{
		"plain": {false, "\n  1  One                                                                            12.3 ms  FAILED\n      file      .../pool/x\n"},
		"in colours": {true, "\n\x1b[36m  1\x1b[0m  \x1b[1mOne\x1b[0m                                                                            12.3 ms  \x1b[31mFAILED\x1b[0m\n" +
			"      \x1b[2mfile     \x1b[0m .../pool/x\n"},
	} {
		t.Run(name, func(t *testing.T) {
			var out bytes.Buffer
			p := newPrinter(&out, c.colour, "/d")
			p.now = func() time.Time { return time.Unix(0, 0) }
			p.begin(1, "One")
			p.factf("file", "%s", "/d/pool/x")
			if out.Len() != 0 {
				t.Errorf("printed before the step is finished: %q", out.String())
			}
			p.now = func() time.Time { return time.Unix(0, 12_345_678) }
			p.finish(false)
			if diff := cmp.Diff(c.want, out.String()); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestDriverGetsNoConfigurationFromTheEnvironment(t *testing.T) {
	got := ownEnvironment([]string{"PATH=/bin", "CSILOOP_POOL=a=/b", "CSI_ENDPOINT=x", "CSI_ENDPOINTS=y"})
	if diff := cmp.Diff([]string{"PATH=/bin", "CSI_ENDPOINTS=y"}, got); diff != "" {
		t.Error(diff)
	}
}

func TestPatientlyRepeatsOnlyNotNow(t *testing.T) {
	calls := 0
	err := patiently(t.Context(), func() error {
		if calls++; calls < 3 {
			return &callError{"X", status.Error(codes.Aborted, "busy")}
		}
		return nil
	})
	if err != nil || calls != 3 {
		t.Errorf("%d calls, %v", calls, err)
	}
	calls = 0
	err = patiently(t.Context(), func() error { calls++; return status.Error(codes.Internal, "broken") })
	if err == nil || calls != 1 {
		t.Errorf("%d calls, %v", calls, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err = patiently(ctx, func() error { return status.Error(codes.Aborted, "busy") }); err == nil {
		t.Error("success after the end")
	}
}

func TestRefusedWantsTheErrno(t *testing.T) {
	var out bytes.Buffer
	d := &demo{out: newPrinter(&out, false, "/d")}
	if err := d.refused("write", syscall.EROFS, fmt.Errorf("open: %w", syscall.EROFS)); err != nil {
		t.Error(err)
	}
	for _, err := range []error{nil, errors.New("other"), syscall.ENOSPC} {
		if d.refused("write", syscall.EROFS, err) == nil {
			t.Errorf("%v passes for read-only", err)
		}
	}
}

func TestNoiseIsWrittenAndReadBack(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	if err := writeFile(path, mib+17, "seed"); err != nil {
		t.Fatal(err)
	}
	got, size, err := sumFile(path)
	if errors.Is(err, errors.ErrUnsupported) {
		t.Skip("not Linux")
	}
	if err != nil || size != mib+17 || got != sumOf(size, "seed") || got == sumOf(size, "other") {
		t.Errorf("%s, %d bytes, %v", got, size, err)
	}
}
