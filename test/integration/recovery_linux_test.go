package integration

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

// TestRecoveryByHand: the commands of docs/operations.md, in their order, get at the
// data of a volume while csi-loop is away, and leave a volume that it takes again.
func TestRecoveryByHand(t *testing.T) {
	for _, k := range []kind{ext4, xfs, btrfs} {
		t.Run(k.name, func(t *testing.T) {
			s := newSite(t, siteConfig{})
			v := s.rest(k, "by-hand-"+k.name)
			s.stop()
			h := newHand(t, v)
			ran := 0
			for _, line := range commandsOf(t, "## Recovery by hand") {
				if h.skips(line) {
					continue
				}
				h.run(line)
				ran++
			}
			if ran < 9 {
				t.Errorf("only %d commands", ran)
			}
			h.unmount()
			h.elsewhere()
			s.start()
			v.step("stage", v.stage())
			v.step("publish", v.publish(0, false))
			v.step("read", v.read(0, 0))
			v.thick("recovery by hand")
			v.down()
		})
	}
}

// TestRecoveryAfterACrash: an image as a crash leaves it has a journal to replay. What
// the page says about it is true: not read-only, but in a copy, or without.
func TestRecoveryAfterACrash(t *testing.T) {
	skip := map[string]string{"ext4": "noload", "xfs": "norecovery", "btrfs": "rescue=nologreplay"}
	for _, k := range []kind{ext4, xfs, btrfs} {
		t.Run(k.name, func(t *testing.T) {
			s := newSite(t, siteConfig{})
			v := s.volume(k, "crash-"+k.name).up()
			v.step("write", v.write(0))
			h := newHand(t, v)
			crashed := filepath.Join(h.backup, "crashed.img")
			h.command("cp", "--sparse=always", v.image(), crashed)
			v.down()
			eventually(t, func() string { // other words are of a device that somebody else took
				out, err := exec.Command("mount", "-o", "ro,loop", crashed, h.mnt).CombinedOutput()
				if err == nil {
					t.Fatal("it is mounted read-only")
				} else if !strings.Contains(string(out), "read-only") && !strings.Contains(string(out), "superblock") {
					return fmt.Sprintf("%v: %s", err, out)
				}
				return ""
			})
			h.command("mount", "-o", "ro,loop,"+skip[k.name], crashed, h.mnt)
			h.unmount()
			roottest.WaitUnbound(t, h.backup) // mount would take the device that is read-only
			h.command("mount", "-o", "loop", crashed, h.mnt)
			must(t, compareFile(filepath.Join(h.mnt, "data-0"), v.pattern(0), 0))
			h.unmount()
		})
	}
}

// commandsOf returns the indented lines of a section of docs/operations.md.
func commandsOf(t *testing.T, heading string) []string {
	t.Helper()
	page, err := os.ReadFile("../../docs/operations.md")
	must(t, err)
	_, section, ok := strings.Cut(string(page), "\n"+heading+"\n")
	if !ok {
		t.Fatalf("there is no %q", heading)
	}
	section, _, _ = strings.Cut(section, "\n## ")
	var lines []string
	for line := range strings.SplitSeq(section, "\n") {
		if command, ok := strings.CutPrefix(line, "    "); ok {
			command, _, _ = strings.Cut(command, " #")
			lines = append(lines, strings.TrimSpace(command))
		}
	}
	return lines
}

// hand is a person with a volume and a shell.
type hand struct {
	t           *testing.T
	v           *volume
	mnt, backup string
	device      string // what losetup --show printed last
}

func newHand(t *testing.T, v *volume) *hand {
	t.Helper()
	h := &hand{t: t, v: v, mnt: filepath.Join(v.dir, "mnt"), backup: filepath.Join(v.dir, "backup")}
	must(t, errors.Join(os.Mkdir(h.mnt, 0o700), os.Mkdir(h.backup, 0o700)))
	t.Cleanup(h.unmount)
	return h
}

// skips says which lines are for other filesystems, or no commands.
func (h *hand) skips(line string) bool {
	of := map[string]string{"e2fsck": "ext4", "xfs_repair": "xfs", "btrfs": "btrfs"}
	program, _, _ := strings.Cut(line, " ")
	fs, special := of[program]
	return strings.HasPrefix(line, "POOL/") || special && fs != h.v.fs
}

// run runs a line of the page, and looks at what it is for.
func (h *hand) run(line string) {
	h.t.Helper()
	line = strings.NewReplacer(
		"POOL", h.v.pool, "NAME", h.v.key(), "/mnt", h.mnt, "/backup", h.backup, "/dev/loopN", h.device,
	).Replace(line)
	words := strings.Fields(line)
	if strings.Contains(line, "| ssh ") { // the other machine is this one
		words = []string{"bash", "-o", "pipefail", "-c", "ssh() { shift; \"$@\"; }\n" + line}
	}
	mounts := words[0] == "mount"
	if mounts || words[0] == "e2fsck" || words[0] == "xfs_repair" || words[0] == "btrfs" {
		h.unmount()
	}
	out := h.command(words[0], words[1:]...)
	switch {
	case slices.Contains(words, "-j") && out != "":
		h.t.Errorf("the volume is attached: %s", out)
	case slices.Contains(words, "--show"):
		h.device = out
	case mounts:
		if err := compareFile(filepath.Join(h.mnt, "data-0"), h.v.pattern(0), 0); err != nil {
			h.t.Errorf("%s: %v", line, err)
		}
	}
}

// elsewhere checks that what was sent to another machine is a volume of a pool there,
// with the same data.
func (h *hand) elsewhere() {
	h.t.Helper()
	there := newSite(h.t, siteConfig{})
	made := there.rest(kind{name: "first", fs: "ext4", size: 16 * mib}, "first")
	pool, _, _ := strings.Cut(made.id, ".")
	there.stop()
	h.command("mv", filepath.Join(h.backup, h.v.key()), filepath.Join(there.pool, "volumes"))
	there.start()
	made.step("delete", made.remove())
	v := there.volume(h.v.kind, pool+"."+h.v.key())
	v.seed = h.v.seed
	v.step("stage", v.stage())
	v.step("publish", v.publish(0, false))
	v.step("read", v.read(0, 0))
	v.thick("brought from elsewhere")
	v.down()
}

// command runs a command that succeeds. One that takes a free loop device is repeated, as
// by a person: others take devices at the same time.
func (h *hand) command(name string, args ...string) string {
	h.t.Helper()
	limit := time.Duration(0)
	if line := name + " " + strings.Join(args, " "); strings.HasPrefix(line, "losetup --find") || name == "mount" && strings.Contains(line, "loop") {
		limit = patience
	}
	var out []byte
	if last := waitFor(limit, func() (failed string) {
		var err error
		if out, err = exec.Command(name, args...).CombinedOutput(); err != nil {
			failed = fmt.Sprintf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
		}
		return failed
	}); last != "" {
		h.t.Fatal(last)
	}
	return strings.TrimSpace(string(out))
}

// unmount ends what is mounted; a device of mount -o loop goes with it.
func (h *hand) unmount() {
	if err := unix.Unmount(h.mnt, 0); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		h.t.Errorf("unmount: %v", err)
	}
}
