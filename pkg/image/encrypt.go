package image

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
)

// HeaderSize is what an encrypted image has before its content, in bytes. It belongs to
// the image's size, and is charged with it.
const HeaderSize = 16 * MiB

// LUKS2 is the one type of encryption.
const LUKS2 = "luks2"

// Encryption is how the content of an image is encrypted. The zero value is that it is
// not. This package makes such images and keeps them; it never sees a key, and so makes
// no filesystem in them: their content is zeros until somebody with a key has written a
// header and all that follows.
type Encryption struct {
	// Type is "" or LUKS2.
	Type string `json:"type"`
	// Discard: what the content's user discards is given back to the pool, which shows
	// in the image what is not in use.
	Discard bool `json:"discard,omitempty"`
}

func (e Encryption) String() string {
	switch {
	case e.Type == "":
		return "not encrypted"
	case e.Discard:
		return "encrypted (" + e.Type + ", with discards)"
	}
	return "encrypted (" + e.Type + ")"
}

// Encrypted says whether the image holds its content encrypted.
func (s Spec) Encrypted() bool { return s.Encryption.Type != "" }

// Content is the size of the content, in bytes: what a tenant sees.
func (s Spec) Content() int64 {
	if s.Encrypted() {
		return s.Size - HeaderSize
	}
	return s.Size
}

func (s Spec) checkEncryption() error {
	e := s.Encryption
	switch {
	case e.Type != "" && e.Type != LUKS2:
		return &SpecError{"Encryption", fmt.Sprintf("%q is not %s", e.Type, LUKS2)}
	case e.Type == "" && e.Discard:
		return &SpecError{"Encryption", "discards are for encrypted volumes"}
	case e.Type != "" && s.Ephemeral != nil:
		return &SpecError{"Encryption", "an ephemeral volume is not encrypted"}
	case e.Type != "" && s.Size <= HeaderSize:
		return &SpecError{"Size", fmt.Sprintf("%d leaves no room beside a header of %d", s.Size, HeaderSize)}
	}
	return nil
}

// FormatDevice makes the filesystem of an encrypted volume on the device that shows its
// content. What the device held is lost: it is for the caller to know that nobody wrote
// to it. The errors are those of Create for mkfs.
func (s *Store) FormatDevice(ctx context.Context, device string, v Spec) error {
	if v.Filesystem == "" {
		return nil
	}
	return s.tools.formatFile(ctx, nil, device, v, deviceArguments)
}

// RenewDevice makes the filesystem of an encrypted copy, on the device that shows its
// content and that nobody has mounted, one that can be mounted beside its source. It stays
// as large as it is: mounted it grows by its journal, and an end of the machine in the
// middle harms nothing. Again is harmless.
func (s *Store) RenewDevice(ctx context.Context, device string, v Spec) error {
	return s.tools.renewFile(ctx, nil, device, v, v.Size)
}

// deviceArguments are mkfsArguments for a device that is used in a moment, while a pod
// waits: tables of inodes are cleared in the background. Decrypted zeros look like
// anything, also like a filesystem, so nothing found there counts.
func deviceArguments(s Spec, help string) []string {
	args := mkfsArguments(s, help)
	if !strings.HasPrefix(s.Filesystem, "ext") {
		return append([]string{"-f"}, args...)
	}
	for i, a := range args {
		args[i] = strings.Replace(a, "lazy_itable_init=0", "lazy_itable_init=1", 1)
	}
	return args
}

// Blank says whether a file has nothing but zeros from a byte on.
func Blank(ctx context.Context, f *os.File, from int64) (bool, error) {
	st, err := f.Stat()
	if err != nil {
		return false, err
	}
	buffer := make([]byte, MiB)
	for at := from; at < st.Size(); {
		start, end, err := nextData(f, at, st.Size())
		if err != nil {
			return false, opError("find data in", imageFile, err)
		}
		for start < end {
			if err := ctx.Err(); err != nil {
				return false, err
			}
			piece := buffer[:min(int64(len(buffer)), end-start)]
			if _, err := f.ReadAt(piece, start); err != nil {
				return false, errors.Join(errors.New("look for data"), err)
			}
			if first, _ := withoutZeros(piece); first < len(piece) {
				return false, nil
			}
			start += int64(len(piece))
		}
		at = end
	}
	return true, nil
}
