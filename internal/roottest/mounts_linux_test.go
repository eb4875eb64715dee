package roottest

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"
)

func TestForeignMounts(t *testing.T) {
	const table = `21 1 254:0 / / rw - ext4 /dev/vda rw
30 21 7:1 / /tmp/csi-loop-test-1/pool rw shared:3 - xfs /dev/loop1 rw
31 30 7:2 / /tmp/csi-loop-test-1/a\040b rw - btrfs /dev/loop2 rw
32 21 7:3 / /snap/go/1 ro - squashfs /dev/loop3 ro
33 21 7:4 / /work rw - ext4 /dev/loop4 rw
34 21 0:9 / /tmp/t rw - tmpfs none rw
`
	want := []string{"/tmp/csi-loop-test-1/pool", "/tmp/csi-loop-test-1/a b"}
	if got := foreign(table, []string{"/tmp", "/work/csi-loop"}); !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}

// Who makes a mount namespace from that of the machine has no copy of the mounts of
// tests: their loop devices go with them.
func TestNobodyCopiesMounts(t *testing.T) {
	Require(t)
	ours, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		t.Fatal(err)
	}
	machine := strconv.Itoa(os.Getppid())
	if theirs, err := os.Readlink("/proc/" + machine + "/ns/mnt"); err != nil || theirs == ours {
		t.Fatalf("the tests have the namespace of who started them: %s, %v", theirs, err)
	}
	t.Run("inner", func(t *testing.T) { // Pool fails when the device stays
		Pool(t, "ext4", 16<<20)
		copier := exec.Command("nsenter", "-t", machine, "-m", "unshare", "-m", "--propagation", "private", "sleep", "60")
		if err := copier.Start(); err != nil {
			t.Fatal(err)
		}
		defer func() {
			_ = copier.Process.Kill()
			_ = copier.Wait()
		}()
		entered := func() bool {
			now, err := os.Readlink(filepath.Join("/proc", strconv.Itoa(copier.Process.Pid), "ns/mnt"))
			comm, _ := os.ReadFile(filepath.Join("/proc", strconv.Itoa(copier.Process.Pid), "comm"))
			return err == nil && now != ours && string(comm) == "sleep\n"
		}
		for range 1000 {
			if entered() {
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
		t.Fatal("no copy was made")
	})
}
