package driver

import (
	"sync"

	"github.com/csi-loop/csi-loop/pkg/loop"
	"github.com/csi-loop/csi-loop/pkg/report"
)

// counting makes counters of volumes out of those of devices, which go on when their
// number shows another volume.
type counting struct {
	mu      sync.Mutex
	volumes map[string]counted // guarded by mu; by the volume ID of the stage record
}

type counted struct {
	ref   loop.Ref
	last  loop.Counters
	total report.IO
}

// begin counts a volume on a device that is about to show it, so that nothing is
// missed. Failing is no failure of the caller's: then it counts from the first look.
func (c *counting) begin(table loopTable, id string, ref loop.Ref) {
	if now, err := table.Counters(ref); err == nil {
		c.note(id, ref, now)
	}
}

// keep forgets volumes that are not staged. When they are again, they count from 0.
func (c *counting) keep(staged map[string]stageRecord) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for id := range c.volumes {
		if _, is := staged[id]; !is {
			delete(c.volumes, id)
		}
	}
}

// note adds what a device counted since the last time, and returns the sum. A binding
// that is new counts from now.
func (c *counting) note(id string, ref loop.Ref, now loop.Counters) report.IO {
	c.mu.Lock()
	defer c.mu.Unlock()
	v, known := c.volumes[id]
	if !known || v.ref != ref {
		v.ref, v.last = ref, now
	}
	v.total.Reads += now.Reads - v.last.Reads
	v.total.ReadBytes += now.ReadBytes - v.last.ReadBytes
	v.total.Writes += now.Writes - v.last.Writes
	v.total.WriteBytes += now.WriteBytes - v.last.WriteBytes
	v.total.ReadSeconds += (now.ReadTime - v.last.ReadTime).Seconds()
	v.total.WriteSeconds += (now.WriteTime - v.last.WriteTime).Seconds()
	v.total.BusySeconds += (now.Busy - v.last.Busy).Seconds()
	v.last = now
	if c.volumes == nil {
		c.volumes = map[string]counted{}
	}
	c.volumes[id] = v
	return v.total
}
