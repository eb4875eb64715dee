package mount

import (
	"fmt"
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

// answerLog is what the helper said.
type answerLog []string

func (a *answerLog) Write(b []byte) (int, error) {
	*a = append(*a, string(b))
	return len(b), nil
}

func TestHelperObeys(t *testing.T) {
	for name, c := range map[string]struct {
		commands []string      // with two directories, for a second
		pause    time.Duration // after each command
		fail     map[string]error
		want     string
		left     []string
		hurries  string // what the kernel is told, and what is frozen by then
	}{
		"freeze and thaw":            {commands: []string{"hold", "freeze", "thaw"}, want: "held 2,frozen,thawed"},
		"in a hurry":                 {commands: []string{"hold", "freeze hurried", "thaw"}, want: "held 2,frozen,thawed", hurries: "true [], false [a b]"},
		"a failure in a hurry":       {commands: []string{"hold", "freeze hurried"}, fail: map[string]error{"freeze b": syscall.EBUSY}, want: "held 2,failed 1 16", hurries: "true [], false []"},
		"no hurry allowed":           {commands: []string{"hold", "freeze hurried", "thaw"}, fail: map[string]error{"hurry": syscall.EROFS}, want: "held 2,frozen,thawed"},
		"the caller dies":            {commands: []string{"hold", "freeze"}, want: "held 2,frozen"},
		"the caller dies before":     {commands: []string{"hold"}, want: "held 2"},
		"too late":                   {commands: []string{"hold", "freeze", "thaw"}, pause: 2 * time.Second, want: "held 2,frozen,late"},
		"the second is busy":         {commands: []string{"hold", "freeze"}, fail: map[string]error{"freeze b": syscall.EBUSY}, want: "held 2,failed 1 16"},
		"somebody else thawed":       {commands: []string{"hold", "freeze", "thaw"}, fail: map[string]error{"thaw a": syscall.EINVAL}, want: "held 2,frozen,late", left: []string{"a"}},
		"twice":                      {commands: []string{"hold", "freeze", "thaw", "hold", "freeze", "thaw"}, want: "held 2,frozen,thawed,held 2,frozen,thawed"},
		"nothing to freeze":          {commands: []string{"freeze"}, want: "not understood"},
		"the kernel refuses to thaw": {commands: []string{"hold", "freeze", "thaw"}, fail: map[string]error{"thaw a": syscall.EIO}, want: "held 2,frozen,failed 0 5", left: []string{"a"}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				fake := &fakeFilesystems{fail: c.fail}
				var out answerLog
				var hurries []string
				h := &helper{answers: &out, freeze: fake.freeze, thaw: fake.thaw, hurry: func(on bool) error {
					if err := c.fail["hurry"]; err != nil {
						return err
					}
					hurries = append(hurries, fmt.Sprint(on, " ", fake.frozen))
					return nil
				}}
				orders := make(chan order)
				go func() {
					defer close(orders)
					for _, command := range c.commands {
						o := order{words: []string{command}}
						switch word, more, _ := strings.Cut(command, " "); word {
						case "hold":
							o.files = []*os.File{os.NewFile(^uintptr(0)>>1, "a"), os.NewFile(^uintptr(0)>>1, "b")}
						case "freeze":
							o.words = append([]string{word, "1s", "2"}, strings.Fields(more)...)
						}
						orders <- o
						time.Sleep(c.pause)
					}
				}()
				err := h.run(orders)
				if got := strings.Join(out, ","); got != c.want {
					t.Errorf("answers %q, want %q", got, c.want)
				}
				if got := strings.Join(hurries, ", "); got != c.hurries {
					t.Errorf("hurries: %q, want %q", got, c.hurries)
				}
				if !slices.Equal(fake.frozen, c.left) {
					t.Errorf("left frozen: %v, want %v (%v)", fake.frozen, c.left, err)
				}
			})
		})
	}
}
