package loop

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

// TestPartitionsOfImagesAreNotScanned: the image has a GPT, which the kernel reads when it is
// asked to, and is not.
func TestPartitionsOfImagesAreNotScanned(t *testing.T) {
	m := realMachine(t)
	manager := m.manager(t)
	f := m.image(t, "a")
	table := exec.Command("sfdisk", "--quiet", f.Name())
	table.Stdin = strings.NewReader("label: gpt\nstart=2048, size=2048\n")
	if out, err := table.CombinedOutput(); err != nil {
		t.Fatalf("sfdisk: %v: %s", err, out)
	}
	check(t, f.Close())
	// partitions are how many the kernel has found, and whether it would look again.
	partitions := func(device string) (int, string) {
		dir := "/sys/block/" + filepath.Base(device)
		found, err := filepath.Glob(dir + "/" + filepath.Base(device) + "p*")
		check(t, err)
		scan, err := os.ReadFile(dir + "/loop/partscan")
		check(t, err)
		return len(found), strings.TrimSpace(string(scan))
	}
	other := roottest.Losetup(t, "--partscan", filepath.Join(m.dir, "a"))
	n, scan := partitions(other)
	roottest.Run(t, "losetup", "-d", other)
	if scan != "1" {
		t.Fatalf("partscan is %s where it was asked for", scan)
	}
	if n == 0 {
		t.Log("this kernel was built without GPT: only its flag tells")
	}
	for _, mapping := range []Mapping{whole, {BlockSize: 512, Tag: "csi-loop test"}} {
		d := m.attach(t, manager, "a", mapping)
		if n, scan := partitions(d.Path()); n != 0 || scan != "0" {
			t.Errorf("block size %d: %d partitions, partscan %s", mapping.BlockSize, n, scan)
		}
		h := must(m.node(d.Ref().Number, forReading))(t)
		const flagPartScan = 1 << 3
		if st, err := h.Status(); err != nil || st.Flags&flagPartScan != 0 {
			t.Errorf("status %+v, %v", st, err)
		}
		check(t, h.Close())
		if _, err := os.Stat("/dev/loop" + strconv.Itoa(d.Ref().Number) + "p1"); err == nil {
			t.Error("the partition has a node")
		}
		m.detach(t, manager, d)
	}
}
