package mount

import (
	"fmt"
	"regexp"
	"strings"
)

// Flags are the attributes of one mount, as opposed to those of a filesystem.
type Flags uint32

// The attributes that a caller may set. The zero value is a plain mount with
// the kernel's default for access times (relatime).
const (
	NoSuid      Flags = 1 << iota // set-user-ID bits and file capabilities do nothing
	NoDev                         // device nodes cannot be opened
	NoExec                        // programs cannot be run
	NoSymFollow                   // symbolic links are not followed
	NoDirAtime                    // no access times of directories
	NoAtime                       // no access times at all
	StrictAtime                   // access times at each access
)

// Param is one parameter for the filesystem, as fsconfig(2) takes it.
type Param struct {
	Key, Value string
	HasValue   bool // false: a flag, set by its name alone
}

func (p Param) String() string {
	if !p.HasValue {
		return p.Key
	}
	return p.Key + "=" + p.Value
}

// Options is a list of mount options that was looked at and found allowed.
type Options struct {
	ReadOnly bool    // "ro" was among them
	Flags    Flags   // for the mount
	Super    []Param // for the filesystem, in the order given
}

// maxOptionBytes is what mount(2) takes at most, and kernels up to 6.7 for btrfs
// (up to 5.16 for ext4) behind fsconfig(2) too.
const maxOptionBytes = 4000

// ParseOptions sorts mount options (each element may be one, or several with
// commas between) into those of the mount and those of the filesystem fsType.
//
// Only options on the list of fsType pass; all others are an *OptionError that
// says why, so that an option can neither reach another device or file than the
// volume, nor change the node. Options for user space (defaults, _netdev, nofail,
// x-*) are dropped. SELinux contexts (context= and its kin) are kept whole, be
// they quoted or not. Of contradicting options the last one holds.
//
// An unknown fsType is ErrUnknownFilesystem.
func ParseOptions(fsType string, options []string) (Options, error) {
	table, ok := filesystemOptions[fsType]
	if !ok {
		return Options{}, fmt.Errorf("%w: %q", ErrUnknownFilesystem, shorten(fsType))
	}
	var out Options
	size := 0
	for _, element := range options {
		size += len(element) + 1
		if size > maxOptionBytes {
			return Options{}, &OptionError{
				FSType: fsType, Option: element,
				Reason: fmt.Sprintf("all options together are longer than %d bytes", maxOptionBytes),
			}
		}
		for _, option := range splitGiven(element) {
			if err := out.add(fsType, table, option); err != nil {
				return Options{}, err
			}
		}
	}
	return out, nil
}

// add sorts one option into o.
func (o *Options) add(fsType string, table map[string]rule, option string) error {
	refuse := func(format string, args ...any) error {
		return &OptionError{FSType: fsType, Option: option, Reason: fmt.Sprintf(format, args...)}
	}
	for _, c := range []byte(option) {
		if c < ' ' || c == 0x7f {
			return refuse("control characters are not allowed")
		}
	}
	key, value, hasValue := strings.Cut(option, "=")
	if isUserspace(key) {
		return nil
	}
	if len(unquote(value)) > maxParamBytes {
		return refuse("its value is longer than the %d bytes that the kernel takes", maxParamBytes)
	}
	if set, ok := generic[key]; ok {
		if hasValue {
			return refuse("takes no value")
		}
		set(o)
		return nil
	}
	if contextKeys[key] {
		value = unquote(value)
		if value == "" || strings.Contains(value, `"`) {
			return refuse("needs a security context, in plain or in double quotes")
		}
		o.Super = append(o.Super, Param{Key: key, Value: value, HasValue: true})
		return nil
	}
	if r, ok := table[key]; ok && r.refused == "" {
		if reason := r.check(value, hasValue); reason != "" {
			return refuse("%s", reason)
		}
		o.Super = append(o.Super, Param{Key: key, Value: value, HasValue: hasValue})
		return nil
	} else if ok {
		return refuse("%s", r.refused)
	}
	if reason, ok := refusedEverywhere[key]; ok {
		return refuse("%s", reason)
	}
	if strings.HasPrefix(key, "X-") {
		return refuse("is an instruction to the mount program, which is not used")
	}
	return refuse("is not on the list of allowed options")
}

// isUserspace reports options that are comments or hints for programs that read
// fstab, and change nothing about a mount.
func isUserspace(key string) bool {
	switch key {
	case "defaults", "auto", "noauto", "_netdev", "nofail", "comment":
		return true
	}
	return strings.HasPrefix(key, "x-")
}

// category is a piece of an SELinux level that stands behind a comma.
var category = regexp.MustCompile(`^c[0-9]{1,4}(\.c[0-9]{1,4})?"?$`)

// splitGiven splits at commas, except in double quotes and except before the
// categories of a context that was given without quotes.
func splitGiven(s string) []string {
	var pieces []string
	quoted, from := false, 0
	for i := 0; i <= len(s); i++ {
		switch {
		case i == len(s) || (s[i] == ',' && !quoted):
			pieces = append(pieces, strings.Trim(s[from:i], " "))
			from = i + 1
		case s[i] == '"':
			quoted = !quoted
		}
	}
	var out []string
	inContext := false
	for _, p := range pieces {
		if p == "" {
			continue
		}
		if inContext && category.MatchString(p) {
			out[len(out)-1] += "," + p
			continue
		}
		key, value, _ := strings.Cut(p, "=")
		inContext = contextKeys[key] && !strings.HasPrefix(value, `"`)
		out = append(out, p)
	}
	return out
}

func unquote(s string) string {
	if len(s) >= 2 && s[0] == '"' && s[len(s)-1] == '"' {
		return s[1 : len(s)-1]
	}
	return s
}

var contextKeys = map[string]bool{"context": true, "fscontext": true, "defcontext": true, "rootcontext": true}

// generic are the options that every filesystem has.
var generic = map[string]func(*Options){
	"ro": func(o *Options) { o.ReadOnly = true },
	"rw": func(o *Options) { o.ReadOnly = false },

	"nosuid": setFlag(NoSuid, 0), "suid": setFlag(0, NoSuid),
	"nodev": setFlag(NoDev, 0), "dev": setFlag(0, NoDev),
	"noexec": setFlag(NoExec, 0), "exec": setFlag(0, NoExec),
	"nosymfollow": setFlag(NoSymFollow, 0), "symfollow": setFlag(0, NoSymFollow),
	"nodiratime": setFlag(NoDirAtime, 0), "diratime": setFlag(0, NoDirAtime),
	"noatime": setFlag(NoAtime, StrictAtime), "atime": setFlag(0, NoAtime),
	"strictatime": setFlag(StrictAtime, NoAtime), "nostrictatime": setFlag(0, StrictAtime),
	"relatime": setFlag(0, NoAtime|StrictAtime), "norelatime": setFlag(0, 0),

	"sync": setSuper("sync"), "async": setSuper("async"), "dirsync": setSuper("dirsync"),
	"lazytime": setSuper("lazytime"), "nolazytime": setSuper("nolazytime"),
	"silent": setFlag(0, 0), "loud": setFlag(0, 0),
}

func setFlag(set, unset Flags) func(*Options) {
	return func(o *Options) { o.Flags = o.Flags&^unset | set }
}

func setSuper(key string) func(*Options) {
	return func(o *Options) { o.Super = append(o.Super, Param{Key: key}) }
}
