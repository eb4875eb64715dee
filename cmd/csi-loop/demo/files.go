package demo

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"syscall"
)

func makeDir(path string) error { return os.MkdirAll(path, 0o750) }

// noise is a stream of bytes that depends on seed only: a pattern that no
// other volume has, and that no cache or hole can show by chance.
func noise(seed string) io.Reader {
	return rand.NewChaCha8(sha256.Sum256([]byte(seed)))
}

// sumOf is the sha256 of the first size bytes of noise.
func sumOf(size int64, seed string) string {
	h := sha256.New()
	if _, err := io.CopyN(h, noise(seed), size); err != nil {
		return err.Error() // neither side can fail
	}
	return hex.EncodeToString(h.Sum(nil))
}

// writeFile writes size bytes of noise and syncs them.
func writeFile(path string, size int64, seed string) (err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if _, err := io.CopyN(f, noise(seed), size); err != nil {
		return err
	}
	return f.Sync()
}

// writeDevice is writeFile for a device, which is never created.
func writeDevice(path string, size int64, seed string) (err error) {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if _, err := io.CopyN(f, noise(seed), size); err != nil {
		return err
	}
	return f.Sync()
}

// writeByte writes one byte at an offset.
func writeByte(path string, offset int64) (err error) {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	_, err = f.WriteAt([]byte{1}, offset)
	return err
}

// sumFile reads a file or device from below the page cache.
func sumFile(path string) (sum string, size int64, err error) {
	f, err := os.Open(path)
	if err != nil {
		return "", 0, err
	}
	defer f.Close()
	if err := dropCache(f); err != nil {
		return "", 0, err
	}
	h := sha256.New()
	size, err = io.Copy(h, f)
	return hex.EncodeToString(h.Sum(nil)), size, err
}

// fill writes to a new file until not one byte more is taken. It returns how
// many were, and the error of the last attempt.
func fill(ctx context.Context, path string) (written int64, err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return 0, err
	}
	defer func() {
		if cerr := f.Close(); cerr != nil && err == nil {
			err = cerr
		}
	}()
	source := noise(path)
	buffer := make([]byte, mib)
	for chunk := len(buffer); chunk > 0; {
		if err := context.Cause(ctx); err != nil {
			return written, err
		}
		if _, err := io.ReadFull(source, buffer[:chunk]); err != nil {
			return written, err
		}
		n, werr := f.Write(buffer[:chunk])
		written += int64(n)
		if werr == nil {
			continue
		}
		if err = werr; !errors.Is(err, syscall.ENOSPC) {
			return written, err
		}
		chunk /= 2
	}
	// What was taken must also reach the device.
	if serr := f.Sync(); serr != nil {
		return written, errors.New("written bytes were lost: " + serr.Error())
	}
	return written, err
}

// wrapImage makes a disk image: size bytes of nothing, the file from, and as many
// again.
func wrapImage(path, from string, size int64) (err error) {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	if _, err := io.CopyN(out, noise(path), size); err != nil {
		return err
	}
	if _, err := io.Copy(out, in); err != nil {
		return err
	}
	if _, err := io.CopyN(out, noise(path), size); err != nil {
		return err
	}
	return out.Sync()
}
