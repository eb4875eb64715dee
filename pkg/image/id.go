package image

import (
	"crypto/sha256"
	"encoding/base32"
	"regexp"
	"strings"
)

const (
	poolIDLength  = 20  // base32 characters: 100 bits of the public key's hash
	hashLength    = 26  // base32 characters: 130 bits of the name's hash
	maxPlainName  = 100 // so that a whole ID has at most 121 bytes
	maxHashPrefix = 32
	maxNameLength = 128 // CSI's limit for strings
	separator     = "."
	hashSeparator = "_" // cannot occur in a plain name
)

var (
	lowerBase32 = base32.NewEncoding("abcdefghijklmnopqrstuvwxyz234567").WithPadding(base32.NoPadding)

	plainName = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]*[a-z0-9])?$`)
	hashName  = regexp.MustCompile(`^([a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?)?_[a-z2-7]{26}$`)
	poolIDs   = regexp.MustCompile(`^[a-z2-7]{20}$`)
)

// DirName is the directory of the volume with the given name: the name itself
// when it is plain (a DNS label of at most 100 bytes, such as "pvc-..."), so that
// people find it with ls; otherwise what is plain of its first bytes, "_", and a
// hash. Two names share a directory only if the hash collides, and the record's
// name tells them apart. The result is always one safe path component.
func DirName(name string) string {
	if len(name) <= maxPlainName && plainName.MatchString(name) {
		return name
	}
	sum := sha256.Sum256([]byte(name))
	return sanitise(name) + hashSeparator + lowerBase32.EncodeToString(sum[:])[:hashLength]
}

func sanitise(name string) string {
	var b strings.Builder
	for i := 0; i < len(name) && b.Len() < maxHashPrefix; i++ {
		c := name[i]
		switch {
		case c >= 'A' && c <= 'Z':
			c += 'a' - 'A'
		case c >= 'a' && c <= 'z', c >= '0' && c <= '9':
		default:
			c = '-'
		}
		b.WriteByte(c)
	}
	return strings.Trim(b.String(), "-")
}

// validDir tells whether DirName could have made dir.
func validDir(dir string) bool {
	return len(dir) <= maxPlainName && (plainName.MatchString(dir) || hashName.MatchString(dir))
}

// VolumeID joins a pool's ID and a volume's directory name.
func VolumeID(poolID, dir string) string { return poolID + separator + dir }

// ParseID splits a volume ID at its first dot. A false ok means that no pool of
// csi-loop ever made this ID, so that the volume cannot exist.
func ParseID(id string) (poolID, dir string, ok bool) {
	poolID, dir, ok = strings.Cut(id, separator)
	if !ok || !poolIDs.MatchString(poolID) || !validDir(dir) {
		return "", "", false
	}
	return poolID, dir, true
}
