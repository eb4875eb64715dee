package demo

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// loopDevice is what sysfs shows of a bound loop device.
type loopDevice struct {
	name      string // loop7
	backing   string // path of the file behind it
	size      int64
	offset    int64
	sizeLimit int64
	blockSize string
	readOnly  bool
	autoclear bool
	directIO  bool
	discard   bool
}

func (l loopDevice) node() string { return "/dev/" + l.name }

// mode lists what is on.
func (l loopDevice) mode() string {
	words := []string{"writable"}
	if l.readOnly {
		words[0] = "read-only"
	}
	for word, on := range map[string]bool{"autoclear": l.autoclear, "direct I/O": l.directIO, "discard": l.discard} {
		if on {
			words = append(words, word)
		}
	}
	slices.Sort(words[1:])
	return strings.Join(words, ", ")
}

const sysBlock = "/sys/block"

// loopsBelow lists the bound loop devices whose file lies below dir, or is it.
func loopsBelow(dir string) ([]loopDevice, error) {
	paths, err := filepath.Glob(sysBlock + "/loop*/loop/backing_file")
	if err != nil {
		return nil, err
	}
	var found []loopDevice
	for _, path := range paths {
		text, err := os.ReadFile(path)
		if err != nil {
			continue // unbound meanwhile
		}
		backing := strings.TrimSuffix(strings.TrimSuffix(string(text), "\n"), " (deleted)")
		if !within(backing, dir) {
			continue
		}
		found = append(found, describeLoop(filepath.Base(filepath.Dir(filepath.Dir(path))), backing))
	}
	return found, nil
}

func within(path, dir string) bool { return path == dir || strings.HasPrefix(path, dir+"/") }

func describeLoop(name, backing string) loopDevice {
	attr := func(path string) string {
		b, err := os.ReadFile(filepath.Join(sysBlock, name, path))
		if err != nil {
			return ""
		}
		return strings.TrimSpace(string(b))
	}
	number := func(path string) int64 {
		n, err := strconv.ParseInt(attr(path), 10, 64)
		if err != nil {
			return -1
		}
		return n
	}
	return loopDevice{
		name: name, backing: backing,
		size:   number("size") * 512, // sysfs counts in sectors of 512 bytes, whatever the block size
		offset: number("loop/offset"), sizeLimit: number("loop/sizelimit"),
		blockSize: attr("queue/logical_block_size"),
		readOnly:  attr("ro") == "1", autoclear: attr("loop/autoclear") == "1", directIO: attr("loop/dio") == "1",
		discard: number("queue/discard_max_bytes") > 0,
	}
}

// loopOver finds the one loop device over a file that is read-only or not.
func loopOver(file string, readOnly bool) (loopDevice, error) {
	all, err := loopsBelow(file)
	if err != nil {
		return loopDevice{}, err
	}
	for _, l := range all {
		if l.readOnly == readOnly {
			return l, nil
		}
	}
	return loopDevice{}, fmt.Errorf("sysfs shows no loop device over %s", file)
}

// mountLine is what mountinfo shows of a mount.
type mountLine struct {
	root, path, options, fsType, source string
}

// mountsBelow lists the mounts at dir or below, in the order they were made.
func mountsBelow(dir string) ([]mountLine, error) {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	return parseMounts(string(text), dir), nil
}

func parseMounts(text, dir string) []mountLine {
	var found []mountLine
	for line := range strings.Lines(text) {
		// 36 35 98:0 /root /path rw,noatime master:1 - ext3 /dev/root rw,errors=continue
		before, after, ok := strings.Cut(strings.TrimSpace(line), " - ")
		f, g := strings.Fields(before), strings.Fields(after)
		if !ok || len(f) < 6 || len(g) < 2 {
			continue
		}
		m := mountLine{root: unescape(f[3]), path: unescape(f[4]), options: f[5], fsType: g[0], source: unescape(g[1])}
		if within(m.path, dir) {
			found = append(found, m)
		}
	}
	return found
}

// unescape undoes mountinfo's octal escapes.
func unescape(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}

// mountAt finds the mount at exactly path.
func mountAt(path string) (mountLine, error) {
	all, err := mountsBelow(path)
	if err != nil {
		return mountLine{}, err
	}
	for _, m := range slices.Backward(all) { // the last one made is on top
		if m.path == path {
			return m, nil
		}
	}
	return mountLine{}, fmt.Errorf("mountinfo shows no mount at %s", path)
}

// leftovers says in words what the kernel still has of a directory.
func leftovers(dir string) ([]string, error) {
	mounts, err := mountsBelow(dir)
	if err != nil {
		return nil, err
	}
	loops, err := loopsBelow(dir)
	if err != nil {
		return nil, err
	}
	var left []string
	for _, m := range mounts {
		left = append(left, "mount "+m.path)
	}
	for _, l := range loops {
		left = append(left, l.name+" over "+l.backing)
	}
	return left, nil
}

// needs is what this machine can do.
type needs struct {
	kernel      string
	sysResource bool // ext4 can grow while mounted
}

// fsType is the filesystem that can show growth.
func (n needs) fsType() string {
	if n.sysResource {
		return "ext4"
	}
	return "xfs"
}

// capSysResource is the number of CAP_SYS_RESOURCE.
const capSysResource = 24

// prepare checks what can be checked before anything is made.
func prepare() (needs, error) {
	if os.Geteuid() != 0 {
		return needs{}, errors.New("the demo needs root, to attach loop devices and to mount: run it with sudo, or make demo")
	}
	n := needs{kernel: "unknown"}
	if b, err := os.ReadFile("/proc/sys/kernel/osrelease"); err == nil {
		n.kernel = strings.TrimSpace(string(b))
	}
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return n, err
	}
	n.sysResource = hasCapability(string(b), capSysResource)
	return n, checkPrograms(n)
}

// hasCapability looks into /proc/self/status for an effective capability.
func hasCapability(status string, number uint) bool {
	for line := range strings.Lines(status) {
		if hex, ok := strings.CutPrefix(line, "CapEff:"); ok {
			set, err := strconv.ParseUint(strings.TrimSpace(hex), 16, 64)
			return err == nil && set&(1<<number) != 0
		}
	}
	return false
}
