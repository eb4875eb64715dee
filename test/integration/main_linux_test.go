package integration

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

const mib = int64(1) << 20

func TestMain(m *testing.M) { roottest.Main(m) }

// binary builds csi-loop once, into the directory that roottest.Main removes.
var binary = sync.OnceValues(func() (string, error) {
	if path := os.Getenv("CSI_LOOP_BIN"); path != "" {
		return filepath.Abs(path)
	}
	path := filepath.Join(os.Getenv("TMPDIR"), "csi-loop")
	args := []string{"build", "-o", path}
	if os.Getenv("CSI_LOOP_RACE") == "1" {
		args = append(args, "-race")
	}
	out, err := exec.Command("go", append(args, "github.com/csi-loop/csi-loop/cmd/csi-loop")...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("go build: %w\n%s", err, out)
	}
	return path, nil
})

// long tells whether the long form of the tests was asked for.
func long() bool { return os.Getenv("CSI_LOOP_LONG") == "1" }

// times is how often a repetitive test repeats: normally, with -short, or in the
// long form.
func times(short, normal, whenLong int) int {
	switch {
	case testing.Short():
		return short
	case long():
		return whenLong
	}
	return normal
}

// random returns a generator and prints what repeats it.
func random(t *testing.T) *rand.Rand {
	t.Helper()
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("CSI_LOOP_SEED"); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatalf("CSI_LOOP_SEED: %v", err)
		}
	}
	t.Logf("CSI_LOOP_SEED=%d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

// patience bounds every wait for something that happens by itself. An emulated processor
// (test/vm) takes ten to thirty times as long for everything.
var patience = func() time.Duration {
	if os.Getenv("CSI_LOOP_VM") != "" {
		return 3 * time.Minute
	}
	return 20 * time.Second
}()

// eventually polls until ok returns "", and fails the test with what it returned
// last when that does not happen in time.
func eventually(t testing.TB, ok func() string) {
	t.Helper()
	last := waitFor(patience, ok)
	if last != "" {
		t.Fatalf("after %v: %s", patience, last)
	}
}

// waitFor polls until ok returns "" or the time is over; it returns what ok
// returned last.
func waitFor(limit time.Duration, ok func() string) string {
	deadline := time.Now().Add(limit)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		last := ok()
		if last == "" || time.Now().After(deadline) {
			return last
		}
		<-tick.C
	}
}
