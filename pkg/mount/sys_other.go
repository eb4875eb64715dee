//go:build !linux

package mount

import (
	"errors"
	"net"
	"os"
	"syscall"
)

// Mounts are Linux's. The pure parts (options, superblocks, mountinfo) work
// everywhere, so that they can be tested everywhere.

// errUnclean stands in for an errno of Linux that not every system has.
const errUnclean = syscall.EBADMSG

var errNoStatmount = errors.New("statmount does not exist")

func openPath(string) (int, error)                  { return -1, errors.ErrUnsupported }
func closeFD(int)                                   {}
func lookFD(int) (place, error)                     { return place{}, errors.ErrUnsupported }
func look(string) (place, error)                    { return place{}, errors.ErrUnsupported }
func lookThrough(string) (place, error)             { return place{}, errors.ErrUnsupported }
func mountNumber(string) (uint64, error)            { return 0, errors.ErrUnsupported }
func mountNumberFD(int) (uint64, error)             { return 0, errors.ErrUnsupported }
func mountNumberOf(*os.File) (uint64, error)        { return 0, errors.ErrUnsupported }
func devNumbers(uint64) (major, minor uint32)       { return 0, 0 }
func newMount(string, string, Options) (int, error) { return -1, errors.ErrUnsupported }
func cloneMount(int) (int, error)                   { return -1, errors.ErrUnsupported }
func setAttrs(int, Flags, bool) error               { return errors.ErrUnsupported }
func isReadOnly(int) (bool, error)                  { return false, errors.ErrUnsupported }
func attachMount(int, int) error                    { return errors.ErrUnsupported }
func unmountTop(string) error                       { return errors.ErrUnsupported }
func statsOf(string) (Stats, error)                 { return Stats{}, errors.ErrUnsupported }
func statmount(uint64) (Mount, error)               { return Mount{}, errNoStatmount }
func deviceSize(string) (int64, error)              { return 0, errors.ErrUnsupported }
func claimable(string) error                        { return errors.ErrUnsupported }
func xfsSize(string) (Superblock, error)            { return Superblock{}, errors.ErrUnsupported }
func frozen(Mount) bool                             { return false }
func growXFS(string, int) error                     { return errors.ErrUnsupported }
func btrfsSize(string, uint64) (Superblock, error)  { return Superblock{}, errors.ErrUnsupported }
func growBtrfs(int, uint64) error                   { return errors.ErrUnsupported }
func growExt(string, int, int) error                { return errors.ErrUnsupported }
func openMount(string) (int, error)                 { return -1, errors.ErrUnsupported }
func freezeFilesystem(*os.File) error               { return errors.ErrUnsupported }
func thawFilesystem(*os.File) error                 { return errors.ErrUnsupported }
func syncFilesystem(*os.File) error                 { return errors.ErrUnsupported }

func socketPair() (*net.UnixConn, *os.File, error)             { return nil, nil, errors.ErrUnsupported }
func trimRange(_, _ string, _ int, _, _ uint64) (int64, error) { return 0, errors.ErrUnsupported }
