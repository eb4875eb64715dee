package driver

import (
	"errors"
	"fmt"

	"github.com/csi-loop/csi-loop/pkg/image"
)

// templateSource is the source of a volume whose class names a template. That the
// template is not here is RESOURCE_EXHAUSTED: Kubernetes then looks for a node that has
// it, and shows the message at the claim.
func (d *Driver) templateSource(name string, p params) (*image.Source, error) {
	if len(p.mkfsOptions) > 0 {
		return nil, invalidf("parameter %q: a volume made of a template is not formatted", paramMkfsOptions)
	}
	pool, err := d.pool(p.pool)
	if err != nil {
		return nil, err
	}
	src := &image.Source{Template: image.VolumeID(pool.ID(), p.template)}
	if have, ok := d.images.Find(name); ok && have.Source != nil && *have.Source == *src {
		return src, nil // it exists; the template may be gone by now
	}
	_, err = pool.Template(p.template)
	if errors.Is(err, image.ErrNotFound) {
		return nil, exhaustedf("there is no template %q in pool %q of node %q: make it with \"csi-loop template add\" there, or use a node that has it",
			p.template, pool.Name(), d.cfg.NodeID)
	}
	if err != nil {
		return nil, fmt.Errorf("template %q: %w", p.template, err)
	}
	return src, nil
}

// templateSpec describes a template as the source of a copy.
func (d *Driver) templateSpec(id string) (image.Spec, error) {
	pool, name, ok := d.images.Lookup(id)
	if !ok {
		return image.Spec{}, unavailablef("template %q: its pool cannot be used now", id)
	}
	t, err := pool.Template(name)
	return image.Spec{Size: t.Size, Filesystem: t.Filesystem, BlockSize: t.BlockSize}, err
}
