package image

import (
	"bytes"
	"container/list"
	"context"
	"errors"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"k8s.io/klog/v2"
)

// Limits of what is kept of templates, in memory.
const (
	maxTemplateMemory = 4 << 20
	maxTemplates      = 64
	maxTemplateTries  = 3
	templateBuffers   = 4 // calls that write from templates at once
)

// templates keeps what mkfs wrote to new images, so that the next equal image gets the
// same, with an identity of its own, without running mkfs.
//
// Nothing is taken on trust. The first mkfs of a shape makes a template if all in it
// that has to differ was found, with every checksum as it should be. The second proves
// it: the template with that one's identity must be equal to it, byte for byte. Only
// then it is used. What does not pass keeps running mkfs.
//
// They are of this process: a restart, another mkfs program and another mke2fs.conf
// begin anew.
type templates struct {
	buffers chan struct{}

	mu     sync.Mutex
	shapes map[shape]*list.Element // guarded by mu; of *template
	used   *list.List              // guarded by mu; latest first
	memory int                     // guarded by mu
}

// shape is all that what mkfs writes depends on, but for an identity.
type shape struct {
	pool       string // mkfs.xfs asks the filesystem that its file is on
	filesystem string
	size       int64
	allocation Allocation
	arguments  string
	program    fileVersion
	config     fileVersion // of the ext family
}

// fileVersion changes when a file is replaced or written to.
type fileVersion struct {
	path     string
	dev, ino uint64
	size     int64
	changed  int64 // ns
}

// template is what is known of a shape.
type template struct {
	shape  shape
	proven bool
	tries  int // that did not end in one that is proven

	blocks  blocks // its data is packed
	length  int    // of its data
	packed  []byte
	plan    *plan
	blocked []fileRange // what has blocks, of a sparse image: also much that is zero
}

// memory is about what it takes.
func (t *template) memory() int {
	n := 512 + len(t.packed) + 8*len(t.blocks.at)
	if t.plan != nil {
		n += 8*len(t.plan.fields) + 36*len(t.plan.sums)
	}
	return n + 16*len(t.blocked)
}

func newTemplates() *templates {
	return &templates{buffers: make(chan struct{}, templateBuffers), shapes: map[shape]*list.Element{}, used: list.New()}
}

// format makes the filesystem of a new image: from a template if there is one, else
// by mkfs. synced is to be called when the image is synced.
func (p *Pool) format(ctx context.Context, d, f *os.File, r record) (synced func(), err error) {
	ctx, end := p.store.step(ctx, "format image")
	defer func() { end(err) }()
	s, t := r.spec(), p.store.templates
	found, err := p.store.tools.find(ctx, s.Filesystem)
	if err != nil {
		return nil, err
	}
	synced = func() {}
	x, ok := p.store.tools.shapeOf(p.ID(), s, found)
	if ok = ok && t != nil; ok {
		proven, learn := t.ready(x)
		if proven != nil {
			klog.FromContext(ctx).Info("Formatting a new image from a template", "name", s.Name, "filesystem", s.Filesystem, "size", s.Size)
			return synced, t.write(ctx, f, proven, p.store.now())
		}
		ok = learn
	}
	begun := time.Now()
	if err := p.store.tools.format(ctx, d, s); err != nil {
		return nil, err
	}
	if done := time.Now(); ok {
		synced = func() { t.learn(ctx, x, f, begun, done) }
	}
	return synced, nil
}

// shapeOf tells what an image will be like. Without ok it cannot be told.
func (t *tools) shapeOf(pool string, s Spec, found tool) (x shape, ok bool) {
	x = shape{
		pool: pool, filesystem: s.Filesystem, size: s.Size, allocation: s.Allocation,
		arguments: strings.Join(mkfsArguments(s, found.help), "\x00"),
	}
	var err error
	if x.program, err = versionOf(found.path); err != nil {
		return shape{}, false
	}
	if strings.HasPrefix(s.Filesystem, "ext") {
		x.config, err = versionOf(mke2fsConfig)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return shape{}, false
		}
	}
	return x, true
}

// mke2fsConfig is where mke2fs looks, with the environment that it is given.
const mke2fsConfig = "/etc/mke2fs.conf"

// ready returns the proven template of a shape, or nil, and whether mkfs may be
// watched to make or prove one.
func (t *templates) ready(x shape) (proven *template, learn bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	e, ok := t.shapes[x]
	if !ok {
		return nil, true
	}
	known := e.Value.(*template) //nolint:errcheck,forcetypeassert // nothing else is in the list
	if known.proven {
		t.used.MoveToFront(e)
		return known, false
	}
	return nil, known.tries < maxTemplateTries
}

// write gives an empty image of the template's shape its content, with a new identity.
func (t *templates) write(ctx context.Context, f *os.File, of *template, now time.Time) error {
	select {
	case t.buffers <- struct{}{}:
		defer func() { <-t.buffers }()
	case <-ctx.Done():
		return ctx.Err()
	}
	buffer := unpackBuffer(of.length)
	defer unpackBuffers.Put(buffer)
	data := *buffer
	if err := unpack(of.packed, data); err != nil {
		return err
	}
	id := fsIdentity{when: now}
	for range of.uuids() {
		id.uuids = append(id.uuids, newUUID())
	}
	of.plan.stamp(data, id)
	for _, x := range of.blocked {
		if err := allocate(f, x.start, x.end-x.start, true); err != nil {
			return opError("allocate", imageFile, err)
		}
	}
	return opError("write", imageFile, of.blocks.write(f, data))
}

// unpackBuffers are buffers for what write unpacks, some 600 KiB for ext4: they would be
// most of what a volume's whole life allocates.
var unpackBuffers sync.Pool

// unpackBuffer is one of so many bytes, whose content is anything.
func unpackBuffer(n int) *[]byte {
	if b, ok := unpackBuffers.Get().(*[]byte); ok && cap(*b) >= n {
		*b = (*b)[:n]
		return b
	}
	b := make([]byte, n)
	return &b
}

// uuids is how many UUIDs the filesystem has.
func (t *template) uuids() int {
	n := 0
	for _, x := range t.plan.fields {
		if !x.kind.isTime() {
			n = max(n, int(x.which)+1)
		}
	}
	return n
}

// learn looks at what mkfs made of a new image, which is synced, between begun and
// done: to make a template of it, or to prove the one there is.
func (t *templates) learn(ctx context.Context, x shape, f *os.File, begun, done time.Time) {
	select {
	case t.buffers <- struct{}{}:
		defer func() { <-t.buffers }()
	case <-ctx.Done():
		return
	}
	seen, data, id, err := study(x, f, begun, done)
	log := klog.FromContext(ctx).V(1)
	t.mu.Lock()
	var before *template
	if e, ok := t.shapes[x]; ok {
		before = e.Value.(*template) //nolint:errcheck,forcetypeassert // nothing else is in the list
	}
	t.mu.Unlock()
	switch {
	case before != nil && before.proven:
		return
	case err != nil:
		log.Info("No template can be made of what mkfs wrote", "filesystem", x.filesystem, "size", x.size, "reason", err)
		seen = &template{shape: x}
	case before == nil || before.plan == nil:
		// The first.
	case before.becomes(seen, data, id):
		log.Info("New images are written from a template from now on", "filesystem", x.filesystem, "size", x.size, "bytes", len(data))
		seen.proven = true
	default:
		err = errors.New("two runs of mkfs differ in more than was found")
		log.Info("A template was not proven", "filesystem", x.filesystem, "size", x.size, "reason", err)
	}
	if before != nil {
		seen.tries = before.tries
	}
	if err != nil {
		seen.tries++
	}
	t.keep(seen)
}

// study makes a template of an image, and returns its data and identity too.
func study(x shape, f *os.File, begun, done time.Time) (*template, []byte, fsIdentity, error) {
	c, err := readBlocks(f, x.size, x.grain(f))
	if err != nil {
		return nil, nil, fsIdentity{}, err
	}
	p, id, err := survey(x.filesystem, c, begun, done)
	if err != nil {
		return nil, nil, fsIdentity{}, err
	}
	p.fields, p.sums = slices.Clip(p.fields), slices.Clip(p.sums)
	seen := &template{shape: x, blocks: blocks{grain: c.grain, at: slices.Clip(c.at)}, length: len(c.data), packed: pack(c.data), plan: p}
	if x.allocation == Thin {
		err = extents(f, 0, x.size, fiemapSync, func(e extent) bool {
			if n := len(seen.blocked); n > 0 && seen.blocked[n-1].end == e.start {
				seen.blocked[n-1].end = e.end
			} else {
				seen.blocked = append(seen.blocked, fileRange{e.start, e.end})
			}
			return len(seen.blocked) <= maxTemplateMemory/16
		})
	}
	if err == nil && seen.memory() > maxTemplateMemory {
		err = errTooMuch
	}
	return seen, c.data, id, err
}

// grain is the unit in which a filesystem's content is looked at: that of its
// checksums, for btrfs.
func (x shape) grain(f *os.File) int {
	const usual = 4096
	if x.filesystem != "btrfs" {
		return usual
	}
	var b [4]byte
	if _, err := f.ReadAt(b[:], btrfsSuper+148); err != nil {
		return usual
	}
	if n := int(le32(b[:])); n >= usual && n <= btrfsSuper && n&(n-1) == 0 {
		return n
	}
	return usual
}

// becomes tells whether a template, given the identity of what mkfs made later, is
// that: data. Times are apart, since a run of mkfs has several; both get the same.
func (t *template) becomes(later *template, data []byte, id fsIdentity) bool {
	if !slices.Equal(t.blocks.at, later.blocks.at) || t.length != len(data) ||
		!slices.Equal(t.plan.fields, later.plan.fields) || !slices.Equal(t.plan.sums, later.plan.sums) {
		return false
	}
	mine := make([]byte, t.length)
	if unpack(t.packed, mine) != nil {
		return false
	}
	id.when = time.Unix(1<<30, 0)
	t.plan.stamp(mine, id)
	theirs := bytes.Clone(data)
	later.plan.stamp(theirs, id)
	return bytes.Equal(mine, theirs)
}

// keep remembers a template instead of the one of its shape, and forgets those that
// were not used for the longest time.
func (t *templates) keep(x *template) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if e, ok := t.shapes[x.shape]; ok {
		t.drop(e)
	}
	t.shapes[x.shape] = t.used.PushFront(x)
	t.memory += x.memory()
	for t.used.Len() > 1 && (t.memory > maxTemplateMemory || t.used.Len() > maxTemplates) {
		t.drop(t.used.Back())
	}
}

// Precondition: mu is held.
func (t *templates) drop(e *list.Element) {
	x := t.used.Remove(e).(*template) //nolint:errcheck,forcetypeassert // nothing else is in the list
	delete(t.shapes, x.shape)
	t.memory -= x.memory()
}
