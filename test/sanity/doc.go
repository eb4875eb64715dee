// Package sanity runs csi-sanity, the conformance suite of the CSI community,
// against the driver on real loop devices and real filesystems: once for each
// filesystem and once for raw block volumes, on pools of several filesystems.
//
// Nothing is skipped silently: a spec that the suite skips and that is not in the
// list of skips_test.go, or one in the list that is not skipped, fails the run.
package sanity
