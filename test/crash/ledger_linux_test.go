package crash

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/csi-loop/csi-loop/test/crash/gate"
)

// ledger is what the driver and its children changed below a directory and did not sync
// since. It outlives the driver: what a killed process changed and did not sync is for
// the next one to sync before it tells somebody of it.
//
// What is synced when is what ext4, XFS and btrfs hold to: fsync of a file brings its
// content, length and blocks to disk; fsync of a directory that changed brings there
// what changed in it and, below it, in directories until then, as a new directory is of
// no use without its names. Of a directory that did not change it brings nothing.
//
// A sync of a file that failed has lost what was to be synced: the kernel takes the pages
// for clean, and the next sync succeeds. What was written must be written again, or be
// thrown away. A child's failure is known to whoever has the file open since before, so
// that the driver's own sync of it tells the truth. The metadata of a directory is in
// the journal, which stops for ever when it fails.
type ledger struct {
	root  string
	debts map[string]debt // by path
	now   int             // counts calls
}

// debt is a file or directory that is not synced.
type debt struct {
	since int    // the last change
	by    string // its name
	dir   bool
	lost  bool // a sync failed
}

// note enters a call that is about to be run, or not.
func (l *ledger) note(c gate.Call, v gate.Verdict) {
	l.now++
	syncs := c.Name == "fsync" || c.Name == "fdatasync"
	switch {
	case v.Lie, v.Kill && c.Own:
	case v.Errno == unix.EINTR: // nothing happened
	case v.Errno != 0:
		if syncs && c.Own && l.within(c.Path) && !isDir(c.Path) {
			l.debts[c.Path] = debt{since: l.now, by: c.Name, lost: true}
		}
	case syncs:
		l.synced(c.Path)
	case c.Name == "syncfs" && l.within(c.Path): // not of a volume's filesystem
		maps.DeleteFunc(l.debts, func(_ string, d debt) bool { return !d.lost })
	default:
		l.changed(c)
	}
}

// changed enters a call that is about to change something.
func (l *ledger) changed(c gate.Call) {
	switch c.Name {
	case "open", "openat", "openat2", "creat", "mkdir", "mkdirat", "mknod", "mknodat", "symlink", "symlinkat":
		if !there(c.Path) {
			l.named(c, c.Path)
		}
	case "unlink", "unlinkat", "rmdir":
		if there(c.Path) {
			l.named(c, c.Path)
			l.forget(c.Path)
		}
	case "rename", "renameat", "renameat2":
		if there(c.Path) && !isDir(c.To) { // else it fails
			l.named(c, c.Path)
			l.named(c, c.To)
			l.moved(c.Path, c.To)
		}
	case "link", "linkat":
		l.named(c, c.To)
	case "truncate", "ftruncate":
		// To the length that a file has, it gives back blocks past the end, which no
		// answer tells of.
		if l.within(c.Path) && lengthOf(c.Path) != c.Length {
			l.debts[c.Path] = debt{since: l.now, by: c.Name}
		}
	case "write", "pwrite", "writev", "pwritev", "pwritev2", "sendfile", "copy_file_range", "fallocate",
		"ioctl FICLONE", "ioctl FICLONERANGE":
		if l.within(c.Path) {
			l.debts[c.Path] = debt{since: l.now, by: c.Name}
		}
	}
}

// named enters that a directory has a name more or less. One that begins with a dot is of
// nothing that counts.
func (l *ledger) named(c gate.Call, path string) {
	if l.within(path) && !strings.HasPrefix(filepath.Base(path), ".") {
		l.debts[filepath.Dir(path)] = debt{since: l.now, by: c.Name, dir: true}
	}
}

func (l *ledger) synced(path string) {
	d, ok := l.debts[path]
	if !ok || d.lost {
		return
	}
	delete(l.debts, path)
	if !d.dir {
		return
	}
	maps.DeleteFunc(l.debts, func(p string, o debt) bool { return o.dir && o.since <= d.since && below(p, path) })
}

func (l *ledger) forget(path string) {
	maps.DeleteFunc(l.debts, func(p string, _ debt) bool { return p == path || below(p, path) })
}

func (l *ledger) moved(from, to string) {
	l.forget(to)
	for _, p := range slices.Collect(maps.Keys(l.debts)) {
		if p == from || below(p, from) {
			l.debts[to+strings.TrimPrefix(p, from)] = l.debts[p]
			delete(l.debts, p)
		}
	}
}

func (l *ledger) within(path string) bool { return path == l.root || below(path, l.root) }

// unsynced lists what is not on disk and should be, one line each: not what is in the
// making or on its way out.
func (l *ledger) unsynced() []string {
	var found []string
	for _, path := range slices.Sorted(maps.Keys(l.debts)) {
		if d := l.debts[path]; there(path) && !strings.Contains(strings.TrimPrefix(path, l.root), "/.") {
			found = append(found, fmt.Sprintf("not synced since %s (a sync failed: %v): %s", d.by, d.lost, path))
		}
	}
	return found
}

func below(path, dir string) bool { return strings.HasPrefix(path, dir+"/") }

func there(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// lengthOf is a file's length in bytes, -1 of none.
func lengthOf(path string) int64 {
	st, err := os.Stat(path)
	if err != nil {
		return -1
	}
	return st.Size()
}

func isDir(path string) bool {
	st, err := os.Lstat(path)
	return err == nil && st.IsDir()
}
