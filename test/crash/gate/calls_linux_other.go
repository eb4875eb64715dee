//go:build linux && !amd64

package gate

var oldCalls = map[int]call{}
