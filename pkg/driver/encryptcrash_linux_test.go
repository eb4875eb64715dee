package driver

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/csi-loop/csi-loop/pkg/crypt"
)

// stepper ends the process, as a crash would, before or after a step on mappings.
type stepper struct {
	encrypter
	at string
}

func (s stepper) step(name string, work func() error) error {
	if s.at == "before "+name {
		os.Exit(crashed)
	}
	err := work()
	if err == nil && s.at == "after "+name {
		os.Exit(crashed)
	}
	return err
}

const crashed = 42

func (s stepper) Format(ctx context.Context, device string, p []byte, spec crypt.FormatSpec) error {
	return s.step("format", func() error { return s.encrypter.Format(ctx, device, p, spec) })
}

func (s stepper) Open(ctx context.Context, device string, p []byte, spec crypt.OpenSpec) (m crypt.Mapping, err error) {
	return m, s.step("open", func() error { m, err = s.encrypter.Open(ctx, device, p, spec); return err })
}

func (s stepper) Relabel(ctx context.Context, device, label string) error {
	return s.step("relabel", func() error { return s.encrypter.Relabel(ctx, device, label) })
}

func (s stepper) CloseLast(m crypt.Mapping) error {
	return s.step("closeLast", func() error { return s.encrypter.CloseLast(m) })
}

func (s stepper) Close(ctx context.Context, m crypt.Mapping) error {
	return s.step("close", func() error { return s.encrypter.Close(ctx, m) })
}

// TestEncryptedCrash ends the process at each step of a first staging. The next one
// begins again with what came before the label, and a passphrase that nobody has data
// under yet may be another by then; what came after is the volume's.
func TestEncryptedCrash(t *testing.T) {
	if dir := os.Getenv("CSI_LOOP_CRASH_DIR"); dir != "" {
		crashIn(t, dir)
		return
	}
	for _, kind := range []string{"ext4", "block"} {
		for _, at := range []string{"before format", "after format", "after open", "before relabel", "after relabel", "before closeLast", "after closeLast"} {
			if kind == "block" && strings.HasSuffix(at, "closeLast") {
				continue
			}
			t.Run(kind+" "+at, func(t *testing.T) {
				e := newEncrypting(t)
				c := capabilityOf(kind)
				id := e.create("v", c, 64*mib, nil, nil)
				e.crash(kind, id, at)
				key := badKey // nobody has data under the other one
				if at == "after relabel" || strings.HasSuffix(at, "closeLast") {
					e.clean() // the start has taken down what nobody was told of
					e.wantCode(e.stage(id, c, e.key(key)), codes.InvalidArgument, "does not open the volume")
					key = goodKey
				}
				e.must(e.stage(id, c, e.key(key)))
				e.must(e.publish(id, c, false))
				file := e.path("target", id)
				if kind != "block" {
					file = filepath.Join(file, "file")
				}
				e.write(file)
				e.healthy(id)
				e.must(e.unpublish(id))
				e.must(e.unstage(id))
				e.clean()
				e.must(e.stage(id, c, e.key(key)))
				e.must(e.publish(id, c, false))
				e.holds(file)
				e.must(e.unpublish(id))
				e.must(e.unstage(id))
				e.remove(id)
			})
		}
	}
	t.Run("unstaged after a crash", func(t *testing.T) {
		for _, at := range []string{"after format", "after open", "after relabel", "after closeLast"} {
			e := newEncrypting(t)
			c := mountCap("ext4", oneWriter)
			id := e.create("v", c, 64*mib, nil, nil)
			e.crash("ext4", id, at)
			e.must(e.unstage(id))
			e.clean()
			e.remove(id)
		}
	})
}

// crash stages in a process of its own that ends at a step.
func (e *encrypting) crash(kind, id, at string) {
	e.t.Helper()
	e.stop()
	self, err := os.Executable()
	e.must(err)
	cmd := exec.Command(self, "-test.run=^TestEncryptedCrash$", "-test.v")
	cmd.Env = append(os.Environ(), "CSI_LOOP_CRASH_DIR="+e.dir, "CSI_LOOP_CRASH_POOL="+e.pool, "CSI_LOOP_CRASH="+strings.Join([]string{kind, id, at}, "|"))
	out, err := cmd.CombinedOutput()
	exit, ok := errors.AsType[*exec.ExitError](err)
	if !ok || exit.ExitCode() != crashed {
		e.t.Fatalf("the process did not crash %s: %v\n%s", at, err, out)
	}
	e.start()
}

// crashIn is the process that crashes.
func crashIn(t *testing.T, dir string) {
	kind, rest, _ := strings.Cut(os.Getenv("CSI_LOOP_CRASH"), "|")
	id, at, _ := strings.Cut(rest, "|")
	e := &encrypting{t: t, dir: dir, pool: os.Getenv("CSI_LOOP_CRASH_POOL")}
	e.start()
	e.d.crypt = stepper{e.d.crypt, at}
	t.Fatal(fmt.Errorf("staged: %w", e.stage(id, capabilityOf(kind), e.key(goodKey))))
}

// TestEncryptedDeadlines ends a first staging by its deadline, later each time: nothing is
// left by any, and one succeeds, as with a kubelet that asks again.
func TestEncryptedDeadlines(t *testing.T) {
	e := newEncrypting(t)
	c := mountCap("ext4", oneWriter)
	id := e.create("v", c, 64*mib, nil, nil)
	staging := e.path("staging", id)
	e.must(os.MkdirAll(staging, 0o750))
	for limit, ended := 20*time.Millisecond, 0; ; limit, ended = limit*3/2, ended+1 {
		ctx, cancel := context.WithTimeout(t.Context(), limit)
		_, err := (&nodeServer{d: e.d}).NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{
			VolumeId: id, StagingTargetPath: staging, VolumeCapability: c, Secrets: e.key(goodKey),
		})
		cancel()
		if err == nil {
			if ended == 0 {
				t.Error("no deadline came too early")
			}
			break
		}
		if got := codeOf(err); got != codes.DeadlineExceeded && got != codes.Aborted || limit > 5*time.Minute {
			t.Fatalf("after %v: %v, %v", limit, got, err)
		}
		e.clean()
	}
	e.write(filepath.Join(staging, "file"))
	e.must(e.unstage(id))
	e.clean()
	e.must(e.stage(id, c, e.key(goodKey)))
	e.read(filepath.Join(staging, "file"))
	e.must(e.unstage(id))
	e.remove(id)
}
