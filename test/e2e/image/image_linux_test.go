package image

import (
	"archive/tar"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// unpacked is an image: its root directory and what it says about itself.
type unpacked struct {
	root   string
	config struct {
		//nolint:tagliatelle // the image format's names
		Entrypoint []string `json:"Entrypoint"`
		//nolint:tagliatelle // the image format's names
		Env []string `json:"Env"`
		//nolint:tagliatelle // the image format's names
		Labels map[string]string `json:"Labels"`
	}
}

// open unpacks the archive that CSI_LOOP_IMAGE names.
func open(t *testing.T) unpacked {
	t.Helper()
	archive := os.Getenv("CSI_LOOP_IMAGE")
	if archive == "" {
		t.Skip("CSI_LOOP_IMAGE names no archive: make test-image does")
	}
	if os.Geteuid() != 0 {
		t.Fatal("chroot needs root")
	}
	parts := t.TempDir()
	untar(t, archive, parts)
	var manifest []struct {
		Config string
		Layers []string
	}
	parse(t, filepath.Join(parts, "manifest.json"), &manifest)
	if len(manifest) != 1 {
		t.Fatalf("the archive has %d images", len(manifest))
	}
	var description struct{ Config json.RawMessage }
	parse(t, filepath.Join(parts, manifest[0].Config), &description)
	u := unpacked{root: t.TempDir()}
	if err := json.Unmarshal(description.Config, &u.config); err != nil {
		t.Fatal(err)
	}
	for _, layer := range manifest[0].Layers {
		untar(t, filepath.Join(parts, layer), u.root)
	}
	// As in every container: the programs look there for what is mounted.
	proc := filepath.Join(u.root, "proc")
	if err := os.MkdirAll(proc, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("proc", proc, "proc", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(proc, 0); err != nil {
			t.Error(err)
		}
	})
	return u
}

func parse(t *testing.T, path string, into any) {
	t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(content, into); err != nil {
		t.Fatalf("%s: %v", path, err)
	}
}

// untar knows the few kinds of entries that our own image has.
func untar(t *testing.T, archive, dir string) {
	t.Helper()
	f, err := os.Open(archive)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for r := tar.NewReader(f); ; {
		header, err := r.Next()
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			t.Fatalf("%s: %v", archive, err)
		}
		path := filepath.Join(dir, filepath.Clean("/"+header.Name))
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		switch header.Typeflag {
		case tar.TypeDir:
			err = os.MkdirAll(path, header.FileInfo().Mode().Perm())
		case tar.TypeReg:
			err = copyTo(path, r, header.FileInfo().Mode().Perm())
		case tar.TypeSymlink:
			err = os.Symlink(header.Linkname, path)
		case tar.TypeLink:
			err = os.Link(filepath.Join(dir, filepath.Clean("/"+header.Linkname)), path)
		default:
			t.Fatalf("%s: %s is of type %c", archive, header.Name, header.Typeflag)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

func copyTo(path string, r io.Reader, mode os.FileMode) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, mode)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, r)
	return errors.Join(err, f.Close())
}

// run runs a program of the image with the image as the whole world.
func (u unpacked) run(t *testing.T, name string, args ...string) (string, error) {
	t.Helper()
	for _, dir := range []string{"/usr/local/bin", "/usr/sbin", "/usr/bin"} {
		if _, err := os.Stat(filepath.Join(u.root, dir, name)); err == nil {
			cmd := exec.Command(filepath.Join(dir, name), args...)
			cmd.Err = nil // it is looked for outside
			cmd.Dir, cmd.Env = "/", u.config.Env
			cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: u.root}
			out, err := cmd.CombinedOutput()
			return string(out), err
		}
	}
	t.Fatalf("the image has no %s", name)
	return "", nil
}

func TestEveryProgramStarts(t *testing.T) {
	u := open(t)
	for name, args := range programs {
		out, err := u.run(t, name, args...)
		// Some end with an error after their usage; a missing library never says a version.
		if !strings.Contains(out, "1.") && !strings.Contains(out, "version") && !strings.Contains(out, " v") && !strings.HasPrefix(out, name+" ") {
			t.Errorf("%s %v: %v: %s", name, args, err, out)
		}
	}
}

func TestFilesystemsAreMadeCheckedAndGrown(t *testing.T) {
	u := open(t)
	const small, large = 320 << 20, 480 << 20
	for _, fs := range []string{"ext2", "ext3", "ext4", "xfs", "btrfs"} {
		t.Run(fs, func(t *testing.T) {
			file := filepath.Join(u.root, "tmp", fs)
			must := func(err error) {
				t.Helper()
				if err != nil {
					t.Fatal(err)
				}
			}
			program := func(name string, args ...string) {
				t.Helper()
				if out, err := u.run(t, name, args...); err != nil {
					t.Fatalf("%s %v: %v: %s", name, args, err, out)
				}
			}
			must(os.WriteFile(file, nil, 0o600))
			must(os.Truncate(file, small))
			program("mkfs."+fs, "/tmp/"+fs)
			if strings.HasPrefix(fs, "ext") {
				must(os.Truncate(file, large))
				program("e2fsck", "-f", "-p", "/tmp/"+fs)
				program("resize2fs", "/tmp/"+fs)
				program("e2fsck", "-f", "-p", "/tmp/"+fs)
			}
			must(os.Remove(file))
		})
	}
}

// cryptsetup finds its ciphers and hashes at run time, and makes a header with the slowest of them.
func TestHeadersAreMade(t *testing.T) {
	u := open(t)
	dev := filepath.Join(u.root, "dev") // the node's in a pod
	if err := os.MkdirAll(dev, 0o750); err != nil {
		t.Fatal(err)
	}
	for name, minor := range map[string]uint32{"urandom": 9, "random": 8} {
		err := unix.Mknod(filepath.Join(dev, name), unix.S_IFCHR|0o600, int(unix.Mkdev(1, minor)))
		if err != nil {
			t.Fatal(err)
		}
	}
	for name, size := range map[string]int64{"disk": 18 << 20, "key": 32} {
		if err := errors.Join(os.WriteFile(filepath.Join(u.root, "tmp", name), nil, 0o600), os.Truncate(filepath.Join(u.root, "tmp", name), size)); err != nil {
			t.Fatal(err)
		}
	}
	for _, args := range [][]string{
		{"luksFormat", "--batch-mode", "--type", "luks2", "--cipher", "aes-xts-plain64", "--key-size", "512", "--hash", "sha256", "--pbkdf", "argon2id", "--pbkdf-memory", "32768", "--iter-time", "1"},
		{"open", "--test-passphrase"},
	} {
		if out, err := u.run(t, "cryptsetup", append(args, "--key-file", "/tmp/key", "/tmp/disk")...); err != nil {
			t.Fatalf("cryptsetup %v: %v: %s", args, err, out)
		}
	}
}

func TestTheDriverSaysTheVersionOfTheLabel(t *testing.T) {
	u := open(t)
	if got, want := u.config.Entrypoint, []string{"/usr/local/bin/csi-loop"}; !slices.Equal(got, want) {
		t.Errorf("entry point %v, want %v", got, want)
	}
	out, err := u.run(t, "csi-loop", "version")
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, label := range []string{"version", "revision"} {
		value := u.config.Labels["org.opencontainers.image."+label]
		if value == "" || !strings.Contains(out, value[:min(len(value), 7)]) {
			t.Errorf("label %s is %q; the driver says %s", label, value, out)
		}
	}
	for _, label := range []string{"title", "description", "source", "licenses"} {
		if u.config.Labels["org.opencontainers.image."+label] == "" {
			t.Errorf("label %s is missing", label)
		}
	}
}

func TestNothingElseIsInside(t *testing.T) {
	u := open(t)
	for _, dir := range []string{"usr/bin", "usr/sbin", "usr/local/bin", "usr/local/sbin"} {
		entries, err := os.ReadDir(filepath.Join(u.root, dir))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		for _, e := range entries {
			if _, ok := programs[e.Name()]; !ok && e.Name() != "csi-loop" && e.Name() != "mke2fs" {
				t.Errorf("%s/%s is in the image, and the driver does not call it", dir, e.Name())
			}
		}
	}
}
