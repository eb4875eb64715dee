package image

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"k8s.io/klog/v2"

	"github.com/csi-loop/csi-loop/internal/confine"
)

// renew makes the filesystem of a copy, whose image in dir nobody else knows yet, one
// that can be mounted beside its source, and of the ext family as large as the image.
//
// XFS stays as it is: its identity cannot be changed while its log is dirty, which that
// of a frozen one is, and it is mounted with nouuid (facts 66, 71). XFS and btrfs grow
// when they are mounted first.
func (t *tools) renew(ctx context.Context, dir *os.File, s Spec, from int64) error {
	return t.renewFile(ctx, dir, imageFile, s, from)
}

// renewFile is renew for a file in dir, or for a path if dir is nil.
func (t *tools) renewFile(ctx context.Context, dir *os.File, file string, s Spec, from int64) error {
	var err error
	switch s.Filesystem {
	case "ext2", "ext3", "ext4":
		err = t.renewExt(ctx, dir, file, s, from)
	case "btrfs":
		err = t.run(ctx, dir, "btrfstune", "-f", "-m", file)
	default:
		return nil
	}
	if err != nil {
		return err
	}
	return checkMade(dir, file, s.Filesystem)
}

func (t *tools) renewExt(ctx context.Context, dir *os.File, file string, s Spec, from int64) error {
	checked := false
	check := func() error {
		checked = true
		// It repairs what needs no decision: the journal of a filesystem that was not
		// unmounted is replayed.
		return t.run(ctx, dir, "e2fsck", "-f", "-p", file)
	}
	err := t.run(ctx, dir, "tune2fs", "-U", "random", file)
	if err != nil && ctx.Err() == nil {
		// Without metadata_csum_seed it wants a check first.
		if checkErr := check(); checkErr != nil {
			return errors.Join(err, checkErr)
		}
		err = t.run(ctx, dir, "tune2fs", "-U", "random", file)
	}
	if err != nil || s.Size == from {
		return err
	}
	if !checked {
		if err := check(); err != nil {
			return err
		}
	}
	klog.FromContext(ctx).Info("Growing the filesystem of a new copy", "name", s.Name, "filesystem", s.Filesystem, "from", from, "size", s.Size)
	return t.run(ctx, dir, "resize2fs", file)
}

// run runs a program for an image in dir, its last argument, and returns an error when
// it fails.
func (t *tools) run(ctx context.Context, dir *os.File, name string, args ...string) error {
	path, ok := t.path(name)
	if !ok {
		return fmt.Errorf("%w: %s is not installed; install the package %s", ErrUnsupported, name, programs[name])
	}
	select {
	case t.slots <- struct{}{}:
		defer func() { <-t.slots }()
	case <-ctx.Done():
		return ctx.Err()
	}
	out, err := whileDevicesGo(ctx, func() (string, error) { return confined(ctx, dir, args[len(args)-1], path, args) })
	const repaired = 1 // of e2fsck
	if exit, ok := errors.AsType[*exec.ExitError](err); ok && name == "e2fsck" && exit.ExitCode() == repaired {
		return nil
	}
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return fmt.Errorf("%s: %w", name, ctx.Err())
	}
	return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, firstLines(out))
}

// confined is command for a program that reads what a tenant has written, and changes
// nothing but file.
func confined(ctx context.Context, dir *os.File, file, path string, args []string) (out string, err error) {
	target, err := openToName(dir, file)
	if err != nil {
		return "", err
	}
	defer target.Close()
	err = confine.Run(confine.Limits{Write: []*os.File{target}}, func() (err error) {
		out, err = command(ctx, dir, path, args)
		return err
	})
	return out, err
}

// programs are those that run runs, and the packages of Debian that have them.
var programs = map[string]string{
	"tune2fs": "e2fsprogs", "e2fsck": "e2fsprogs", "resize2fs": "e2fsprogs", "btrfstune": "btrfs-progs",
}

// path finds a program.
func (t *tools) path(name string) (string, bool) {
	for _, dir := range t.dirs {
		path := filepath.Join(dir, name)
		if st, err := os.Stat(path); filepath.IsAbs(path) && err == nil && !st.IsDir() && st.Mode()&0o111 != 0 {
			return path, true
		}
	}
	return "", false
}
