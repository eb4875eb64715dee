package image

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"sync"
)

// fileStat is what the package wants to know of a file.
type fileStat struct {
	Dev, Ino  uint64
	Mode      fs.FileMode // permissions and kind: regular, directory or irregular
	UID, GID  uint32
	Links     uint64
	Size      int64
	Allocated int64 // bytes of blocks, those past the end included
}

// space is a filesystem as its users see it.
type space struct {
	Size, Free int64 // bytes; free for those who are not root
	Type       string
	ReadOnly   bool
}

var (
	errNotRegular = errors.New("not a regular file")
	errNoProc     = errors.New("/proc is not mounted")
)

// writeSynced makes a new file with the given content and syncs it.
func writeSynced(dir *os.File, name string, content []byte) error {
	f, err := createAt(dir, name)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// syncAt makes durable what a file has.
func syncAt(dir *os.File, name string) error {
	f, err := openAt(dir, name, false)
	if err != nil {
		return openError(name, err)
	}
	return opError("sync", name, errors.Join(f.Sync(), f.Close()))
}

// writeAside begins writeSynced. The function that it returns waits for that, and may be
// called again.
func writeAside(dir *os.File, name string, content []byte) (wait func() error) {
	done := make(chan error, 1)
	go func() { done <- opError("write", name, writeSynced(dir, name, content)) }()
	return sync.OnceValue(func() error { return <-done })
}

// replaceSynced makes name have the given content, or keep the old one, whatever
// happens; temporary is a name in dir that nobody else uses.
func replaceSynced(dir *os.File, name, temporary string, content []byte, kill func(string)) (renamed bool, err error) {
	if err := unlinkAt(dir, temporary, false); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	if err := writeSynced(dir, temporary, content); err != nil {
		return false, err
	}
	kill("record written")
	if err := renameOver(dir, temporary, name); err != nil {
		return false, err
	}
	kill("record renamed")
	if err := dir.Sync(); err != nil {
		return true, err
	}
	kill("record synced")
	return true, nil
}

// names lists a directory that is open already, from its beginning.
func names(dir *os.File) ([]string, error) {
	if _, err := dir.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	return dir.Readdirnames(-1)
}
