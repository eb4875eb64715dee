// Package integration proves the driver's promises on the real thing: the tests
// build the csi-loop binary, run it as a process, talk CSI to its socket, kill
// it, and look at what the kernel shows. They need root, and leave nothing:
// each test checks loop devices, mounts, pools, stage records and processes.
//
// Environment:
//
//	CSI_LOOP_BIN    the csi-loop binary to test; without it one is built
//	CSI_LOOP_RACE   "1" builds it with the race detector
//	CSI_LOOP_LONG   "1" runs the long form of the tests that have one: more
//	                kills, more cycles, and a kill after every step of every kind
//	CSI_LOOP_SEED   seed of the random tests, to repeat a run; they print it
//	CSI_LOOP_SOAK   how many cycles TestSoak makes
//	CSI_LOOP_FOR    after which time it begins no more of them, such as 20m
//
// With -short the repetitive tests do a part of their work.
//
// # What went wrong elsewhere
//
// The flaws found in other drivers for volumes in image files, and where each one
// is tested. "Not applicable" has the reason.
//
//	F1   a stale probe cache made mkfs be skipped  TestNumberIsReused: one number, many filesystems
//	F2   restoring a mounted XFS                   not applicable yet: there are no snapshots
//	F3   restoring never shares blocks             not applicable yet: there are no snapshots
//	F4   restoring does not grow the filesystem    not applicable yet; growing at stage: TestKillBetweenRPCs
//	F5   a read-only publication could be written  TestReadOnly*
//	F6   same name, other size was accepted        TestSameNameOtherSize
//	F7   a crash while creating blocked the name   TestKillWhileCreating, TestKillDuringRPCs
//	F8   two holders of one lock, code UNKNOWN     TestOneVolumeManyCalls: ABORTED only, never UNKNOWN
//	F9   expanding wanted the whole size free      TestCapacityIsExact
//	F10  capacity was counted wrong                TestCapacityIsExact
//	F11  a crash left a filesystem frozen          not applicable yet: nothing freezes before snapshots
//	F12  no check of a filesystem that asks for it TestErrorFlagIsRepaired, TestBeyondRepair
//	F13  a probe that failed led to mkfs           TestUnreadableSuperblockIsNotFormatted
//	F14  a btrfs clone had the fsid of its source  not applicable yet: there are no clones; TestManyVolumes
//	                                               mounts many btrfs volumes at the same time
//	F15  unstage and delete fail without metadata  TestLostState*
//	F16  no mounts without the API server          not applicable: the driver has no client of it
//	F17  plaintext gRPC, analytics                 not applicable: one UNIX socket, which only its owner
//	                                               may open: TestSocketIsPrivate
//	F18  a rollout that stops all nodes at once    not applicable here: test/chart, TestNodePod
//	F19  conformance tests could not run           package test/sanity; order and repeats: TestOneVolumeManyCalls
package integration
