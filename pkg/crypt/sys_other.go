//go:build !linux

package crypt

import (
	"errors"
	"os/exec"
)

func targetVersion(string) (version [3]uint32, err error) { return version, errors.ErrUnsupported }

func remove(string, string, string, bool) error { return errors.ErrUnsupported }

func runTogether(cmd *exec.Cmd) error { return cmd.Run() }
