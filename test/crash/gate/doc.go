// Package gate runs a program that has to ask before each system call that
// changes something: files, loop devices, mounts. The test that runs it learns of
// each such call before the kernel does anything, and may let it run, make it fail
// with an errno, pretend that it succeeded, or kill the program right there.
//
// It is made of a seccomp filter that sends these calls to a supervisor
// (SECCOMP_RET_USER_NOTIF). All threads and children of the program are under the
// filter. A signal does not restart a call that waits, so each call is seen once;
// that needs Linux 5.19.
//
// The filter has to be put on by the process that becomes the program, so the test
// binary starts itself anew for that: its TestMain must call [Launch] first.
package gate
