package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/csi-loop/csi-loop/test/vm/plan"
)

// requiredTools and optionalTools are the programs of this machine that the
// guest gets, with the shared libraries they need. The optional ones may be
// missing here.
const (
	requiredTools = `mke2fs mkfs.ext2 mkfs.ext3 mkfs.ext4 e2fsck resize2fs tune2fs dumpe2fs filefrag
		mkfs.xfs xfs_growfs xfs_repair xfs_db xfs_io xfs_admin
		mkfs.btrfs btrfs btrfstune
		cryptsetup
		losetup mount umount blkid blockdev fallocate fstrim fsfreeze unshare nsenter dmsetup sfdisk
		sh cp dd ln ls mv rm sha256sum sleep stat truncate bash cat grep mkswap tar`
	optionalTools = "debugfs findmnt setpriv lsattr chattr strace"
)

// Names of busybox that would stand in for a real tool badly, or that the kernel
// would call behind our back.
var notFromBusybox = map[string]bool{
	"busybox": true, "modprobe": true, "insmod": true, "init": true, "linuxrc": true,
	"losetup": true, "mount": true, "umount": true, "blkid": true, "mkfs.ext2": true, "mke2fs": true, "tune2fs": true,
	"fsck": true, "blockdev": true, "fallocate": true, "fstrim": true, "fsfreeze": true,
}

// tree builds the guest's first and only root file system.
type tree struct {
	cpio *cpioWriter
	// Directories that are links, as on a system with merged /usr.
	links map[string]string
}

func newTree(c *cpioWriter) *tree {
	t := &tree{cpio: c, links: map[string]string{"bin": "usr/bin", "sbin": "usr/sbin", "lib": "usr/lib", "lib64": "usr/lib64"}}
	for _, dir := range []string{"usr/bin", "usr/sbin", "usr/lib", "usr/lib64", "dev", "proc", "sys", "run", "tmp", "root", "etc", "var/tmp", "mnt"} {
		c.Dir(dir)
	}
	for link, target := range t.links {
		c.Link(link, target)
	}
	c.Link("etc/mtab", "/proc/self/mounts")
	c.Link("var/run", "/run")
	c.File("etc/passwd", 0o644, []byte("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"))
	c.File("etc/group", 0o644, []byte("root:x:0:\nnogroup:x:65534:\n"))
	return t
}

// at resolves the linked directories, so that no file is added through a link.
func (t *tree) at(path string) string {
	first, rest, _ := strings.Cut(clean(path), "/")
	if target, ok := t.links[first]; ok && rest != "" {
		return target + "/" + rest
	}
	return clean(path)
}

// copy adds a file of this machine at a path of the guest; a second time is no error.
func (t *tree) copy(from, to string) error {
	to = t.at(to)
	if t.cpio.Has(to) {
		return nil
	}
	info, err := os.Stat(from)
	if err != nil {
		return err
	}
	data, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	t.cpio.File(to, info.Mode(), data)
	return nil
}

// addTools adds the tools of this machine, their libraries and busybox for the rest.
func (t *tree) addTools() error {
	// Under the names they are found by: mke2fs behaves by the name it is called.
	for tool := range strings.FieldsSeq(requiredTools) {
		path, err := lookTool(tool)
		if err != nil {
			return err
		}
		if err := t.program(path); err != nil {
			return err
		}
	}
	for tool := range strings.FieldsSeq(optionalTools) {
		path, err := lookTool(tool)
		if err != nil {
			continue
		}
		if err := t.program(path); err != nil {
			return err
		}
	}
	if err := t.addBusybox(); err != nil {
		return err
	}
	t.cpio.File("usr/bin/make", 0o755, []byte(standInForMake))
	// mkfs.ext4 takes its feature set from here.
	if exists("/etc/mke2fs.conf") {
		return t.copy("/etc/mke2fs.conf", "/etc/mke2fs.conf")
	}
	return nil
}

// program adds an executable where this machine has it, and the libraries it needs.
func (t *tree) program(path string) error {
	if err := t.copy(path, path); err != nil {
		return err
	}
	libs, err := libraries(path)
	if err != nil {
		return err
	}
	for _, lib := range libs {
		if err := t.copy(lib, lib); err != nil {
			return err
		}
	}
	return nil
}

// standInForMake is what the guest has of make, for commands that a page shows: there is
// no compiler, and what make build makes came along.
const standInForMake = `#!/bin/sh
if [ "$*" != build ]; then
  echo "make $*: not in this machine" >&2
  exit 2
fi
mkdir -p bin && cp "$CSI_LOOP_BIN" bin/csi-loop
`

func (t *tree) addBusybox() error {
	path, err := lookTool("busybox")
	if err != nil {
		return err
	}
	if err := t.copy(path, "/bin/busybox"); err != nil {
		return err
	}
	list, err := output(path, "--list")
	if err != nil {
		return err
	}
	for name := range strings.Lines(string(list)) {
		name = strings.TrimSpace(name)
		if notFromBusybox[name] || t.cpio.Has("usr/bin/"+name) || t.cpio.Has("usr/sbin/"+name) {
			continue
		}
		t.cpio.Link("usr/bin/"+name, "/usr/bin/busybox")
	}
	return nil
}

// lookTool finds a program also where a user's PATH does not reach.
func lookTool(name string) (string, error) {
	for _, dir := range append(filepath.SplitList(os.Getenv("PATH")), "/usr/sbin", "/sbin", "/usr/bin", "/bin") {
		path := filepath.Join(dir, name)
		if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
			return path, nil
		}
	}
	return "", fmt.Errorf("%s is not installed: hack/deps vm installs it", name)
}

// libraries lists the shared libraries of a program, its loader included. None
// for a static program or a script.
func libraries(path string) ([]string, error) {
	out, err := exec.Command("ldd", path).CombinedOutput()
	text := string(out)
	if strings.Contains(text, "not a dynamic executable") || strings.Contains(text, "statically linked") {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("ldd %s: %w: %s", path, err, text)
	}
	return parseLDD(text)
}

// parseLDD reads "name => path (address)" and "path (address)"; the kernel's
// own vdso has no path.
func parseLDD(text string) ([]string, error) {
	var libs []string
	lines := bufio.NewScanner(strings.NewReader(text))
	for lines.Scan() {
		line := lines.Text()
		if strings.Contains(line, "not found") {
			return nil, fmt.Errorf("ldd: %s", strings.TrimSpace(line))
		}
		for field := range strings.FieldsSeq(line) {
			// In "/a => /b" the file is what the arrow points to.
			if strings.HasPrefix(field, "/") && !strings.Contains(line, field+" =>") {
				libs = append(libs, field)
			}
		}
	}
	return libs, lines.Err()
}

// addModules adds the kernel modules and returns their paths in loading order.
func (t *tree) addModules(modules []module) []string {
	var paths []string
	for i, m := range modules {
		path := fmt.Sprintf("/modules/%02d-%s.ko", i, m.name)
		t.cpio.File(path, 0o644, m.data)
		paths = append(paths, path)
	}
	return paths
}

// addTests adds the test binaries with their testdata.
func (t *tree) addTests(tests []testBinary) error {
	for _, test := range tests {
		if err := t.copy(test.path, test.job.Argv[0]); err != nil {
			return err
		}
		data := filepath.Join(test.source, "testdata")
		if !exists(data) {
			continue
		}
		err := filepath.WalkDir(data, func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			rel, err := filepath.Rel(test.source, path)
			if err != nil {
				return err
			}
			return t.copy(path, filepath.Join(test.job.Dir, rel))
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// buildInitramfs writes the guest's file system to path.
func buildInitramfs(path, initBinary string, modules []module, tests []testBinary, p plan.Plan) (err error) {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() {
		if cerr := f.Close(); err == nil {
			err = cerr
		}
	}()
	w := bufio.NewWriterSize(f, 1<<20)
	c := newCPIO(w)
	t := newTree(c)
	if err := t.copy(initBinary, "/init"); err != nil {
		return err
	}
	if err := t.addTools(); err != nil {
		return err
	}
	if err := t.addTests(tests); err != nil {
		return err
	}
	p.Modules = t.addModules(modules)
	b, err := json.Marshal(p)
	if err != nil {
		return err
	}
	c.File(plan.Path, 0o600, b)
	if err := c.Close(); err != nil {
		return err
	}
	return w.Flush()
}
