package mount

import (
	"bytes"
	"encoding/binary"
	"errors"
	"unsafe"

	"golang.org/x/sys/unix"
)

// statmount(2) asks for one mount by its unique number, where mountinfo has to
// be printed and read whole. Linux 6.8 has it; the source comes with 6.13.

// Bits of mnt_id_req.param and statmount.mask, STATMOUNT_* in the kernel.
const (
	statmountSBBasic  = 0x1
	statmountMntBasic = 0x2
	statmountMntRoot  = 0x8
	statmountMntPoint = 0x10
	statmountFSType   = 0x20
	statmountMntOpts  = 0x80
	statmountFSSub    = 0x100
	statmountSBSource = 0x200

	statmountNeeded = statmountSBBasic | statmountMntBasic | statmountMntRoot | statmountMntPoint |
		statmountFSType | statmountSBSource
	statmountWanted = statmountNeeded | statmountMntOpts | statmountFSSub
)

// mntIDReq is struct mnt_id_req, first version.
type mntIDReq struct {
	size, spare  uint32
	mntID, param uint64
}

// Offsets in struct statmount, whose strings begin after 512 bytes and are named
// by their offset from there.
const (
	smMntOpts, smMask, smMajor, smMinor = 4, 8, 16, 20
	smSBFlags, smFSType                 = 32, 36
	smIDOld, smParentOld, smAttr        = 56, 60, 64
	smRoot, smPoint, smSub, smSource    = 104, 108, 120, 124
	smStrings                           = 512
)

// errNoStatmount means that mountinfo has to be asked instead.
var errNoStatmount = errors.New("statmount does not answer everything")

// statmount describes the mount with this unique number.
func statmount(id uint64) (Mount, error) {
	buf := make([]byte, 4096)
	for {
		err := statmountInto(id, buf)
		switch {
		case err == nil:
			return parseStatmount(buf)
		case errors.Is(err, unix.EOVERFLOW) && len(buf) < 1<<20:
			buf = make([]byte, 8*len(buf))
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EINVAL), errors.Is(err, unix.EPERM), errors.Is(err, unix.EOVERFLOW):
			// ENOSYS before 6.8 or under an old seccomp filter, EPERM under another.
			return Mount{}, errNoStatmount
		default:
			return Mount{}, err
		}
	}
}

func statmountInto(id uint64, buf []byte) error {
	req := mntIDReq{mntID: id, param: statmountWanted}
	req.size = uint32(unsafe.Sizeof(req))
	_, _, errno := unix.Syscall6(unix.SYS_STATMOUNT, uintptr(unsafe.Pointer(&req)),
		uintptr(unsafe.Pointer(&buf[0])), uintptr(len(buf)), 0, 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// parseStatmount reads a struct statmount. An answer without a field that Mount
// needs is errNoStatmount.
func parseStatmount(b []byte) (Mount, error) {
	ne := binary.NativeEndian
	if len(b) < smStrings {
		return Mount{}, errNoStatmount
	}
	mask := ne.Uint64(b[smMask:])
	if mask&statmountNeeded&^statmountSBSource != statmountNeeded&^statmountSBSource {
		return Mount{}, errNoStatmount
	}
	str := func(bit uint64, at int) string {
		off := smStrings + int64(ne.Uint32(b[at:]))
		if mask&bit == 0 || off >= int64(len(b)) {
			return ""
		}
		s, _, _ := bytes.Cut(b[off:], []byte{0})
		return string(s)
	}
	m := Mount{
		ID: int(ne.Uint32(b[smIDOld:])), ParentID: int(ne.Uint32(b[smParentOld:])),
		Major: ne.Uint32(b[smMajor:]), Minor: ne.Uint32(b[smMinor:]),
		Root: str(statmountMntRoot, smRoot), Path: str(statmountMntPoint, smPoint),
		FSType: str(statmountFSType, smFSType), Source: str(statmountSBSource, smSource),
	}
	if m.Source == "" || m.Path == "" || m.Root == "" {
		// No source before 6.13; no path when it is out of this process' root.
		return Mount{}, errNoStatmount
	}
	if sub := str(statmountFSSub, smSub); sub != "" {
		m.FSType += "." + sub
	}
	m.Options = attrOptions(ne.Uint64(b[smAttr:]))
	m.SuperOptions = append(superFlags(ne.Uint32(b[smSBFlags:])), splitOptions(str(statmountMntOpts, smMntOpts))...)
	m.ReadOnly = takesNoWrites(m.Options, m.SuperOptions)
	return m, nil
}

// attrOptions prints MOUNT_ATTR_* bits the way mountinfo does.
func attrOptions(attr uint64) []string {
	out := []string{"rw"}
	if attr&unix.MOUNT_ATTR_RDONLY != 0 {
		out[0] = "ro"
	}
	for _, a := range attrTable {
		if attr&a.attr == 0 || a.name == "" {
			continue
		}
		if a.flag == NoSymFollow {
			break // comes after relatime
		}
		out = append(out, a.name)
	}
	if attr&unix.MOUNT_ATTR__ATIME == unix.MOUNT_ATTR_RELATIME {
		out = append(out, "relatime")
	}
	if attr&unix.MOUNT_ATTR_NOSYMFOLLOW != 0 {
		out = append(out, "nosymfollow")
	}
	return out
}

// superFlags prints SB_* bits the way mountinfo does.
func superFlags(flags uint32) []string {
	out := []string{"rw"}
	if flags&unix.MS_RDONLY != 0 {
		out[0] = "ro"
	}
	for _, f := range []struct {
		bit  uint32
		name string
	}{
		{unix.MS_SYNCHRONOUS, "sync"},
		{unix.MS_DIRSYNC, "dirsync"},
		{unix.MS_MANDLOCK, "mand"},
		{unix.MS_LAZYTIME, "lazytime"},
	} {
		if flags&f.bit != 0 {
			out = append(out, f.name)
		}
	}
	return out
}
