package router

import (
	"fmt"
	"os"
	"runtime"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sync/errgroup"
)

// benchNodes is how many nodes BenchmarkNodes simulates, unless NODES says
// otherwise.
const benchNodes = 1000

// BenchmarkNodes links many nodes to one controller, over real TLS on loopback,
// with both ends in this process:
//
//	make bench-link
//
// It reports the memory of both ends per node, with 100 volumes each, how long all
// take to link, to link again after the controller was restarted, and to be asked for
// their capacity, and calls per second by the kind of call. All nodes have one
// address here, so that the bound on those that have not said who they are yet makes
// some of them wait and try again, which it does not do to nodes with their own.
func BenchmarkNodes(b *testing.B) {
	count := benchNodes
	if n, err := strconv.Atoi(os.Getenv("NODES")); err == nil {
		count = n
	}
	const volumes = 100
	c := newCluster(b)
	nodes := make([]*fakeNode, count)
	for i := range nodes {
		p := newDisk(b, "default", 1<<45)
		for v := range volumes {
			p.volumes[fmt.Sprintf("pvc-%08d-0000-4000-8000-%012d", i, v)] = 1
		}
		nodes[i] = c.node(fmt.Sprintf("node-%04d", i), p)
		nodes[i].slow = true
	}
	before := heap()
	start := time.Now()
	var wg sync.WaitGroup
	for _, n := range nodes {
		wg.Go(func() { n.up() })
	}
	all := func() bool { return c.router.Stats().Linked == count }
	wg.Wait()
	within(b, 2*time.Minute, "all nodes are linked", all)
	linked := time.Since(start)
	perNode := float64(heap()-before) / float64(count) / 1024
	goroutines := float64(runtime.NumGoroutine()) / float64(count)

	publish := publishing(b, c, nodes)
	c.halt()
	c.start()
	start = time.Now()
	within(b, 2*time.Minute, "all nodes are linked again", all)
	storm := time.Since(start)

	report := func(b *testing.B) {
		b.ReportMetric(linked.Seconds(), "s-to-link")
		b.ReportMetric(storm.Seconds(), "s-to-relink")
		b.ReportMetric(publish.Seconds(), "s-to-publish")
		b.ReportMetric(perNode, "KiB/node")
		b.ReportMetric(goroutines, "goroutines/node")
	}
	run := func(name string, call func(i int) error) {
		b.Run(name, func(b *testing.B) {
			var next sync.Mutex
			i := 0
			b.ResetTimer()
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					next.Lock()
					i++
					n := i
					next.Unlock()
					if err := call(n); err != nil {
						b.Error(err)
						return
					}
				}
			})
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "calls/s")
			report(b)
		})
	}
	run("GetCapacity", func(i int) error {
		_, err := c.csi.GetCapacity(b.Context(), &csi.GetCapacityRequest{AccessibleTopology: nodes[i%count].topology()[0]})
		return err
	})
	run("CreateVolume", func(i int) error {
		_, err := c.csi.CreateVolume(b.Context(), create(fmt.Sprintf("new-%d-%d", i, time.Now().UnixNano()), 1, nodes[i%count]))
		return err
	})
	run("ListVolumes-page-of-500", func(int) error {
		_, err := c.csi.ListVolumes(b.Context(), &csi.ListVolumesRequest{MaxEntries: 500})
		return err
	})
	wg = sync.WaitGroup{}
	for _, n := range nodes {
		wg.Go(n.stop)
	}
	wg.Wait()
}

// publishing is how long csi-provisioner takes to ask for the capacity of all nodes,
// with --capacity-threads=10 and without the limits of its API client.
func publishing(b *testing.B, c *cluster, nodes []*fakeNode) time.Duration {
	b.Helper()
	start := time.Now()
	var group errgroup.Group
	group.SetLimit(10)
	for _, n := range nodes {
		group.Go(func() error {
			_, err := c.csi.GetCapacity(b.Context(), &csi.GetCapacityRequest{AccessibleTopology: n.topology()[0]})
			return err
		})
	}
	must(b, group.Wait())
	return time.Since(start)
}

func heap() uint64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc + m.StackInuse
}
