// Package confine runs programs with less than this process may do. It is for
// programs that read what may be hostile, and needs no set-up and no helper.
package confine

import "os"

// Limits are what the programs that Run's function starts may do. They have no
// capabilities and cannot gain any, and make no system calls that reach a socket,
// another process, a namespace or the owner, mode and attributes of a file, whatever is
// here.
type Limits struct {
	// Write are the files and directories that they may write to, with all that is
	// below them. nil forbids nothing: that is for who cannot name them. Where all are
	// files, also no name is made, removed or renamed, and no file is cut by its
	// name, which Landlock cannot forbid on every kernel.
	Write []*os.File
}
