package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
)

// errNoKernel says that this machine's apt has no kernel of a series.
var errNoKernel = errors.New("apt offers no such kernel")

// kernel is a distribution kernel, unpacked but not installed.
type kernel struct {
	Release string // as uname -r prints it
	Image   string // path of the bzImage
	Modules string // path of its module tree
}

// findKernel returns the newest cloud kernel of a series such as "6.1", from
// the cache or by downloading its package. errNoKernel if there is none.
func findKernel(cache, series string) (kernel, error) {
	if runtime.GOARCH != "amd64" {
		return kernel{}, fmt.Errorf("%w: only amd64 is supported here, not %s", errNoKernel, runtime.GOARCH)
	}
	var packages []string
	// An error means that there is no apt here; a kernel may still be cached.
	if out, err := output("apt-cache", "pkgnames", "linux-image-"+series); err == nil {
		packages = strings.Fields(string(out))
	}
	cached, err := filepath.Glob(filepath.Join(cache, "linux-image-*"))
	if err != nil {
		return kernel{}, err
	}
	for _, c := range cached {
		packages = append(packages, filepath.Base(c))
	}
	name, ok := newest(packages, series)
	if !ok {
		return kernel{}, fmt.Errorf("%w: no linux-image-%s*-cloud-amd64, which Debian has and Ubuntu has not", errNoKernel, series)
	}
	dir := filepath.Join(cache, name)
	if _, err := os.Stat(dir); err != nil {
		if err := fetchKernel(name, dir); err != nil {
			return kernel{}, fmt.Errorf("fetch %s: %w", name, err)
		}
	}
	release := strings.TrimPrefix(name, "linux-image-")
	k := kernel{Release: release, Image: filepath.Join(dir, "boot", "vmlinuz-"+release)}
	// Merged /usr moved the modules from Debian 13 on.
	for _, lib := range []string{"lib", "usr/lib"} {
		if tree := filepath.Join(dir, lib, "modules", release); exists(tree) {
			k.Modules = tree
		}
	}
	if !exists(k.Image) || k.Modules == "" {
		return kernel{}, fmt.Errorf("%s holds no kernel: remove it and try again", dir)
	}
	return k, nil
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// newest chooses the highest version among package names of a series.
func newest(packages []string, series string) (string, bool) {
	re := regexp.MustCompile(`^linux-image-` + regexp.QuoteMeta(series) + `\.[0-9].*-cloud-amd64$`)
	packages = slices.DeleteFunc(slices.Clone(packages), func(p string) bool { return !re.MatchString(p) })
	if len(packages) == 0 {
		return "", false
	}
	return slices.MaxFunc(packages, func(a, b string) int { return slices.Compare(numbers(a), numbers(b)) }), true
}

// numbers gives the numbers in a package name, in order.
func numbers(name string) []int {
	var all []int
	for _, n := range regexp.MustCompile(`[0-9]+`).FindAllString(name, -1) {
		i, err := strconv.Atoi(n)
		if err != nil {
			i = 0 // too long for a version
		}
		all = append(all, i)
	}
	return all
}

// fetchKernel downloads a kernel package and unpacks it as dir.
func fetchKernel(name, dir string) (err error) {
	fmt.Printf("vm: downloading %s\n", name)
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return err
	}
	tmp, err := os.MkdirTemp(filepath.Dir(dir), ".new-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(tmp)) }()
	if err := download(tmp, name); err != nil {
		// Package lists age: the version they name may be gone from the mirror.
		update := exec.Command("hack/as-root", "apt-get", "update", "-qq")
		update.Stdout, update.Stderr = os.Stdout, os.Stderr
		if err2 := update.Run(); err2 != nil {
			return errors.Join(err, fmt.Errorf("apt-get update: %w", err2))
		}
		if err := download(tmp, name); err != nil {
			return err
		}
	}
	debs, err := filepath.Glob(filepath.Join(tmp, "*.deb"))
	if err != nil || len(debs) != 1 {
		return fmt.Errorf("%d packages downloaded, want 1", len(debs))
	}
	unpacked := filepath.Join(tmp, "unpacked")
	if _, err := output("dpkg-deb", "-x", debs[0], unpacked); err != nil {
		return err
	}
	return os.Rename(unpacked, dir)
}

func download(dir, name string) error {
	cmd := exec.Command("apt-get", "download", "-qq", name)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", cmd, err, out)
	}
	return nil
}
