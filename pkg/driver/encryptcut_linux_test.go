package driver

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"

	"github.com/csi-loop/csi-loop/internal/roottest"
	"github.com/csi-loop/csi-loop/pkg/crypt"
)

// cutDisk is the device of the device mapper below a pool whose power can be cut.
const cutDisk = "cut-disk"

// disk is a disk that loses all that is written to it from a moment on, as one without power
// does. What was written before that, and not to a cache, is there.
type disk struct {
	e       *encrypting
	below   string // the loop device that it is over
	sectors int64
}

// newCutting is newEncrypting with a pool on such a disk.
func newCutting(t *testing.T) (*encrypting, *disk) {
	t.Helper()
	roottest.Require(t)
	needDMCrypt(t)
	t.Setenv("DM_DISABLE_UDEV", "1") // dmsetup makes the nodes itself
	const size = 1 << 30
	dir := t.TempDir()
	file, root := filepath.Join(dir, "disk.img"), filepath.Join(dir, "pool")
	e := &encrypting{t: t, dir: t.TempDir(), pool: root}
	e.must(os.WriteFile(file, nil, 0o600))
	e.must(os.Truncate(file, size))
	e.must(os.Mkdir(root, 0o700))
	d := &disk{e: e, sectors: size / 512, below: roottest.Losetup(t, file)}
	t.Cleanup(func() { roottest.Run(t, "losetup", "--detach", d.below) })
	roottest.Run(t, "dmsetup", "create", cutDisk, "--table", d.table("linear %s 0"))
	t.Cleanup(func() { roottest.Run(t, "dmsetup", "remove", "--retry", cutDisk) })
	roottest.Run(t, "mkfs.xfs", "-q", "-f", "/dev/mapper/"+cutDisk)
	d.mount()
	t.Cleanup(d.umount)
	e.start()
	t.Cleanup(func() {
		e.stop()
		e.clean()
	})
	return e, d
}

func (d *disk) mount() {
	d.e.t.Helper()
	d.e.must(unix.Mount("/dev/mapper/"+cutDisk, d.e.pool, "xfs", 0, ""))
}

func (d *disk) umount() {
	d.e.t.Helper()
	d.e.must(unix.Unmount(d.e.pool, 0))
}

func (d *disk) table(target string) string {
	return fmt.Sprintf("0 %d "+target, d.sectors, d.below)
}

func (d *disk) becomes(target string) {
	d.e.t.Helper()
	roottest.Run(d.e.t, "dmsetup", "suspend", "--nolockfs", cutDisk)
	roottest.Run(d.e.t, "dmsetup", "load", cutDisk, "--table", d.table(target))
	roottest.Run(d.e.t, "dmsetup", "resume", cutDisk)
}

// boot is a boot of the machine after its power was cut: nothing is attached or mounted
// any more, and what the kernel still had to write is lost.
func (d *disk) boot(id string) {
	e := d.e
	e.t.Helper()
	for _, m := range []string{e.path("target", id), e.path("staging", id)} {
		_ = unix.Unmount(m, 0)
	}
	for _, name := range e.mappings() {
		roottest.Run(e.t, "dmsetup", "remove", "--retry", name)
	}
	for dev := range strings.FieldsSeq(roottest.Run(e.t, "losetup", "-n", "-O", "NAME", "-j", e.image(id))) {
		roottest.Run(e.t, "losetup", "--detach", dev)
	}
	d.umount()
	d.becomes("linear %s 0")
	d.mount()
	e.must(os.RemoveAll(filepath.Join(e.dir, "state")))
	e.start()
}

// steps of a first staging, and which of them begin with content that is finished.
var (
	cutSteps = []string{"before format", halfFormatted, "after format", "after open", "before relabel", "after relabel", "after stage", "after sync"}
	finished = []string{"after relabel", "after stage", "after sync"}
)

// halfFormatted: a header is there, and no key in it.
const halfFormatted = "in format"

// TestEncryptedPowerCut cuts the power in a first staging. A volume that was handed out
// opens with its passphrase only and has what was synced; before that the next staging
// begins again, with any passphrase.
func TestEncryptedPowerCut(t *testing.T) {
	if os.Getenv("CSI_LOOP_CUT") != "" {
		cutIn(t)
		return
	}
	for _, kind := range []string{"ext4", "block"} {
		for _, at := range cutSteps {
			t.Run(kind+" "+at, func(t *testing.T) {
				e, d := newCutting(t)
				c := capabilityOf(kind)
				id := e.create("v", c, 64*mib, nil, nil)
				unix.Sync() // the volume itself is older than the cut
				e.until(kind, id, at, func() { d.becomes("flakey %s 0 0 3600 1 drop_writes") })
				d.boot(id)
				e.wantBegun(kind, id, at)
				e.remove(id)
			})
		}
	}
}

// TestEncryptedKill kills the driver in the middle of a format. The program that it ran
// writes nothing from then on, and the next staging begins again.
func TestEncryptedKill(t *testing.T) {
	for _, kind := range []string{"ext4", "block"} {
		t.Run(kind, func(t *testing.T) {
			e := newEncrypting(t)
			c := capabilityOf(kind)
			id := e.create("v", c, 64*mib, nil, nil)
			e.until(kind, id, halfFormatted, func() {})
			before, err := os.ReadFile(e.image(id))
			e.must(err)
			h, err := crypt.ReadHeader(bytes.NewReader(before))
			if err != nil || h.Label != labelUnfinished || !bytes.Contains(before[:16<<10], []byte(`"keyslots":{}`)) {
				t.Fatalf("it was not half-way: %+v, %v", h, err)
			}
			e.start()
			e.wantBegun(kind, id, halfFormatted)
			e.remove(id)
		})
	}
}

func capabilityOf(kind string) *csi.VolumeCapability {
	if kind == "block" {
		return blockCap(legacy)
	}
	return mountCap(kind, oneWriter)
}

// wantBegun stages a volume whose first staging was ended at a step, and uses it.
func (e *encrypting) wantBegun(kind, id, at string) {
	e.t.Helper()
	c, key := capabilityOf(kind), badKey // nobody has data under the other one
	file := e.path("target", id)
	if kind != "block" {
		file = filepath.Join(file, "file")
	}
	if slices.Contains(finished, at) {
		e.wantCode(e.stage(id, c, e.key(badKey)), codes.InvalidArgument, "does not open the volume")
		e.clean()
		key = goodKey
	}
	for round := range 2 {
		e.must(e.stage(id, c, e.key(key)))
		e.must(e.publish(id, c, false))
		if round == 1 || at == "after sync" {
			e.holds(file)
		}
		e.write(file)
		e.healthy(id)
		e.must(e.unpublish(id))
		e.must(e.unstage(id))
		e.clean()
	}
}

// until stages in a process of its own, and kills it when it is at a step, after cut.
func (e *encrypting) until(kind, id, at string, cut func()) {
	e.t.Helper()
	e.stop()
	self, err := os.Executable()
	e.must(err)
	cmd := exec.Command(self, "-test.run=^TestEncryptedPowerCut$")
	cmd.Env = append(os.Environ(), "CSI_LOOP_CUT="+strings.Join([]string{kind, id, at, e.dir, e.pool}, "|"))
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	e.must(err)
	e.must(cmd.Start())
	defer func() { _ = cmd.Wait() }()
	defer func() { _ = cmd.Process.Kill() }()
	if at == halfFormatted {
		e.awaitHeader(id)
	} else {
		lines := bufio.NewScanner(out)
		for lines.Scan() && lines.Text() != at {
			e.t.Log(lines.Text())
		}
		if lines.Text() != at {
			e.t.Fatalf("it never came to %q", at)
		}
	}
	cut()
}

// awaitHeader waits for the first part of a header.
func (e *encrypting) awaitHeader(id string) {
	e.t.Helper()
	f, err := os.Open(e.image(id))
	e.must(err)
	defer f.Close()
	for deadline := time.Now().Add(5 * time.Minute); ; time.Sleep(20 * time.Millisecond) {
		if _, err := crypt.ReadHeader(f); err == nil {
			return
		}
		if time.Now().After(deadline) {
			e.t.Fatal("no header comes")
		}
	}
}

// pauser says that it is at a step, and waits there for its end.
type pauser struct {
	encrypter
	at string
}

func (p pauser) reached(at string) {
	if p.at == at {
		fmt.Println(at)
		time.Sleep(time.Hour)
	}
}

func (p pauser) Format(ctx context.Context, device string, key []byte, spec crypt.FormatSpec) error {
	p.reached("before format")
	err := p.encrypter.Format(ctx, device, key, spec)
	p.reached("after format")
	return err
}

func (p pauser) Open(ctx context.Context, device string, key []byte, spec crypt.OpenSpec) (crypt.Mapping, error) {
	m, err := p.encrypter.Open(ctx, device, key, spec)
	p.reached("after open")
	return m, err
}

func (p pauser) Relabel(ctx context.Context, device, label string) error {
	p.reached("before relabel")
	err := p.encrypter.Relabel(ctx, device, label)
	p.reached("after relabel")
	return err
}

// cutIn is the process that is killed.
func cutIn(t *testing.T) {
	f := strings.Split(os.Getenv("CSI_LOOP_CUT"), "|")
	kind, id, at := f[0], f[1], f[2]
	e := &encrypting{t: t, dir: f[3], pool: f[4]}
	if at == halfFormatted {
		e.keys = crypt.Options{PBKDF: "pbkdf2", Time: time.Minute} // the header is there while the key is made
	}
	e.start()
	p := pauser{e.d.crypt, at}
	e.d.crypt = p
	e.must(e.stage(id, capabilityOf(kind), e.key(goodKey)))
	p.reached("after stage")
	path := filepath.Join(e.path("staging", id), "file")
	if kind == "block" {
		r, _ := e.d.state.get(id)
		path = r.Device.Mapping.Path
	}
	e.write(path)
	file, err := os.Open(path)
	e.must(err)
	e.must(file.Sync())
	if kind != "block" {
		dir, err := os.Open(filepath.Dir(path))
		e.must(err)
		e.must(dir.Sync())
	}
	p.reached("after sync")
	t.Fatalf("it came to its end, and not to %q", at)
}
