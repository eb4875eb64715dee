// Package image keeps volumes as image files in pools, which are directories.
//
//	<pool>/pool.json                                  identity of the pool, 0600
//	<pool>/volumes/<directory>/{volume.json,disk.img}
//	<pool>/snapshots/<directory>/{snapshot.json,disk.img}
//	<pool>/groups/<directory>/group.json              group snapshots
//	<pool>/.new-* .gone-*                             work in progress
//
// Invariants:
//
//  1. A volume exists if and only if volumes/<directory>/volume.json can be read.
//     A record that cannot be read is never guessed at: that volume is refused,
//     every other one is served. Damage is what was looked at and found wrong;
//     that something could not be looked at is never taken for it.
//
//  2. Create commits with one rename out of .new-*, Remove with one rename into
//     .gone-*. Whatever a crash leaves has one of these prefixes and is gone after
//     the next Open.
//
//  3. When Create, Grow or Remove has returned nil its effect is on disk: it
//     survives SIGKILL and power loss. When it has returned an error the pool and
//     its accounting are as before. The one exception is an error of the very last
//     directory sync, after the commit; then the effect is seen, and repeating the
//     call is right.
//
//  4. Image and record are synced before the rename, and volumes/ after it
//     (fact 74). A record never promises what the image lacks: a grown image
//     is synced before its record, and without it is rolled forward at Open.
//
//  5. A thick image has a block for every byte from before its record exists until
//     it is removed; mkfs may not give any back (facts 48, 62), OpenImage refills
//     the holes, and only those: repeating the fallocate of a whole image fails on
//     a full XFS. On btrfs it is NOCOW as well, or it is refused (fact 70); for one that
//     was copied in by hand and is not, the account holds as much as it has.
//
//  6. Only new files in .new-* are ever formatted. There is no probe for a
//     filesystem, hence none that can be wrong. What is in an encrypted image is made
//     by who has the key, who has to know that nobody wrote there (FormatDevice). What is written instead of a run
//     of mkfs was equal to one, byte for byte but for its identity.
//
//  7. Free space, less the reserve, less what thin volumes may still write (divided
//     by the overcommit ratio), less what calls under way will write, is what a new
//     volume may have. Capacity, Create and Grow ask the same account, in constant
//     time. Pools on one filesystem share it. After a Remove, XFS shows its blocks
//     free some ms later and btrfs up to 30 s; a refusal waits for them, Capacity
//     does not.
//
//  8. A volume's name is never used as a path. Every file is opened beneath the
//     pool's root descriptor, without following links and without leaving the
//     filesystem; an image must be a regular file with one link (fact 73).
//
//  9. One process per pool, one pool per directory, one directory per pool ID.
//     Whatever breaks this fails the whole Open.
//
//  10. A pool that merely cannot be used is absent: the others are served, and it
//     is tried again until it opens. While it is absent its ID is unknown, so that
//     none of its volumes is taken for one that does not exist.
//
//  11. A snapshot exists if and only if its record can be read and, where it is part
//     of a group, the group's record names it. So a group is all there or not at
//     all, also when its snapshots are in several pools. A snapshot is never
//     written to; it does not need its volume.
//
//  12. What a volume shares with other files it may have to write anew. The account
//     holds that for it until it is seen to be shared no more: once, however many
//     files share it (fact 69). On btrfs a claim is given up only after a commit,
//     since statfs does not show what was written since the last one.
//
// Not for: files other programs write, directories on network filesystems (no
// space can be promised there), images that are in use. Callers must not Remove an
// image that is bound to a loop device: its space is not freed until unbound
// (fact 37). The package knows nothing of loop devices, mounts or CSI.
//
// Lock order: a group's lock, then those of a snapshot and of its volume, in the order
// of the volumes' IDs (all in Pool.locks), then Pool.mu or ledger.mu. The latter
// two are never held together, and nothing but statfs runs under them: no call
// waits for another volume's I/O.
package image
