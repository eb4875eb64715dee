package image

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Expect is what a pool's directory must be, so that a disk that failed to mount
// does not fill the disk below. Empty fields are not looked at.
type Expect struct {
	// Filesystem is ext4 (which stands for ext2 and ext3 too), xfs, btrfs, ...
	Filesystem string
	// UUID of the filesystem, in text form.
	UUID string
	// MountPoint: something is mounted exactly at the pool's path.
	MountPoint bool
	// PoolID is the ID in pool.json.
	PoolID string
	// Existing: the pool is there already, never make one.
	Existing bool
}

// Config is one pool.
type Config struct {
	// Name is how parameters and people name the pool; a plain DNS label.
	Name string
	// Path is an existing directory, absolute.
	Path string
	// Reserve is kept free for others.
	Reserve Reserve
	// Overcommit is what thin volumes may promise, as a multiple of the space
	// there is: 1 or more; 0 means 1.
	Overcommit float64
	Expect     Expect
}

func poolError(c Config, format string, args ...any) error {
	return fmt.Errorf("%w: pool %q at %s: %w", ErrPool, c.Name, c.Path, fmt.Errorf(format, args...))
}

// conflictError is what makes Open refuse all pools: going on without this one
// would hide a mistake that is dangerous to the others.
type conflictError struct{ error }

func (e *conflictError) Unwrap() error { return e.error }

func conflict(c Config, format string, args ...any) error {
	return &conflictError{poolError(c, format, args...)}
}

func (c Config) validate() error {
	if len(c.Name) > maxPlainName || !plainName.MatchString(c.Name) {
		return poolError(c, "its name must consist of a-z, 0-9 and -")
	}
	if !filepath.IsAbs(c.Path) || filepath.Clean(c.Path) == "/" {
		return poolError(c, "its path must be absolute, and not /")
	}
	if c.Overcommit != 0 && !(c.Overcommit >= 1 && c.Overcommit <= 1000) {
		return poolError(c, "overcommit ratio %v is not from 1 to 1000", c.Overcommit)
	}
	if err := c.Reserve.validate(); err != nil {
		return poolError(c, "%w", err)
	}
	return nil
}

func validateConfigs(configs []Config) error {
	seen, paths := map[string]bool{}, map[string]string{}
	for _, c := range configs {
		if err := c.validate(); err != nil {
			return err
		}
		if seen[c.Name] {
			return poolError(c, "there are two pools of this name")
		}
		seen[c.Name] = true
		path := filepath.Clean(c.Path)
		if other, ok := paths[path]; ok {
			return poolError(c, "it is the same directory as pool %q", other)
		}
		paths[path] = c.Name
	}
	return nil
}

// openRoot opens a pool's directory and looks whether it is the expected one. It
// changes nothing.
func openRoot(c Config) (root *os.File, uuid string, err error) {
	root, err = openPath(c.Path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, "", poolError(c, "there is no such directory; create it, or mount its disk first")
	case err != nil:
		return nil, "", poolError(c, "%w", err)
	}
	uuid, err = guard(c, root)
	if err != nil {
		return nil, "", errors.Join(err, root.Close())
	}
	return root, uuid, nil
}

func guard(c Config, root *os.File) (uuid string, err error) {
	s, err := spaceOf(root)
	if err != nil {
		return "", poolError(c, "%w", err)
	}
	e := c.Expect
	if family := extFamily(e.Filesystem); family != "" && family != s.Type {
		return "", poolError(c, "it is on %s, expected %s; is its disk mounted?", s.Type, e.Filesystem)
	}
	if s.ReadOnly {
		return "", poolError(c, "its filesystem is read-only")
	}
	uuid, err = filesystemUUID(root, s.Type)
	switch {
	case e.UUID == "":
	case err != nil:
		return "", poolError(c, "expected filesystem %s, but this kernel cannot tell the UUID of %s (%w); expect a pool ID instead", e.UUID, s.Type, err)
	case !strings.EqualFold(e.UUID, uuid):
		return "", poolError(c, "it is on filesystem %s, expected %s; is its disk mounted?", uuid, e.UUID)
	}
	if e.MountPoint {
		mounted, err := isMountPoint(c.Path)
		if err != nil {
			return "", poolError(c, "find out whether it is a mount point: %w", err)
		}
		if !mounted {
			return "", poolError(c, "it is not a mount point; is its disk mounted?")
		}
	}
	st, err := statFile(root)
	if err != nil {
		return "", poolError(c, "%w", err)
	}
	if st.Mode&0o022 != 0 || (st.UID != 0 && st.UID != effectiveUID()) {
		return "", poolError(c, "others may write to it (mode %#o, owner %d); chown it to root and chmod it to 0700", st.Mode.Perm(), st.UID)
	}
	return uuid, nil
}

func extFamily(fsType string) string {
	if fsType == "ext2" || fsType == "ext3" {
		return "ext4"
	}
	return fsType
}

// promisesSpace tells whether an allocated file on that filesystem can always be
// overwritten. Those that write elsewhere, or far away, cannot promise it.
func promisesSpace(fsType string) bool {
	return !slices.Contains([]string{
		"zfs", "bcachefs", "nilfs2", "nfs", "cifs", "ceph", "fuse", "ecryptfs",
	}, fsType)
}
