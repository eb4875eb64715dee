package integration

import (
	"bytes"
	"crypto/sha256"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
)

// TestMappedPartitions: partitions of a disk image, as sfdisk makes them, are volumes, and nothing beside them is written.
func TestMappedPartitions(t *testing.T) {
	s := newSite(t, siteConfig{})
	for name, c := range map[string]struct {
		script        string
		number        string
		offset, limit int64
	}{
		"gpt":     {"label: gpt\nsize=8MiB\nsize=32MiB\nsize=8MiB\n", "2", 9 * mib, 32 * mib},
		"logical": {"label: dos\nsize=8MiB\ntype=5\nsize=4MiB\nsize=32MiB\n", "6", 15 * mib, 32 * mib},
	} {
		t.Run(name, func(t *testing.T) {
			path := diskImage(t, s, name, c.script)
			if out, err := exec.Command("mkfs.ext4", "-q", "-E", "offset="+strconv.FormatInt(c.offset, 10), path, "32M").CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			beside := func() [2][32]byte {
				b, err := os.ReadFile(path)
				must(t, err)
				return [2][32]byte{sha256.Sum256(b[:c.offset]), sha256.Sum256(b[c.offset+c.limit:])}
			}
			before := beside()
			v := s.volume(kind{name: "partition", fs: "ext4", size: c.limit, mapped: true}, "partition-"+name)
			v.context = map[string]string{"image": path, "partition": c.number}
			v.step("stage", v.stage())
			v.step("publish", v.publish(0, false))
			v.step("write", v.write(0))
			s.kill()
			s.start()
			v.step("read", v.read(0, 0))
			v.step("fill", v.fillFilesystem())
			v.step("unpublish", v.unpublish(0))
			v.step("unstage", v.unstage())
			if beside() != before {
				t.Error("bytes beside the partition were written")
			}

			missing := s.volume(kind{name: "partition", fs: "ext4", size: c.limit, mapped: true}, "missing-"+name)
			missing.context = map[string]string{"image": path, "partition": "9"}
			wantCode(t, "stage of a partition that is not there", missing.stage(), codes.FailedPrecondition)
			f, err := os.OpenFile(path, os.O_RDWR, 0)
			must(t, err)
			_, err = f.WriteAt(bytes.Repeat([]byte{0xff}, 512), 0)
			must(t, err)
			must(t, f.Close())
			wantCode(t, "stage of a damaged table", v.stage(), codes.FailedPrecondition)
			must(t, os.Remove(missing.staging()))
			must(t, os.Remove(v.staging()))
			must(t, os.Remove(path))
		})
	}
}

// diskImage makes an image of 64 MiB with the partitions that a script for sfdisk asks for.
func diskImage(t *testing.T, s *site, name, script string) string {
	t.Helper()
	path := filepath.Join(s.images, name+".img")
	must(t, os.WriteFile(path, bytes.Repeat([]byte("beside.."), 8<<20), 0o600))
	cmd := exec.Command("sfdisk", "--quiet", "--wipe=always", path)
	cmd.Stdin = strings.NewReader(script)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("sfdisk: %v: %s", err, out)
	}
	return path
}
