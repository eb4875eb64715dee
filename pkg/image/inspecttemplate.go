package image

import (
	"context"
	"fmt"
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
func (p *Pool) inspectTemplates(ctx context.Context) ([]TemplateView, error) {
	return inspectEntries(ctx, p, templatesDir, &p.templates, p.inspectTemplate)
}

// inspectTemplate looks at one entry of templates/; false when it is gone by now.
func (p *Pool) inspectTemplate(dir string) (TemplateView, bool) {
	v := TemplateView{ID: VolumeID(p.ID(), dir), Template: Template{Pool: p.Name()}}
	r, err := p.loadTemplate(dir)
	if err != nil {
		v.Err = fmt.Errorf("%s/%s/%s: %w", p.Path(), templatesDir, dir, err)
		return v, isEntry(p.templates, dir)
	}
	v.Template = p.template(r)
	v.Allocated, v.ImageErr = p.inspectImage(p.templates, templatesDir, dir, r.Size)
	return v, true
}
