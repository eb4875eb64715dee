//go:build !linux

package survey

import "context"

// LookAtNode needs Linux.
func LookAtNode(_ context.Context, cfg Config) Node {
	return Node{Release: "is not the kernel of this machine", Tools: tools(), Endpoint: cfg.Endpoint}
}
