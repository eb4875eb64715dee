package mount

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

// TestCheckIsConfined: in the place of e2fsck is a program that shows what it may.
func TestCheckIsConfined(t *testing.T) {
	roottest.Require(t)
	dir := t.TempDir()
	device := filepath.Join(dir, "device")
	write := func(path, content string, mode os.FileMode) {
		t.Helper()
		if err := os.WriteFile(path, []byte(content), mode); err != nil {
			t.Fatal(err)
		}
	}
	write(device, "", 0o600)
	write(filepath.Join(dir, "e2fsck"), "#!/bin/sh\ngrep -E 'CapEff|CapBnd|NoNewPrivs' /proc/self/status\necho written 1<> "+device+"\necho x > "+filepath.Join(dir, "elsewhere")+"\nexit 4\n", 0o700)
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	err := e2fsck(t.Context(), device, "-p")
	if err == nil {
		t.Fatal("its exit status was lost")
	}
	for _, want := range []string{"CapEff:\t0000000000000000", "CapBnd:\t0000000000000000", "NoNewPrivs:\t1"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q is not in %v", want, err)
		}
	}
	if b, err := os.ReadFile(device); err != nil || string(b) != "written\n" {
		t.Errorf("the device has %q, %v", b, err)
	}
	const version = 1 // LANDLOCK_CREATE_RULESET_VERSION
	_, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, version)
	if _, err := os.Stat(filepath.Join(dir, "elsewhere")); errno == 0 && err == nil {
		t.Error("it wrote elsewhere, on a kernel with Landlock")
	}
}
