package mount

import "math/bits"

// Stats are the sizes of a filesystem, in bytes and inodes. Available is what
// ordinary users may still write; Total-Used is more where a reserve is kept for
// root. A filesystem that makes inodes as needed (btrfs) counts none: all zero.
type Stats struct {
	Total, Available, Used         int64
	Inodes, InodesFree, InodesUsed int64
}

// Stats asks the filesystem that path lies in, whether or not it is a mount
// point. A path that does not exist is an *OpError with ENOENT; a dead filesystem
// is one with EIO or whatever it answers.
func (m *Mounter) Stats(path string) (Stats, error) {
	path, err := cleanPath("count", path)
	if err != nil {
		return Stats{}, err
	}
	s, err := statsOf(path)
	if err != nil {
		return Stats{}, &OpError{Op: "count blocks of", Path: path, Err: err}
	}
	return s, nil
}

// newStats turns statfs(2)'s counts of units into bytes. Nonsense is clamped: no
// number is negative, or greater than the total.
func newStats(unit int64, blocks, free, available, inodes, inodesFree uint64) Stats {
	free, inodesFree = min(free, blocks), min(inodesFree, inodes)
	available = min(available, free)
	return Stats{
		Total: scale(blocks, unit), Available: scale(available, unit), Used: scale(blocks-free, unit),
		Inodes: scale(inodes, 1), InodesFree: scale(inodesFree, 1), InodesUsed: scale(inodes-inodesFree, 1),
	}
}

func scale(n uint64, unit int64) int64 {
	const most = 1<<63 - 1
	hi, lo := bits.Mul64(n, uint64(max(unit, 0)))
	if hi != 0 || lo > most {
		return most
	}
	return int64(lo)
}
