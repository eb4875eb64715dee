package mount

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/csi-loop/csi-loop/internal/confine"
)

// Check repairs what can be repaired without a person's decision on the
// unmounted filesystem of device: e2fsck -p for ext2, ext3 and ext4. On success
// it is sound. Ask for it when Superblock.NeedsCheck says so, or a mount failed;
// a sound filesystem costs one short process.
//
// ErrBusy: the device is mounted or claimed. *CheckError: a person has to look.
// ErrUnsupported for xfs and btrfs, which recover by themselves when mounted;
// xfs_repair and btrfs check may lose data and are a person's decision.
//
// ctx is looked at before the program starts; a running repair is not killed.
func (m *Mounter) Check(ctx context.Context, fsType, device string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	switch fsType {
	case "ext2", "ext3", "ext4":
	case "xfs", "btrfs":
		return &OpError{
			Op: "check " + fsType + " on", Path: device, Err: ErrUnsupported,
			Words: "it recovers when mounted; repairing more may lose data and is left to a person",
		}
	default:
		return fmt.Errorf("check %s: %w: %q", shorten(device), ErrUnknownFilesystem, fsType)
	}
	unlock, err := m.targets.lock(ctx, "device\x00"+device)
	if err != nil {
		return err
	}
	defer unlock()
	if err := claimable(device); err != nil {
		return &OpError{Op: "check", Path: device, Err: err}
	}
	return e2fsck(ctx, device, "-p")
}

// e2fsck exit codes are bits: 1 repaired, 2 repaired and wants a reboot (of a
// mounted root), 4 not repaired, 8 to 128 it could not do its work.
func e2fsck(ctx context.Context, device string, args ...string) error {
	const repaired = 1
	out, code, err := runWhole(ctx, device, "e2fsck", append(args, "--", device)...)
	if err != nil {
		return &OpError{Op: "run e2fsck on", Path: device, Err: err}
	}
	if code&^repaired != 0 {
		return &CheckError{Device: device, Code: code, Output: out}
	}
	return nil
}

// runWhole runs a program to its end, whatever becomes of ctx: the programs that
// are run here change a filesystem's structure, and half a change is worse than
// a late answer. It returns the last 4 KiB of what the program said.
//
// The filesystem may be a tenant's who means harm, so the program has no capabilities,
// cannot reach sockets, other processes or the owner and mode of a file, and with
// Landlock opens nothing but the device for writing. docs/security.md says what is left.
func runWhole(ctx context.Context, device, name string, args ...string) (output string, code int, err error) {
	resolved, err := filepath.EvalSymlinks(device)
	if err != nil {
		return "", 0, err
	}
	fd, err := openPath(resolved)
	if err != nil {
		return "", 0, err
	}
	target := os.NewFile(uintptr(fd), device)
	defer target.Close()
	cmd := exec.CommandContext(context.WithoutCancel(ctx), name, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	// Away from our process group: a Ctrl-C for us must not end it half way.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	// A filesystem that is a tenant's decides how much e2fsck has to say.
	var said tail
	cmd.Stdout, cmd.Stderr = &said, &said
	err = confine.Run(confine.Limits{Write: []*os.File{target}}, cmd.Run)
	output = strings.TrimSpace(said.String())
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		return output, exit.ExitCode(), nil
	}
	return output, 0, err
}

// tail keeps the end of what is written to it.
type tail struct {
	kept []byte // at most twice mostSaid, so that not every write moves it
	cut  bool
}

const mostSaid = 4096

func (t *tail) Write(b []byte) (int, error) {
	n := len(b)
	if len(b) > mostSaid {
		b, t.cut = b[len(b)-mostSaid:], true
	}
	if len(t.kept)+len(b) > 2*mostSaid {
		t.shorten()
	}
	t.kept = append(t.kept, b...)
	return n, nil
}

func (t *tail) shorten() {
	if over := len(t.kept) - mostSaid; over > 0 {
		t.kept, t.cut = append(t.kept[:0], t.kept[over:]...), true
	}
}

// String is at most mostSaid bytes, and begins with dots when there was more.
func (t *tail) String() string {
	t.shorten()
	if !t.cut {
		return string(t.kept)
	}
	const dots = "..."
	return dots + string(t.kept[max(0, len(t.kept)-mostSaid+len(dots)):])
}
