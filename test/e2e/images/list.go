package main

import (
	"bufio"
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
)

const (
	busybox = "/bin/busybox"
	redis   = "/usr/bin/redis-check-rdb"
	testing = "registry.k8s.io/e2e-test-images/"
	sidecar = "registry.k8s.io/sig-storage/"
)

var searchPath = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}

// all the images: those of the suite at the versions that it asks for, and the
// sidecars at those of our modules.
func all(bin string) []image {
	in := func(name string) string { return filepath.Join(bin, name) }
	images := []image{
		{
			file: "pause", names: []string{"registry.k8s.io/pause:3.10.2"}, program: in("pause"),
			config: config{Entrypoint: []string{"/pause"}, User: "65535:65535"},
			fill:   one("/pause", in("pause")),
		},
		{
			file: "busybox", names: []string{testing + "busybox:1.37.0-2"}, program: busybox,
			config: config{Cmd: []string{"sh"}, Env: searchPath}, fill: shell,
		},
		{
			// The suite uses nginx only to run a script from a volume, and the other for
			// GNU's dd and stat.
			file: "gnu", names: []string{testing + "glibc-dns-testing:2.1.1", testing + "nginx:1.27.0-2"}, program: "/bin/bash",
			config: config{Cmd: []string{"sh"}, Env: searchPath}, fill: gnu,
		},
		{
			file: "agnhost", names: []string{testing + "agnhost:2.66.1"}, program: in("agnhost"),
			config: config{Entrypoint: []string{"/agnhost"}, Cmd: []string{"pause"}, Env: searchPath},
			fill: func(ctx context.Context, t *tree) error {
				t.program("/agnhost", in("agnhost"))
				t.link("/agnhost-2", "agnhost")
				t.dir("/uploads", 0o755)
				return shell(ctx, t)
			},
		},
	}
	images = append(images, image{
		// The tutorials' database: Debian's Redis, which is one program under two names.
		file: "redis", names: []string{"docker.io/library/redis:7"}, program: redis,
		config: config{Cmd: []string{"redis-server"}, Env: searchPath},
		fill: func(ctx context.Context, t *tree) error {
			if err := shell(ctx, t); err != nil {
				return err
			}
			t.dir("/data", 0o755)
			t.link("/usr/bin/redis-server", redis)
			return errors.Join(t.native(redis), t.native("/usr/bin/redis-cli"))
		},
	})
	for _, name := range []string{
		"csi-provisioner:v6.3.0", "csi-resizer:v2.3.0", "csi-snapshotter:v8.7.0", "snapshot-controller:v8.7.0",
	} {
		program, _, _ := strings.Cut(name, ":")
		images = append(images, image{
			file: program, names: []string{sidecar + name}, program: in(program),
			config: config{Entrypoint: []string{"/" + program}, Env: searchPath}, fill: one("/"+program, in(program)),
		})
	}
	return images
}

// one is an image of one static program.
func one(name, source string) func(context.Context, *tree) error {
	return func(_ context.Context, t *tree) error {
		t.dir("/tmp", 0o777|fs.ModeSticky)
		t.file("/etc/passwd", "root:x:0:0:root:/root:/sbin/nologin\nnobody:x:65534:65534:nobody:/:/sbin/nologin\n")
		t.program(name, source)
		return nil
	}
}

// shell is busybox under all its names, and the users that the suite expects.
func shell(ctx context.Context, t *tree) error {
	for _, d := range []string{"/bin", "/dev", "/etc", "/home", "/lib", "/mnt", "/proc", "/root", "/run", "/sys", "/var"} {
		t.dir(d, 0o755)
	}
	t.dir("/tmp", 0o777|fs.ModeSticky)
	t.file("/etc/passwd", `root:x:0:0:root:/root:/bin/sh
user-defined-in-image:x:1000:1000::/home:/bin/sh
nobody:x:65534:65534:nobody:/:/bin/false
`)
	t.file("/etc/group", "root:x:0:\nnogroup:x:65534:\ngroup-defined-in-image:x:50000:user-defined-in-image\n")
	list, err := exec.CommandContext(ctx, busybox, "--list-full").Output()
	if err != nil {
		return fmt.Errorf("%s --list-full: %w", busybox, err)
	}
	t.program(busybox, busybox)
	for name := range strings.FieldsSeq(string(list)) {
		if name = "/" + name; name != busybox && !t.has(name) {
			t.link(name, busybox)
		}
	}
	return nil
}

// gnu is this machine's GNU programs, with their libraries, over busybox.
func gnu(ctx context.Context, t *tree) error {
	if err := shell(ctx, t); err != nil {
		return err
	}
	list, err := exec.CommandContext(ctx, "dpkg", "--listfiles", "coreutils", "bash", "dash", "grep", "sed", "findutils",
		"util-linux", "e2fsprogs", "xfsprogs").Output()
	if err != nil {
		return fmt.Errorf("where GNU's programs are, only Debian's dpkg says: %w", err)
	}
	for s := bufio.NewScanner(bytes.NewReader(list)); s.Scan(); {
		name := s.Text()
		if base := path.Base(path.Dir(name)); base != "bin" && base != "sbin" {
			continue
		}
		if err := t.native(name); err != nil {
			return err
		}
	}
	t.program("/bin/sh", "/bin/dash")
	return nil
}

// native adds a program of this machine and the libraries it needs.
func (t *tree) native(name string) error {
	source, err := filepath.EvalSymlinks(name)
	if err != nil {
		return nil //nolint:nilerr // a name in the package's list that is not on this machine
	}
	for _, d := range []string{"/bin/", "/sbin/", "/usr/bin/", "/usr/sbin/"} {
		t.remove(d + path.Base(name)) // busybox's
	}
	t.program(name, source)
	return t.libraries(source)
}

// libraries adds those that the dynamic linker would load, and itself.
func (t *tree) libraries(source string) error {
	f, err := elf.Open(source)
	if err != nil {
		if _, ok := errors.AsType[*elf.FormatError](err); ok {
			return nil // a script
		}
		return err
	}
	defer func() { _ = f.Close() }()
	for _, p := range f.Progs {
		if p.Type != elf.PT_INTERP {
			continue
		}
		interpreter := make([]byte, p.Filesz)
		if _, err := p.ReadAt(interpreter, 0); err != nil {
			return err
		}
		name := strings.TrimRight(string(interpreter), "\x00")
		t.program(name, name)
	}
	needed, err := f.ImportedLibraries()
	if err != nil {
		return err
	}
	for _, library := range needed {
		file := findLibrary(library)
		if file == "" {
			return fmt.Errorf("%s needs %s, which is nowhere", source, library)
		}
		if t.has(file) {
			continue
		}
		t.program(file, file)
		if err := t.libraries(file); err != nil {
			return err
		}
	}
	return nil
}

func findLibrary(name string) string {
	for _, pattern := range []string{"/lib/*-linux-gnu*/", "/usr/lib/*-linux-gnu*/", "/lib64/", "/usr/lib64/", "/lib/", "/usr/lib/"} {
		found, err := filepath.Glob(pattern + name)
		if err == nil && len(found) > 0 {
			if _, err := os.Stat(found[0]); err == nil {
				return found[0]
			}
		}
	}
	return ""
}
