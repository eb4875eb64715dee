//go:build !linux

package image

import (
	"errors"
	"os"
	"os/exec"
	"time"
)

// Only Linux has what pools need. Elsewhere the package builds, so that callers
// can be worked on, and Open answers errors.ErrUnsupported.

var errOS = errors.ErrUnsupported

func openPath(string) (*os.File, error)                     { return nil, errOS }
func openDirAt(*os.File, string) (*os.File, error)          { return nil, errOS }
func createAt(*os.File, string) (*os.File, error)           { return nil, errOS }
func openAt(*os.File, string, bool) (*os.File, error)       { return nil, errOS }
func openMapped(*os.File, string, bool) (*os.File, error)   { return nil, errOS }
func mkdirAt(*os.File, string) error                        { return errOS }
func renameNew(*os.File, string, *os.File, string) error    { return errOS }
func renameOver(*os.File, string, string) error             { return errOS }
func unlinkAt(*os.File, string, bool) error                 { return errOS }
func statFile(*os.File) (fileStat, error)                   { return fileStat{}, errOS }
func statAt(*os.File, string) (fileStat, error)             { return fileStat{}, errOS }
func versionOf(string) (fileVersion, error)                 { return fileVersion{}, errOS }
func isMountPoint(string) (bool, error)                     { return false, errOS }
func allocate(*os.File, int64, int64, bool) error           { return errOS }
func lockDir(*os.File) error                                { return errOS }
func spaceOf(*os.File) (space, error)                       { return space{}, errOS }
func filesystemUUID(*os.File, string) (string, error)       { return "", errOS }
func setNoCow(*os.File) error                               { return errOS }
func isNoCow(*os.File) (bool, error)                        { return false, errOS }
func nextHole(*os.File, int64, int64) (int64, int64, error) { return 0, 0, errOS }
func openedOnce(*os.File) bool                              { return false }
func commitBtrfs(*os.File) error                            { return errOS }
func probeWrite(*os.File, bool) error                       { return errOS }
func inDirectory(*exec.Cmd, *os.File)                       {}
func openToName(*os.File, string) (*os.File, error)         { return nil, errOS }
func effectiveUID() uint32                                  { return 0 }

const fiemapSync = 0

func reflink(*os.File, *os.File) error                    { return errOS }
func reflinkRange(*os.File, *os.File, int64, int64) error { return errOS }
func linkInto(*os.File, *os.File, string) error           { return errOS }
func stateOf(*os.File) (uint64, time.Time, time.Time, error) {
	return 0, time.Time{}, time.Time{}, errOS
}
func unshare(*os.File, int64, int64) error                            { return errOS }
func nextData(*os.File, int64, int64) (int64, int64, error)           { return 0, 0, errOS }
func copyRange(*os.File, *os.File, int64, int64) error                { return errOS }
func extents(*os.File, int64, int64, uint32, func(extent) bool) error { return errOS }
func countExtents(*os.File, int64) (int64, error)                     { return 0, errOS }
func freeSpeculative(*os.File) error                                  { return errOS }
