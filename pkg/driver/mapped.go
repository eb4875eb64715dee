package driver

import (
	"maps"
	"slices"
	"strconv"
	"strings"

	"k8s.io/apimachinery/pkg/api/resource"

	"github.com/csi-loop/csi-loop/pkg/partition"
)

// Attributes of a mapped volume: a pre-provisioned volume that shows a byte
// range of an existing image. They stand in the volume_context of the
// PersistentVolume; attrImage is what makes a volume a mapped one.
const (
	attrImage     = "image"     // absolute path beneath an allowed directory
	attrOffset    = "offset"    // first byte of the range, default 0; a number of bytes or a quantity
	attrSizeLimit = "sizeLimit" // length of the range, default to the end of the file
	attrPartition = "partition" // number of a partition, instead of both
	attrReadOnly  = "readOnly"  // "true": the device rejects every write
	// attrExposeImage: "true" allows a part of an image as a raw block device, by which a
	// pod reaches the whole image.
	attrExposeImage = "exposeImage"
	// attrBlockSize, attrDirectIO: as the parameters of the same name.
)

// maxMappedID is how long the ID of a mapped volume may be, in bytes: what CSI gives a
// string. A person chooses it; IDs of volumes in pools are shorter by themselves.
const maxMappedID = 128

// mappedAttributes are the attributes of a mapped volume after validation.
type mappedAttributes struct {
	Image     string `json:"image"`
	Offset    int64  `json:"offset,omitempty"`
	SizeLimit int64  `json:"sizeLimit,omitempty"`
	Partition int    `json:"partition,omitempty"`
	ReadOnly  bool   `json:"readOnly,omitempty"`
	Exposed   bool   `json:"exposeImage,omitempty"`
	BlockSize int    `json:"blockSize"`
	DirectIO  string `json:"directIO"`
}

// parseMapped reads the attributes of a mapped volume; nil when the context is
// not one's. Keys that Kubernetes adds are passed over, unknown ones refused.
func parseMapped(context map[string]string) (*mappedAttributes, error) {
	if _, ok := context[attrImage]; !ok {
		return nil, nil //nolint:nilnil // "no mapped volume" is not an error and there is nothing to return
	}
	m := &mappedAttributes{BlockSize: 512, DirectIO: "auto"}
	for _, key := range slices.Sorted(maps.Keys(context)) {
		if strings.HasPrefix(key, kubernetesPrefix) || strings.HasPrefix(key, provisionerPrefix) {
			continue
		}
		if err := m.set(key, context[key]); err != nil {
			return nil, err
		}
	}
	for _, key := range []string{attrOffset, attrSizeLimit} {
		if _, named := context[key]; named && m.Partition > 0 {
			return nil, invalidf("attributes: give %q or %q, not both", attrPartition, key)
		}
	}
	if m.Offset%int64(m.BlockSize) != 0 || m.SizeLimit%int64(m.BlockSize) != 0 {
		return nil, invalidf("attributes: %s %d and %s %d must be multiples of the %s %d", attrOffset, m.Offset, attrSizeLimit, m.SizeLimit, paramBlockSize, m.BlockSize)
	}
	return m, nil
}

func (m *mappedAttributes) set(key, value string) (err error) {
	if err := knownKey("attribute", key, MappedVolume); err != nil {
		return err
	}
	switch key {
	case attrImage:
		if !strings.HasPrefix(value, "/") {
			return invalidf("attribute %q: %q is not an absolute path", key, value)
		}
		m.Image = value
	case attrOffset:
		m.Offset, err = parseBytes(key, value)
	case attrSizeLimit:
		m.SizeLimit, err = parseBytes(key, value)
		if err == nil && m.SizeLimit == 0 {
			err = invalidf("attribute %q is 0: leave it out to map to the end of the image", key)
		}
	case attrPartition:
		m.Partition, err = strconv.Atoi(value)
		if err != nil || m.Partition < 1 || m.Partition > partition.MaxNumber {
			return invalidf("attribute %q: %q is no number of a partition, 1 to %d", key, value, partition.MaxNumber)
		}
	case attrReadOnly:
		m.ReadOnly, err = parseTruth(key, value)
	case attrExposeImage:
		m.Exposed, err = parseTruth(key, value)
	case paramBlockSize, paramDirectIO:
		var p params
		if err := p.set(key, value); err != nil {
			return err
		}
		if key == paramBlockSize {
			m.BlockSize = p.blockSize
		} else {
			m.DirectIO = p.directIO
		}
	default:
		return unreadable(key)
	}
	return err
}

func parseTruth(key, value string) (bool, error) {
	truth, err := strconv.ParseBool(value)
	if err != nil {
		return false, invalidf("attribute %q: %q is neither true nor false", key, value)
	}
	return truth, nil
}

// part says whether the volume is a part of its image only.
func (m *mappedAttributes) part() bool { return m.Offset != 0 || m.SizeLimit != 0 || m.Partition != 0 }

// parseBytes reads a size in bytes, plain or as a Kubernetes quantity.
func parseBytes(key, value string) (int64, error) {
	q, err := resource.ParseQuantity(value)
	if err != nil {
		return 0, invalidf("attribute %q: %q is not a size in bytes or a quantity such as 10Gi", key, value)
	}
	n, exact := q.AsInt64()
	if !exact || n < 0 {
		return 0, invalidf("attribute %q: %q is not a whole, positive number of bytes", key, value)
	}
	return n, nil
}
