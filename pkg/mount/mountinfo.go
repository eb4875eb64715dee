package mount

import (
	"bytes"
	"slices"
	"strconv"
	"strings"
)

// Mount is one mount as the kernel sees it.
type Mount struct {
	// ID is the kernel's number for it, unique among the mounts of now only.
	// ParentID is that of the mount it sits on.
	ID, ParentID int
	// Path is where it is mounted. Root is the path inside the filesystem that
	// shows there: "/" unless it is a bind of something deeper (or a btrfs
	// subvolume); it ends in "//deleted" when that was removed since.
	Path, Root string
	// FSType and Source are what it was mounted with. A Source is for people,
	// except that it is the only way to a btrfs' device.
	FSType, Source string
	// Major and Minor number the filesystem: its block device, or an anonymous
	// number with major 0 (btrfs, tmpfs, overlay).
	Major, Minor uint32
	// ReadOnly means that nothing can be written here, because of this mount or
	// because of the whole filesystem.
	ReadOnly bool
	// Options are those of this mount, SuperOptions those of the filesystem,
	// which all of its mounts share. Both begin with "rw" or "ro".
	Options, SuperOptions []string
}

// parseMountinfo reads the text of /proc/<pid>/mountinfo.
//
// mount-utils' ParseMountInfo is not used: it splits at every Unicode space, so
// one path with a no-break space anywhere on the machine makes it fail or lie,
// an empty source does the same, and paths stay escaped. Here only what the
// kernel uses as a separator separates. A line that does not look like one is
// left out and does not hide the others: other people's mounts must not be able
// to stop ours.
func parseMountinfo(text []byte) []Mount {
	mounts := make([]Mount, 0, bytes.Count(text, []byte{'\n'}))
	for len(text) > 0 {
		var line []byte
		line, text, _ = bytes.Cut(text, []byte{'\n'})
		if m, ok := parseLine(string(line)); ok {
			mounts = append(mounts, m)
		}
	}
	return mounts
}

// parseLine reads one line:
//
//	36 35 98:0 /root /path rw,noatime shared:1 - ext3 /dev/root rw,errors=continue
//	id parent dev root path options optional*  - type source    super options
func parseLine(line string) (Mount, bool) {
	const fixed, after = 6, 3
	fields := strings.Split(line, " ")
	if len(fields) < fixed+1+after {
		return Mount{}, false
	}
	// Optional fields are "tag" or "tag:value" and never "-".
	sep := fixed
	for sep < len(fields) && fields[sep] != "-" {
		sep++
	}
	if len(fields) < sep+1+after {
		return Mount{}, false
	}
	id, err1 := strconv.Atoi(fields[0])
	parent, err2 := strconv.Atoi(fields[1])
	major, minor, ok := parseDev(fields[2])
	if err1 != nil || err2 != nil || !ok {
		return Mount{}, false
	}
	m := Mount{
		ID: id, ParentID: parent, Major: major, Minor: minor,
		Root: unescape(fields[3]), Path: unescape(fields[4]),
		Options: splitOptions(fields[5]),
		FSType:  unescape(fields[sep+1]), Source: unescape(fields[sep+2]),
		// Some filesystems print their options unescaped, spaces included.
		SuperOptions: splitOptions(strings.Join(fields[sep+3:], " ")),
	}
	m.ReadOnly = takesNoWrites(m.Options, m.SuperOptions)
	return m, true
}

// takesNoWrites says whether a mount or its filesystem is read-only. An ext4 that stopped
// after an error (errors=remount-ro) is told as "rw,emergency_ro" since Linux 6.14: its
// superblock has a state of its own for that. Some kernels before do not tell it.
func takesNoWrites(mount, super []string) bool {
	return first(mount) == "ro" || first(super) == "ro" || slices.Contains(super, "emergency_ro")
}

func parseDev(s string) (major, minor uint32, ok bool) {
	a, b, found := strings.Cut(s, ":")
	if !found {
		return 0, 0, false
	}
	x, err1 := strconv.ParseUint(a, 10, 32)
	y, err2 := strconv.ParseUint(b, 10, 32)
	return uint32(x), uint32(y), err1 == nil && err2 == nil
}

// unescape undoes the kernel's mangling of space, tab, newline, backslash and
// "#": a backslash and three octal digits. Anything else stays as it is.
func unescape(s string) string {
	if strings.IndexByte(s, '\\') < 0 {
		return s
	}
	out := make([]byte, 0, len(s))
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if v, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				out = append(out, byte(v))
				i += 3
				continue
			}
		}
		out = append(out, s[i])
	}
	return string(out)
}

// splitOptions splits at commas that are not inside double quotes (SELinux
// contexts have commas) and undoes the escapes.
func splitOptions(s string) []string {
	var out []string
	quoted, from := false, 0
	for i := 0; i <= len(s); i++ {
		switch {
		case i == len(s) || (s[i] == ',' && !quoted):
			if i > from {
				out = append(out, unescape(s[from:i]))
			}
			from = i + 1
		case s[i] == '"':
			quoted = !quoted
		}
	}
	return out
}

func first(s []string) string {
	if len(s) == 0 {
		return ""
	}
	return s[0]
}

// topAt returns the uppermost of the mounts at exactly path.
func topAt(mounts []Mount, path string) (Mount, bool) {
	covered := make(map[int]bool)
	for i := range mounts {
		if mounts[i].Path == path {
			covered[mounts[i].ParentID] = true
		}
	}
	for _, m := range slices.Backward(mounts) {
		if m.Path == path && (!covered[m.ID] || m.ID == m.ParentID) {
			return m, true
		}
	}
	return Mount{}, false
}
