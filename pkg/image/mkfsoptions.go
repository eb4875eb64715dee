package image

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// An mkfsFlag says what may follow one flag of an mkfs. Exactly one of the fields
// is set, none for a flag without a value.
type mkfsFlag struct {
	value    *regexp.Regexp            // the whole value
	list     map[string]*regexp.Regexp // key=value,key=value; may be repeated
	features []string                  // name,^name; may be repeated
	refused  string                    // why it is not for users
}

var (
	number  = regexp.MustCompile(`^[0-9]{1,19}$`)
	sized   = regexp.MustCompile(`^[0-9]{1,15}[bskmg]?$`)
	boolean = regexp.MustCompile(`^[01]$`)
	percent = regexp.MustCompile(`^([0-9]|[1-4][0-9]|50)$`)
	profile = regexp.MustCompile(`^(single|dup)$`)
)

const (
	pinnedBlock   = "the block size follows the volume's blockSize"
	pinnedDiscard = "discards would take the blocks of a thick volume away"
	pinnedSize    = "the size is the volume's"
	pinnedUUID    = "all volumes made with it would have the same UUID"
	pinnedForce   = "it is not needed: the file is new"
	pinnedFile    = "it reads files of the node"
	pinnedDevice  = "a volume is one file"
)

var extFlags = map[string]mkfsFlag{
	"-L": {value: regexp.MustCompile(`^[A-Za-z0-9_.][A-Za-z0-9_.-]{0,15}$`)},
	"-i": {value: regexp.MustCompile(`^[0-9]{4,8}$`)},
	"-I": {value: regexp.MustCompile(`^(128|256|512|1024|2048|4096)$`)},
	"-N": {value: number},
	"-m": {value: percent},
	"-G": {value: number},
	"-T": {value: regexp.MustCompile(`^(small|big|huge|news|largefile|largefile4)$`)},
	"-e": {value: regexp.MustCompile(`^(continue|remount-ro)$`)},
	"-J": {list: map[string]*regexp.Regexp{"size": number, "fast_commit_size": number}},
	"-E": {list: map[string]*regexp.Regexp{
		"stride": number, "stripe_width": number, "stripe-width": number, "resize": number,
		"packed_meta_blocks": boolean, "num_backup_sb": regexp.MustCompile(`^[012]$`),
		"root_owner": regexp.MustCompile(`^[0-9]{1,10}:[0-9]{1,10}$`),
	}},
	"-O": {features: []string{
		"dir_index", "dir_nlink", "ea_inode", "encrypt", "fast_commit", "filetype", "has_journal", "huge_file",
		"inline_data", "large_dir", "project", "quota", "resize_inode", "stable_inodes", "uninit_bg", "verity",
		"casefold", "sparse_super2", "metadata_csum", "metadata_csum_seed", "flex_bg", "64bit", "ext_attr",
	}},
	"-b": {refused: pinnedBlock}, "-C": {refused: pinnedBlock}, "-U": {refused: pinnedUUID},
	"-F": {refused: pinnedForce}, "-K": {refused: pinnedDiscard}, "-d": {refused: pinnedFile},
	"-l": {refused: pinnedFile}, "-z": {refused: pinnedFile}, "-c": {refused: "a new file has no bad blocks"},
	"-t": {refused: "the type is the volume's filesystem"}, "-j": {refused: "choose ext3 or ext4 for a journal"},
	"-S": {refused: "it makes no usable filesystem"}, "-n": {refused: "it makes no filesystem"},
}

var xfsFlags = map[string]mkfsFlag{
	"-L": {value: regexp.MustCompile(`^[A-Za-z0-9_.][A-Za-z0-9_.-]{0,11}$`)},
	"-i": {list: map[string]*regexp.Regexp{
		"size": regexp.MustCompile(`^(256|512|1024|2048)$`), "maxpct": regexp.MustCompile(`^([0-9]{1,2}|100)$`),
		"sparse": boolean,
	}},
	"-m": {list: map[string]*regexp.Regexp{
		"reflink": boolean, "rmapbt": boolean, "finobt": boolean, "inobtcount": boolean, "bigtime": boolean,
	}},
	"-d": {list: map[string]*regexp.Regexp{
		"agcount": number, "agsize": sized, "su": sized, "sw": number, "sunit": number, "swidth": number,
	}},
	"-l": {list: map[string]*regexp.Regexp{"size": sized, "su": sized, "sunit": number, "lazy-count": boolean}},
	"-n": {list: map[string]*regexp.Regexp{"size": sized, "version": regexp.MustCompile(`^(2|ci)$`)}},
	"-b": {refused: pinnedBlock}, "-s": {refused: pinnedBlock}, "-K": {refused: pinnedDiscard},
	"-f": {refused: pinnedForce}, "-c": {refused: pinnedFile}, "-p": {refused: pinnedFile},
	"-r": {refused: pinnedDevice}, "-N": {refused: "it makes no filesystem"},
}

var btrfsFlags = map[string]mkfsFlag{
	"-L": {value: regexp.MustCompile(`^[A-Za-z0-9_.][A-Za-z0-9_.-]{0,254}$`)},
	"-n": {value: regexp.MustCompile(`^(4096|8192|16384|32768|65536|4k|8k|16k|32k|64k)$`)},
	"-d": {value: profile}, "-m": {value: profile}, "-M": {},
	"--csum": {value: regexp.MustCompile(`^(crc32c|xxhash|sha256|blake2)$`)},
	"-O":     {features: []string{"extref", "mixed-bg", "no-holes", "skinny-metadata"}},
	"-s":     {refused: pinnedBlock}, "-b": {refused: pinnedSize}, "-K": {refused: pinnedDiscard},
	"-f": {refused: pinnedForce}, "-U": {refused: pinnedUUID}, "-r": {refused: pinnedFile},
	"-R": {refused: "its features are those of the oldest supported kernel"},
}

var mkfsFlags = map[string]map[string]mkfsFlag{
	"ext2": extFlags, "ext3": extFlags, "ext4": extFlags, "xfs": xfsFlags, "btrfs": btrfsFlags,
}

// ParseMkfsOptions checks arguments for the mkfs of a filesystem against the list
// of those that are allowed, and returns them in one canonical form: a flag and
// its value are two elements. It accepts "-i", "8192" as well as "-i8192" and
// "--csum=sha256". The *SpecError names the argument and the reason.
func ParseMkfsOptions(filesystem string, options []string) ([]string, error) {
	if len(options) == 0 {
		return nil, nil
	}
	if filesystem == "" {
		return nil, mkfsError(options[0], "a raw block volume has no filesystem")
	}
	flags, ok := mkfsFlags[filesystem]
	if !ok {
		return nil, mkfsError(options[0], "no options are known for "+filesystem)
	}
	var canonical []string
	seen := map[string]bool{}
	for rest := options; len(rest) > 0; {
		option := rest[0]
		rest = rest[1:]
		name, value, attached := splitOption(option)
		flag, ok := flags[name]
		if !ok {
			return nil, mkfsError(option, "not among those allowed for "+filesystem+": "+strings.Join(allowed(flags), " "))
		}
		if flag.refused == "" && !attached && flag.wantsValue() {
			if len(rest) == 0 {
				return nil, mkfsError(name, "its value is missing")
			}
			value, rest = rest[0], rest[1:]
		}
		if err := flag.check(name, value); err != nil {
			return nil, err
		}
		if seen[key(name, value, flag)] {
			return nil, mkfsError(name, "given twice")
		}
		seen[key(name, value, flag)] = true
		canonical = append(canonical, name)
		if flag.wantsValue() {
			canonical = append(canonical, value)
		}
	}
	return canonical, nil
}

func mkfsError(option, reason string) error {
	return &SpecError{Field: "MkfsOptions", Reason: fmt.Sprintf("%q: %s", option, reason)}
}

// key is what may not be repeated: the flag, or for flags with a list one whole
// list (a repeated key in two lists is for mkfs to refuse).
func key(name, value string, f mkfsFlag) string {
	if f.list != nil || f.features != nil {
		return name + " " + value
	}
	return name
}

func splitOption(s string) (name, value string, attached bool) {
	if strings.HasPrefix(s, "--") {
		return strings.Cut(s, "=")
	}
	if len(s) > 2 && s[0] == '-' {
		return s[:2], s[2:], true
	}
	return s, "", false
}

func allowed(flags map[string]mkfsFlag) []string {
	var names []string
	for name, f := range flags {
		if f.refused == "" {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

func (f mkfsFlag) wantsValue() bool { return f.value != nil || f.list != nil || f.features != nil }

func (f mkfsFlag) check(name, value string) error {
	switch {
	case f.refused != "":
		return mkfsError(name, f.refused)
	case f.value != nil && !f.value.MatchString(value):
		return mkfsError(name, fmt.Sprintf("value %q is not of the form %v", value, f.value))
	case !f.wantsValue() && value != "":
		return mkfsError(name, "takes no value")
	}
	for item := range strings.SplitSeq(value, ",") {
		switch {
		case f.list != nil:
			k, v, _ := strings.Cut(item, "=")
			pattern, ok := f.list[k]
			if !ok {
				return mkfsError(name, fmt.Sprintf("%q is not allowed", item))
			}
			if !pattern.MatchString(v) {
				return mkfsError(name, fmt.Sprintf("%q is not of the form %s=%v", item, k, pattern))
			}
		case f.features != nil && !slices.Contains(f.features, strings.TrimPrefix(item, "^")):
			return mkfsError(name, fmt.Sprintf("feature %q is not allowed", item))
		}
	}
	return nil
}
