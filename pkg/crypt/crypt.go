package crypt

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"k8s.io/klog/v2"
)

const (
	// program does the work on headers and tables.
	program = "cryptsetup"
	// MaxLabel is the longest label of a header, in bytes.
	MaxLabel = labelBytes - 1
	// atOnce is how many passphrases are worked on at a time: each takes the memory
	// that its key slot was made with.
	atOnce = 2
	// busyTime is how long Close waits for somebody who looks at the mapping, as udev
	// does.
	busyTime = 5 * time.Second
)

// Options say how a passphrase becomes a key, in headers that are made from now on.
type Options struct {
	// PBKDF is argon2id or pbkdf2; argon2id if empty.
	PBKDF string
	// Memory bounds what argon2id takes, in bytes; 64 MiB if 0.
	Memory int64
	// Time is how long one try at a passphrase takes on this machine; a second if 0.
	Time time.Duration
}

// Check refuses what cryptsetup would.
func (o Options) Check() error {
	_, err := o.normalise()
	return err
}

// normalise fills in the defaults.
func (o Options) normalise() (Options, error) {
	if o.PBKDF == "" {
		o.PBKDF = "argon2id"
	}
	if o.Memory == 0 {
		o.Memory = 64 << 20
	}
	if o.Time == 0 {
		o.Time = time.Second
	}
	switch {
	case o.PBKDF != "argon2id" && o.PBKDF != "pbkdf2":
		return o, fmt.Errorf("%q is neither argon2id nor pbkdf2", o.PBKDF)
	case o.Memory < 32<<10 || o.Memory > 4<<30:
		return o, fmt.Errorf("%d bytes of memory are not between 32 KiB and 4 GiB", o.Memory)
	case o.Time < time.Millisecond || o.Time > time.Minute:
		return o, fmt.Errorf("%v is not between 1ms and 1m", o.Time)
	}
	return o, nil
}

// Crypt makes and ends mappings. Its methods may be called at the same time.
type Crypt struct {
	options Options
	slots   chan struct{}
	sys     string // where sysfs is
	dev     string // where device nodes are
}

// New makes one. It looks at nothing yet.
func New(o Options) (*Crypt, error) {
	o, err := o.normalise()
	if err != nil {
		return nil, fmt.Errorf("encryption: %w", err)
	}
	return &Crypt{options: o, slots: make(chan struct{}, atOnce), sys: "/sys", dev: "/dev"}, nil
}

// Available says whether this machine can encrypt: nil, or an error that wraps
// ErrUnavailable and names what is missing. A kernel that has dm-crypt as a module loads
// it for this question.
func (c *Crypt) Available() error {
	if _, err := find(); err != nil {
		return err
	}
	version, err := targetVersion(c.control())
	switch {
	case errors.Is(err, errors.ErrUnsupported):
		return fmt.Errorf("%w: the kernel has no device mapper (dm_mod)", ErrUnavailable)
	case errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("%w: the kernel has no target \"crypt\" (dm_crypt)", ErrUnavailable)
	case err != nil:
		return fmt.Errorf("%w: ask the kernel for dm-crypt: %w", ErrUnavailable, err)
	}
	if version[0] < 1 || version[0] == 1 && version[1] < 17 { // blocks larger than 512 bytes
		return fmt.Errorf("%w: the kernel's dm-crypt is too old: %v", ErrUnavailable, version)
	}
	return nil
}

// FormatSpec says what Format makes.
type FormatSpec struct {
	// Offset is where the content begins, in bytes, a multiple of 1 MiB and at least 1.
	Offset int64
	// BlockSize is that of the mapping: 512, 1024, 2048 or 4096 bytes.
	BlockSize int
	// Label is at most MaxLabel bytes.
	Label string
}

// Format writes a LUKS2 header with one key slot, opened by passphrase, and makes it
// durable. What the device held is lost. The cipher is AES-XTS with a key of 512 bits.
func (c *Crypt) Format(ctx context.Context, device string, passphrase []byte, s FormatSpec) error {
	args := []string{
		"luksFormat", "--batch-mode", "--type", "luks2",
		"--cipher", "aes-xts-plain64", "--key-size", "512", "--hash", "sha256",
		"--sector-size", strconv.Itoa(s.BlockSize),
		"--offset", strconv.FormatInt(s.Offset/512, 10),
		"--luks2-metadata-size", strconv.Itoa(areaBytes),
		"--label", s.Label,
		"--pbkdf", c.options.PBKDF,
		"--iter-time", strconv.FormatInt(c.options.Time.Milliseconds(), 10),
	}
	if c.options.PBKDF == "argon2id" {
		args = append(args, "--pbkdf-memory", strconv.FormatInt(c.options.Memory>>10, 10), "--pbkdf-parallel", "1")
	}
	return c.run(ctx, passphrase, append(args, "--key-file", "-", device)...)
}

// Relabel changes the label of a header, durably and in one step.
func (c *Crypt) Relabel(ctx context.Context, device, label string) error {
	return c.run(ctx, nil, "config", "--label", label, device)
}

// Verify says whether passphrase opens the header on device: nil, ErrPassphrase, or that
// it could not be tried.
func (c *Crypt) Verify(ctx context.Context, device string, passphrase []byte) error {
	return c.run(ctx, passphrase, "open", "--type", "luks2", "--test-passphrase", "--key-file", "-", device)
}

// OpenSpec says how Open maps.
type OpenSpec struct {
	// Name of the mapping: letters, digits, '-', '_', '.'; at most 127 bytes.
	Name string
	// Discard lets discards pass, which shows on the device below what is not in use.
	Discard bool
	// ReadOnly mappings refuse writes.
	ReadOnly bool
}

// Open maps what Format made, to the end of the device. ErrPassphrase when it is not the
// one; ErrBusy when there is a mapping of that name. One that has no table, which an Open
// that was cut short left, is none: it is ended first.
func (c *Crypt) Open(ctx context.Context, device string, passphrase []byte, s OpenSpec) (Mapping, error) {
	args := []string{"open", "--type", "luks2", "--disable-keyring", "--disable-external-tokens", "--key-file", "-"}
	if s.Discard {
		args = append(args, "--allow-discards")
	}
	if s.ReadOnly {
		args = append(args, "--readonly")
	}
	args = append(args, device, s.Name)
	err := c.run(ctx, passphrase, args...)
	if errors.Is(err, ErrBusy) {
		if ended, endErr := c.endHollow(ctx, s.Name); endErr != nil {
			return Mapping{}, errors.Join(err, endErr)
		} else if ended {
			klog.FromContext(ctx).Info("Ended a mapping that was never made whole", "mapping", s.Name, "device", device)
			err = c.run(ctx, passphrase, args...)
		}
	}
	if err != nil {
		return Mapping{}, err
	}
	c.dropNode(s.Name)
	m, ok, err := c.named(s.Name)
	if err == nil && !ok {
		err = fmt.Errorf("cryptsetup opened %s, and the kernel shows no mapping %s", device, s.Name)
	}
	return m, err
}

// Resize lets the mapping reach to the end of the device below it. It needs no passphrase.
func (c *Crypt) Resize(ctx context.Context, m Mapping) error {
	err := c.run(ctx, nil, "resize", m.Name)
	c.dropNode(m.Name)
	return err
}

// Close ends the mapping when nobody uses it. One that does not exist is success; one that
// stays in use is ErrBusy.
func (c *Crypt) Close(ctx context.Context, m Mapping) error {
	deadline := time.Now().Add(busyTime)
	for {
		err := remove(c.control(), m.Name, m.UUID, false)
		switch {
		case err == nil || errors.Is(err, syscall.ENXIO):
			c.dropNode(m.Name)
			return nil
		case !errors.Is(err, syscall.EBUSY):
			return fmt.Errorf("remove mapping %s: %w", m.Name, err)
		case time.Now().After(deadline):
			return fmt.Errorf("remove mapping %s: %w", m.Name, ErrBusy)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("remove mapping %s: %w", m.Name, ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// CloseLast ends the mapping as soon as its last user is gone, which is at once when it
// has none.
func (c *Crypt) CloseLast(m Mapping) error {
	err := remove(c.control(), m.Name, m.UUID, true)
	if err != nil && !errors.Is(err, syscall.ENXIO) {
		return fmt.Errorf("remove mapping %s after its last user: %w", m.Name, err)
	}
	return nil
}

// dropNode removes the node that cryptsetup makes under /dev/mapper where no udev does:
// nobody would when the kernel ends the mapping. A link is udev's.
func (c *Crypt) dropNode(name string) {
	path := filepath.Join(c.dev, "mapper", name)
	if st, err := os.Lstat(path); err == nil && st.Mode()&os.ModeDevice != 0 {
		_ = os.Remove(path)
	}
}

// find returns the program.
func find() (string, error) {
	for _, dir := range append(filepath.SplitList(os.Getenv("PATH")), "/usr/sbin", "/sbin") {
		path := filepath.Join(dir, program)
		if st, err := os.Stat(path); filepath.IsAbs(path) && err == nil && !st.IsDir() && st.Mode()&0o111 != 0 {
			return path, nil
		}
	}
	return "", fmt.Errorf("%w: the program %s is not installed", ErrUnavailable, program)
}

// Exit codes of cryptsetup.
const (
	exitPermission = 2 // the passphrase opens nothing
	exitMemory     = 3
	exitExists     = 5
)

// run runs cryptsetup with the passphrase on its standard input. Those who need one wait
// for each other.
func (c *Crypt) run(ctx context.Context, passphrase []byte, args ...string) error {
	path, err := find()
	if err != nil {
		return err
	}
	if passphrase != nil {
		select {
		case c.slots <- struct{}{}:
			defer func() { <-c.slots }()
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	cmd := exec.CommandContext(ctx, path, args...)
	// No udev is waited for: in a container it does not hear of the mapping, and nothing
	// here needs its links.
	cmd.Env = []string{"LC_ALL=C", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "DM_DISABLE_UDEV=1"}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 5 * time.Second
	cmd.Stdin = bytes.NewReader(passphrase)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	start := time.Now()
	err = runTogether(cmd)
	klog.FromContext(ctx).V(4).Info("Ran cryptsetup", "action", args[0], "device", args[len(args)-1], "took", time.Since(start).String())
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return fmt.Errorf("%s %s: %w", program, args[0], ctx.Err())
	}
	said := strings.Join(strings.Fields(out.String()), " ")
	said = said[:min(len(said), 512)]
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		switch code := exit.ExitCode(); {
		case code == exitPermission && slices.Contains(args, "--key-file") && args[0] == "open":
			return ErrPassphrase
		case code == exitExists:
			return fmt.Errorf("%s %s: %w: %s", program, args[0], ErrBusy, said)
		case code == exitMemory:
			return fmt.Errorf("%s %s: not enough memory to make the key of the passphrase: %s", program, args[0], said)
		}
	}
	return fmt.Errorf("%s %s: %w: %s", program, args[0], err, said)
}
