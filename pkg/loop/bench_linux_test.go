package loop

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// BenchmarkAttachDetach runs the manager's cycle and the floor's in turn, so that
// what else the machine does slows both, and reports the medians and their ratio.
func BenchmarkAttachDetach(b *testing.B) {
	for name, want := range map[string]Mapping{
		"thick":     {BlockSize: 4096, DirectIO: DirectIOAuto, Tag: "bench"},
		"thin":      {BlockSize: 4096, DirectIO: DirectIOAuto, Discard: true, Tag: "bench"},
		"autoclear": {BlockSize: 4096, DirectIO: DirectIOAuto, Autoclear: true, Tag: "bench"},
	} {
		for _, others := range []int{0, 200} {
			b.Run(fmt.Sprintf("%s/others=%d", name, others), func(b *testing.B) {
				m := realMachine(b)
				manager := m.manager(b, WithMax(1000))
				defer bindOthers(b, m, manager, others)()
				image := m.image(b, "a")
				path := image.Name()
				other := m.image(b, "floor") // nothing waits until this one is unbound
				check(b, errors.Join(image.Close(), other.Close()))
				control := must(os.OpenFile("/dev/loop-control", os.O_RDWR, 0))(b)
				defer control.Close()
				var ours, floor []float64
				for b.Loop() {
					start := time.Now()
					benchCycle(b, manager, path, want)
					middle := time.Now()
					floorCycle(b, int(control.Fd()), other.Name())
					ours = append(ours, float64(middle.Sub(start).Microseconds()))
					floor = append(floor, float64(time.Since(middle).Microseconds()))
				}
				slices.Sort(ours)
				slices.Sort(floor)
				n := len(ours)
				b.ReportMetric(ours[n/2], "p50-us")
				b.ReportMetric(ours[n*9/10], "p90-us")
				b.ReportMetric(floor[n/2], "floor-p50-us")
				b.ReportMetric(ours[n/2]/floor[n/2], "x-floor")
			})
		}
	}
}

func benchCycle(b *testing.B, manager *Manager, path string, want Mapping) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	check(b, err)
	d, err := manager.Attach(b.Context(), f, want)
	check(b, err)
	check(b, errors.Join(f.Close(), d.Close(), manager.Detach(b.Context(), d.Ref())))
}

// floorCycle makes the system calls without which there is no device, and no more.
func floorCycle(b *testing.B, control int, path string) {
	f := must(unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0))(b)
	for {
		n := must(unix.IoctlRetInt(control, unix.LOOP_CTL_GET_FREE))(b)
		node := must(unix.Open("/dev/loop"+strconv.Itoa(n), unix.O_RDWR|unix.O_CLOEXEC, 0))(b)
		c := unix.LoopConfig{Fd: uint32(f), Size: 4096}
		c.Info.Flags = flagDirectIO
		err := unix.IoctlLoopConfigure(node, &c)
		if err == nil {
			check(b, unix.IoctlSetInt(node, unix.LOOP_CLR_FD, 0))
		}
		check(b, unix.Close(node))
		if err == nil {
			break
		}
	}
	check(b, unix.Close(f))
}

func BenchmarkFind(b *testing.B) {
	m := realMachine(b)
	manager := m.manager(b, WithMax(1000))
	defer bindOthers(b, m, manager, 200)()
	b.Run("alone/bound=200", func(b *testing.B) {
		name := "alone"
		check(b, m.image(b, name).Close())
		f := must(os.OpenFile(m.dir+"/"+name, os.O_RDWR, 0))(b)
		defer f.Close()
		for b.Loop() {
			if found := must(manager.Find(b.Context(), f))(b); len(found) != 0 {
				b.Fatal(found)
			}
		}
	})
	b.Run("attached/bound=200", func(b *testing.B) {
		f := must(os.OpenFile(m.dir+"/other-7", os.O_RDWR, 0))(b)
		defer f.Close()
		for b.Loop() {
			if found := must(manager.Find(b.Context(), f))(b); len(found) != 1 {
				b.Fatal(found)
			}
		}
	})
	b.Run("all/bound=200", func(b *testing.B) {
		for b.Loop() {
			if found, _, err := manager.Survey(b.Context()); err != nil || len(found) < 200 {
				b.Fatal(len(found), err)
			}
		}
	})
}

func bindOthers(b *testing.B, m *machine, manager *Manager, n int) (detach func()) {
	b.Helper()
	var devices []*Device
	for i := range n {
		devices = append(devices, m.attach(b, manager, fmt.Sprint("other-", i), whole))
	}
	return func() {
		m.detach(b, manager, devices...)
		check(b, manager.Trim(b.Context()))
	}
}
