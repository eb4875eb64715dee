package partition

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

func TestMain(m *testing.M) { roottest.Main(m) }

// TestAsSfdiskReads has sfdisk make tables, and compares what it reads with ours. The
// kernel at hand may not know partitions at all.
func TestAsSfdiskReads(t *testing.T) {
	roottest.Require(t) // not for root: it promises the programs
	for name, script := range map[string]string{
		"GPT":                    "label: gpt\nsize=4MiB\nsize=8MiB, type=L\nsize=1MiB\n",
		"GPT with a gap":         "label: gpt\nsize=4MiB\ndisk4 : size=8MiB\n",
		"GPT of many":            "label: gpt\n" + strings.Repeat("size=256KiB\n", 60),
		"MBR":                    "label: dos\nsize=4MiB, type=83\nsize=8MiB, bootable\n",
		"MBR with logical ones":  "label: dos\nsize=4MiB\ntype=5\nsize=2MiB\nsize=3MiB\nsize=1MiB\n",
		"extended as the fourth": "label: dos\nsize=1MiB\nsize=2MiB\nsize=1MiB\ntype=f\nsize=2MiB\nsize=3MiB\n",
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "disk.img")
			f, err := os.Create(path)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if err := f.Truncate(64 * mib); err != nil {
				t.Fatal(err)
			}
			cmd := exec.Command("sfdisk", "--quiet", path)
			cmd.Stdin = strings.NewReader(script)
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("sfdisk: %v\n%s", err, out)
			}
			want := sfdiskReads(t, path)
			got, err := Read(f, 64*mib)
			if diff := cmp.Diff(want, got); err != nil || diff != "" || len(want) < 2 {
				t.Errorf("%v (-sfdisk +ours):\n%s", err, diff)
			}
		})
	}
}

// sfdiskReads lists the partitions, without extended ones.
func sfdiskReads(t *testing.T, path string) (all []Partition) {
	t.Helper()
	var said struct {
		Table struct {
			Partitions []struct {
				Node  string `json:"node"`
				Type  string `json:"type"`
				Start int64  `json:"start"`
				Size  int64  `json:"size"`
			} `json:"partitions"`
		} `json:"partitiontable"`
	}
	if err := json.Unmarshal([]byte(roottest.Run(t, "sfdisk", "--json", path)), &said); err != nil {
		t.Fatal(err)
	}
	for _, p := range said.Table.Partitions {
		n, err := strconv.Atoi(strings.TrimPrefix(p.Node, path))
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Contains([]string{"5", "f"}, p.Type) {
			all = append(all, Partition{Number: n, Offset: p.Start * 512, Length: p.Size * 512})
		}
	}
	return all
}
