package mount

import (
	"regexp"
	"slices"
	"strings"
)

// rule says what an option may look like, or why it may not be used at all.
type rule struct {
	form    form
	words   []string // for formWord: the values that are allowed
	refused string
}

type form int

const (
	formFlag     form = iota // no value
	formNumber               // a decimal number
	formOptional             // no value, or 0 or 1
	formSize                 // a number with an optional unit
	formWord                 // one of the rule's words; "" among them: no value
	formName                 // a file name without directories
	formPattern              // compress: a word and a level
)

var (
	number   = regexp.MustCompile(`^[0-9]{1,18}$`)
	size     = regexp.MustCompile(`^[0-9]{1,18}[kKmMgG]?$`)
	fileName = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}$`)
	compress = regexp.MustCompile(`^(no|none|(zlib|zstd)(:-?[0-9]{1,2})?|lzo)$`)
)

// check returns why the value does not fit, or "".
func (r rule) check(value string, has bool) string {
	switch r.form {
	case formFlag:
		if has {
			return "takes no value"
		}
	case formNumber:
		if !number.MatchString(value) {
			return "needs a decimal number"
		}
	case formOptional:
		if has && value != "0" && value != "1" {
			return "takes no value, or 0 or 1"
		}
	case formSize:
		if !size.MatchString(value) {
			return "needs a number of bytes, with k, m or g behind it if you like"
		}
	case formName:
		if !fileName.MatchString(value) {
			return "needs a plain file name"
		}
	case formPattern:
		if has && !compress.MatchString(value) {
			return "needs zlib, lzo, zstd (with an optional :level) or no"
		}
	case formWord:
		if value == "panic" {
			return nodePanic
		}
		if !slices.Contains(r.words, value) || (has && value == "") {
			return "needs one of " + strings.Join(r.words, ", ")
		}
	}
	return ""
}

// table builds an allow-list: one form for many keys separated by spaces.
type table map[string]rule

func (t table) with(f form, keys string) table {
	for k := range strings.FieldsSeq(keys) {
		t[k] = rule{form: f}
	}
	return t
}

func (t table) word(key string, words ...string) table {
	t[key] = rule{form: formWord, words: words}
	return t
}

func (t table) refuse(reason, keys string) table {
	for k := range strings.FieldsSeq(keys) {
		t[k] = rule{refused: reason}
	}
	return t
}

const (
	otherDevice = "names another device or file than the volume"
	forTests    = "is for debugging the kernel"
	wholeVolume = "a volume is always mounted whole"
	nodePanic   = "a damaged volume must not stop the whole node"
)

// refusedEverywhere are the options whose refusal deserves a reason.
var refusedEverywhere = func() map[string]string {
	out := make(map[string]string)
	for reason, keys := range map[string]string{
		"is set by the driver, which attaches the device itself":                     "loop offset sizelimit encryption",
		"asks for another operation than a mount":                                    "bind rbind remount move",
		"propagation is decided by the directory it is mounted in":                   "shared slave private unbindable rshared rslave rprivate runbindable",
		"needs memory that is addressed like a disk, a file behind a loop is not":    "dax",
		"lets ordinary users mount, which has no meaning here":                       "user nouser users nousers owner noowner group nogroup uid gid",
		"mandatory locks were removed from the kernel in 5.15":                       "mand nomand",
		"is made of several layers, a volume is not":                                 "lowerdir upperdir workdir",
		"integrity devices have to be opened before the volume is mounted":           "verity.hashdevice verity.roothash verity.roothashfile",
		"change counters are kept by the filesystem itself":                          "iversion noiversion i_version",
		"is an instruction to the mount program, which is not used":                  "helper uhelper",
		"the device to mount is the volume's, it cannot be chosen by a mount option": "source",
	} {
		for k := range strings.FieldsSeq(keys) {
			out[k] = reason
		}
	}
	return out
}()

// filesystemOptions is the allow-list of each filesystem that a volume may have.
var filesystemOptions = map[string]map[string]rule{
	"ext2":  extOptions(),
	"ext3":  ext3Options(),
	"ext4":  ext4Options(),
	"xfs":   xfsOptions(),
	"btrfs": btrfsOptions(),
}

func extOptions() table {
	return table{}.
		with(formFlag, `acl noacl user_xattr nouser_xattr grpid bsdgroups nogrpid sysvgroups minixdf bsddf
			quota noquota usrquota grpquota nouid32 discard nodiscard`).
		with(formNumber, "resuid resgid stripe inode_readahead_blks").
		word("errors", "continue", "remount-ro").
		refuse(otherDevice, "sb").
		refuse(forTests, "debug abort check test_dummy_encryption")
}

func ext3Options() table {
	return extOptions().
		with(formFlag, "nobarrier noload norecovery journal_checksum nojournal_checksum prjquota").
		with(formOptional, "barrier").
		with(formNumber, "commit journal_ioprio").
		with(formName, "usrjquota grpjquota").
		word("data", "journal", "ordered", "writeback").
		word("data_err", "abort", "ignore").
		word("jqfmt", "vfsold", "vfsv0", "vfsv1").
		refuse(otherDevice, "journal journal_dev journal_path")
}

func ext4Options() table {
	return ext3Options().
		with(formFlag, `journal_async_commit delalloc nodelalloc dioread_nolock dioread_lock nodioread_nolock
			block_validity noblock_validity noauto_da_alloc noinit_itable nombcache no_mbcache inlinecrypt
			prefetch_block_bitmaps no_prefetch_block_bitmaps warn_on_error nowarn_on_error`).
		with(formOptional, "auto_da_alloc mb_optimize_scan").
		with(formNumber, "min_batch_time max_batch_time max_dir_size_kb").
		word("init_itable", "", "1", "2", "5", "10", "20", "50", "100").
		refuse(forTests, "debug_want_extra_isize fc_debug_force fc_debug_max_replay")
}

func xfsOptions() table {
	return table{}.
		with(formFlag, `attr2 noattr2 discard nodiscard filestreams grpid bsdgroups nogrpid sysvgroups ikeep noikeep
			inode32 inode64 largeio nolargeio noalign norecovery nouuid swalloc wsync lifetime nolifetime
			quota noquota uquota usrquota uqnoenforce qnoenforce gquota grpquota gqnoenforce pquota prjquota pqnoenforce`).
		with(formNumber, "logbufs sunit swidth").
		with(formSize, "allocsize logbsize max_atomic_write").
		refuse(otherDevice, "logdev rtdev").
		refuse("was removed from the kernel in 4.19: barriers are always on", "barrier nobarrier")
}

func btrfsOptions() table {
	return table{}.
		with(formFlag, `acl noacl autodefrag noautodefrag barrier nobarrier datacow nodatacow datasum nodatasum nodiscard
			enospc_debug noenospc_debug flushoncommit noflushoncommit norecovery nologreplay rescan_uuid_tree skip_balance
			nospace_cache clear_cache ssd nossd ssd_spread nossd_spread treelog notreelog user_subvol_rm_allowed usebackuproot`).
		with(formNumber, "commit thread_pool metadata_ratio").
		with(formSize, "max_inline").
		with(formPattern, "compress compress-force").
		word("discard", "", "sync", "async").
		word("space_cache", "", "v1", "v2").
		word("rescue", "usebackuproot", "nologreplay", "ignorebadroots", "ignoredatacsums", "ignoremetacsums", "ignoresuperflags", "all").
		refuse(wholeVolume, "subvol subvolid subvolrootid").
		refuse(otherDevice, "device").
		refuse("a volume has one device, which is there or is not", "degraded").
		refuse(nodePanic, "fatal_errors").
		refuse(forTests, "fragment ref_verify check_int check_int_data check_int_print_mask")
}
