package loop

import "time"

// Option changes a Manager's defaults.
type Option func(*options)

type options struct {
	warm, max           int
	dev, sysfs, nodeDir string
	retry               Retry
	kernel              kernel
}

// Retry bounds what the manager tries again: a device that somebody else took
// first, and one that is not free yet. Zero fields mean the default.
type Retry struct {
	// Attempts bounds the tries of one Attach to find a device, and of one Remove.
	// Default 64.
	Attempts int
	// Delay is the pause after the first failed try; it doubles up to MaxDelay, and
	// each pause is a random part of it, at least half. Defaults 1 ms and 100 ms.
	Delay, MaxDelay time.Duration
	// Settle bounds the wait for a device or an image that somebody else uses, so
	// that a busy one is reported within the caller's deadline. Default 5 s.
	Settle time.Duration
	// Answer bounds the wait for a device to say what it shows. Default 3 s.
	Answer time.Duration
}

// WithWarm sets how many idle devices Warm registers ahead and Trim leaves. The
// default is 8.
func WithWarm(n int) Option { return func(o *options) { o.warm = n } }

// WithMax sets how many devices the manager may have attached at a time. The
// default is 256; the kernel's bound is the minor space, about a million (fact 8).
func WithMax(n int) Option { return func(o *options) { o.max = n } }

// WithDev sets where the kernel's device nodes are. The default is /dev.
func WithDev(dir string) Option { return func(o *options) { o.dev = dir } }

// WithSysfs sets where sysfs is. The default is /sys.
func WithSysfs(dir string) Option { return func(o *options) { o.sysfs = dir } }

// WithNodeDir sets where the manager makes device nodes that it misses (fact 11).
// The directory is made when needed; it must not be on a file system mounted nodev.
// The default is csi-loop below the directory of WithDev.
func WithNodeDir(dir string) Option { return func(o *options) { o.nodeDir = dir } }

// WithRetry sets the bounds of trying again.
func WithRetry(r Retry) Option { return func(o *options) { o.retry = r } }

func withKernel(k kernel) Option { return func(o *options) { o.kernel = k } }
