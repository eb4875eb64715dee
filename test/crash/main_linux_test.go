package crash

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-loop/csi-loop/internal/roottest"
	"github.com/csi-loop/csi-loop/test/crash/gate"
)

const mib = int64(1) << 20

func TestMain(m *testing.M) {
	gate.Launch()
	useMemory()
	roottest.Main(m)
}

// useMemory puts the tests' files into memory, if nobody chose a place and there is
// enough of it: it is the driver that is killed here, not the machine, and thousands of
// fsyncs on a disk show nothing more. The pool's filesystem is a real one, on a loop
// device, wherever its file is.
func useMemory() {
	const memory, enough = "/dev/shm", uint64(8 << 30)
	var st unix.Statfs_t
	var machine unix.Sysinfo_t
	if os.Getenv("TMPDIR") != "" || unix.Statfs(memory, &st) != nil || unix.Sysinfo(&machine) != nil {
		return
	}
	if st.Type == unix.TMPFS_MAGIC && st.Flags&unix.ST_NOEXEC == 0 && st.Bavail*uint64(st.Bsize) >= enough && machine.Totalram*uint64(machine.Unit) >= 2*enough {
		_ = os.Setenv("TMPDIR", memory)
	}
}

// leases counts the tests that want short leases; guarded by mu.
var leases struct {
	mu     sync.Mutex
	users  int
	before []byte
}

// shortenLeases lets the kernel break a lease after a second while the test runs. A
// driver that is killed while it has one leaves it to the loop device (fact 84), and
// waiting 45 s for that shows nothing more.
func shortenLeases(t *testing.T) {
	t.Helper()
	const knob = "/proc/sys/fs/lease-break-time"
	leases.mu.Lock()
	defer leases.mu.Unlock()
	if leases.users == 0 {
		var err error
		leases.before, err = os.ReadFile(knob)
		must(t, err)
		if string(leases.before) == "1\n" {
			return // another run of these tests did it, and takes it back
		}
		must(t, os.WriteFile(knob, []byte("1"), 0))
	}
	leases.users++
	t.Cleanup(func() {
		leases.mu.Lock()
		defer leases.mu.Unlock()
		if leases.users--; leases.users == 0 {
			must(t, os.WriteFile(knob, leases.before, 0))
		}
	})
}

// binary builds csi-loop once, into the directory that roottest.Main removes.
var binary = sync.OnceValues(func() (string, error) {
	if path := os.Getenv("CSI_LOOP_BIN"); path != "" {
		return filepath.Abs(path)
	}
	path := filepath.Join(os.Getenv("TMPDIR"), "csi-loop")
	out, err := exec.Command("go", "build", "-o", path, "github.com/csi-loop/csi-loop/cmd/csi-loop").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("go build: %w\n%s", err, out)
	}
	return path, nil
})

// long tells whether the long form of the tests was asked for.
func long() bool { return os.Getenv("CSI_LOOP_LONG") == "1" }

// patience bounds every wait for something that happens by itself. A machine that is
// busy with other things is no failure.
var patience = func() time.Duration {
	if os.Getenv("CSI_LOOP_VM") != "" {
		return 5 * time.Minute // on an emulated processor (test/vm)
	}
	return time.Minute
}()

// leastTries is how often something is tried however long each try takes.
const leastTries = 5

// waitFor polls until ok returns "" or the time is over; it returns what ok
// returned last.
func waitFor(limit time.Duration, ok func() string) string {
	deadline := time.Now().Add(limit)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for try := 1; ; try++ {
		last := ok()
		if last == "" || try >= leastTries && time.Now().After(deadline) {
			return last
		}
		<-tick.C
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
