package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/csi-loop/csi-loop/internal/roottest"
	"github.com/csi-loop/csi-loop/test/docs"
)

// ownDirectories are those of the machine that the shown commands write to. Each is
// covered by one of the test, in a mount namespace; /tmp is the last, since the others
// come from there.
var ownDirectories = []string{"/var/lib", "/var/tmp", "/run", "/tmp"}

// reader is a shell in the repository that runs what a page shows, and what it has
// instead of ownDirectories and bin.
type reader struct {
	dir   string
	child *child
}

// read starts a block of commands, the last of which goes on until it is stopped.
func read(t *testing.T, commands string) reader {
	t.Helper()
	dir, err := os.MkdirTemp("", "s") //nolint:usetesting // its path is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	script := []string{"trap : TERM"} // the last command's own end is the shell's
	for _, d := range append([]string{"bin"}, ownDirectories...) {
		own := filepath.Join(dir, d)
		if err := os.MkdirAll(own, 0o755); err != nil {
			t.Fatal(err)
		}
		script = append(script, "mkdir -p "+d, "mount --bind "+own+" "+d)
	}
	if _, err := exec.LookPath("sudo"); err != nil { // who is root may do without
		script = append(script, `sudo() { "$@"; }`)
	}
	cmd := exec.Command("unshare", "--mount", "--propagation=private", "bash", "-euc", strings.Join(append(script, commands), "\n"))
	cmd.Dir = "../.."
	return reader{dir, spawnCommand(t, cmd, []string{"TMPDIR=/tmp", "MAKEFLAGS=", asMain + "="})}
}

// What README.md and CONTRIBUTING.md show is a driver, from a clone of the repository
// to a volume.
func TestServeAsShown(t *testing.T) {
	roottest.Require(t)
	shown := docs.Take(t, "../..")
	// Compiled before anybody waits for it: the shown commands find it done.
	build := exec.Command("make", "build")
	build.Dir, build.Env = "../..", append(os.Environ(), "MAKEFLAGS=")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for name, c := range map[string]struct{ line, socket, pool string }{
		"a complete driver":                {"sudo mkdir -p /var/lib/csi-loop", "/run/csi/csi-loop.sock", "/var/lib/csi-loop"},
		"beside any other, for developers": {"sudo mkdir -p -m 0700 /var/tmp/pool", "/tmp/csi-loop/csi.sock", "/var/tmp/pool"},
	} {
		commands := shown(c.line)
		t.Run(name, func(t *testing.T) {
			r := read(t, commands)
			r.child.waitFor("Serving")
			controller := csi.NewControllerClient(dial(t, r.dir+c.socket))
			made, err := controller.CreateVolume(t.Context(), &csi.CreateVolumeRequest{
				Name: "shown", CapacityRange: &csi.CapacityRange{RequiredBytes: 16 << 20},
				VolumeCapabilities: []*csi.VolumeCapability{{
					AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{FsType: "ext4"}},
					AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
				}},
			})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := os.Stat(r.dir + c.pool + "/volumes/shown/disk.img"); err != nil {
				t.Error(err)
			}
			if _, err := controller.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: made.GetVolume().GetVolumeId()}); err != nil {
				t.Error(err)
			}
			if err := syscall.Kill(-r.child.cmd.Process.Pid, syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
			if code := r.child.wait(); code != 0 {
				t.Errorf("it ends with status %d: %s", code, r.child.errors())
			}
		})
	}
}
