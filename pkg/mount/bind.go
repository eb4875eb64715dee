package mount

import (
	"context"
	"errors"
	"io/fs"
	"syscall"
)

// BindSpec says what Bind shall show where.
type BindSpec struct {
	Source   string // a directory, a regular file or a block device's node; absolute
	Target   string // an absolute path; its parent directory exists
	ReadOnly bool   // this mount of it
	Flags    Flags  // in addition to those of the mount that Source lies in
	// Mount is the kernel's number (Mount.ID) of the mount that Source must lie in; 0 is
	// whichever is there.
	Mount int
}

// Bind shows Source at Target. On success it is there, and with ReadOnly nothing
// can be written through it and nothing ever could. What is mounted below Source
// is not shown. Target is made when missing: a directory (0750) for a directory,
// an empty file (0640) for anything else.
//
// The new mount has the flags of the mount that Source lies in, and those asked
// for: without ReadOnly it is as writable as Source is.
//
// The same already there with the same flags is success; anything else is a
// *ForeignError. A Source or Target that is a symbolic link is refused (ELOOP).
// ErrBusy: Source lies in another mount than the one that is meant.
//
// For a device node, ReadOnly protects the node (its owner, mode and times) and
// not the device: writing to it goes on. Use a read-only device.
func (m *Mounter) Bind(ctx context.Context, spec BindSpec) error {
	target, err := cleanPath("bind to", spec.Target)
	if err != nil {
		return err
	}
	source, err := cleanPath("bind from", spec.Source)
	if err != nil {
		return err
	}
	unlock, err := m.targets.lock(ctx, target)
	if err != nil {
		return err
	}
	defer unlock()

	from, err := openPath(source)
	if err != nil {
		return &OpError{Op: "bind from", Path: source, Err: err}
	}
	defer closeFD(from)
	shown, err := lookFD(from)
	if err != nil {
		return &OpError{Op: "bind from", Path: source, Err: err}
	}
	if err := checkSource(source, shown); err != nil {
		return err
	}
	if err := checkMount(from, source, spec.Mount); err != nil {
		return err
	}
	inherited, err := isReadOnly(from)
	if err != nil {
		return &OpError{Op: "bind from", Path: source, Err: err}
	}
	found, ok, err := m.at(target)
	if err != nil {
		return err
	}
	if ok {
		return compareBind(found, target, shown, spec.ReadOnly || inherited, spec.Flags)
	}
	return m.onTarget(ctx, target, shown.mode.IsDir(), func(at int) error {
		return bindAt(from, at, source, target, spec)
	})
}

func checkSource(source string, p place) error {
	switch {
	case p.mode&fs.ModeSymlink != 0:
		return &OpError{Op: "bind from", Path: source, Err: syscall.ELOOP, Words: "the source is a symbolic link, which is not followed"}
	case p.mode.IsDir(), p.mode.IsRegular(), p.isBlock():
		return nil
	}
	return &OpError{Op: "bind from", Path: source, Err: syscall.EINVAL, Words: "the source is " + typeName(p.mode)}
}

// checkMount refuses what is open at from if it does not lie in the mount of that number:
// that one was unmounted, or covered, since its path was looked up.
func checkMount(from int, source string, want int) error {
	if want == 0 {
		return nil
	}
	number, err := mountNumberFD(from)
	if err == nil && number != uint64(want) {
		err = ErrBusy
	}
	if err != nil {
		return &OpError{Op: "bind from", Path: source, Err: err, Words: "another mount is there than a moment ago"}
	}
	return nil
}

func bindAt(from, at int, source, target string, spec BindSpec) error {
	fd, err := cloneMount(from)
	if err != nil {
		out := &OpError{Op: "copy mount of " + shorten(source) + " for", Path: target, Err: err}
		if errors.Is(err, syscall.EINVAL) {
			out.Words = "the source lies in another mount namespace, or cannot be bound by its nature"
		}
		return out
	}
	defer closeFD(fd)
	if err := setAttrs(fd, spec.Flags, spec.ReadOnly); err != nil {
		return &OpError{Op: "set flags of mount for", Path: target, Err: err}
	}
	return attachAt(fd, at, target, spec.ReadOnly)
}

// compareBind tells success from a foreign mount.
func compareBind(found Mount, target string, want place, readOnly bool, flags Flags) error {
	foreign := func(reason string) error {
		return &ForeignError{Target: target, Found: found, Reason: reason}
	}
	got, err := look(target)
	switch {
	case err != nil:
		return errors.Join(foreign("it cannot be looked at"), &OpError{Op: "look at", Path: target, Err: err})
	case !got.sameAs(want):
		return foreign("it shows another file or directory")
	case found.ReadOnly != readOnly && readOnly:
		return foreign("it is writable, read-only is asked for")
	case found.ReadOnly != readOnly:
		return foreign("it is read-only, writable is asked for")
	}
	if missing := missingFlag(found.Options, flags); missing != "" {
		return foreign("it lacks " + missing)
	}
	return nil
}

// missingFlag names a flag that a mount with these options does not have, or
// returns "". StrictAtime is what neither relatime nor noatime says.
func missingFlag(options []string, flags Flags) string {
	has := make(map[string]bool, len(options))
	for _, o := range options {
		has[o] = true
	}
	for _, f := range flagNames {
		if flags&f.flag == 0 {
			continue
		}
		missing := !has[f.name]
		if f.flag == StrictAtime {
			missing = has["relatime"] || has["noatime"]
		}
		if missing {
			return f.name
		}
	}
	return ""
}

var flagNames = []struct {
	flag Flags
	name string
}{
	{NoSuid, "nosuid"},
	{NoDev, "nodev"},
	{NoExec, "noexec"},
	{NoSymFollow, "nosymfollow"},
	{NoDirAtime, "nodiratime"},
	{NoAtime, "noatime"},
	{StrictAtime, "strictatime"},
}
