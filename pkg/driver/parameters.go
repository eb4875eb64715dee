package driver

import (
	"fmt"
	"slices"
	"strings"

	"github.com/csi-loop/csi-loop/pkg/image"
	"github.com/csi-loop/csi-loop/pkg/partition"
)

// Where says what a parameter is written into.
type Where int

// The places that have parameters.
const (
	// StorageClass is for CreateVolume and GetCapacity. It may have the parameters of
	// AttributesClass as well.
	StorageClass Where = iota
	// AttributesClass is a VolumeAttributesClass: what may change while a volume is used.
	AttributesClass
	// SnapshotClass is a VolumeSnapshotClass or VolumeGroupSnapshotClass.
	SnapshotClass
	// MappedVolume is volumeAttributes of a PersistentVolume that shows a part of an image.
	MappedVolume
	// EphemeralVolume is volumeAttributes of an inline volume of a pod.
	EphemeralVolume
)

// Parameter describes one key, for people. Values and Text are Markdown.
type Parameter struct {
	Name    string
	Values  string
	Default string // what holds when it is not there, as it would be written; "" for none
	Text    string
}

// Parameters lists the keys that a place may have, in the order in which they are best
// read. A key that is not among them is refused there.
func Parameters(w Where) []Parameter { return slices.Clone(parameters[w]) }

// Parameters that are the same in several places.
var (
	aboutPool       = Parameter{paramPool, "name of a pool", "", "a pool of the node's configuration, never a path; else the default pool"}
	aboutAllocation = Parameter{paramAllocation, "`thick`, `thin`", "thick", "thin volumes take space when written to, and may meet a full pool"}
	aboutDirectIO   = Parameter{
		paramDirectIO, "`auto`, `on`, `off`", "auto",
		"`auto` asks for direct I/O and takes buffered I/O when the pool cannot, which the log says (`csi-loop devices -o wide` too); `on` insists",
	}
	aboutFreezeTimeout = Parameter{
		paramFreezeTimeout, fmt.Sprintf("a duration up to `%s`", shortDuration(maxFreezeTimeout.String())), shortDuration(defaultFreezeTimeout.String()),
		"how long a filesystem may be frozen; a snapshot that takes longer is thrown away",
	}
	aboutCopyInUse = Parameter{paramCopyInUse, "`true`, `false`", "false", "on pools that cannot reflink: allow to freeze a volume in use while its data is copied"}
)

// parameters are the keys that are known. Whoever reads a key asks knownKey first, so
// that none works without being told of here.
var parameters = map[Where][]Parameter{
	StorageClass: {
		aboutPool, aboutAllocation, aboutDirectIO,
		{paramBlockSize, "`512`, `1024`, `2048`, `4096`", "4096", "logical block size of the device, in bytes"},
		{paramFilesystem, markdownList(filesystems), "", fmt.Sprintf("filesystem of volumes that are mounted; `%s` when neither the class nor the claim names one", defaultFilesystem)},
		{paramMkfsOptions, "words for mkfs", "", "an allow-list; what would break a promise is refused, with the reason"},
		{paramTemplate, "name of a template", "", "new volumes begin as it; where a claim has a source of its own, that counts"},
		{
			paramEncrypted, "`true`, `false`", "false",
			"LUKS2 below the filesystem or the raw device; the class names a node-stage secret with the passphrase, see [operations](../operations.md#encrypted-volumes)",
		},
		{paramEncryptedDiscard, "`true`, `false`", "false", "of encrypted thin volumes: discards give space back, and show in the image what is not in use"},
		aboutFreezeTimeout.of("here for clones of volumes in use"), aboutCopyInUse.of("the same"),
		{
			paramSourceNode, "`preferred`, `required`", "preferred",
			"in Kubernetes: a restore or clone may be made on another node than that of its source, and is sent there; `required` makes the scheduler choose the source's node",
		},
	},
	AttributesClass: {
		{paramReadIOPS, valuesIOPS, "", "reads a second of each pod that uses the volume"},
		{paramWriteIOPS, valuesIOPS, "", "writes a second of each pod"},
		{paramReadBandwidth, valuesBandwidth, "", "what each pod reads in a second"},
		{paramWriteBandwidth, valuesBandwidth, "", "what each pod writes in a second"},
		{paramReadAhead, fmt.Sprintf("`0`, or a multiple of 4096 bytes up to `%dMi`, as in `1Mi`", image.LargestReadAhead>>20), "", "how much the kernel reads ahead"},
		{paramTrim, "`true`, `false`", "", "whether the filesystem of a thin volume is trimmed in the background, as it is from the start; `true` is refused for thick volumes"},
	},
	SnapshotClass: {
		aboutFreezeTimeout, aboutCopyInUse,
		{paramIndependent, "`true`, `false`", "false", "give the snapshot blocks of its own, in the background"},
	},
	MappedVolume: {
		{attrImage, "absolute path", "", "the image, beneath a directory that `--image-dir` allows; it makes the volume a mapped one"},
		{attrOffset, "bytes, or a quantity such as `1Mi`", "0", "first byte of the range"},
		{attrSizeLimit, "the same", "", "length of the range; else to the end of the file"},
		{attrPartition, fmt.Sprintf("1 to %d", partition.MaxNumber), "", "number of a partition (GPT, or MBR with logical ones), instead of `offset` and `sizeLimit`"},
		{attrReadOnly, "`true`, `false`", "false", "the kernel rejects every write"},
		{attrExposeImage, "`true`, `false`", "false", "allow a part of an image (`offset`, `sizeLimit`, `partition`) as a raw block device: pods that have it can reach the [whole image](../security.md#a-tenant-who-has-a-raw-block-device)"},
		{paramBlockSize, "`512`, `1024`, `2048`, `4096`", "512", "logical block size of the device, in bytes"},
		aboutDirectIO,
	},
	EphemeralVolume: {
		{paramSize, "a quantity such as `1Gi`", "", fmt.Sprintf("size of the volume, at most `--ephemeral-max-size`; else %d GiB, or what is allowed if that is less", defaultSize>>30)},
		aboutPool.of("it has to be one that `--ephemeral-pool` allows"), aboutAllocation, aboutDirectIO,
	},
}

var (
	valuesIOPS      = fmt.Sprintf("`%s`, or a number, %d or more", unlimited, image.LeastIOPS)
	valuesBandwidth = fmt.Sprintf("`%s`, or bytes as in `50Mi`, %d KiB or more", unlimited, image.LeastBandwidth>>10)
)

// of returns p with something more to say.
func (p Parameter) of(what string) Parameter {
	p.Text += "; " + what
	return p
}

// knownKey refuses what is not in the table, as a kind of key.
func knownKey(kind, key string, places ...Where) error {
	var known []string
	for _, w := range places {
		for _, p := range parameters[w] {
			if p.Name == key {
				return nil
			}
			known = append(known, p.Name)
		}
	}
	return invalidf("%s %q is not known; known are %s", kind, key, strings.Join(known, ", "))
}

// unreadable is of a key that is in the table and that nobody reads.
func unreadable(key string) error {
	return fmt.Errorf("BUG: %q is told of, and not read", key)
}

func markdownList(names []string) string { return "`" + strings.Join(names, "`, `") + "`" }

// shortDuration takes the zeros from the end of a time.Duration's text.
func shortDuration(text string) string {
	for _, zero := range []string{"m0s", "h0m"} {
		if s, ok := strings.CutSuffix(text, zero); ok {
			text = s + zero[:1]
		}
	}
	return text
}
