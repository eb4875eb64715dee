package driver

import "github.com/csi-loop/csi-loop/pkg/image"

// reason is a kind of problem that the node finds, beside those of package image.
type reason int

const (
	reasonPoolAbsent reason = iota
	reasonPoolUnknown
	reasonNotTuned
	reasonDetached
	reasonCleared
	reasonDeviceSmaller
	reasonUnmounted
	reasonReadOnly
	reasonNotGrown
	reasonUnknown
	reasonDeviceLimit
	reasonNoNumber
	reasons // how many there are
)

const stageAnew = "delete the pods that use it, so that it is staged anew"

// reasonTable has of each reason its word, which never changes, and what a person does
// about it.
var reasonTable = [reasons]struct{ word, action string }{
	reasonPoolAbsent:  {"PoolAbsent", "mount the pool's disk, or mend its directory or the configuration; it is tried again every 30 s"},
	reasonPoolUnknown: {"PoolMissing", "configure the pool on this node again, or mount its disk"},
	reasonNotTuned: {
		"TuningNotInForce", "limits need cgroup version 2 with the io controller; once the node has what is missing they are set by themselves",
	},
	reasonDetached:      {"LoopDeviceDetached", stageAnew},
	reasonCleared:       {"LoopDeviceCleared", stageAnew},
	reasonDeviceSmaller: {"LoopDeviceSmallerThanVolume", "the expansion is repeated by itself; if it stays so, expand the claim again, or see csi-loop's log on the node"},
	reasonUnmounted:     {"FilesystemUnmounted", stageAnew},
	reasonReadOnly: {
		"FilesystemReadOnly", "see the kernel log of the node, then delete the pods that use it: it is checked when it is staged anew",
	},
	reasonNotGrown: {"FilesystemSmallerThanVolume", "expand the volume again, or see csi-loop's log on the node for why it could not grow"},
	reasonUnknown:  {"HealthCheckFailed", "it is looked at again by itself; if it stays so, run csi-loop doctor on the node"},
	reasonDeviceLimit: {
		"LoopDeviceLimit", "raise --loop-devices-max (loopDevices.max in the chart), or move pods to other nodes",
	},
	reasonNoNumber: {"NoLoopDeviceNumber", "free loop devices that nobody needs: losetup --list on the node shows them"},
}

// Reasons lists what can be wrong with a node, its pools and its volumes, for people. A
// word may be there several times, with something else to do.
func Reasons() []image.ReasonKind {
	all := image.Reasons()
	for _, r := range reasonTable {
		all = append(all, image.ReasonKind{Word: r.word, Action: r.action})
	}
	return all
}
