// Package loop attaches byte ranges of files as block devices, by the kernel's
// loop driver, and keeps its promises about them under concurrency, crashes and
// other users of loop devices on the same kernel.
//
// It owns the conversation with /dev/loop-control (which devices exist) and with
// /dev/loopN (what each one shows). It knows nothing of volumes, mounts or CSI,
// and never runs a program. Behaviour of the kernel is cited as "fact N", see
// docs/loop-devices.md.
//
// # States
//
// Every registered loop device is in one of four states:
//
//	        Bind                 Clear                  Remove
//	Unbound ------------> Bound ----------> Rundown ------------> Deleting --> gone
//	   ^ |  <------------   |                  |  ^                  ^  |
//	   | |     Released     |                  |  |                  |  |
//	   | |                  |                  +--+ Clear            |  |
//	   | |                  |                  |                     |  |
//	   | +------------------)------------------)------- Remove ------+  |
//	   +--------------------)----- Released ---+                        |
//	   +------------------------------------- Refused, Register --------+
//
// Unbound devices have no backing file. In Bound a mapping is in force. In Rundown
// the device unbinds when the last opener leaves: it was cleared while in use, or
// it is an autoclear device that nobody has mounted and this manager does not
// hold. A device in Deleting is being unregistered.
//
// The table is in state.go. The state is read from the kernel at the start of
// each operation and never remembered, so a restart needs no special code.
//
// # Invariants
//
//  1. An image is (device, inode), a binding is (number, diskseq). Nothing is
//     decided by a path or by a number alone (facts 24 to 28).
//  2. A device that a Manager did not bind is never cleared or changed. It is
//     opened read-only to read its status, and an image's device for an instant
//     with O_EXCL, to learn whether it is mounted.
//  3. No two writable mappings of one file overlap through this package, in one
//     process or in several.
//  4. What Attach returns has exactly the size, access, block size, discard limit
//     and (if required) direct I/O that was asked for. The kernel clamps and drops
//     silently, so all of it is read back (facts 13, 19, 61 to 63).
//  5. When Attach fails nothing of its work stays bound and no descriptor stays
//     open. If the kernel refuses even the undoing, the error says so.
//  6. Detach succeeds only when the binding was seen gone (facts 31 to 34).
//  7. A Device holds one O_RDONLY descriptor and no writable one (fact 51).
//
// # How Attach knows that nobody else shows a file
//
// Looking at every device for each Attach would cost time in proportion to their
// number. Instead Attach takes a write lease (fcntl F_SETLEASE) on the caller's
// open file and drops it at once. The kernel grants it only if no other open file
// of that inode exists, and a loop device keeps one. The lease is asked for before
// the bind and again after it: who opens the file later finds our device bound.
// When a lease is refused, for whatever reason, Attach falls back to looking at
// every device, before and after the bind, under an flock of the image that all
// managers honour.
//
// The lease cannot see a loop device that keeps the very open file it is asked
// for. So Attach marks each open file that it hands to the kernel (by F_SETSIG, the
// signal for a lease that is being broken) and never uses the fast path for one
// that is marked already. Open the image anew for each Attach. Whoever opens an image with
// O_NONBLOCK may, in the microsecond of a lease, be answered EAGAIN.
//
// # Lock order
//
// Outermost first: the lock of one image within the process (Manager.images), the
// flock of an image, the allocation lock (Manager.alloc), Manager.mu or Device.mu.
// No system call is made under Manager.mu.
package loop
