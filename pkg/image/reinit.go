package image

import (
	"context"
	"errors"
	"io/fs"
	"path/filepath"
	"syscall"
	"time"
)

// Summary is a pool on a disk, looked at without serving it.
type Summary struct {
	Path string `json:"path"`
	ID   string `json:"id"`
	// Created is when its identity was made.
	Created    time.Time `json:"created"`
	Filesystem string    `json:"filesystem"`
	UUID       string    `json:"uuid,omitempty"` // of the filesystem, where it can be told
	Volumes    int       `json:"volumes"`
	Snapshots  int       `json:"snapshots"`
	// Served: a process has the pool.
	Served bool `json:"served"`
}

// Summarize looks at the pool in a directory. It changes nothing, and may be called
// while the pool is served. The error wraps ErrPool.
func Summarize(path string) (Summary, error) {
	p := &Pool{config: Config{Name: filepath.Base(path), Path: filepath.Clean(path)}}
	root, uuid, err := openRoot(p.config)
	if err != nil {
		return Summary{}, err
	}
	defer root.Close()
	p.root = root
	return p.summary(uuid)
}

func (p *Pool) summary(uuid string) (Summary, error) {
	s := Summary{Path: p.config.Path, UUID: uuid}
	b, err := p.readIdentity()
	if errors.Is(err, fs.ErrNotExist) {
		return s, poolError(p.config, "there is no %s: it is not a pool", identityFile)
	}
	if err == nil {
		p.identity, err = parseIdentity(b)
	}
	if err != nil {
		return s, poolError(p.config, "%s: %w", identityFile, err)
	}
	s.ID, s.Created = p.ID(), p.identity.Created
	space, err := spaceOf(p.root)
	if err != nil {
		return s, poolError(p.config, "%w", err)
	}
	s.Filesystem = space.Type
	for dir, count := range map[string]*int{volumesDir: &s.Volumes, snapshotsDir: &s.Snapshots} {
		content, err := p.content(dir)
		if err != nil {
			return s, err
		}
		*count = len(content)
	}
	// The lock is let go of with the descriptor it was taken by, which is a new one.
	probe, err := openPath(p.config.Path)
	if err != nil {
		return s, poolError(p.config, "%w", err)
	}
	defer probe.Close()
	err = lockDir(probe)
	s.Served = errors.Is(err, syscall.EWOULDBLOCK)
	if err != nil && !s.Served {
		return s, poolError(p.config, "lock: %w", err)
	}
	return s, nil
}

// content lists a directory of the pool; one that is missing is empty.
func (p *Pool) content(dir string) ([]string, error) {
	d, err := openDirAt(p.root, dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, poolError(p.config, "%s: %w", dir, err)
	}
	defer d.Close()
	content, err := names(d)
	if err != nil {
		return nil, poolError(p.config, "%s: %w", dir, err)
	}
	return content, nil
}

// ImageFile is an image's file in a pool.
type ImageFile struct {
	Path     string
	Dev, Ino uint64
}

// Reinit gives the pool in a directory a new identity, and with it new IDs to all its
// volumes and snapshots, which stay as they are otherwise. It is for the copy of a
// pool: both have one ID, and only one of them can be served. The old identity is
// kept beside the new one, in pool.json.old-<ID>, for the case that it was the wrong
// one of the two.
//
// No process may serve the pool, and none may begin to meanwhile. inUse is called
// with all image files while that is sure, and refuses by an error.
func Reinit(ctx context.Context, path string, inUse func(images []ImageFile) error) (before Summary, id string, err error) {
	return reinit(ctx, path, inUse, func(string) {})
}

func reinit(ctx context.Context, path string, inUse func(images []ImageFile) error, kill func(string)) (before Summary, id string, err error) {
	p := &Pool{config: Config{Name: filepath.Base(path), Path: filepath.Clean(path)}}
	root, uuid, err := openRoot(p.config)
	if err != nil {
		return before, "", err
	}
	defer root.Close()
	p.root = root
	if before, err = p.summary(uuid); err != nil {
		return before, "", err
	}
	if err := lockRoot(ctx, root); err != nil {
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return before, "", poolError(p.config, "a csi-loop process serves it: stop that one first")
		}
		return before, "", poolError(p.config, "lock: %w", err)
	}
	images, err := p.imageFiles()
	if err != nil {
		return before, "", err
	}
	if err := inUse(images); err != nil {
		return before, "", poolError(p.config, "%w", err)
	}
	old, err := p.identity.encode()
	if err != nil {
		return before, "", poolError(p.config, "%w", err)
	}
	kept := identityFile + ".old-" + before.ID
	if _, err := replaceSynced(root, kept, newPrefix+identityFile, old, kill); err != nil {
		return before, "", poolError(p.config, "%s: %w", kept, opError("write", kept, err))
	}
	next, err := newIdentity(time.Now())
	if err != nil {
		return before, "", poolError(p.config, "make a key: %w", err)
	}
	b, err := next.encode()
	if err != nil {
		return before, "", poolError(p.config, "%w", err)
	}
	if _, err := replaceSynced(root, identityFile, newPrefix+identityFile, b, kill); err != nil {
		return before, "", poolError(p.config, "%s: %w", identityFile, opError("write", identityFile, err))
	}
	return before, next.ID, nil
}

// imageFiles finds the image of every volume and snapshot, whatever their records say.
func (p *Pool) imageFiles() ([]ImageFile, error) {
	var images []ImageFile
	for _, kind := range []string{volumesDir, snapshotsDir, templatesDir} {
		content, err := p.content(kind)
		if err != nil {
			return nil, err
		}
		for _, name := range content {
			st, err := statAt(p.root, kind+"/"+name+"/"+imageFile)
			switch {
			case err == nil:
				images = append(images, ImageFile{filepath.Join(p.config.Path, kind, name, imageFile), st.Dev, st.Ino})
			case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ENOTDIR):
			default:
				return nil, poolError(p.config, "%s/%s: %w", kind, name, err)
			}
		}
	}
	return images, nil
}
