package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"k8s.io/klog/v2"
)

// minimumSizes is what the tools of Debian 12 and later accept with our options,
// in bytes. Below 8 MiB ext3 and ext4 would silently get no journal.
var minimumSizes = map[string]int64{
	"ext2": 1 * MiB, "ext3": 8 * MiB, "ext4": 8 * MiB, "xfs": 300 * MiB, "btrfs": 109 * MiB,
}

var packages = map[string]string{
	"ext2": "e2fsprogs", "ext3": "e2fsprogs", "ext4": "e2fsprogs", "xfs": "xfsprogs", "btrfs": "btrfs-progs",
}

// MinimumSize is the smallest volume with that filesystem, in bytes: 1 MiB for a
// raw block volume, 0 for a filesystem that is not known.
func MinimumSize(filesystem string) int64 {
	if filesystem == "" {
		return MiB
	}
	return minimumSizes[filesystem]
}

// Everything that kernel 5.15 mounts, and nothing else; "none" first, so that the
// node's mke2fs.conf has no say. metadata_csum_seed makes the UUID cheap to change
// (fact 71).
var extFeatures = map[string]string{
	"ext2": "none,ext_attr,resize_inode,dir_index,filetype,sparse_super,large_file",
	"ext3": "none,has_journal,ext_attr,resize_inode,dir_index,filetype,sparse_super,large_file",
	"ext4": "none,has_journal,ext_attr,resize_inode,dir_index,filetype,sparse_super,large_file," +
		"extent,64bit,flex_bg,huge_file,dir_nlink,extra_isize,metadata_csum,metadata_csum_seed",
}

// Features that newer tools switch on by default and kernel 5.15 does not know.
// Older tools do not know the word either, so it is only said to those that do.
var (
	xfsNewer = []struct{ word, flag, option string }{
		{"nrext64=", "-i", "nrext64=0"},   // 5.19
		{"exchange=", "-i", "exchange=0"}, // 6.10
		{"parent=", "-n", "parent=0"},     // 6.10
		{"metadir=", "-m", "metadir=0"},   // 6.13
	}
	btrfsNewer = []string{"block-group-tree", "raid-stripe-tree", "squota"} // 6.1, 6.7, 6.7
)

// tool is an mkfs as found on this machine.
type tool struct {
	path string
	help string // what it says of its options
}

// tools finds and runs the mkfs programs.
type tools struct {
	dirs  []string
	slots chan struct{} // as many as may run at once

	mu    sync.Mutex
	found map[string]tool // guarded by mu
}

func newTools(dirs []string) *tools {
	return &tools{dirs: dirs, slots: make(chan struct{}, 2*runtime.NumCPU()), found: map[string]tool{}}
}

// toolDirs is PATH, and the places where Debian keeps mkfs but not in the PATH of
// ordinary users.
func toolDirs() []string {
	return append(filepath.SplitList(os.Getenv("PATH")), "/usr/sbin", "/sbin", "/usr/local/sbin")
}

// find returns the mkfs for a filesystem, with its words about itself; it asks
// the tool once in the life of the store (a few ms, in which others wait for it).
func (t *tools) find(ctx context.Context, filesystem string) (tool, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if found, ok := t.found[filesystem]; ok {
		return found, nil
	}
	name := "mkfs." + filesystem
	path, ok := t.path(name)
	if !ok {
		return tool{}, fmt.Errorf("%w: %s is not installed; install the package %s", ErrUnsupported, name, packages[filesystem])
	}
	found := tool{path: path}
	ask := map[string][]string{"xfs": {}, "btrfs": {"-O", "list-all"}}
	if args, ok := ask[filesystem]; ok {
		// mkfs.xfs tells its options with its complaint, so the status is no guide.
		found.help, _ = command(ctx, nil, path, args)
		if err := ctx.Err(); err != nil {
			return tool{}, err
		}
	}
	t.found[filesystem] = found
	return found, nil
}

// mkfsArguments is the command line for a new image, without the file name.
// Precondition: s is normalised.
func mkfsArguments(s Spec, help string) []string {
	switch s.Filesystem {
	case "xfs":
		args := []string{"-q", "-K", "-b", "size=4096", "-s", "size=" + strconv.Itoa(s.BlockSize)}
		for _, n := range xfsNewer {
			if strings.Contains(help, n.word) {
				args = append(args, n.flag, n.option)
			}
		}
		return append(args, s.MkfsOptions...)
	case "btrfs":
		var features []string
		for _, f := range btrfsNewer {
			if strings.Contains(help, f) {
				features = append(features, "^"+f)
			}
		}
		user, rest := pick(s.MkfsOptions, "-O")
		args := []string{"-q", "-K", "-s", "4096"}
		if features = append(features, user...); len(features) > 0 {
			args = append(args, "-O", strings.Join(features, ","))
		}
		return append(args, rest...)
	}
	// Of a repeated -E or -O only the last one counts, so there is one.
	extended, rest := pick(s.MkfsOptions, "-E")
	features, rest := pick(rest, "-O")
	return slices.Concat(
		[]string{
			"-q", "-F", "-b", "4096", "-m", "0",
			"-E", strings.Join(append([]string{"nodiscard", "lazy_itable_init=0", "lazy_journal_init=0"}, extended...), ","),
			"-O", strings.Join(append([]string{extFeatures[s.Filesystem]}, features...), ","),
		}, rest)
}

// pick takes the values of one flag out of canonical options.
func pick(options []string, flag string) (values, rest []string) {
	for i := 0; i < len(options); i++ {
		if options[i] == flag {
			i++
			values = append(values, options[i])
			continue
		}
		rest = append(rest, options[i])
	}
	return values, rest
}

// format makes the filesystem on the new image in dir, which nobody else knows
// yet. ctx ends the tool; the image is then worthless.
func (t *tools) format(ctx context.Context, dir *os.File, s Spec) error {
	return t.formatFile(ctx, dir, imageFile, s, mkfsArguments)
}

// formatFile makes the filesystem on a file in dir, or on a path if dir is nil.
func (t *tools) formatFile(ctx context.Context, dir *os.File, file string, s Spec, arguments func(s Spec, help string) []string) error {
	found, err := t.find(ctx, s.Filesystem)
	if err != nil {
		return err
	}
	select {
	case t.slots <- struct{}{}:
		defer func() { <-t.slots }()
	case <-ctx.Done():
		return ctx.Err()
	}
	args := append(arguments(s, found.help), file)
	klog.FromContext(ctx).Info("Formatting a new image", "name", s.Name, "filesystem", s.Filesystem, "size", s.Size)
	out, err := whileDevicesGo(ctx, func() (string, error) { return command(ctx, dir, found.path, args) })
	if err == nil {
		err = checkMade(dir, file, s.Filesystem)
	}
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return fmt.Errorf("%s: %w", filepath.Base(found.path), ctx.Err())
	}
	if errors.Is(err, os.ErrNotExist) {
		t.forget(s.Filesystem) // removed since it was found
	}
	return fmt.Errorf("%s %s: %w: %s", filepath.Base(found.path), strings.Join(args, " "), err, firstLines(out))
}

// whileDevicesGo is run again while it fails for a chance. Programs of btrfs look whether
// any mounted loop device shows the file, and give up when one of them goes while they
// look; they have not written anything then (fact 94).
func whileDevicesGo(ctx context.Context, run func() (out string, err error)) (string, error) {
	out, err := run()
	for try := 0; err != nil && try < mountCheckTries && strings.Contains(out, mountCheckFailed); try++ {
		if err := pause(ctx, mountCheckPause); err != nil {
			return out, err
		}
		out, err = run()
	}
	return out, err
}

const (
	mountCheckFailed = " check mount status of " // "cannot" says mkfs.btrfs, "could not" btrfstune
	mountCheckTries  = 20
	mountCheckPause  = 10 * time.Millisecond
)

// pause waits, at most until ctx ends.
func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (t *tools) forget(filesystem string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.found, filesystem)
}

// firstLines keeps the part of the tool's words that says what is wrong; mkfs.xfs
// lets its whole usage follow.
func firstLines(out string) string {
	out, _, _ = strings.Cut(out, "\nUsage:")
	out = strings.Join(strings.Fields(out), " ")
	if out == "" {
		return "it said nothing"
	}
	return out[:min(len(out), 1024)]
}

// command runs a program in dir (if not nil), with an empty input and a fixed
// environment, and returns what it said. No shell is involved.
func command(ctx context.Context, dir *os.File, path string, args []string) (string, error) {
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env = []string{"LC_ALL=C", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
	cmd.WaitDelay = 5 * time.Second // for a grandchild that keeps the output open
	if dir != nil {
		inDirectory(cmd, dir)
	}
	var out head
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	runtime.KeepAlive(dir)
	return out.kept.String(), err
}

// head keeps the beginning of what is written to it: a filesystem that is a tenant's
// decides how much e2fsck has to say.
type head struct{ kept bytes.Buffer }

const mostKept = 64 << 10

func (h *head) Write(b []byte) (int, error) {
	_, _ = h.kept.Write(b[:min(len(b), mostKept-h.kept.Len())])
	return len(b), nil
}
