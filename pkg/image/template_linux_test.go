package image

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

// TestTemplatesMountSideBySide: volumes from one template are whole, sound, described
// by the filesystem's own tools as those of mkfs are, and mounted at the same time.
func TestTemplatesMountSideBySide(t *testing.T) {
	onEach(t, 5000<<20, func(t *testing.T, _, dir string) {
		_, p := openPool(t, dir)
		for _, filesystem := range []string{"ext2", "ext3", "ext4", "xfs", "btrfs"} {
			for _, allocation := range []Allocation{Thick, Thin} {
				t.Run(filesystem+"-"+string(allocation), func(t *testing.T) {
					var volumes []Volume
					for i := range 4 { // two of mkfs, two of the template
						volumes = append(volumes, create(t, p, Spec{
							Name: fmt.Sprint("v", i), Size: 320 * MiB, Filesystem: filesystem, Allocation: allocation,
						}))
					}
					wantTemplates(t, p, filesystem, allocation)
					for _, v := range volumes[2:] {
						if allocation == Thick {
							wantWhole(t, p, v.ID)
						}
						wantSound(t, p, v)
						if got, want := described(t, p, v), described(t, p, volumes[0]); got != want {
							t.Errorf("the template's:\n%s\nthat of mkfs:\n%s", got, want)
						}
						if a, b := allocatedOf(t, p, v), allocatedOf(t, p, volumes[0]); a < b-b/50 || a > b+b/50 {
							t.Errorf("%d bytes of blocks, and %d from mkfs", a, b)
						}
					}
					mounted(t, p, volumes[2], func(one string) {
						mounted(t, p, volumes[3], func(other string) {
							for _, at := range []string{one, other} {
								if err := os.WriteFile(filepath.Join(at, "f"), []byte(at), 0o600); err != nil {
									t.Error(err)
								}
							}
							if b, err := os.ReadFile(filepath.Join(one, "f")); err != nil || string(b) != one {
								t.Errorf("%q, %v", b, err)
							}
						})
					})
					for _, v := range volumes {
						if v.Name == "v2" {
							wantSound(t, p, v)
						}
						if err := p.Remove(ctx, v.ID); err != nil {
							t.Fatal(err)
						}
					}
				})
			}
		}
	})
}

// wantTemplates fails if the pool's filesystems of a kind are still made by mkfs.
func wantTemplates(t *testing.T, p *Pool, filesystem string, allocation Allocation) {
	t.Helper()
	for x, e := range p.store.templates.shapes {
		if x.filesystem == filesystem && x.allocation == allocation && e.Value.(*template).proven { //nolint:forcetypeassert // it is one
			return
		}
	}
	t.Fatal("there is no template")
}

func (p *Pool) imageOf(v Volume) string {
	_, dir, _ := p.store.Lookup(v.ID)
	return filepath.Join(p.Path(), volumesDir, dir, imageFile)
}

func allocatedOf(t *testing.T, p *Pool, v Volume) int64 {
	t.Helper()
	f, err := os.Open(p.imageOf(v))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	st, err := statFile(f)
	if err != nil {
		t.Fatal(err)
	}
	return st.Allocated
}

// wantSound has a volume's filesystem checked by its own program, which may not write.
func wantSound(t *testing.T, p *Pool, v Volume) {
	t.Helper()
	check := []string{"e2fsck", "-f", "-n"}
	switch v.Filesystem {
	case "xfs":
		check = []string{"xfs_repair", "-n", "-f"}
	case "btrfs":
		check = []string{"btrfs", "check"}
	}
	roottest.Run(t, append(check, p.imageOf(v))...)
}

// ownWords are what two filesystems of one mkfs may differ in: identities, times, and
// sums, which are over both.
var ownWords = regexp.MustCompile(`(?i)[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}|` +
	`(created|write time|last checked|last write time|checksum seed|checksum|csum|crc|lfs_crc)[^\n]*`)

// described is what the filesystem's tools say of it.
func described(t *testing.T, p *Pool, v Volume) string {
	t.Helper()
	var say [][]string
	image := p.imageOf(v)
	switch v.Filesystem {
	case "xfs":
		say = [][]string{
			{"xfs_db", "-r", "-f", "-c", "sb 0", "-c", "p", "-c", "sb 3", "-c", "p", "-c", "agf 0", "-c", "p", "-c", "agi 0", "-c", "p", "-c", "freesp", image},
		}
	case "btrfs":
		say = [][]string{{"btrfs", "inspect-internal", "dump-super", "-a", image}, {"btrfs", "inspect-internal", "dump-tree", "--hide-names", image}}
	default:
		say = [][]string{{"dumpe2fs", image}, {"debugfs", "-R", "ls -l /", image}}
	}
	var all strings.Builder
	for _, argv := range say {
		out, err := exec.Command(argv[0], argv[1:]...).Output()
		if err != nil || len(out) < 100 {
			t.Fatalf("%v: %v: %s", argv, err, out)
		}
		all.Write(out)
	}
	said := strings.ReplaceAll(all.String(), image, "IMAGE")
	return times.ReplaceAllString(ownWords.ReplaceAllString(said, "OWN"), "TIME")
}

// times as these tools write them.
var times = regexp.MustCompile(`[0-9]{10}\.[0-9]+ \([^)]*\)|[0-9]{1,2}-[A-Z][a-z]{2}-[0-9]{4} [0-9:]+|(atime|ctime|mtime|otime) [^\n]*|UUID_KEY_SUBVOL[^\n]*|\(0x[0-9a-f]+ UUID_KEY[^\n]*|item 0 key \(0x[^\n]*`)
