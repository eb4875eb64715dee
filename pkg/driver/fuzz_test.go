package driver

import (
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
)

// FuzzCapacity: whatever the numbers, a size that is chosen satisfies them.
func FuzzCapacity(f *testing.F) {
	f.Add(int64(0), int64(0))
	f.Add(int64(1), int64(1))
	f.Add(int64(1<<20+1), int64(1<<21))
	f.Add(int64(1<<62), int64(1<<63-1))
	f.Fuzz(func(t *testing.T, required, limit int64) {
		c, err := parseCapacity(&csi.CapacityRange{RequiredBytes: required, LimitBytes: limit})
		if err != nil {
			return
		}
		size, err := c.size()
		if err == nil && (size <= 0 || size%sizeUnit != 0 || !c.holds(size)) {
			t.Errorf("size %d for required %d and limit %d", size, required, limit)
		}
	})
}

// FuzzParams: parameters from anybody never panic, and what passes is in range.
func FuzzParams(f *testing.F) {
	f.Add("blockSize", "512", "offset", "1Mi")
	f.Add("mkfsOptions", "-m 1", "sizeLimit", "1e3")
	f.Fuzz(func(t *testing.T, k1, v1, k2, v2 string) {
		if p, err := parseParams(map[string]string{k1: v1, k2: v2}); err == nil && (p.blockSize < 512 || p.blockSize > 4096) {
			t.Errorf("block size %d", p.blockSize)
		}
		m, err := parseMapped(map[string]string{attrImage: "/x", k1: v1, k2: v2})
		if err == nil && (m.Offset < 0 || m.SizeLimit < 0 || m.Offset%int64(m.BlockSize) != 0) {
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
