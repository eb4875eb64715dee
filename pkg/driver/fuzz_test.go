package driver

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/csi-loop/csi-loop/pkg/image"
	"github.com/csi-loop/csi-loop/pkg/transfer"
)

// FuzzCapacity: whatever the numbers, a size that is chosen satisfies them.
func FuzzCapacity(f *testing.F) {
	f.Add(int64(0), int64(0), int64(1))
	f.Add(int64(1), int64(1), int64(1))
	f.Add(int64(1<<20+1), int64(1<<21), int64(8))
	f.Add(int64(1<<20), int64(0), int64(300))
	f.Add(int64(1<<62), int64(1<<63-1), int64(109))
	f.Fuzz(func(t *testing.T, required, limit, least int64) {
		least = (least & 511) * sizeUnit
		c, err := parseCapacity(&csi.CapacityRange{RequiredBytes: required, LimitBytes: limit})
		if err != nil {
			return
		}
		size, err := c.size(least)
		if err == nil && (size <= 0 || size%sizeUnit != 0 || size < least || !c.holds(size)) {
			t.Errorf("size %d for required %d, limit %d and at least %d", size, required, limit, least)
		}
		if err != nil && limit == 0 {
			t.Errorf("nothing is large enough for required %d: %v", required, err)
		}
	})
}

// FuzzOffered: what another node says of a source is something this node could have
// made itself, or is refused in a way that a CO asks again after.
func FuzzOffered(f *testing.F) {
	f.Add(int64(16<<20), "ext4", 4096, "-m 1")
	f.Add(int64(300<<20), "xfs", 512, "")
	f.Add(int64(1<<20), "", 4096, "-m 1")
	f.Add(int64(-1), "ntfs", 0, "-E discard")
	f.Add(int64(1<<62), "btrfs", 3000, "/dev/sda")
	f.Fuzz(func(t *testing.T, size int64, filesystem string, blockSize int, options string) {
		o := &transfer.Offer{Source: transfer.Description{Size: size, Filesystem: filesystem, BlockSize: blockSize, MkfsOptions: strings.Fields(options)}}
		s, err := offered(o)
		if err != nil {
			if codeOf(err) != codes.Unavailable {
				t.Errorf("%v", err)
			}
			return
		}
		again, err := image.ParseMkfsOptions(s.Filesystem, s.MkfsOptions)
		if s.Size <= 0 || s.Size%sizeUnit != 0 || !slices.Contains([]int{512, 1024, 2048, 4096}, s.BlockSize) || err != nil || !slices.Equal(again, s.MkfsOptions) {
			t.Errorf("%+v: %v", s, err)
		}
		if s.Filesystem != "" && image.MinimumSize(s.Filesystem) == 0 {
			t.Errorf("filesystem %q", s.Filesystem)
		}
	})
}

// FuzzParams: parameters from anybody never panic, and what passes is in range.
func FuzzParams(f *testing.F) {
	f.Add("blockSize", "512", "offset", "1Mi")
	f.Add("mkfsOptions", "-m 1", "sizeLimit", "1e3")
	f.Add("partition", "1", "blockSize", "512")
	f.Fuzz(func(t *testing.T, k1, v1, k2, v2 string) {
		if p, err := parseParams(map[string]string{k1: v1, k2: v2}); err == nil && (p.blockSize < 512 || p.blockSize > 4096) {
			t.Errorf("block size %d", p.blockSize)
		}
		m, err := parseMapped(map[string]string{attrImage: "/x", k1: v1, k2: v2})
		if err == nil && (m.Offset < 0 || m.SizeLimit < 0 || m.Offset%int64(m.BlockSize) != 0 || m.Partition < 0 || m.Partition > 0 && m.Offset+m.SizeLimit > 0) {
			t.Errorf("mapped %+v", m)
		}
	})
}

// FuzzToken: a token from anybody is ours or refused.
func FuzzToken(f *testing.F) {
	f.Add(makeToken("x"))
	f.Add("invalid-token")
	f.Fuzz(func(t *testing.T, token string) {
		id, err := parseToken(token)
		if err == nil && token != "" && makeToken(id) != token {
			t.Errorf("token %q means %q", token, id)
		}
	})
}

// FuzzStageRecord: whatever lies in the state directory, the driver opens it, and
// believes only a record of this boot that is in the place of its volume.
func FuzzStageRecord(f *testing.F) {
	sound, err := json.Marshal(stageRecord{ //nolint:musttag // as in nodestate.go
		Version: recordVersion, BootID: bootID(), VolumeID: "v", StagingPath: "/s", Device: binding{Number: 1, DiskSeq: 2},
		Targets: map[string]targetRecord{"/t": {ReadOnly: true}},
	})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(sound)
	f.Add([]byte(`{"version":1,"volumeID":"w"}`))
	f.Add([]byte("{\x00"))
	f.Fuzz(func(t *testing.T, data []byte) {
		dir := t.TempDir()
		path := (&nodeState{dir: dir}).path("v")
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		s, err := openNodeState(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range s.list() {
			if r.VolumeID != "v" || r.BootID != s.bootID || r.Version != recordVersion {
				t.Errorf("believed %+v", r)
			}
		}
		if _, err := os.Stat(path); (err == nil) != (len(s.list()) == 1) {
			t.Errorf("%d records, and its file: %v", len(s.list()), err)
		}
	})
}

// FuzzEndpoint: a socket's path is absolute, short and named as CSI wants.
func FuzzEndpoint(f *testing.F) {
	f.Add("unix:///run/csi/csi-loop.sock")
	f.Add("unix:/../x.sock")
	f.Add("tcp://x:1")
	f.Fuzz(func(t *testing.T, endpoint string) {
		path, err := socketPath(endpoint)
		if err == nil && (!filepath.IsAbs(path) || filepath.Clean(path) != path || filepath.Ext(path) != ".sock" || len(path) > 107) {
			t.Errorf("%q gives %q", endpoint, path)
		}
	})
}

// TestPathsThatNobodyMeans was found by FuzzCalls: they were answered with INTERNAL.
func TestPathsThatNobodyMeans(t *testing.T) {
	n := newFake(t)
	for name, path := range map[string]string{"root": "/", "zero byte": "/a\x00b", "too long": "/" + strings.Repeat("x", 4096)} {
		t.Run(name, func(t *testing.T) {
			_, err := n.client.NodeUnpublishVolume(t.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: "v", TargetPath: path})
			code(t, err, codes.InvalidArgument)
			_, err = n.client.NodeUnstageVolume(t.Context(), &csi.NodeUnstageVolumeRequest{VolumeId: "v", StagingTargetPath: path})
			code(t, err, codes.InvalidArgument)
		})
	}
}
