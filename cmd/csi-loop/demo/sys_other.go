//go:build !linux

package demo

import (
	"errors"
	"os"
	"os/exec"
	"time"
)

type df struct{ total, used, free int64 }

const settle = 3 * time.Second

func fileSystem(string) (string, int64, error) { return "", 0, errors.ErrUnsupported }
func statfs(string) (df, error)                { return df{}, errors.ErrUnsupported }
func allocated(os.FileInfo) int64              { return -1 }
func dropCache(*os.File) error                 { return errors.ErrUnsupported }
func apart(*exec.Cmd)                          {}
func unmount(string) error                     { return errors.ErrUnsupported }
func clearLoop(loopDevice) error               { return errors.ErrUnsupported }
