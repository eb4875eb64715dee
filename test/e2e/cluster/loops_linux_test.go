package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// bind puts a loop device over a file or another device, and returns its number.
// It is cleared at the end of the test, if it still is that file's.
func bind(t *testing.T, path string) int {
	t.Helper()
	out, err := exec.Command("losetup", "--find", "--show", path).Output()
	if err != nil {
		t.Skipf("loop devices cannot be bound here: %v", err)
	}
	device := strings.TrimSpace(string(out))
	number, err := strconv.Atoi(strings.TrimPrefix(device, "/dev/loop"))
	if err != nil {
		t.Fatal(err)
	}
	before := *loopStatus(number)
	t.Cleanup(func() {
		if now := loopStatus(number); now != nil && now.Inode == before.Inode && now.Device == before.Device {
			_ = clearLoop(number)
		}
	})
	return number
}

func sparse(t *testing.T, path string) string {
	t.Helper()
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, 8<<20); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestOnlyLoopDevicesOverTheNodesFilesAreCleared(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("loop devices need root")
	}
	node, elsewhere := t.TempDir(), t.TempDir()
	if err := os.Mkdir(filepath.Join(node, "deep"), 0o700); err != nil {
		t.Fatal(err)
	}
	ours := bind(t, sparse(t, filepath.Join(node, "deep", "image")))
	above := bind(t, "/dev/loop"+strconv.Itoa(ours)) // as the kubelet's over a raw block volume
	foreign := bind(t, sparse(t, filepath.Join(elsewhere, "image")))
	if err := clearLoops(t.Context(), node); err != nil {
		t.Fatal(err)
	}
	files, err := filesBelow(node)
	if err != nil {
		t.Fatal(err)
	}
	left, err := loopsOver(files)
	if err != nil {
		t.Fatal(err)
	}
	if len(left) > 0 {
		t.Errorf("devices %v are left of %d and %d", left, ours, above)
	}
	if loopStatus(foreign) == nil {
		t.Errorf("device %d over a file elsewhere was cleared", foreign)
	}
}
