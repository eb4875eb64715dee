//go:build !linux

package image

import "os"

func directIOAlignment(*os.File) int { return -1 }
func reflinks(*os.File, string) bool { return false }
