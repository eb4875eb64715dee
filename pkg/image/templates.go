package image

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"
)

const (
	templatesDir    = "templates"
	templateFile    = "template.json"
	templateVersion = 1
	maxTemplateName = 63
)

// TemplateSpec is what a template is: content that new volumes begin with.
type TemplateSpec struct {
	// Name is 1 to 63 bytes of a to z, 0 to 9 and '-', without a '-' at either end.
	Name string
	// Size in bytes, a positive multiple of MiB.
	Size int64
	// Filesystem and BlockSize are as in Spec.
	Filesystem string
	BlockSize  int
}

// Template is a template that exists. It is never written to, and volumes made of it do
// not need it.
type Template struct {
	TemplateSpec
	ID      string // <pool ID>.<name>
	Pool    string // name of its pool
	Source  string // path of the file it was made of
	Created time.Time
}

// templateRecord is template.json.
type templateRecord struct {
	FormatVersion int       `json:"formatVersion"`
	Name          string    `json:"name"`
	Size          int64     `json:"size"`
	Filesystem    string    `json:"filesystem"`
	BlockSize     int       `json:"blockSize"`
	Source        string    `json:"source"`
	Taken         Taken     `json:"taken,omitzero"` // of Source
	Created       time.Time `json:"created"`
}

// volume is the spec of a volume that is the template unchanged.
func (s TemplateSpec) volume() Spec {
	return Spec{Name: s.Name, Size: s.Size, Allocation: Thin, Filesystem: s.Filesystem, BlockSize: s.BlockSize, DirectIO: "auto"}
}

func (s TemplateSpec) check() error {
	if len(s.Name) > maxTemplateName || !plainName.MatchString(s.Name) {
		return &SpecError{"Name", fmt.Sprintf("%q is no name of a template: 1 to %d of a to z, 0 to 9 and '-'", s.Name, maxTemplateName)}
	}
	if s.BlockSize == 0 {
		return &SpecError{"BlockSize", "is missing"}
	}
	_, err := s.volume().normalise()
	return err
}

func (r templateRecord) spec() TemplateSpec {
	return TemplateSpec{Name: r.Name, Size: r.Size, Filesystem: r.Filesystem, BlockSize: r.BlockSize}
}

// parseTemplate reads the record of the template in directory dir, strictly.
func parseTemplate(b []byte, dir string) (templateRecord, error) {
	var r templateRecord
	if err := decodeStrict(b, templateVersion, &r); err != nil {
		return r, err
	}
	if err := r.spec().check(); err != nil {
		return r, err
	}
	if err := r.Taken.check(); err != nil {
		return r, err
	}
	if r.Name != dir {
		return r, fmt.Errorf("it is the record of template %q", r.Name)
	}
	return r, nil
}

func (p *Pool) template(r templateRecord) Template {
	return Template{TemplateSpec: r.spec(), ID: VolumeID(p.ID(), r.Name), Pool: p.Name(), Source: r.Source, Created: r.Created}
}

func templateLock(dir string) string { return templatesDir + "/" + dir }

// AddTemplate makes a template of the content of a file. Its blocks are taken once, in
// the pool, whatever number of thin volumes share them. An equal template of that name,
// made of the same bytes of a file that did not change since, is success, a different one
// ErrIncompatible. The other errors are those of Import. After an error there is nothing
// of the template.
func (p *Pool) AddTemplate(ctx context.Context, s TemplateSpec, c FileContent) (Template, error) {
	if err := s.check(); err != nil {
		return Template{}, err
	}
	leave, err := p.enter(ctx, templateLock(s.Name))
	if err != nil {
		return Template{}, err
	}
	defer leave()
	if have, err := p.getTemplate(s.Name); err == nil {
		if have.spec() != s || have.Source != c.Path {
			return Template{}, fmt.Errorf("%w: template %s has %d bytes of %s and is made of %s: use another name, or remove the template first", ErrIncompatible, s.Name, have.Size, have.Filesystem, have.Source)
		}
		if err := have.Taken.sameAs(c, "template"); err != nil {
			return Template{}, fmt.Errorf("template %s: %w", s.Name, err)
		}
		return p.template(have), nil
	} else if !errors.Is(err, ErrNotFound) {
		return Template{}, err
	}
	switch err := c.check(); {
	case err != nil:
		return Template{}, err
	case c.Method == Move:
		return Template{}, fmt.Errorf("%w: a template is a copy: use reflink or copy", ErrContent)
	case s.Size < c.Length:
		return Template{}, fmt.Errorf("%w: %s has %d bytes, the template %d", ErrSize, c.Path, c.Length, s.Size)
	}
	if err := p.present(); err != nil {
		return Template{}, err
	}
	taken, err := takenOf(c)
	if err != nil {
		return Template{}, err
	}
	r := templateRecord{
		FormatVersion: templateVersion, Name: s.Name, Size: s.Size, Filesystem: s.Filesystem, BlockSize: s.BlockSize,
		Source: c.Path, Taken: taken, Created: p.store.now().UTC().Truncate(time.Second),
	}
	if err := p.buildTemplate(ctx, r, c); err != nil {
		return Template{}, fmt.Errorf("template %s of %s: %w", s.Name, c.Path, err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.templateRecords[r.Name] = r
	return p.template(r), nil
}

// buildTemplate makes the template in .new-*, and commits it by a rename.
func (p *Pool) buildTemplate(ctx context.Context, r templateRecord, c FileContent) (err error) {
	need, err := dataIn(c.File, c.Offset, c.Offset+c.Length)
	if err != nil {
		return err
	}
	space, err := p.account.take(ctx, Thick, need)
	if err != nil {
		return err
	}
	defer space.release()
	defer p.settleUsed()
	work := newPrefix + r.Name + "-" + rand.Text()[:8]
	if err := mkdirAt(p.root, work); err != nil {
		return opError("make", work, err)
	}
	defer func() {
		if err != nil {
			p.discard(work)
		}
	}()
	d, err := openDirAt(p.root, work)
	if err != nil {
		return opError("open", work, err)
	}
	defer d.Close()
	in, err := p.takeIn(ctx, d, c, r.Name, r.Size, Thin)
	if err != nil {
		return err
	}
	_ = in.f.Close()
	p.store.kill("template: content synced")
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	if err := writeSynced(d, templateFile, append(b, '\n')); err != nil {
		return opError("write", templateFile, err)
	}
	p.store.kill("template: record synced")
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := renameNew(p.root, work, p.templates, r.Name); err != nil {
		return opError("commit", r.Name, err)
	}
	p.store.kill("template: renamed")
	if err := p.templates.Sync(); err != nil {
		if back := renameNew(p.templates, r.Name, p.root, work); back != nil {
			err = errors.Join(fmt.Errorf("%w: its creation was not synced; restart csi-loop", ErrDamaged), err, back)
			p.mu.Lock()
			defer p.mu.Unlock()
			p.damagedCut[templateLock(r.Name)] = err
		}
		return opError("sync", templatesDir, err)
	}
	p.store.kill("template: committed")
	return nil
}

// RemoveTemplate makes a template not exist; volumes made of it stay. An unknown name is
// ErrNotFound. Other errors: ErrDamaged for one whose record cannot be read, ErrPool,
// ctx's.
func (p *Pool) RemoveTemplate(ctx context.Context, name string) error {
	leave, err := p.enter(ctx, templateLock(name))
	if err != nil {
		return err
	}
	defer leave()
	if _, err := p.getTemplate(name); err != nil {
		return err
	}
	p.log(ctx).Info("Removing a template, as asked", "template", name)
	gone := gonePrefix + name + "-" + rand.Text()[:8]
	err = renameNew(p.templates, name, p.root, gone)
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // removed by hand: then only forget it
		return opError("remove", name, err)
	}
	p.store.kill("remove template: renamed")
	if err := p.templates.Sync(); err != nil {
		_ = renameNew(p.root, gone, p.templates, name) // as in Remove
		return opError("sync", templatesDir, err)
	}
	p.mu.Lock()
	delete(p.templateRecords, name)
	p.mu.Unlock()
	await(ctx, p.eraseAll(gone))
	p.endClaims(ctx, p.near(Source{Template: VolumeID(p.ID(), name)}, ""))
	return nil
}

// getTemplate is get for templates.
func (p *Pool) getTemplate(name string) (templateRecord, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if r, ok := p.templateRecords[name]; ok {
		return r, nil
	}
	if err, ok := p.damagedCut[templateLock(name)]; ok {
		return templateRecord{}, err
	}
	return templateRecord{}, fmt.Errorf("%w: template %q in pool %q", ErrNotFound, name, p.Name())
}

// Template returns a template of the pool: ErrNotFound, or ErrDamaged.
func (p *Pool) Template(name string) (Template, error) {
	r, err := p.getTemplate(name)
	if err != nil {
		return Template{}, err
	}
	return p.template(r), nil
}

// Templates lists the templates of the pool by name. The slice is the caller's.
func (p *Pool) Templates() []Template {
	p.mu.Lock()
	defer p.mu.Unlock()
	all := make([]Template, 0, len(p.templateRecords))
	for _, r := range p.templateRecords {
		all = append(all, p.template(r))
	}
	slices.SortFunc(all, func(a, b Template) int { return strings.Compare(a.Name, b.Name) })
	return all
}

// openTemplate opens a template's image for reading; it stays readable when the
// template is removed.
func (p *Pool) openTemplate(ctx context.Context, name string) (templateRecord, *os.File, error) {
	leave, err := p.enter(ctx, templateLock(name))
	if err != nil {
		return templateRecord{}, nil, err
	}
	defer leave()
	r, err := p.getTemplate(name)
	if err != nil {
		return r, nil, err
	}
	d, f, err := p.openImage(p.templates, templatesDir, name, r.Size, false)
	if err != nil {
		return r, nil, fmt.Errorf("open template %s: %w", name, err)
	}
	return r, f, d.Close()
}

// loadTemplates reads every record. It is load for templates.
func (p *Pool) loadTemplates(ctx context.Context) error {
	content, err := names(p.templates)
	if err != nil {
		return poolError(p.config, "%w", err)
	}
	for _, dir := range content {
		if err := ctx.Err(); err != nil {
			return err
		}
		r, err := p.loadTemplate(dir)
		if scarce(err) {
			return poolError(p.config, "%s/%s: %w", templatesDir, dir, err)
		}
		if err != nil {
			err = fmt.Errorf("%s/%s/%s: %w", p.Path(), templatesDir, dir, err)
			p.once("refuse template "+dir).Error(err, "Refusing a template", "template", dir)
			p.damagedCut[templateLock(dir)] = err
			continue
		}
		p.templateRecords[dir] = r
	}
	return nil
}

func (p *Pool) loadTemplate(dir string) (templateRecord, error) {
	if !plainName.MatchString(dir) {
		return templateRecord{}, fmt.Errorf("%w: not a name that csi-loop gives", ErrDamaged)
	}
	d, err := openDirAt(p.templates, dir)
	if err != nil {
		return templateRecord{}, openError(dir, err)
	}
	defer d.Close()
	return readRecord(d, templateFile, dir, parseTemplate)
}
