package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
)

// TemplateView is what a look at a template found.
type TemplateView struct {
	ID string
	// Err is why the template is refused; then Template is zero but for Pool.
	Err error
	Template

	Allocated int64 // bytes of blocks that its image has, shared ones too
	// ImageErr is what is wrong with its image.
	ImageErr error
}

// inspectTemplates looks at the templates of a pool.
func (p *Pool) inspectTemplates(ctx context.Context) (all []TemplateView, err error) {
	p.templates, err = openDirAt(p.root, templatesDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	var content []string
	if err == nil {
		content, err = names(p.templates)
	}
	if err != nil {
		return nil, poolError(p.config, "%s: %w", templatesDir, err)
	}
	slices.Sort(content)
	for _, dir := range content {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if v, ok := p.inspectTemplate(dir); ok {
			all = append(all, v)
		}
	}
	return all, nil
}

// inspectTemplate looks at one entry of templates/; false when it is gone by now.
func (p *Pool) inspectTemplate(dir string) (TemplateView, bool) {
	v := TemplateView{ID: VolumeID(p.ID(), dir), Template: Template{Pool: p.Name()}}
	r, err := p.loadTemplate(dir)
	if err != nil {
		if _, gone := statAt(p.templates, dir); errors.Is(gone, fs.ErrNotExist) {
			return v, false
		}
		v.Err = fmt.Errorf("%s/%s/%s: %w", p.Path(), templatesDir, dir, err)
		return v, true
	}
	v.Template = p.template(r)
	d, f, err := p.openImage(p.templates, templatesDir, dir, r.Size, false)
	if err != nil {
		v.ImageErr = err
		return v, true
	}
	defer d.Close()
	defer f.Close()
	if st, err := statFile(f); err == nil {
		v.Allocated = st.Allocated
	}
	return v, true
}
