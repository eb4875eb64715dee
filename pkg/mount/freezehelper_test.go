package mount

import (
	"bytes"
	"io"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// fakeFilesystems freezes and thaws by name.
type fakeFilesystems struct {
	frozen []string
	fail   map[string]error
}

func (f *fakeFilesystems) freeze(dir *os.File) error {
	if err := f.fail["freeze "+dir.Name()]; err != nil {
		return err
	}
	f.frozen = append(f.frozen, dir.Name())
	return nil
}

func (f *fakeFilesystems) thaw(dir *os.File) error {
	if err := f.fail["thaw "+dir.Name()]; err != nil {
		return err
	}
	f.frozen = slices.DeleteFunc(f.frozen, func(name string) bool { return name == dir.Name() })
	return nil
}

func TestHelperObeys(t *testing.T) {
	for name, c := range map[string]struct {
		commands []string
		pause    time.Duration // after each command
		fail     map[string]error
		want     string
		left     []string
	}{
		"freeze and thaw":            {commands: []string{"freeze", "thaw"}, want: "ready frozen thawed"},
		"the caller dies":            {commands: []string{"freeze"}, want: "ready frozen"},
		"the caller dies before":     {want: "ready"},
		"too late":                   {commands: []string{"freeze", "thaw"}, pause: 2 * time.Second, want: "ready frozen late"},
		"the second is busy":         {commands: []string{"freeze"}, fail: map[string]error{"freeze b": syscall.EBUSY}, want: "ready failed 1 16"},
		"somebody else thawed":       {commands: []string{"freeze", "thaw"}, fail: map[string]error{"thaw a": syscall.EINVAL}, want: "ready frozen late", left: []string{"a"}},
		"the kernel refuses to thaw": {commands: []string{"freeze", "thaw"}, fail: map[string]error{"thaw a": syscall.EIO}, want: "ready frozen failed 0 5", left: []string{"a"}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				fake := &fakeFilesystems{fail: c.fail}
				var out bytes.Buffer
				h := &helper{
					dirs: []*os.File{os.NewFile(^uintptr(0)>>1, "a"), os.NewFile(^uintptr(0)>>1, "b")}, answers: &out,
					limit: time.Second, freeze: fake.freeze, thaw: fake.thaw,
				}
				in, commands := io.Pipe()
				go func() {
					for _, command := range c.commands {
						_, _ = io.WriteString(commands, command+"\n")
						time.Sleep(c.pause)
					}
					_ = commands.Close()
				}()
				err := h.run(in)
				if got := strings.Join(strings.Split(strings.TrimSpace(out.String()), "\n"), " "); got != c.want {
					t.Errorf("answers %q, want %q", got, c.want)
				}
				if !slices.Equal(fake.frozen, c.left) {
					t.Errorf("left frozen: %v, want %v (%v)", fake.frozen, c.left, err)
				}
			})
		})
	}
}
