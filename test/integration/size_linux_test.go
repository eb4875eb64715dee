package integration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
)

const codeAlreadyExists = codes.AlreadyExists

// t0 is some time that is not now.
var t0 = time.Unix(1e9, 0)

// TestExactSizes: what was answered is what the record, the file and the device have.
func TestExactSizes(t *testing.T) {
	s := newSite(t, siteConfig{})
	for i, c := range []struct{ required, limit, want int64 }{
		{1, 0, mib},
		{mib - 1, 0, mib},
		{mib, mib, mib},
		{mib + 1, 0, 2 * mib},
		{3*mib + 511, 0, 4 * mib},
		{3*mib + 4096, 4*mib + 1, 4 * mib},
		{5*mib - 4097, 5 * mib, 5 * mib},
		{17*mib + 513, 0, 18 * mib},
		{0, 7*mib + 12345, 7 * mib},
		{1_000_000_007, 0, 954 * mib},
	} {
		for _, thin := range []bool{false, true} {
			v := s.volume(kind{name: "block", size: c.want, thin: thin}, fmt.Sprintf("size-%d-%v", i, thin))
			r, err := s.controller().CreateVolume(context.Background(), &csi.CreateVolumeRequest{
				Name: v.id, CapacityRange: &csi.CapacityRange{RequiredBytes: c.required, LimitBytes: c.limit},
				VolumeCapabilities: []*csi.VolumeCapability{v.capability()}, Parameters: v.parameters(),
			})
			if err != nil {
				t.Fatalf("%+v: %s", c, explain(err))
			}
			v.id = r.GetVolume().GetVolumeId()
			if got := r.GetVolume().GetCapacityBytes(); got != c.want {
				t.Fatalf("%+v: capacity_bytes %d", c, got)
			}
			if got := v.recorded(); got != c.want {
				t.Errorf("%+v: recorded size %d", c, got)
			}
			v.step("stage", v.stage())
			v.step("publish", v.publish(0, false))
			v.step("size", v.checkSize())
			v.step("last byte", v.toTheLastByte())
			v.down()
		}
	}
	for _, c := range []struct{ required, limit int64 }{{1, mib - 1}, {mib + 1, 2*mib - 1}, {0, 1}, {5, 6}} {
		v := s.volume(block, "impossible")
		_, err := s.controller().CreateVolume(context.Background(), &csi.CreateVolumeRequest{
			Name: v.id, CapacityRange: &csi.CapacityRange{RequiredBytes: c.required, LimitBytes: c.limit},
			VolumeCapabilities: []*csi.VolumeCapability{v.capability()},
		})
		wantCode(t, fmt.Sprintf("%+v", c), err, codes.OutOfRange)
	}
}

// recorded is the size in the volume's record.
func (v *volume) recorded() int64 {
	v.t.Helper()
	b, err := os.ReadFile(filepath.Join(filepath.Dir(v.image()), "volume.json"))
	must(v.t, err)
	var r struct {
		Size int64 `json:"size"`
	}
	must(v.t, json.Unmarshal(b, &r))
	return r.Size
}

// toTheLastByte writes the last byte of the device, and finds nothing behind it.
func (v *volume) toTheLastByte() error {
	f, err := os.OpenFile(v.target(0), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte("end"), v.want-3); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if n, err := f.WriteAt([]byte("x"), v.want); !errors.Is(err, syscall.ENOSPC) {
		return fmt.Errorf("a write behind the end: %d bytes and %w, want ENOSPC", n, err)
	}
	got := make([]byte, 8)
	n, err := f.ReadAt(got, v.want-3)
	if n != 3 || string(got[:3]) != "end" || !errors.Is(err, io.EOF) {
		return fmt.Errorf("read at the end: %q, %w", got[:n], err)
	}
	st, err := os.Stat(v.image())
	if err == nil && st.Size() != v.want {
		err = fmt.Errorf("the image has %d bytes, want %d", st.Size(), v.want)
	}
	return err
}

// TestFullThickVolume: a thick volume that is filled to the last byte takes nothing
// from the pool, because it has taken everything before.
func TestFullThickVolume(t *testing.T) {
	for _, pool := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(pool, func(t *testing.T) {
			s := newSite(t, siteConfig{poolFS: pool, poolSize: 1 << 30})
			for _, k := range []kind{ext4, xfs, btrfs, block} {
				v := s.volume(k, "full-"+k.name).up()
				syncFS(t, s.pool)
				before, err := free(s.pool)
				must(t, err)
				if k.block() {
					v.step("fill", v.fillDevice())
				} else {
					v.step("fill", v.fillFilesystem())
				}
				syncFS(t, s.pool)
				after, err := free(s.pool)
				must(t, err)
				// The pool's own metadata: extents become written, times change.
				if diff := before - after; diff > tolerance[pool] || diff < -tolerance[pool] {
					t.Errorf("%s on %s: filling it took %d bytes from the pool", k.name, pool, diff)
				}
				v.thick("full")
				v.down()
			}
		})
	}
}

// tolerance is what the metadata of a pool may grow by, in bytes.
var tolerance = map[string]int64{"ext4": 64 << 10, "xfs": 128 << 10, "btrfs": 4 * mib}

func syncFS(t *testing.T, path string) {
	t.Helper()
	must(t, withDevice(path, os.O_RDONLY, func(fd uintptr) error { return unix.Syncfs(int(fd)) }))
}

// fillFilesystem writes until ENOSPC; every write before it, and the fsync, succeeds.
func (v *volume) fillFilesystem() error {
	f, err := os.Create(filepath.Join(v.target(0), "fill"))
	if err != nil {
		return err
	}
	defer f.Close()
	data := make([]byte, mib)
	for i := range data {
		data[i] = byte(i * 7)
	}
	var total int64
	for ; ; total += int64(len(data)) {
		if _, err = f.Write(data); err != nil {
			break
		}
	}
	if !errors.Is(err, syscall.ENOSPC) {
		return err
	}
	if total < v.want/3 {
		return fmt.Errorf("full after %d of %d bytes", total, v.want)
	}
	return f.Sync()
}

func (v *volume) fillDevice() error {
	data := make([]byte, mib)
	for at := int64(0); at < v.want; at += mib {
		if err := writeFile(v.target(0), data, at, 0); err != nil {
			return err
		}
	}
	return v.toTheLastByte()
}

// thick fails the test when the image has lost blocks.
func (v *volume) thick(after string) {
	v.t.Helper()
	have, err := allocated(v.image())
	must(v.t, err)
	if have < v.want {
		v.t.Errorf("%s volume after %s: %d of %d bytes are allocated", v.name(), after, have, v.want)
	}
}

// TestCapacityIsExact (F9, F10): GetCapacity follows every create, expand and delete by
// exactly the bytes in question, and what it says can be had, and no more.
func TestCapacityIsExact(t *testing.T) {
	s := newSite(t, siteConfig{poolFS: "xfs", poolSize: 1 << 30})
	capacity := func() int64 {
		r, err := s.controller().GetCapacity(context.Background(), &csi.GetCapacityRequest{})
		must(t, err)
		return r.GetAvailableCapacity()
	}
	start := capacity()
	near := func(what string, want int64) {
		t.Helper()
		// Metadata of the pool's filesystem, and rounding to whole MiB. xfs frees the
		// blocks of a removed file a moment later.
		eventually(t, func() string {
			if got := capacity(); got > want || got < want-3*mib {
				return fmt.Sprintf("after %s: capacity %d, want %d (%+d)", what, got, want, got-want)
			}
			return ""
		})
	}
	a := s.volume(kind{name: "block", size: 300 * mib}, "a").up()
	near("create of 300 MiB", start-300*mib)
	b := s.volume(kind{name: "block", size: 200 * mib}, "b").up()
	near("create of 200 MiB", start-500*mib)
	v := s.volume(kind{name: "block", size: capacity() + mib}, "too-large")
	wantCode(t, "create of one MiB more than there is", v.create(), codes.ResourceExhausted)
	near("a refused create", start-500*mib)
	// F9: 100 MiB more must be possible though less than 400 MiB are free.
	grow := capacity() - 100*mib
	a.step("expand by all but 100 MiB", a.expand(a.want+grow))
	near("expand", start-500*mib-grow)
	wantCode(t, "expand by more than there is", a.expand(a.want+200*mib), codes.ResourceExhausted)
	near("a refused expand", start-500*mib-grow)
	a.step("size", a.checkSize())
	a.down()
	near("delete of the grown one", start-200*mib)
	rest := capacity()
	all := s.volume(kind{name: "block", size: rest}, "all").up()
	all.step("fill", all.fillDevice())
	if got := capacity(); got > mib {
		t.Errorf("capacity %d when all was given away", got)
	}
	all.down()
	b.down()
	near("delete of all", start)

	// Thin volumes of the same pool are promised no more than is there.
	thin := s.volume(kind{name: "block", size: capacity(), thin: true}, "thin").up()
	if got := capacity(); got > 2*mib {
		t.Errorf("capacity %d beside a thin volume that was promised all", got)
	}
	thin.down()
	s.kill()
	s.start()
	near("restart", start)
}

// TestExpandBtrfsBelowItsResizeMinimum: btrfs resizes only to 256 MiB or more, so an
// expansion to less goes there, and is refused where the limit forbids that.
func TestExpandBtrfsBelowItsResizeMinimum(t *testing.T) {
	s := newSite(t, siteConfig{})
	v := s.volume(btrfs, "small").up()
	ctx := context.Background()
	expand := func(r *csi.CapacityRange) (int64, error) {
		c, err := s.controller().ControllerExpandVolume(ctx, &csi.ControllerExpandVolumeRequest{VolumeId: v.id, CapacityRange: r, VolumeCapability: v.capability()})
		return c.GetCapacityBytes(), err
	}
	_, err := expand(&csi.CapacityRange{RequiredBytes: 192 * mib, LimitBytes: 255 * mib})
	wantCode(t, "ControllerExpandVolume to what cannot be", err, codes.OutOfRange)
	v.step("size as it was", v.checkSize())

	r := &csi.CapacityRange{RequiredBytes: 192 * mib}
	for range 2 {
		if v.want, err = expand(r); err != nil || v.want != 256*mib {
			t.Errorf("ControllerExpandVolume: %d, %v", v.want, err)
		}
	}
	_, err = s.node().NodeExpandVolume(ctx, &csi.NodeExpandVolumeRequest{VolumeId: v.id, VolumePath: v.target(0), CapacityRange: r})
	v.step("NodeExpandVolume", err)
	v.step("size", v.checkSize())
	v.down()
}

// TestSmallestVolumes: who asks for less than a filesystem can be gets the least that
// it can, and that is what is said and what there is; restores are asked for in the same
// words.
func TestSmallestVolumes(t *testing.T) {
	s := newSite(t, siteConfig{poolFS: "xfs"})
	groups := csi.NewGroupControllerClient(s.client())
	for fs, want := range map[string]int64{"ext2": mib, "ext3": 8 * mib, "ext4": 8 * mib, "xfs": 300 * mib, "btrfs": 109 * mib} {
		check := func(v *volume, steps ...func() error) *volume {
			v.want = want
			for _, step := range steps {
				v.step("its life", step())
			}
			if size, err := deviceSize(v.device()); err != nil || size != want {
				t.Errorf("%s: the device has %d bytes, want %d: %v", fs, size, want, err)
			}
			return v
		}
		up := func(v *volume) *volume {
			return check(v, v.create, v.create, v.stage, func() error { return v.publish(0, false) })
		}
		v := up(s.volume(kind{name: fs, fs: fs, size: 1}, "tiny-"+fs))
		v.step("write", os.WriteFile(filepath.Join(v.target(0), "file"), []byte("there is room"), 0o600))
		made, err := groups.CreateVolumeGroupSnapshot(t.Context(), &csi.CreateVolumeGroupSnapshotRequest{Name: fs, SourceVolumeIds: []string{v.id}})
		must(t, err)
		r := s.volume(v.kind, "restored-"+fs)
		r.source = &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{Snapshot: &csi.VolumeContentSource_SnapshotSource{
			SnapshotId: made.GetGroupSnapshot().GetSnapshots()[0].GetSnapshotId(),
		}}}
		up(r)
		v.step("read", compareFile(filepath.Join(r.target(0), "file"), []byte("there is room"), 0))
		_, err = groups.DeleteVolumeGroupSnapshot(t.Context(), &csi.DeleteVolumeGroupSnapshotRequest{GroupSnapshotId: made.GetGroupSnapshot().GetGroupSnapshotId()})
		must(t, err)
		r.downChecked(t)
		v.downChecked(t)
	}
}
