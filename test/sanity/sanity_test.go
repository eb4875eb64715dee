package sanity

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/kubernetes-csi/csi-test/v5/pkg/sanity"
	"github.com/onsi/ginkgo/v2"
	"github.com/onsi/ginkgo/v2/types"
	"github.com/onsi/gomega"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"k8s.io/klog/v2"

	"github.com/csi-loop/csi-loop/internal/roottest"
	"github.com/csi-loop/csi-loop/pkg/driver"
	"github.com/csi-loop/csi-loop/pkg/image"
	"github.com/csi-loop/csi-loop/pkg/loop"
	"github.com/csi-loop/csi-loop/pkg/mount"
)

const mib = int64(1) << 20

func TestMain(m *testing.M) {
	quiet := flag.NewFlagSet("klog", flag.PanicOnError)
	klog.InitFlags(quiet)
	_ = quiet.Parse([]string{"-logtostderr=false", "-stderrthreshold=FATAL"})
	klog.SetOutput(io.Discard)
	roottest.Main(m, roottest.IgnoreGoroutine("github.com/onsi/ginkgo/v2/internal/interrupt_handler.(*InterruptHandler).registerForInterrupts.func2"))
}

// run is one pass of the suite.
type run struct {
	name       string
	access     string // mount or block
	filesystem string
	pool       string // filesystem of the pool; "" is that of the temporary directory
	size       int64
}

var runs = []run{
	{"ext4", "mount", "ext4", "", 64 * mib},
	{"xfs", "mount", "xfs", "xfs", 300 * mib},
	{"btrfs", "mount", "btrfs", "btrfs", 128 * mib},
	{"block", "block", "", "", 64 * mib},
}

// growExt4 matches the spec that grows a mounted ext4.
const growExt4 = `\bext4 .*node-expand is called after node-publish`

// TestSanity runs the whole suite for each of runs.
func TestSanity(t *testing.T) {
	roottest.Require(t)
	var contexts []*sanity.TestContext
	for _, r := range runs {
		config := r.serve(t)
		ginkgo.Describe(r.name, func() { contexts = append(contexts, sanity.GinkgoTest(config)) })
	}
	gomega.RegisterFailHandler(ginkgo.Fail)
	var skipped []string
	ginkgo.ReportAfterEach(func(s ginkgo.SpecReport) {
		if s.State == types.SpecStateSkipped {
			skipped = append(skipped, s.FullText())
		}
	})
	suite, reporter := ginkgo.GinkgoConfiguration()
	reporter.Succinct = true
	if !canGrowExt4() {
		fmt.Println("csi-sanity: without CAP_SYS_RESOURCE the kernel refuses to grow a mounted ext4: " +
			"that one spec does not run here; make test-growth runs it where it can")
		suite.SkipStrings = append(suite.SkipStrings, growExt4)
	}
	ginkgo.RunSpecs(t, "csi-sanity", suite, reporter)
	for _, c := range contexts {
		c.Finalize()
	}
	checkSkips(t, skipped)
}

// checkSkips compares what was skipped with what may be.
func checkSkips(t *testing.T, skipped []string) {
	used := make([]bool, len(skips))
	for _, text := range skipped {
		allowed := !canGrowExt4() && regexp.MustCompile(growExt4).MatchString(text)
		for i, s := range skips {
			if strings.Contains(text, s.text) {
				allowed, used[i] = true, true
			}
		}
		if !allowed {
			t.Errorf("skipped without a reason: %s", text)
		}
	}
	for i, s := range skips {
		if !used[i] {
			t.Errorf("nothing that contains %q was skipped: take it off the list (%s)", s.text, s.reason)
		}
	}
	fmt.Printf("csi-sanity: %d specs skipped, all of RPCs that the driver does not offer\n", len(skipped))
}

// serve starts a driver of its own for the run.
func (r run) serve(t *testing.T) *sanity.TestConfig {
	ctx := context.Background()
	dir := t.TempDir()
	pool := filepath.Join(dir, "pool")
	if r.pool != "" {
		pool = roottest.Pool(t, r.pool, 4<<30)
	} else if err := os.Mkdir(pool, 0o700); err != nil {
		t.Fatal(err)
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	store, err := image.Open(ctx, []image.Config{{Name: "default", Path: pool, Overcommit: 1}})
	must(err)
	dirs, err := image.OpenDirs(nil)
	must(err)
	loops, err := loop.New(ctx, loop.WithNodeDir(filepath.Join(dir, "dev")))
	must(err)
	d, err := driver.New(driver.Config{
		Version: "sanity", NodeID: "sanity-" + r.name, StateDir: filepath.Join(dir, "state"), DefaultPool: "default",
	}, store, dirs, loops, mount.New())
	must(err)
	must(d.Reconcile(ctx))
	socket := filepath.Join(dir, "csi.sock")
	l, err := driver.Listen(ctx, "unix://"+socket)
	must(err)
	serve, cancel := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() { done <- d.Serve(serve, l, 0) }()
	t.Cleanup(func() {
		cancel()
		must(<-done)
		if left := store.List(); len(left) > 0 {
			t.Errorf("%s: volumes left: %v", r.name, left)
		}
		must(d.Close())
		must(loops.Close())
		must(store.Close())
	})

	config := sanity.NewTestConfig()
	config.Address = "unix://" + socket
	config.DialOptions = append(config.DialOptions, grpc.WithChainUnaryInterceptor(patient))
	config.TargetPath = filepath.Join(dir, "target")
	config.StagingPath = filepath.Join(dir, "staging")
	config.TestVolumeAccessType = r.access
	config.TestVolumeSize = r.size
	config.TestVolumeExpandSize = 2 * r.size
	config.TestVolumeMutableParameters = map[string]string{"readIOPS": "1000", "writeBandwidth": "50Mi", "readAhead": "256Ki", "trim": "false"}
	if r.filesystem != "" {
		config.TestVolumeParameters = map[string]string{"csi.storage.k8s.io/fstype": r.filesystem}
	}
	return &config
}

// patient repeats a call whose work goes on, as a CO does: on a slow machine a copy
// takes longer than one call.
func patient(ctx context.Context, method string, req, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, options ...grpc.CallOption) error {
	for {
		err := invoke(ctx, method, req, reply, conn, options...)
		if status.Code(err) != codes.Aborted || !strings.Contains(err.Error(), "goes on") || ctx.Err() != nil {
			return err
		}
	}
}
