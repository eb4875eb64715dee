package integration

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

// TestImportCommand imports with the driver running and not, by each method and from a partition; the volume is mounted
// and its data is what it was.
func TestImportCommand(t *testing.T) {
	for name, c := range map[string]struct {
		fs      string // of the image
		down    bool
		args    []string
		removed bool // the file
	}{
		"copied beside a running driver":  {"ext4", false, []string{"--method=copy"}, false},
		"moved beside a running driver":   {"ext4", false, []string{"--method=move"}, true},
		"reflinked, thin":                 {"xfs", false, []string{"--method=reflink", "--allocation=thin"}, false},
		"a partition":                     {"", false, []string{"--partition=2"}, false},
		"copied without a driver":         {"btrfs", true, nil, false},
		"moved without a driver, larger":  {"xfs", true, []string{"--method=move", "--size=400Mi"}, true},
		"a partition, without the driver": {"", true, []string{"--partition=2", "--allocation=thin"}, false},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t, siteConfig{poolFS: "xfs"})
			path := filepath.Join(filepath.Dir(s.pool), "old.img")
			fs := c.fs
			if fs == "" {
				fs = "ext4"
				roottest.Run(t, "mv", diskImage(t, s, "disk", "label: gpt\nsize=8MiB\nsize=32MiB\n"), path) // to another filesystem
				roottest.Run(t, "mkfs.ext4", "-q", "-E", "offset=9437184", path, "32M")
			} else {
				must(t, os.WriteFile(path, nil, 0o600))
				must(t, os.Truncate(path, 320*mib))
				roottest.Run(t, "mkfs."+fs, path)
			}
			defer os.Remove(path)
			if c.down {
				s.stop()
			}
			through := filepath.Join(t.TempDir(), "link")
			must(t, os.Symlink(filepath.Dir(path), through))
			args := append([]string{"import", "--claim=shop/data", filepath.Join(through, "old.img")}, c.args...)
			out := s.command(t, args...)
			again := s.command(t, args...) // as after an answer that was lost
			_, manifests, _ := strings.Cut(out, "apiVersion: ")
			if _, same, _ := strings.Cut(again, "apiVersion: "); same != manifests {
				t.Errorf("the first time:\n%s\nagain:\n%s", out, again)
			}
			for _, want := range []string{"kind: PersistentVolume\n", "kind: PersistentVolumeClaim\n", "fsType: " + fs, "name: shop.data", "volumeHandle: "} {
				if !strings.Contains(out, want) {
					t.Errorf("the manifests lack %q:\n%s", want, out)
				}
			}
			if _, err := os.Stat(path); (err != nil) != c.removed {
				t.Errorf("the file: %v", err)
			}
			if c.down {
				s.start()
			}
			_, rest, _ := strings.Cut(out, "volumeHandle: ")
			id, _, _ := strings.Cut(rest, "\n")
			v := s.volume(kind{name: "imported", fs: fs}, id)
			v.step("stage", v.stage())
			v.step("publish", v.publish(0, false))
			v.step("write", writeFile(filepath.Join(v.target(0), "file"), []byte("own"), 0, os.O_CREATE))
			v.step("unpublish", v.unpublish(0))
			v.step("unstage", v.unstage())
			v.step("remove", v.remove())
		})
	}
}

// TestTemplateCommand manages templates beside a running driver, and without one.
func TestTemplateCommand(t *testing.T) {
	s := newSite(t, siteConfig{})
	path := filepath.Join(s.dir, "golden.img")
	must(t, os.WriteFile(path, nil, 0o600))
	must(t, os.Truncate(path, 16*mib))
	roottest.Run(t, "mkfs.ext4", "-q", path)
	s.command(t, "template", "add", "golden", path)
	s.stop()
	if out := s.command(t, "template", "ls"); !strings.Contains(out, "golden") || !strings.Contains(out, path) {
		t.Errorf("ls without a driver: %s", out)
	}
	if out := s.command(t, "template", "ls", "--into=default"); !strings.Contains(out, "golden") {
		t.Errorf("ls of its pool: %s", out)
	}
	if out, err := s.tryCommand("template", "ls", "--into=other"); err == nil || !strings.Contains(out, `no pool "other"`) {
		t.Errorf("ls of a pool that is none: %v, %s", err, out)
	}
	s.command(t, "template", "rm", "golden")
	s.command(t, "template", "add", "silver", path)
	s.start()
	if out := s.command(t, "template", "ls", "--output=json"); strings.Contains(out, `"name": "golden"`) || !strings.Contains(out, `"name": "silver"`) {
		t.Errorf("ls beside the driver: %s", out)
	}
	s.command(t, "template", "rm", "silver")
	if out, err := s.tryCommand("template", "rm", "silver"); err == nil {
		t.Errorf("removed again: %s", out)
	}
	must(t, os.Remove(path))
}

// command runs csi-loop with the site's flags.
func (s *site) command(t *testing.T, args ...string) string {
	t.Helper()
	out, err := s.tryCommand(args...)
	if err != nil {
		t.Fatalf("%v: %v\n%s", args, err, out)
	}
	return out
}

func (s *site) tryCommand(args ...string) (string, error) {
	path, err := binary()
	if err != nil {
		return "", err
	}
	out, err := exec.Command(path, append(args, "--endpoint=unix://"+s.socket, "--node-id="+s.name, "--pool=default="+s.pool, "--state-dir="+s.state)...).CombinedOutput()
	return string(out), err
}
