// Package driver is the gRPC edge of csi-loop: the CSI Identity, Controller
// and Node services over pools of image files (package image), loop devices
// (package loop) and mounts (package mount).
//
// It owns the validation of requests, the per-volume lock, the order of steps,
// the one table from errors to gRPC codes (status.go), what a node remembers of
// staged volumes (nodestate.go) and the reconcile at start-up. It knows no
// system call: what it learns about the kernel comes from the packages below
// it, at the moment it asks.
//
// Values move forward only:
//
//	image.Volume -> source -> loop.Mapping -> loop.Device -> mount source
//
// Invariants:
//
//   - One call at a time works on a volume. A second one is answered ABORTED at
//     once; there is no queue and no lock over the whole node.
//   - A code that kubelet reads as "nothing happened" (any but CANCELED,
//     DEADLINE_EXCEEDED, UNAVAILABLE, RESOURCE_EXHAUSTED, ABORTED; fact 57) is
//     returned only after what the call did has been undone.
//   - "Already so" is success: every mutating call states what holds after it and
//     does what is missing.
//   - Nothing here formats, and no path leads from a probe to mkfs: filesystems
//     are made by package image in files that no volume ID names yet.
//   - A loop device or mount that does not show an image of ours is never
//     cleared or unmounted.
//   - The records below the state directory are hints about arguments (which
//     access mode, which targets). Whether something is attached or mounted is
//     always the kernel's word.
//
// Lock order: the volume lock, then nodeState.mu. No lock of this package is
// held while another volume's work is done.
package driver
