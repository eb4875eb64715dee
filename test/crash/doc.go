// Package crash ends the driver with SIGKILL at every system call that changes
// something, and makes every such call fail, and checks what is left.
//
// The real binary runs under package gate. A test takes a volume through its life
// as a CO does. In pass k, the k-th call of each RPC is the one that the driver is
// killed at, or that fails. After a kill the driver is started again; then the RPC
// is repeated until it succeeds, and everything that can be checked is checked:
// that the volumes are those that were acknowledged, and as large; their data; that
// the pool's account is what its filesystem says; loop devices, mounts, records,
// files and processes that nobody should have left; and that nothing is frozen.
// "Before call k" is also "after call k-1"; what comes after the last call is
// covered by a kill between the last call and the answer.
//
// A run that counts comes first, so that a test fails when a call was not reached.
// The checks themselves are tested by calls that pretend to succeed.
//
// Environment:
//
//	CSI_LOOP_BIN    the csi-loop binary to test; without it one is built
//	CSI_LOOP_LONG   "1": all kinds of volumes on pools of all filesystems, every
//	                call of mkfs and fsck too, and every errno at every call
//
// With -short only two kinds of volumes are tested.
package crash
