package image

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"k8s.io/klog/v2"
)

// templateCases are shapes that between them have every structure that is surveyed.
func templateCases() []Spec {
	return []Spec{
		{Filesystem: "ext2", Size: 1 * MiB},
		{Filesystem: "ext2", Size: 300 * MiB, BlockSize: 512},
		{Filesystem: "ext3", Size: 8 * MiB},
		{Filesystem: "ext3", Size: 1024 * MiB},
		{Filesystem: "ext4", Size: 8 * MiB},
		{Filesystem: "ext4", Size: 129 * MiB},
		{Filesystem: "ext4", Size: 1024 * MiB},
		{Filesystem: "ext4", Size: 1024 * MiB, Allocation: Thick},
		{Filesystem: "ext4", Size: 20 * 1024 * MiB},
		{Filesystem: "ext4", Size: 200 * 1024 * MiB, MkfsOptions: []string{"-O", "^resize_inode", "-T", "largefile4"}},
		{Filesystem: "ext4", Size: 200 * MiB, MkfsOptions: []string{"-I", "128"}},
		{Filesystem: "ext4", Size: 200 * MiB, MkfsOptions: []string{"-I", "512", "-O", "inline_data,quota,project"}},
		{Filesystem: "ext4", Size: 500 * MiB, MkfsOptions: []string{"-O", "^64bit,^flex_bg,sparse_super2,^resize_inode", "-L", "label"}},
		{Filesystem: "ext4", Size: 500 * MiB, MkfsOptions: []string{"-O", "^metadata_csum_seed,encrypt,verity,ea_inode,large_dir"}},
		{Filesystem: "ext4", Size: 500 * MiB, MkfsOptions: []string{"-O", "^metadata_csum,^metadata_csum_seed", "-E", "packed_meta_blocks=1,root_owner=7:8"}},
		{Filesystem: "xfs", Size: 300 * MiB},
		{Filesystem: "xfs", Size: 1024 * MiB, BlockSize: 512},
		{Filesystem: "xfs", Size: 1024 * MiB, Allocation: Thick},
		{Filesystem: "xfs", Size: 900 * 1024 * MiB},
		{Filesystem: "xfs", Size: 400 * MiB, MkfsOptions: []string{"-i", "size=1024", "-m", "rmapbt=1,reflink=0", "-d", "agcount=4", "-L", "label"}},
		{Filesystem: "xfs", Size: 400 * MiB, MkfsOptions: []string{"-m", "bigtime=0,finobt=0,inobtcount=0", "-l", "size=70m"}},
		{Filesystem: "btrfs", Size: 109 * MiB},
		{Filesystem: "btrfs", Size: 1024 * MiB, Allocation: Thick},
		{Filesystem: "btrfs", Size: 300 * 1024 * MiB, MkfsOptions: []string{"-L", "label", "-d", "dup"}},
		{Filesystem: "btrfs", Size: 400 * MiB, MkfsOptions: []string{"-n", "32768", "-m", "single"}},
		{Filesystem: "btrfs", Size: 400 * MiB, MkfsOptions: []string{"-M"}},
	}
}

func (s Spec) title() string {
	return strings.Join(append([]string{s.Filesystem, strconv.FormatInt(s.Size/MiB, 10), string(s.Allocation)}, s.MkfsOptions...), " ")
}

// bare is an image that mkfs made, outside of any pool.
type bare struct {
	*os.File
	spec        Spec
	begun, done time.Time
}

// formatted runs mkfs as Create does.
func formatted(t *testing.T, spec Spec) bare {
	t.Helper()
	spec.Name = "v"
	s, err := spec.normalise()
	if err != nil {
		t.Fatal(err)
	}
	return bareImage(t, s, func(d *os.File) {
		err := newTools(toolDirs()).format(ctx, d, s)
		if err != nil && os.Geteuid() != 0 && strings.Contains(err.Error(), "cannot check mount status") {
			t.Skipf("something on this machine is mounted from a loop device, and mkfs.btrfs wants to open it; as root this test runs: %v", err)
		}
		if err != nil {
			t.Fatal(err)
		}
	})
}

func bareImage(t *testing.T, s Spec, mkfs func(d *os.File)) bare {
	t.Helper()
	d, err := openPath(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	f, err := createAt(d, imageFile)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if err := f.Truncate(s.Size); err != nil {
		t.Fatal(err)
	}
	b := bare{File: f, spec: s, begun: time.Now()}
	mkfs(d)
	b.done = time.Now()
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	return b
}

func (b bare) study(t *testing.T) (*template, []byte, fsIdentity) {
	t.Helper()
	seen, data, id, err := study(shape{filesystem: b.spec.Filesystem, size: b.spec.Size, allocation: b.spec.Allocation}, b.File, b.begun, b.done)
	if err != nil {
		t.Fatalf("no template: %v", err)
	}
	return seen, data, id
}

// differingBytes lists the bytes that differ in two images, in full.
func differingBytes(t *testing.T, a, b *os.File, size int64) (at []int64) {
	t.Helper()
	var places []int64 // pieces with data in either
	for _, f := range []*os.File{a, b} {
		for from := int64(0); from < size; {
			start, end, err := nextData(f, from, size)
			if err != nil {
				t.Fatal(err)
			}
			for p := start &^ 4095; p < end; p += 4096 {
				places = append(places, p)
			}
			from = end
		}
	}
	slices.Sort(places)
	x, y := make([]byte, 4096), make([]byte, 4096)
	for _, p := range slices.Compact(places) {
		for f, into := range map[*os.File][]byte{a: x, b: y} {
			if _, err := f.ReadAt(into, p); err != nil && err != io.EOF {
				t.Fatal(err)
			}
		}
		for i := range x {
			if x[i] != y[i] {
				at = append(at, p+int64(i))
			}
		}
	}
	return at
}

// TestTemplateIsWhatMkfsMakes gives the template of one mkfs the identity of another
// one. They may differ in times, and in the sums over them, only.
func TestTemplateIsWhatMkfsMakes(t *testing.T) {
	t.Parallel()
	for _, spec := range templateCases() {
		t.Run(spec.title(), func(t *testing.T) {
			t.Parallel()
			first, second := formatted(t, spec), formatted(t, spec)
			one, _, _ := first.study(t)
			two, data, id := second.study(t)
			if !one.becomes(two, data, id) {
				t.Fatal("the template was not proven")
			}
			content := make([]byte, one.length)
			if err := unpack(one.packed, content); err != nil {
				t.Fatal(err)
			}
			one.plan.stamp(content, id)
			made := bareImage(t, first.spec, func(*os.File) {})
			if err := one.blocks.write(made.File, content); err != nil {
				t.Fatal(err)
			}
			free := map[int64]bool{} // bytes that depend on the time
			for _, x := range two.plan.fields {
				for i := range x.kind.width() {
					free[two.blocks.position(int(x.at)+i)] = x.kind.isTime()
				}
			}
			for _, x := range two.plan.sums {
				for _, at := range x.places() {
					free[two.blocks.position(at)] = true
				}
			}
			for _, at := range differingBytes(t, made.File, second.File, spec.Size) {
				if !free[at] {
					t.Fatalf("byte %d differs", at)
				}
			}
		})
	}
}

// places are the bytes where a sum is stored.
func (s *sum) places() []int {
	low, high := int(s.low), int(s.high)
	switch {
	case high == 0:
		return []int{low, low + 1, low + 2, low + 3}
	case high > 0:
		return []int{low, low + 1, high, high + 1}
	}
	return []int{low, low + 1}
}

// position is where a byte of data is in the image.
func (c *blocks) position(i int) int64 {
	return c.at[i/c.grain] + int64(i%c.grain)
}

// TestTemplateIsExactlyWhatMke2fsMakes: where mkfs lets its time and all its random
// numbers be chosen, not one byte differs.
func TestTemplateIsExactlyWhatMke2fsMakes(t *testing.T) {
	t.Parallel()
	for _, spec := range templateCases() {
		if !strings.HasPrefix(spec.Filesystem, "ext") {
			continue
		}
		t.Run(spec.title(), func(t *testing.T) {
			t.Parallel()
			first := formatted(t, spec)
			seen, _, _ := first.study(t)
			id := fsIdentity{uuids: []uuid{newUUID(), newUUID()}, when: time.Unix(1700000000, 0)}
			content := make([]byte, seen.length)
			if err := unpack(seen.packed, content); err != nil {
				t.Fatal(err)
			}
			seen.plan.stamp(content, id)
			made := bareImage(t, first.spec, func(*os.File) {})
			if err := seen.blocks.write(made.File, content); err != nil {
				t.Fatal(err)
			}
			chosen := first.spec
			chosen.MkfsOptions = append(slices.Clone(chosen.MkfsOptions), "-E", "hash_seed="+formatUUID(id.uuids[1][:]))
			want := bareImage(t, first.spec, func(d *os.File) {
				args := append(mkfsArguments(chosen, ""), "-U", formatUUID(id.uuids[0][:]), imageFile)
				cmd := exec.Command("/usr/sbin/mkfs."+spec.Filesystem, args...)
				cmd.Env = []string{"E2FSPROGS_FAKE_TIME=1700000000"}
				inDirectory(cmd, d)
				if out, err := cmd.CombinedOutput(); err != nil {
					t.Fatal(string(out))
				}
			})
			if at := differingBytes(t, made.File, want.File, spec.Size); len(at) > 0 {
				t.Fatalf("%d bytes differ, the first at %d", len(at), at[0])
			}
		})
	}
}

// TestSurveyNoticesDamage: a filesystem with any wrong bit under a checksum makes no
// template.
func TestSurveyNoticesDamage(t *testing.T) {
	t.Parallel()
	for _, filesystem := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(filesystem, func(t *testing.T) {
			t.Parallel()
			image := formatted(t, Spec{Filesystem: filesystem, Size: 320 * MiB})
			seen, data, _ := image.study(t)
			for i := range seen.plan.sums {
				x := &seen.plan.sums[i]
				for _, at := range []int32{x.low, max(x.from, 0) + x.n/2, max(x.from, 0) + x.n - 1} {
					bad := bytes.Clone(data)
					bad[at] ^= 0x10
					c := &blocks{grain: seen.blocks.grain, at: seen.blocks.at, data: bad}
					if p, id, err := survey(filesystem, c, image.begun, image.done); err == nil {
						// A sum that covers a sum which the plan sets is not enough to notice; nothing else may pass.
						again := bytes.Clone(bad)
						p.stamp(again, id)
						t.Fatalf("byte %d of data, under sum %d %+v, is wrong, and nobody noticed", at, i, *x)
					}
				}
			}
		})
	}
}

func TestPack(t *testing.T) {
	for name, data := range map[string][]byte{
		"nothing": {}, "zeros": make([]byte, 8192), "no zeros": bytes.Repeat([]byte{7}, 5000),
		"both":       slices.Concat(make([]byte, 100), []byte("x"), make([]byte, 31), []byte("y"), make([]byte, 33)),
		"zeros last": append([]byte("x"), make([]byte, 4096)...),
	} {
		into := bytes.Repeat([]byte{1}, len(data))
		if err := unpack(pack(data), into); err != nil || !bytes.Equal(into, data) {
			t.Errorf("%s: %v, %d bytes packed", name, err, len(pack(data)))
		}
	}
}

// countingMkfs makes a directory with a mkfs.ext4 that counts its runs and then does
// more.
func countingMkfs(t *testing.T, more string) (dir string, runs func() int) {
	t.Helper()
	dir = t.TempDir()
	log := filepath.Join(t.TempDir(), "log")
	script := "#!/bin/sh\necho run >>" + log + "\n/usr/sbin/mkfs.ext4 \"$@\" || exit\n" + more
	if err := os.WriteFile(filepath.Join(dir, "mkfs.ext4"), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	return dir, func() int {
		b, _ := os.ReadFile(log)
		return bytes.Count(b, []byte("\n"))
	}
}

// TestTemplateIsUsedOnceProven: the third equal volume needs no mkfs, one of another
// size does, and so does every one after mkfs was replaced.
func TestTemplateIsUsedOnceProven(t *testing.T) {
	dir, runs := countingMkfs(t, "")
	_, p := openPool(t, poolDir(t), WithToolDirs(dir))
	for i, c := range []struct {
		spec Spec
		want int
	}{
		{Spec{Size: 8 * MiB}, 1},
		{Spec{Size: 8 * MiB}, 2},
		{Spec{Size: 8 * MiB}, 2},
		{Spec{Size: 8 * MiB}, 2},
		{Spec{Size: 9 * MiB}, 3},
		{Spec{Size: 8 * MiB, MkfsOptions: []string{"-L", "x"}}, 4},
		{Spec{Size: 8 * MiB, Allocation: Thin}, 5},
		{Spec{Size: 8 * MiB}, 5},
	} {
		c.spec.Name, c.spec.Filesystem = fmt.Sprint("v", i), "ext4"
		create(t, p, c.spec)
		if n := runs(); n != c.want {
			t.Fatalf("mkfs ran %d times after volume %d, want %d", n, i, c.want)
		}
	}
	other, _ := countingMkfs(t, "# upgraded\n")
	if err := os.Rename(filepath.Join(other, "mkfs.ext4"), filepath.Join(dir, "mkfs.ext4")); err != nil {
		t.Fatal(err)
	}
	before := runs()
	create(t, p, Spec{Name: "after", Size: 8 * MiB, Filesystem: "ext4"})
	if n := p.store.templates.used.Len(); n != 5 || runs() != before {
		t.Errorf("the new mkfs did not run: %d templates, %d runs of the old one", n, runs()-before)
	}
}

// TestMkfsThatCannotBeRepeated: what a template could not reproduce is left to mkfs,
// and no time is spent on it for ever.
func TestMkfsThatCannotBeRepeated(t *testing.T) {
	// Eight random bytes in the last block of the image, where no sum covers them.
	dir, runs := countingMkfs(t, "for last; do :; done\ndd if=/dev/urandom of=$last bs=8 count=1 seek=1048064 conv=notrunc 2>/dev/null\n")
	_, p := openPool(t, poolDir(t), WithToolDirs(dir))
	for i := range 6 {
		v := create(t, p, Spec{Name: fmt.Sprint("v", i), Size: 8 * MiB, Filesystem: "ext4"})
		if n := runs(); n != i+1 {
			t.Fatalf("mkfs ran %d times for %d volumes", n, i+1)
		}
		if err := p.Remove(ctx, v.ID); err != nil {
			t.Fatal(err)
		}
	}
	if e := p.store.templates.used.Front().Value.(*template); e.proven || e.tries != maxTemplateTries { //nolint:forcetypeassert // it is one
		t.Errorf("proven %v after %d tries", e.proven, e.tries)
	}
}

func TestTemplatesAreBounded(t *testing.T) {
	all := newTemplates()
	for i := range 3 * maxTemplates {
		all.keep(&template{shape: shape{size: int64(i)}, packed: make([]byte, i%7*100<<10)})
	}
	sum := 0
	for _, e := range all.shapes {
		sum += e.Value.(*template).memory() //nolint:forcetypeassert // it is one
	}
	if all.used.Len() != len(all.shapes) || all.used.Len() > maxTemplates || all.memory > maxTemplateMemory || sum != all.memory {
		t.Errorf("%d templates, %d shapes, %d bytes counted as %d", all.used.Len(), len(all.shapes), sum, all.memory)
	}
	if all.used.Len() < 10 {
		t.Errorf("only %d are kept", all.used.Len())
	}
}

// sparseCopy copies an image to a file with holes where it is zero: on tmpfs, where
// hack/fuzz has its files, mkfs.xfs writes the zeros of its log.
func sparseCopy(t *testing.T, image *os.File, size int64) *os.File {
	t.Helper()
	to, err := os.Create(filepath.Join(t.TempDir(), "sparse"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { to.Close() })
	b := make([]byte, 64<<10) // of which sizes are multiples
	for at := int64(0); err == nil && at < size; at += int64(len(b)) {
		if _, err = image.ReadAt(b, at); err == nil && !allZero(b) {
			_, err = to.WriteAt(b, at)
		}
	}
	if err = errors.Join(err, to.Truncate(size), to.Sync()); err != nil {
		t.Fatal(err)
	}
	return to
}

func FuzzSurvey(f *testing.F) {
	klog.SetLogger(klog.Logger{})
	for _, filesystem := range []string{"ext4", "ext3", "xfs", "btrfs"} {
		f.Add(filesystem, []byte{1, 2, 3}, uint32(1), uint32(2))
	}
	content := map[string]*blocks{}
	f.Fuzz(func(t *testing.T, filesystem string, change []byte, at, step uint32) {
		size, ok := minimumSizes[filesystem]
		if !ok {
			return
		}
		c, ok := content[filesystem]
		if !ok {
			image := sparseCopy(t, formatted(t, Spec{Filesystem: filesystem, Size: size}).File, size)
			var err error
			if c, err = readBlocks(image, size, shape{filesystem: filesystem}.grain(image)); err != nil {
				t.Fatal(err)
			}
			content[filesystem] = c
		}
		bad := &blocks{grain: c.grain, at: c.at, data: bytes.Clone(c.data)}
		for i, b := range change {
			bad.data[(uint64(at)+uint64(i)*uint64(step))%uint64(len(bad.data))] ^= b
		}
		_, _, _ = survey(filesystem, bad, time.Now(), time.Now())
	})
}
