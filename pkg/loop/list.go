package loop

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
)

// List returns every bound device on the machine, by number, as Survey does, for
// programs that only look: it needs no loop-control and no idle device. WithDev,
// WithSysfs and WithNodeDir apply. The error is ErrSilent, and names them, if some do not say
// what they show; the others are returned.
func List(ctx context.Context, opts ...Option) ([]Info, error) {
	o := options{dev: "/dev", sysfs: "/sys"}
	for _, opt := range opts {
		opt(&o)
	}
	if o.nodeDir == "" {
		o.nodeDir = filepath.Join(o.dev, "csi-loop")
	}
	if o.kernel == nil {
		k, err := newReader(o.sysfs)
		if err != nil {
			return nil, err
		}
		o.kernel = k
	}
	m := &Manager{kernel: o.kernel, dev: o.dev, nodeDir: o.nodeDir, retry: o.retry}
	bound, silent, err := m.Survey(ctx)
	errs := []error{err}
	for _, i := range silent {
		errs = append(errs, fmt.Errorf("%s over %q: %w", i.Path, i.BackingPath, ErrSilent))
	}
	return bound, errors.Join(errs...)
}
