package image

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"
)

const (
	identityFile    = "pool.json"
	identityVersion = 1
	maxIdentitySize = 16 << 10
)

// identity is pool.json. Whoever has the key is the pool: the ID is a hash of the
// public key, so it needs no registry and cannot be claimed without the file.
type identity struct {
	FormatVersion int       `json:"formatVersion"`
	ID            string    `json:"id"`
	Seed          []byte    `json:"ed25519Seed"` // RFC 8032 private key, 32 bytes, base64
	Created       time.Time `json:"created"`
}

// PoolID is the ID of the pool whose identity has that public key.
func PoolID(key ed25519.PublicKey) string {
	sum := sha256.Sum256(key)
	return lowerBase32.EncodeToString(sum[:])[:poolIDLength]
}

func newIdentity(now time.Time) (identity, error) {
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return identity{}, err
	}
	return identity{
		FormatVersion: identityVersion,
		ID:            PoolID(public),
		Seed:          private.Seed(),
		Created:       now.UTC().Truncate(time.Second),
	}, nil
}

func (i identity) encode() ([]byte, error) {
	b, err := json.MarshalIndent(i, "", "  ")
	return append(b, '\n'), err
}

func (i identity) key() ed25519.PrivateKey { return ed25519.NewKeyFromSeed(i.Seed) }

// parseIdentity is strict: a pool with an identity that is not fully understood
// is not used.
func parseIdentity(b []byte) (identity, error) {
	var i identity
	if err := decodeStrict(b, identityVersion, &i); err != nil {
		return identity{}, err
	}
	if len(i.Seed) != ed25519.SeedSize {
		return identity{}, fmt.Errorf("the key has %d bytes instead of %d", len(i.Seed), ed25519.SeedSize)
	}
	public, ok := i.key().Public().(ed25519.PublicKey)
	if !ok || i.ID != PoolID(public) {
		return identity{}, fmt.Errorf("the ID %q does not belong to the key", i.ID)
	}
	return i, nil
}

// errNewer is a file that a later version of csi-loop wrote.
var errNewer = errors.New("written by a newer csi-loop")

// decodeStrict reads one JSON object into v, whose formatVersion must be version,
// without unknown fields and with nothing after it.
func decodeStrict(b []byte, version int, v any) error { //nolint:unparam // each kind of file has a version of its own
	var head struct {
		FormatVersion *int `json:"formatVersion"`
	}
	if err := json.Unmarshal(b, &head); err != nil {
		return fmt.Errorf("not JSON: %w", err)
	}
	switch {
	case head.FormatVersion == nil || *head.FormatVersion < 1:
		return errors.New("no formatVersion")
	case *head.FormatVersion > version:
		return fmt.Errorf("%w: format version %d, this one reads up to %d", errNewer, *head.FormatVersion, version)
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	return d.Decode(v)
}

var errTooLarge = errors.New("too large")

// readSmall reads a whole file of at most limit bytes.
func readSmall(f *os.File, limit int64) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(b)) > limit {
		return nil, fmt.Errorf("%w: more than %d bytes", errTooLarge, limit)
	}
	return b, nil
}
