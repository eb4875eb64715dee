//go:build !linux

package crypt

import (
	"errors"
	"os"
	"os/exec"
)

func targetVersion(string) (version [3]uint32, err error) { return version, errors.ErrUnsupported }

func remove(string, string, string, bool) error { return errors.ErrUnsupported }

func listNames(string) ([]string, error) { return nil, errors.ErrUnsupported }

func status(string, string) (uuid string, active bool, err error) {
	return "", false, errors.ErrUnsupported
}

func blockNumbers(*os.File) (string, error) { return "", errors.ErrUnsupported }

func runTogether(cmd *exec.Cmd) error { return cmd.Run() }
