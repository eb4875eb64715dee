//go:build !linux

package cgroup

import "errors"

var errNoDevice = errors.New("no such device")

func isUnified(string) (bool, error) { return false, errors.ErrUnsupported }
