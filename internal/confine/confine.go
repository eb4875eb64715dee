// Package confine runs programs with less than this process may do. It is for
// programs that read what may be hostile, and needs no set-up and no helper.
package confine

import "os"

// Limits are what the programs that Run's function starts may do. They have no
// capabilities and cannot gain any, whatever is here.
type Limits struct {
	// Write are the files and directories that they may write to, with all that is
	// below them. nil forbids nothing: that is for who cannot name them.
	Write []*os.File
}
