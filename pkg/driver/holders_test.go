package driver

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"

	"github.com/csi-loop/csi-loop/pkg/loop"
)

// fakeBlock makes a directory like /sys with these files in its block.
func fakeBlock(t *testing.T, files map[string]string) string {
	t.Helper()
	sys := t.TempDir()
	for name, content := range files {
		path := filepath.Join(sys, "block", name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return sys
}

func TestHoldersOf(t *testing.T) {
	sys := fakeBlock(t, map[string]string{
		"loop0/holders/dm-1":         "",
		"loop0/holders/dm-2":         "",
		"loop0/holders/dm-3":         "",
		"loop0/holders/md127":        "",
		"loop0/holders/bcache0":      "",
		"loop0/loop0p1/holders/dm-1": "",
		"loop0/loop0p2/holders/md5":  "",
		"dm-1/dm/name":               "vg-data\n",
		"dm-1/dm/uuid":               "LVM-abc\n",
		"dm-2/dm/name":               "other\n",
		"dm-2/dm/uuid":               "\n",
		"dm-3/dm/name":               MappingPrefix + "0-5\n",
		"dm-3/dm/uuid":               "CRYPT-LUKS2-abc\n",
		"loop1/size":                 "0\n",
	})
	for device, want := range map[string][]string{
		"loop0": {
			"bcache0",
			"dm-1 (LVM volume vg-data: deactivate its volume group with vgchange -an)",
			"dm-2 (device-mapper device other: dmsetup remove other)",
			"md127 (mdadm --stop /dev/md127)",
			"md5 (mdadm --stop /dev/md5)",
		},
		"loop1": nil,
		"loop2": nil,
	} {
		if diff := cmp.Diff(want, holdersOf(sys, device)); diff != "" {
			t.Errorf("%s: %s", device, diff)
		}
	}
}

// A raw block volume that LVM of the node has claimed cannot be detached, and the call says why.
func TestUnstageSaysWhoHoldsTheDevice(t *testing.T) {
	n := newFake(t)
	v := n.create("pvc-1", 16*mib, blockCap(manyWriters), nil)
	n.must(v.stage())
	n.d.sys = fakeBlock(t, map[string]string{
		"loop0/holders/dm-1": "", "dm-1/dm/name": "vg-data\n", "dm-1/dm/uuid": "LVM-abc\n",
	})
	n.fake.failOnce("detach", loop.ErrBusy)
	err := v.unstage()
	code(t, err, codes.Aborted)
	if !strings.Contains(err.Error(), "vg-data") || !strings.Contains(err.Error(), "vgchange -an") {
		t.Error(err)
	}
	v.down()
}
