package driver

import (
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/csi-loop/csi-loop/pkg/image"
)

// Keys of StorageClass parameters (CreateVolume, GetCapacity) and, where noted,
// of the attributes of inline ephemeral volumes.
const (
	paramPool        = "pool"        // name of a pool; also ephemeral
	paramAllocation  = "allocation"  // thick (default) or thin; also ephemeral
	paramDirectIO    = "directIO"    // auto (default), on or off; also ephemeral
	paramBlockSize   = "blockSize"   // logical block size of the device in bytes
	paramMkfsOptions = "mkfsOptions" // extra words for mkfs, separated by blanks
	paramSourceNode  = "sourceNode"  // preferred (default) or required; of copies, for the controller
	paramTemplate    = "template"    // name of a template that the volume begins as
	paramEncrypted   = "encrypted"   // true: LUKS2, by the passphrase in the node-stage secret
	// paramEncryptedDiscard, true: discards pass to the pool and show what is not in use.
	paramEncryptedDiscard = "encryptedDiscard"
	paramSize             = "size" // ephemeral only: a Kubernetes quantity
	kubernetesPrefix      = "csi.storage.k8s.io/"
	provisionerPrefix     = "storage.kubernetes.io/"
	// paramFilesystem is how a StorageClass names the filesystem. Kubernetes'
	// provisioner moves it into the volume capability; other COs may not.
	paramFilesystem = kubernetesPrefix + "fstype"
)

// params are StorageClass parameters after validation.
type params struct {
	pool       string // "" means the default pool
	allocation image.Allocation
	directIO   string
	blockSize  int
	// hasBlockSize: it was named, and is no default.
	hasBlockSize bool
	mkfsOptions  []string
	fsType       string // "" when not named
	template     string // "" when not named
	encryption   image.Encryption
	// freeze is for clones of volumes in use; its keys are those of snapshot classes.
	freeze snapshotParams
	// tuning may be changed later, by mutable parameters of the same keys.
	tuning image.Tuning
}

// parseParams checks StorageClass parameters. Keys that Kubernetes adds itself
// are passed over; any other key that is not known is refused by name, since a
// misspelt parameter that is ignored makes a volume nobody asked for.
func parseParams(m map[string]string) (params, error) {
	p := params{allocation: image.Thick, directIO: "auto", blockSize: 4096, freeze: defaultSnapshotParams()}
	for _, key := range slices.Sorted(maps.Keys(m)) {
		if strings.HasPrefix(key, kubernetesPrefix) && key != paramFilesystem {
			continue
		}
		if err := p.set(key, m[key]); err != nil {
			return p, err
		}
	}
	return p, p.checkEncryption()
}

// checkEncryption refuses what does not go together.
func (p *params) checkEncryption() error {
	switch {
	case p.encryption.Discard && p.encryption.Type == "":
		return invalidf("parameter %q is for volumes with %q", paramEncryptedDiscard, paramEncrypted)
	case p.encryption.Discard && p.allocation == image.Thick:
		return invalidf("parameter %q: a thick volume gives nothing back; leave it out, or make the volume thin", paramEncryptedDiscard)
	case p.encryption.Type != "" && p.template != "":
		return invalidf("parameters %q and %q: a template is not encrypted, and its copy would not be", paramEncrypted, paramTemplate)
	}
	return nil
}

// setEncryption takes a parameter of encryption.
func (p *params) setEncryption(key, value string) error {
	on, err := strconv.ParseBool(value)
	switch {
	case err != nil:
		return invalidf("parameter %q: %q is neither true nor false", key, value)
	case key == paramEncryptedDiscard:
		p.encryption.Discard = on
	case on:
		p.encryption.Type = image.LUKS2
	}
	return nil
}

// set takes one parameter.
func (p *params) set(key, value string) error {
	if err := knownKey("parameter", key, StorageClass, AttributesClass); err != nil {
		return err
	}
	switch key {
	case paramPool:
		if value == "" {
			return invalidf("parameter %q is empty: name a pool or leave it out", key)
		}
		p.pool = value
	case paramAllocation:
		switch value {
		case "thick":
			p.allocation = image.Thick
		case "thin":
			p.allocation = image.Thin
		default:
			return invalidf("parameter %q: %q is neither thick nor thin", key, value)
		}
	case paramDirectIO:
		if value != "auto" && value != "on" && value != "off" {
			return invalidf("parameter %q: %q is none of auto, on and off", key, value)
		}
		p.directIO = value
	case paramBlockSize:
		n, err := strconv.Atoi(value)
		if err != nil || n < 512 || n > 4096 || n&(n-1) != 0 {
			return invalidf("parameter %q: %q is none of 512, 1024, 2048 and 4096 (bytes)", key, value)
		}
		p.blockSize, p.hasBlockSize = n, true
	case paramFilesystem:
		if value != "" && !slices.Contains(filesystems, value) {
			return invalidf("parameter %q: filesystem %q is not supported, use one of %v", key, value, filesystems)
		}
		p.fsType = value
	case paramTemplate:
		if value == "" {
			return invalidf("parameter %q is empty: name a template or leave it out", key)
		}
		p.template = value
	case paramEncrypted, paramEncryptedDiscard:
		return p.setEncryption(key, value)
	case paramMkfsOptions:
		p.mkfsOptions = strings.Fields(value)
	case paramSourceNode:
		if value != "preferred" && value != "required" {
			return invalidf("parameter %q: %q is neither preferred nor required", key, value)
		}
	case paramFreezeTimeout, paramCopyInUse:
		return p.freeze.set(key, value)
	case paramReadIOPS, paramWriteIOPS, paramReadBandwidth, paramWriteBandwidth, paramReadAhead, paramTrim:
		return setMutable(&p.tuning, key, value)
	default:
		return unreadable(key)
	}
	return nil
}
