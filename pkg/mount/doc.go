// Package mount puts filesystems in place and takes them away again: mount,
// bind, unmount, grow, check, statistics.
//
// It knows nothing of loop devices, images or volumes: a source is a block
// device or a path, a target is a path. The kernel's own mount API is used
// (fsopen, fsconfig, fsmount, open_tree, mount_setattr, move_mount; Linux 5.15
// or newer); no mount, umount or blkid program is run.
//
// Invariants:
//
//   - A mount becomes visible in one step and complete: flags, read-only among
//     them, are set and verified while it is still detached. There is no instant
//     at which a read-only bind can be written to (mount(2) needs two calls and
//     has such an instant, fact 53).
//   - Every verb states what holds afterwards and treats "already so" as
//     success. What is already there but different is a *ForeignError and stays
//     as it is.
//   - A call that fails leaves no mount, and no directory or file that it made.
//   - Nothing is unmounted lazily or by force. Busy is an answer: ErrBusy.
//   - A symbolic link as the last component of a path is never followed. The
//     directories above it are trusted, as those of the kubelet are.
//   - No call returns while its work still runs. The kernel's mount calls cannot
//     be interrupted, so a context is looked at before and between them; a
//     repairing program is never killed half way.
//
// What is mounted is observed, never remembered. The only state of a Mounter is
// a lock per target, and one per device that is grown or checked, held for one
// call, so that two equal calls at once make one mount (no call holds two); and an
// idle process for the next Freeze, after the first (EndHelper).
//
// A read-only bind of a device node does not make the device read-only: the flag
// protects the node's inode (its mode, owner and times), and the block layer does
// not know the mount. Use a read-only device for that.
package mount
