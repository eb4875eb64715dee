package integration

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
)

// TestDeltaStreams is the proof of changed blocks as a backup program sees them: after
// random writes, discards, growth and fragmentation of a raw block volume, what
// the service tells of two snapshots, laid over a copy of the one, makes the other.
func TestDeltaStreams(t *testing.T) {
	for _, pool := range []string{"xfs", "btrfs", "ext4"} {
		t.Run(pool, func(t *testing.T) {
			random := random(t)
			s := newSite(t, siteConfig{poolFS: pool})
			d := &deltas{site: s, volume: s.volume(kind{name: "block", size: 4 * mib, thin: true}, "source"), random: random}
			d.volume.step("create", d.volume.create())
			rounds := times(5, 20, 2000)
			if pool == "ext4" { // which compares all the data
				rounds = max(3, rounds/4)
			}
			for i := range rounds {
				d.change(i)
				d.snap(fmt.Sprint("s", i))
				if t.Failed() {
					return
				}
			}
			for _, each := range d.taken {
				must(t, s.deleteSnapshot(each.GetSnapshotId()))
			}
			d.volume.step("delete", d.volume.remove())
			t.Logf("%d pairs of snapshots, %d ranges, %d MiB of %d MiB changed", d.pairs, d.ranges, d.changed/mib, d.compared/mib)
			if d.changed == 0 || d.changed >= d.compared {
				t.Error("nothing was shown: the deltas are nothing, or all")
			}
		})
	}
}

// deltas is a volume with the snapshots of it that there are.
type deltas struct {
	*site
	volume *volume
	random *rand.Rand
	taken  []*csi.Snapshot

	pairs, ranges     int
	changed, compared int64 // bytes
}

// change attaches the volume, and writes as a tenant does.
func (d *deltas) change(round int) {
	v, r := d.volume, d.random
	v.step("stage", v.stage())
	v.step("publish", v.publish(0, false))
	if round%10 == 9 && v.want < 24*mib {
		v.step("expand", v.expand(v.want+mib))
	}
	// A place of whole blocks; the last one often.
	place := func(most int64) (at, n int64) {
		blocks := v.want / 4096
		if at = r.Int64N(blocks); r.IntN(8) == 0 {
			at = blocks - 1
		}
		return at * 4096, min(1+r.Int64N(most), blocks-at) * 4096
	}
	for range 1 + r.IntN(6) {
		at, n := place(64)
		switch r.IntN(6) {
		case 0:
			v.step("discard", discard(v.target(0), at, n))
		case 1:
			v.step("zero", zeroOut(v.target(0), at, n))
		case 2: // many small pieces
			for range 40 {
				at, n := place(1)
				v.step("write", writeFile(v.target(0), noise(r, n), at, 0))
			}
		case 3: // the same again is a change to nobody
			b, err := readPart(v.target(0), at, n)
			v.step("read", err)
			v.step("write", writeFile(v.target(0), b, at, 0))
		default:
			v.step("write", writeFile(v.target(0), noise(r, n), at, 0))
		}
	}
	v.step("unpublish", v.unpublish(0))
	v.step("unstage", v.unstage())
}

// snap takes a snapshot, and compares it with older ones.
func (d *deltas) snap(name string) {
	one, err := d.volume.snapshot(name)
	must(d.t, err)
	if d.taken = append(d.taken, one); len(d.taken) > 6 {
		must(d.t, d.deleteSnapshot(d.taken[0].GetSnapshotId()))
		d.taken = d.taken[1:]
	}
	base := d.taken[d.random.IntN(max(1, len(d.taken)-1))] // the first with itself
	d.compare(base, one, 0, 0)
	d.compare(base, one, d.random.Int64N(one.GetSizeBytes()), 1+d.random.Int32N(5))
	d.allocated(one, d.random.Int32N(5))
}

// compare lays what the service says is changed over a copy of base.
func (d *deltas) compare(base, target *csi.Snapshot, from int64, limit int32) {
	t := d.t
	t.Helper()
	stream, err := csi.NewSnapshotMetadataClient(d.client()).GetMetadataDelta(t.Context(), &csi.GetMetadataDeltaRequest{
		BaseSnapshotId: base.GetSnapshotId(), TargetSnapshotId: target.GetSnapshotId(), StartingOffset: from, MaxResults: limit,
	})
	must(t, err)
	want := d.content(target)
	got := make([]byte, len(want))
	copy(got, d.content(base))
	eachRange(t, stream.Recv, from, limit, target.GetSizeBytes(), func(at, end int64) {
		copy(got[at:end], want[at:end])
		d.ranges++
		d.changed += end - at
	})
	d.pairs++
	d.compared += int64(len(want)) - from
	if !bytes.Equal(got[from:], want[from:]) {
		t.Fatalf("the delta from %s to %s behind %d is not all", base.GetSnapshotId(), target.GetSnapshotId(), from)
	}
}

// allocated fails if there is data outside of what the service says is allocated.
func (d *deltas) allocated(one *csi.Snapshot, limit int32) {
	t := d.t
	t.Helper()
	stream, err := csi.NewSnapshotMetadataClient(d.client()).GetMetadataAllocated(t.Context(), &csi.GetMetadataAllocatedRequest{
		SnapshotId: one.GetSnapshotId(), MaxResults: limit,
	})
	must(t, err)
	content := d.content(one)
	eachRange(t, stream.Recv, 0, limit, one.GetSizeBytes(), func(at, end int64) { clear(content[at:end]) })
	if !bytes.Equal(content, make([]byte, len(content))) {
		t.Fatalf("%s has data outside of what is allocated", one.GetSnapshotId())
	}
}

// metadata is a message of either stream.
type metadata interface {
	GetBlockMetadataType() csi.BlockMetadataType
	GetVolumeCapacityBytes() int64
	GetBlockMetadata() []*csi.BlockMetadata
}

// eachRange reads a stream to its end, and holds it against the rules of CSI: ranges in
// order, apart from each other, within the volume, and no more in a message than asked.
func eachRange[M metadata](t testing.TB, next func() (M, error), from int64, limit int32, size int64, use func(at, end int64)) {
	t.Helper()
	last := int64(-1)
	for {
		m, err := next()
		if errors.Is(err, io.EOF) {
			return
		}
		must(t, err)
		blocks := m.GetBlockMetadata()
		if m.GetVolumeCapacityBytes() != size || m.GetBlockMetadataType() == csi.BlockMetadataType_UNKNOWN || limit > 0 && len(blocks) > int(limit) {
			t.Fatalf("%v of a volume of %d bytes, at most %d ranges", m, size, limit)
		}
		for _, b := range blocks {
			at, end := b.GetByteOffset(), b.GetByteOffset()+b.GetSizeBytes()
			if at < last || b.GetSizeBytes() <= 0 || end > size || end <= from {
				t.Fatalf("range %v behind %d of %d bytes, from %d", b, last, size, from)
			}
			last = end
			use(at, end)
		}
	}
}

// content is a snapshot's image, read from the pool.
func (d *deltas) content(s *csi.Snapshot) []byte {
	d.t.Helper()
	_, dir, _ := strings.Cut(s.GetSnapshotId(), ".")
	b, err := os.ReadFile(filepath.Join(d.pool, "snapshots", dir, "disk.img"))
	must(d.t, err)
	return b
}

func noise(r *rand.Rand, n int64) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

func readPart(path string, at, n int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b := make([]byte, n)
	_, err = f.ReadAt(b, at)
	return b, err
}
