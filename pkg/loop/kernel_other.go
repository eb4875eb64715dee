//go:build !linux

package loop

import (
	"errors"
	"os"
)

// FileIDOf needs Linux; elsewhere it returns errors.ErrUnsupported.
func FileIDOf(*os.File) (FileID, error) { return FileID{}, errors.ErrUnsupported }

func newKernel(string, string, string) (kernel, error) { return nil, errors.ErrUnsupported }

func newReader(string) (kernel, error) { return nil, errors.ErrUnsupported }
