package mount

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

const (
	kiB = int64(1) << 10
	miB = int64(1) << 20
)

var ignoreGeometry = cmpopts.IgnoreUnexported(Superblock{})

func TestReadSuperblockByHand(t *testing.T) {
	le, be := binary.LittleEndian, binary.BigEndian
	uuid := []byte{0xde, 0xad, 0xbe, 0xef, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}
	const uuidText = "deadbeef-0102-0304-0506-0708090a0b0c"
	ext := func(edit func(sb []byte)) []byte {
		b := make([]byte, 70<<10)
		sb := b[1024:]
		le.PutUint32(sb[0x4:], 65536)
		le.PutUint32(sb[0x18:], 2)
		le.PutUint32(sb[0x20:], 32768)
		le.PutUint32(sb[0x28:], 8192)
		le.PutUint16(sb[0x38:], extMagic)
		le.PutUint16(sb[0x3A:], stateValid)
		le.PutUint32(sb[0x4C:], 1)
		le.PutUint16(sb[0x58:], 256)
		le.PutUint32(sb[0x5C:], compatHasJournal)
		le.PutUint32(sb[0x60:], 0x40|incompat64Bit)
		le.PutUint16(sb[0xFE:], 64)
		copy(sb[0x68:], uuid)
		copy(sb[0x78:], "sixteen-byte-lab")
		if edit != nil {
			edit(sb)
		}
		return b
	}
	xfs := func(edit func(sb []byte)) []byte {
		b := make([]byte, 70<<10)
		copy(b, "XFSB")
		be.PutUint32(b[4:], 4096)
		be.PutUint64(b[8:], 76800)
		copy(b[32:], uuid)
		be.PutUint32(b[84:], 19200)
		be.PutUint32(b[88:], 4)
		be.PutUint16(b[100:], 0xb4a5)
		be.PutUint16(b[102:], 512)
		copy(b[108:], "data")
		if edit != nil {
			edit(b)
		}
		return b
	}
	btrfs := func(edit func(sb []byte)) []byte {
		b := make([]byte, 70<<10)
		sb := b[64<<10:]
		copy(sb[32:], uuid)
		copy(sb[64:], "_BHRfS_M")
		le.PutUint64(sb[136:], 1)
		le.PutUint32(sb[144:], 4096)
		le.PutUint64(sb[112:], uint64(512*miB))
		le.PutUint64(sb[201:], 1)
		le.PutUint64(sb[201+8:], uint64(256*miB))
		if edit != nil {
			edit(sb)
		}
		return b
	}
	base := Superblock{Type: "ext4", UUID: uuidText, Label: "sixteen-byte-lab", Size: 256 * miB, BlockSize: 4096, SectorSize: 4096}
	with := func(sb Superblock, edit func(*Superblock)) Superblock { edit(&sb); return sb }
	baseXFS := Superblock{Type: "xfs", UUID: uuidText, Label: "data", Size: 300 * miB, BlockSize: 4096, SectorSize: 512}
	baseBtrfs := Superblock{Type: "btrfs", UUID: uuidText, Size: 256 * miB, BlockSize: 4096, SectorSize: 4096}
	for _, tc := range []struct {
		name  string
		bytes []byte
		want  Superblock
	}{
		{"ext4", ext(nil), base},
		{"ext4 with an error", ext(func(b []byte) { b[0x3A] |= stateError }), with(base, func(s *Superblock) { s.NeedsCheck = true })},
		{"ext4 that stops the machine", ext(func(b []byte) { b[0x3C] = errorsPanic }), with(base, func(s *Superblock) { s.Panics = true })},
		{"ext4 that carries an option that stops the machine", ext(func(b []byte) { copy(b[0x200:], "noload,errors=panic") }), with(base, func(s *Superblock) { s.Panics = true })},
		{"ext4 that carries options of no harm", ext(func(b []byte) { copy(b[0x200:], "barrier=1,,data=journal,"+strings.Repeat("acl,", 10)) }), base},
		{"ext4 with a journal to replay", ext(func(b []byte) { b[0x60] |= incompatRecover }), with(base, func(s *Superblock) { s.NeedsRecovery = true })},
		{"ext2 that was not unmounted", ext(func(b []byte) {
			b[0x5C], b[0x60], b[0x3A] = 0, 2, 0
		}), with(base, func(s *Superblock) { s.Type, s.NeedsCheck = "ext2", true })},
		{"ext3", ext(func(b []byte) { b[0x60], b[0x64] = 2, 3 }), with(base, func(s *Superblock) { s.Type = "ext3" })},
		{"ext4 without a journal", ext(func(b []byte) { b[0x5C] = 0 }), with(base, func(s *Superblock) { s.Type = "ext4" })},
		{"more than 2^32 blocks", ext(func(b []byte) { le.PutUint32(b[0x150:], 1) }), with(base, func(s *Superblock) { s.Size = (1<<32 + 65536) * 4096 })},
		{"xfs", xfs(nil), baseXFS},
		{"xfs that needs repair", xfs(func(b []byte) { be.PutUint32(b[216:], 1<<4) }), with(baseXFS, func(s *Superblock) { s.NeedsCheck = true })},
		{"btrfs", btrfs(nil), baseBtrfs},
		{"btrfs with a log", btrfs(func(b []byte) { b[96] = 1 }), with(baseBtrfs, func(s *Superblock) { s.NeedsRecovery = true })},
		{"btrfs magic in a tenant's data does not hide ext4", ext(func(b []byte) { copy(b[63<<10+64:], "_BHRfS_M") }), base},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := ReadSuperblock(bytes.NewReader(tc.bytes))
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(tc.want, got, ignoreGeometry); d != "" {
				t.Error(d)
			}
		})
	}
	for name, b := range map[string][]byte{
		"an empty file":                       nil,
		"zeros":                               make([]byte, 1<<20),
		"a file shorter than superblock":      ext(nil)[:1500],
		"ext with no blocks":                  ext(func(b []byte) { le.PutUint32(b[4:], 0) }),
		"ext with huge blocks":                ext(func(b []byte) { le.PutUint32(b[0x18:], 60) }),
		"ext with empty groups":               ext(func(b []byte) { le.PutUint32(b[0x20:], 0) }),
		"ext with inodes of 0 bytes":          ext(func(b []byte) { le.PutUint16(b[0x58:], 0) }),
		"ext that is only a journal":          ext(func(b []byte) { b[0x60] = incompatJournal }),
		"ext with a journal elsewhere":        ext(func(b []byte) { le.PutUint32(b[0xE4:], 8<<8|1) }),
		"ext that carries a journal's device": ext(func(b []byte) { copy(b[0x200:], "acl,journal_dev=0x801") }),
		"ext that carries a journal's path":   ext(func(b []byte) { copy(b[0x200:], "journal_path=/dev/sda1") }),
		"ext that carries a hidden option":    ext(func(b []byte) { copy(b[0x200:], `x-a="1,journal_dev=0x801,x-b="`) }),
		"ext that carries options to the end": ext(func(b []byte) { copy(b[0x200:], strings.Repeat("acl,", 12)+"journal_dev=0x80") }),
		"ext bigger than anything":            ext(func(b []byte) { le.PutUint32(b[0x150:], 1<<31) }),
		"xfs with blocks of 3 bytes":          xfs(func(b []byte) { be.PutUint32(b[4:], 3) }),
		"xfs with too many blocks":            xfs(func(b []byte) { be.PutUint64(b[8:], 1<<63) }),
		"xfs with sectors of 100 bytes":       xfs(func(b []byte) { be.PutUint16(b[102:], 100) }),
		"xfs with no groups":                  xfs(func(b []byte) { be.PutUint32(b[88:], 0) }),
		"btrfs with sectors of 0":             btrfs(func(b []byte) { le.PutUint32(b[144:], 0) }),
		"btrfs of a device without number":    btrfs(func(b []byte) { b[201] = 0 }),
		"btrfs of two devices":                btrfs(func(b []byte) { b[136] = 2 }),
		"btrfs bigger than anything":          btrfs(func(b []byte) { le.PutUint64(b[209:], 1<<63) }),
	} {
		t.Run(name, func(t *testing.T) {
			if sb, err := ReadSuperblock(bytes.NewReader(b)); !errors.Is(err, ErrUnknownFilesystem) {
				t.Errorf("got %+v, %v", sb, err)
			}
		})
	}
}

func TestReadSuperblockPassesReadErrors(t *testing.T) {
	broken := errors.New("broken disk")
	if _, err := ReadSuperblock(brokenReader{broken}); !errors.Is(err, broken) || errors.Is(err, ErrUnknownFilesystem) {
		t.Errorf("got %v", err)
	}
}

type brokenReader struct{ err error }

func (r brokenReader) ReadAt([]byte, int64) (int, error) { return 0, r.err }

// mkfsImage makes a sparse image with a filesystem on it, without root.
func mkfsImage(tb testing.TB, fsType string, bytes int64, args ...string) string {
	tb.Helper()
	path := filepath.Join(tb.TempDir(), "disk.img")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		tb.Fatal(err)
	}
	if err := os.Truncate(path, bytes); err != nil {
		tb.Fatal(err)
	}
	mkfs(tb, fsType, path, args...)
	return path
}

func mkfs(tb testing.TB, fsType, path string, args ...string) {
	tb.Helper()
	tool, err := exec.LookPath("mkfs." + fsType)
	if err != nil {
		if tool, err = exec.LookPath("/usr/sbin/mkfs." + fsType); err != nil {
			if os.Getenv(roottest.Variable) == "1" {
				tb.Fatalf("no mkfs.%s, and hack/deps root installs it", fsType)
			}
			tb.Skipf("no mkfs.%s on this machine", fsType)
		}
	}
	switch fsType {
	case "xfs":
		args = append([]string{"-q", "-f", "-K", "-s", "size=4096"}, args...)
	case "btrfs":
		args = append([]string{"-q", "-f", "-K"}, args...)
	default:
		args = append([]string{"-q", "-F", "-b", "4096", "-E", "nodiscard,lazy_itable_init=0"}, args...)
	}
	if out, err := roottest.Output(slices.Concat([]string{tool}, args, []string{path})...); err != nil {
		if os.Geteuid() != 0 && strings.Contains(out, "cannot check mount status") {
			// mkfs.btrfs opens every mounted loop device of the machine to compare.
			tb.Skipf("mkfs.btrfs needs root while somebody has a loop device mounted: %s", out)
		}
		tb.Fatalf("%s %v: %v\n%s", tool, args, err, out)
	}
}

const testUUID = "01234567-89ab-cdef-0123-456789abcdef"

func TestReadSuperblockOfMkfs(t *testing.T) {
	ext := []string{"-L", "a label", "-U", testUUID}
	xfs := []string{"-L", "a-label", "-m", "uuid=" + testUUID}
	for _, tc := range []struct {
		fsType string
		size   int64
		args   []string
		want   Superblock
	}{
		{"ext2", 32 * miB, ext, Superblock{Label: "a label"}},
		{"ext3", 32 * miB, ext, Superblock{Label: "a label"}},
		{"ext4", 32 * miB, ext, Superblock{Label: "a label"}},
		{"ext4", 4 << 40, append([]string{"-O", "64bit,^resize_inode"}, ext...), Superblock{Label: "a label"}},
		{"xfs", 300 * miB, xfs, Superblock{Label: "a-label"}},
		{"btrfs", 128 * miB, ext, Superblock{Label: "a label"}},
	} {
		t.Run(tc.fsType, func(t *testing.T) {
			if tc.size > miB*miB && testing.Short() {
				t.Skip("writes much metadata")
			}
			if tc.size > miB*miB {
				tc.args = append([]string{"-E", "nodiscard,lazy_itable_init=1,lazy_journal_init=1", "-i", "67108864"}, tc.args...)
			}
			f, err := os.Open(mkfsImage(t, tc.fsType, tc.size, tc.args...))
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			got, err := ReadSuperblock(f)
			if err != nil {
				t.Fatal(err)
			}
			tc.want.Type, tc.want.UUID, tc.want.Size, tc.want.BlockSize, tc.want.SectorSize = tc.fsType, testUUID, tc.size, 4096, 4096
			if d := cmp.Diff(tc.want, got, ignoreGeometry); d != "" {
				t.Error(d)
			}
			if !got.FillsDevice(tc.size) {
				t.Error("a new filesystem does not fill its device")
			}
		})
	}
}

// What mkfs leaves unused at the end of a device must not look like something to
// grow into, or every attach would try to.
func TestFillsDeviceAgreesWithMkfs(t *testing.T) {
	for _, fsType := range []string{"ext2", "ext4", "xfs", "btrfs"} {
		for _, size := range []int64{128 * miB, 129 * miB, 130 * miB, 131 * miB, 132*miB + 512, 256*miB + 4096, 257 * miB, 301 * miB, 385 * miB, 385*miB + 3*kiB, 641 * miB, 1025 * miB} {
			if (fsType == "xfs" && size < 300*miB) || (testing.Short() && size > 300*miB) {
				continue
			}
			f, err := os.Open(mkfsImage(t, fsType, size))
			if err != nil {
				t.Fatal(err)
			}
			got, err := ReadSuperblock(f)
			_ = f.Close()
			if err != nil {
				t.Fatal(err)
			}
			if !got.FillsDevice(size) {
				t.Errorf("%s of %d bytes on %d seems to have room: %+v", fsType, got.Size, size, got)
			}
			if got.FillsDevice(size + 32*miB) {
				t.Errorf("%s of %d bytes seems to fill %d", fsType, got.Size, size+32*miB)
			}
		}
	}
}

func FuzzReadSuperblock(f *testing.F) {
	f.Add([]byte("XFSB"), int64(0))
	f.Add([]byte{0x53, 0xEF}, int64(1024+0x38))
	f.Add([]byte("_BHRfS_M"), int64(64<<10+64))
	f.Fuzz(func(t *testing.T, patch []byte, at int64) {
		b := make([]byte, 72<<10)
		if at < 0 || at >= int64(len(b)) {
			return
		}
		copy(b[at:], patch)
		// Magic numbers are hard to guess: put each of them there as well.
		for _, magic := range []func(){
			func() {},
			func() { copy(b, "XFSB") },
			func() { copy(b, "none"); b[1024+0x38], b[1024+0x39] = 0x53, 0xEF },
			func() { b[1024+0x38] = 0; copy(b[64<<10+64:], "_BHRfS_M") },
		} {
			magic()
			sb, err := ReadSuperblock(bytes.NewReader(b))
			if err != nil {
				if !errors.Is(err, ErrUnknownFilesystem) && !errors.Is(err, io.EOF) {
					t.Error(err)
				}
				continue
			}
			if sb.Size <= 0 || sb.BlockSize < 512 || sb.Type == "" || len(sb.UUID) != 36 || strings.Contains(sb.Label, "\x00") {
				t.Errorf("%+v", sb)
			}
			for _, size := range []int64{-1, 0, 1, sb.Size, sb.Size + 1, 1 << 40, 1<<63 - 1} {
				if full := sb.FillsDevice(size); !full && size <= sb.Size {
					t.Errorf("%+v has room on %d", sb, size)
				}
			}
		}
	})
}
