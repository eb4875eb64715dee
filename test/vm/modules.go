package main

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// module is a kernel module as the guest gets it: uncompressed.
type module struct {
	name string
	data []byte
}

// required are the modules without which the tests cannot run, unless they are
// built into the kernel.
var required = []string{"virtio_pci", "virtio_blk", "ext4", "loop", "xfs", "btrfs", "overlay", "dm_mod", "dm_flakey", "quota_v2"}

// optional are loaded where they exist: the kernel would ask modprobe for these
// checksums by an alias, and the guest has no modprobe.
var optional = []string{
	"crc32c_generic", "crc32c_intel", "crc32c_cryptoapi", "xxhash_generic", "blake2b_generic", "sha256_generic", "zstd_compress", "raid6_pq", "xor",
	// Of encryption: dm-crypt asks for its cipher by name as well.
	"dm_crypt", "xts", "ecb", "aes_generic", "aesni_intel", "algif_skcipher",
}

// loadModules reads the modules the guest needs from a kernel's module tree, in
// loading order. It reads the dependencies from the modules themselves, because
// a kernel package has no modules.dep before it is installed.
func loadModules(tree string) ([]module, error) {
	files := map[string]string{}
	err := filepath.WalkDir(tree, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			if name, ok := moduleName(d.Name()); ok {
				files[name] = path
			}
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	builtin, err := builtins(filepath.Join(tree, "modules.builtin"))
	if err != nil {
		return nil, err
	}
	l := moduleLoader{files: files, builtin: builtin, seen: map[string]bool{}}
	for _, name := range optional {
		if err := l.add(name, true); err != nil {
			return nil, err
		}
	}
	for _, name := range required {
		if err := l.add(name, false); err != nil {
			return nil, err
		}
	}
	return l.order, nil
}

type moduleLoader struct {
	files   map[string]string
	builtin map[string]bool
	seen    map[string]bool
	order   []module
}

// add appends a module behind those it depends on.
func (l *moduleLoader) add(name string, missingOK bool) error {
	if l.seen[name] || l.builtin[name] {
		return nil
	}
	l.seen[name] = true
	path, ok := l.files[name]
	if !ok {
		if missingOK {
			return nil
		}
		return fmt.Errorf("the kernel package has no module %s", name)
	}
	data, err := readModule(path)
	if err != nil {
		return err
	}
	hard, soft, err := dependencies(data)
	if err != nil {
		return fmt.Errorf("read %s: %w", path, err)
	}
	for _, d := range soft {
		if err := l.add(d, true); err != nil {
			return err
		}
	}
	for _, d := range hard {
		if err := l.add(d, false); err != nil {
			return err
		}
	}
	l.order = append(l.order, module{name: name, data: data})
	return nil
}

// moduleName gives the kernel's name for a module file; the kernel takes "-" and
// "_" for the same.
func moduleName(file string) (string, bool) {
	for _, suffix := range []string{".ko", ".ko.xz", ".ko.zst"} {
		if base, ok := strings.CutSuffix(file, suffix); ok {
			return strings.ReplaceAll(base, "-", "_"), true
		}
	}
	return "", false
}

// builtins reads modules.builtin: a path on each line.
func builtins(path string) (map[string]bool, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	names := map[string]bool{}
	for line := range strings.Lines(string(b)) {
		if name, ok := moduleName(filepath.Base(strings.TrimSpace(line))); ok {
			names[name] = true
		}
	}
	return names, nil
}

func readModule(path string) ([]byte, error) {
	switch filepath.Ext(path) {
	case ".xz":
		return output("xz", "-dc", path)
	case ".zst":
		return output("zstd", "-dcq", path)
	}
	return os.ReadFile(path)
}

// dependencies reads a module's own list of those that must, and those that
// should, be loaded before it.
func dependencies(data []byte) (hard, soft []string, err error) {
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return nil, nil, err
	}
	section := f.Section(".modinfo")
	if section == nil {
		return nil, nil, errors.New("no .modinfo section: not a kernel module")
	}
	info, err := section.Data()
	if err != nil {
		return nil, nil, err
	}
	hard, soft = parseModinfo(info)
	return hard, soft, nil
}

// parseModinfo reads the zero-separated key=value pairs of a module.
func parseModinfo(info []byte) (hard, soft []string) {
	for pair := range strings.SplitSeq(string(info), "\x00") {
		key, value, _ := strings.Cut(pair, "=")
		switch key {
		case "depends":
			for name := range strings.SplitSeq(value, ",") {
				if name != "" {
					hard = append(hard, strings.ReplaceAll(name, "-", "_"))
				}
			}
		case "softdep":
			if names, ok := strings.CutPrefix(value, "pre:"); ok {
				names, _, _ = strings.Cut(names, "post:")
				for name := range strings.FieldsSeq(names) {
					soft = append(soft, strings.ReplaceAll(name, "-", "_"))
				}
			}
		}
	}
	return hard, soft
}

// output runs a command for its standard output; an error carries what it said.
func output(name string, args ...string) ([]byte, error) {
	var stdout, stderr bytes.Buffer
	cmd := exec.Command(name, args...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("%s: %w: %s", cmd, err, bytes.TrimSpace(stderr.Bytes()))
	}
	return stdout.Bytes(), nil
}
