package guest

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// inGuest skips a test that would say something about another machine.
func inGuest(t *testing.T) string {
	t.Helper()
	release := os.Getenv("CSI_LOOP_VM")
	if release == "" {
		t.Skip("describes the virtual machine: make test-vm runs it there")
	}
	return release
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

func TestKernelIsTheOneAskedFor(t *testing.T) {
	release := inGuest(t)
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		t.Fatal(err)
	}
	if got := unix.ByteSliceToString(uts.Release[:]); got != release {
		t.Errorf("running %s, want %s", got, release)
	}
}

func TestEveryCapabilityIsThere(t *testing.T) {
	inGuest(t)
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	last, err := os.ReadFile("/proc/sys/kernel/cap_last_cap")
	if err != nil {
		t.Fatal(err)
	}
	// 41 capabilities since 5.9: bits 0 to 40.
	if strings.TrimSpace(string(last)) == "40" && !strings.Contains(string(status), "CapEff:\t000001ffffffffff") {
		t.Errorf("capabilities are missing:\n%s", status)
	}
}

// Orphans do not stay as zombies, as on a machine: before Linux 6.11 they would keep the
// seccomp filter that they are under, and tests that wait for its end would hang.
func TestOrphansAreReaped(t *testing.T) {
	inGuest(t)
	pid := run(t, "sh", "-c", "sleep 0 >/dev/null 2>&1 & echo $!")
	deadline := time.Now().Add(20 * time.Second)
	for {
		status, err := os.ReadFile("/proc/" + pid + "/status")
		if err != nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("it is still there:\n%s", status)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// An ext4 grows while it is mounted only with CAP_SYS_RESOURCE (fact 40), which
// is why this machine exists; xfs and btrfs prove that their modules are here.
func TestMountedFilesystemGrows(t *testing.T) {
	inGuest(t)
	for _, c := range []struct {
		fstype string
		mkfs   []string
		grow   func(device, target string) []string
	}{
		{"ext4", []string{"mkfs.ext4", "-q"}, func(device, _ string) []string { return []string{"resize2fs", device} }},
		{"xfs", []string{"mkfs.xfs", "-q"}, func(_, target string) []string { return []string{"xfs_growfs", target} }},
		{"btrfs", []string{"mkfs.btrfs", "-q"}, func(_, target string) []string {
			return []string{"btrfs", "filesystem", "resize", "max", target}
		}},
	} {
		t.Run(c.fstype, func(t *testing.T) {
			dir := t.TempDir()
			image, target := filepath.Join(dir, "image"), filepath.Join(dir, "target")
			run(t, "fallocate", "-l", "320M", image)
			run(t, c.mkfs[0], append(c.mkfs[1:], image)...)
			if err := os.Mkdir(target, 0o755); err != nil {
				t.Fatal(err)
			}
			device := run(t, "losetup", "-f", "--show", image)
			t.Cleanup(func() { run(t, "losetup", "-d", device) })
			run(t, "mount", "-t", c.fstype, device, target)
			t.Cleanup(func() { run(t, "umount", target) })

			before := size(t, target)
			run(t, "fallocate", "-l", "640M", image)
			run(t, "losetup", "-c", device)
			args := c.grow(device, target)
			run(t, args[0], args[1:]...)
			if after := size(t, target); after < before+250<<20 {
				t.Errorf("grew from %d to %d bytes, want about 320 MiB more", before, after)
			}
		})
	}
}

func size(t *testing.T, path string) int64 {
	t.Helper()
	var s unix.Statfs_t
	if err := unix.Statfs(path, &s); err != nil {
		t.Fatal(err)
	}
	return int64(s.Blocks) * s.Bsize
}
