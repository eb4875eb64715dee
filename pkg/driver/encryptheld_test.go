package driver

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/csi-loop/csi-loop/pkg/crypt"
	"github.com/csi-loop/csi-loop/pkg/loop"
	"github.com/csi-loop/csi-loop/pkg/mount"
)

// only is the one mapping that there is.
func (m *fakeMappings) only() crypt.Mapping {
	m.t.Helper()
	if len(m.over) != 1 {
		m.t.Fatalf("mappings %v", m.over)
	}
	for _, made := range m.over {
		return made
	}
	return crypt.Mapping{}
}

// The mapping of a raw block volume is held as long as it is staged, and by a start
// again: its number would go to another volume below the pod.
func TestMappingOfABlockVolumeIsHeld(t *testing.T) {
	n, m := newFakeMappings(t)
	v := n.create("v", 16*mib, blockCap(legacy), encrypted)
	n.must(v.stageWith(leftKey))
	m.wantHeld("stage", m.only())
	n.restart()
	m.wantHeld("start", m.only())
	n.loseState()
	n.must(v.stageWith(leftKey))
	m.wantHeld("stage without a record", m.only())
	if m.held[m.only()] != 1 {
		t.Errorf("held %d times", m.held[m.only()])
	}
	v.down()
	if len(m.over) > 0 {
		t.Errorf("left: %v", m.over)
	}
}

// A mapping that is another by the time it is looked at is not used for anything.
func TestReplacedMappingIsNotUsed(t *testing.T) {
	for name, c := range capabilities {
		t.Run(name, func(t *testing.T) {
			n, m := newFakeMappings(t)
			v := n.create("v", 16*mib, c, encrypted)
			m.replaced = true
			code(t, v.stageWith(leftKey), codes.Aborted)
			if all, _ := n.fake.FindAll(t.Context()); len(all) > 0 || len(m.over) > 0 {
				t.Fatalf("left: %+v, mappings %v", all, m.over)
			}
			if st, err := os.Stat(m.node); err != nil || st.Size() > 0 {
				t.Errorf("something was written to it: %v, %v", st, err)
			}
			m.replaced = false
			m.size(16 * mib)
			n.must(v.stageWith(leftKey))
			v.down()
		})
	}
}

var capabilities = map[string]*csi.VolumeCapability{"ext4": mountCap("ext4", oneWriter), "block": blockCap(legacy)}

// size gives the node of the mappings a size, so that a filesystem can be made on it.
func (m *fakeMappings) size(n int64) {
	m.t.Helper()
	if err := os.Truncate(m.node, n); err != nil {
		m.t.Fatal(err)
	}
}

// What cryptsetup left without a table is ended by the next staging or unstaging, which
// would otherwise fail until a reboot.
func TestHollowMapping(t *testing.T) {
	n, m := newFakeMappings(t)
	v := n.create("v", 16*mib, blockCap(legacy), encrypted)
	n.must(v.stageWith(leftKey))
	half := crypt.Mapping{Name: m.only().Name}

	// cryptsetup was ended in a staging, and the driver with it.
	r := n.record(v.id)
	m.lose()
	m.hollow = []crypt.Mapping{half}
	n.must(n.d.letGo(r.Device.ref()))
	r.Device = binding{}
	n.must(n.d.state.put(r))
	n.must(v.stageWith(leftKey))
	if len(m.hollow) > 0 {
		t.Fatalf("left: %v", m.hollow)
	}

	half.Name = m.only().Name
	m.lose()
	m.hollow = []crypt.Mapping{half}
	n.must(v.unstage())
	if len(m.hollow) > 0 {
		t.Fatalf("left by unstaging: %v", m.hollow)
	}
	n.must(v.delete())
}

// The start ends those whose device is gone, which nobody would find any more. What is
// bound may be another csi-loop's, which is just making its mapping.
func TestStartEndsHollowMappings(t *testing.T) {
	n, m := newFakeMappings(t)
	other, err := os.Create(filepath.Join(n.dir, "other.img"))
	n.must(err)
	defer other.Close()
	n.must(other.Truncate(mib))
	dev, err := n.fake.Attach(t.Context(), other, loop.Mapping{BlockSize: 512})
	n.must(err)
	bound := crypt.Mapping{Name: mappingName(dev.Info().Ref)}
	foreign := crypt.Mapping{Name: MappingPrefix + "backup"}
	m.hollow = []crypt.Mapping{{Name: mappingName(loop.Ref{Number: 0, DiskSeq: 1 << 40})}, bound, foreign, {Name: MappingPrefix + "loop77-3"}}
	n.restart()
	if len(m.hollow) != 2 || m.hollow[0] != bound || m.hollow[1] != foreign {
		t.Errorf("left: %v", m.hollow)
	}
	m.hollow = nil
	n.must(dev.Close())
	n.must(n.fake.Detach(t.Context(), dev.Info().Ref))
}

// A volume is not handed out for writing while a whole second copy of its header says
// that nobody was given it: where the first is damaged later, that would be believed.
func TestSecondCopySaysUnfinished(t *testing.T) {
	n, m := newFakeMappings(t)
	v := n.create("v", 16*mib, blockCap(legacy), encrypted)
	n.must(v.stageWith(leftKey))
	n.must(v.unstage())
	const uuid = "header-1"
	m.writeCopy(v.imageFile(), 0, 2, uuid, labelOf(v.id))
	m.writeCopy(v.imageFile(), 1, 1, uuid, labelUnfinished)
	code(t, v.stageWith(leftKey), codes.DataLoss)
	if len(m.over) > 0 || m.formatted != 1 {
		t.Fatalf("mappings %v, formatted %d times", m.over, m.formatted)
	}
	// What is older and of another volume is what a copy of it has: harmless.
	m.writeCopy(v.imageFile(), 1, 1, uuid, labelOf("another"))
	n.must(v.stageWith(leftKey))
	n.must(v.unstage())
	// Nor is it made anew if only the newer says so: a label is never taken back.
	m.writeCopy(v.imageFile(), 0, 2, uuid, labelUnfinished)
	m.writeCopy(v.imageFile(), 1, 1, uuid, labelOf(v.id))
	code(t, v.stageWith(leftKey), codes.DataLoss)
	if m.formatted != 1 {
		t.Fatal("made anew")
	}
	n.must(v.delete())
}

// The filesystem of a larger copy gets an identity of its own, and grows after it was
// mounted, by its journal; unmounted only where the kernel does not do that.
func TestEncryptedCopyGrowsMounted(t *testing.T) {
	for name, test := range map[string]struct {
		refuses  error
		readOnly bool
		want     []string
		code     codes.Code
	}{
		"mounted":                       {want: []string{"mounted"}},
		"without the capability":        {refuses: mount.ErrPermission, want: []string{"mounted", "unmounted"}},
		"cannot":                        {refuses: mount.ErrUnsupported, want: []string{"mounted", "unmounted"}},
		"read-only":                     {readOnly: true, want: []string{"mounted"}},
		"read-only, without capability": {readOnly: true, refuses: mount.ErrPermission, want: []string{"mounted", "unmounted"}},
		"fails":                         {refuses: mount.ErrDamaged, want: []string{"mounted"}, code: codeOf(mount.ErrDamaged)},
		"read-only, fails":              {readOnly: true, refuses: mount.ErrDamaged, want: []string{"mounted"}, code: codeOf(mount.ErrDamaged)},
	} {
		t.Run(name, func(t *testing.T) {
			n, m := newFakeMappings(t)
			v := n.create("v", 16*mib, mountCap("ext4", oneWriter), encrypted)
			m.size(16 * mib)
			n.must(v.stageWith(leftKey))
			n.must(v.unstage())
			made, err := superblockAt(m.node)
			n.must(err)

			mode := oneWriter
			if test.readOnly {
				mode = reader
			}
			resp, err := n.copy("copy", v.asSource(), 32*mib, mountCap("ext4", mode), encrypted)
			n.must(err)
			c := volume{n: n, id: resp.GetVolumeId(), cap: mountCap("ext4", mode)}
			m.size(32 * mib)
			before, err := os.ReadFile(m.node)
			n.must(err)
			// What failed is not forgotten by the call that follows.
			for range 2 {
				n.fake.failOnce("growfs", test.refuses)
				n.fake.grown = nil
				code(t, c.stageWith(leftKey), test.code)
				if test.code == codes.OK {
					break
				}
			}
			// The kernel is a fake, so that the staging itself finds it small, and tries.
			got := n.fake.grownHow(m.node)
			if test.code == codes.OK && len(got) > 0 {
				got = got[:len(got)-1]
			}
			if !slices.Equal(got, test.want) {
				t.Errorf("grown %v, want %v", got, test.want)
			}
			after, err := os.ReadFile(m.node)
			n.must(err)
			const uuid = 1024 + 104 // in the superblock
			if string(before[uuid:uuid+16]) == string(after[uuid:uuid+16]) {
				t.Error("the copy has the identity of its source")
			}
			// The kernel is a fake, so that only what ran offline would have grown it.
			if sb, err := superblockAt(m.node); err != nil || sb.Size != made.Size {
				t.Errorf("resized in place: %d bytes, %v, before %d", sb.Size, err, made.Size)
			}
			if test.code == codes.OK {
				n.must(c.unstage())
			}
			n.must(c.delete())
			n.must(v.delete())
		})
	}
}

// A copy that was in use is a volume as any other: a filesystem that does not grow is no
// reason not to stage it, and it is not taken down for that.
func TestEncryptedCopyInUseStaysUp(t *testing.T) {
	for name, test := range map[string]struct {
		refuses  error
		readOnly bool
	}{
		"without the capability":        {refuses: mount.ErrPermission},
		"cannot":                        {refuses: mount.ErrUnsupported},
		"fails":                         {refuses: mount.ErrDamaged},
		"read-only, without capability": {refuses: mount.ErrPermission, readOnly: true},
	} {
		t.Run(name, func(t *testing.T) {
			n, m := newFakeMappings(t)
			v := n.create("v", 16*mib, mountCap("ext4", oneWriter), encrypted)
			m.size(16 * mib)
			n.must(v.stageWith(leftKey))
			n.must(v.unstage())
			resp, err := n.copy("copy", v.asSource(), 16*mib, mountCap("ext4", oneWriter), encrypted)
			n.must(err)
			c := volume{n: n, id: resp.GetVolumeId(), cap: mountCap("ext4", oneWriter)}
			n.must(c.stageWith(leftKey))
			n.must(c.unstage())
			_, err = n.ctrl.ControllerExpandVolume(t.Context(), &csi.ControllerExpandVolumeRequest{VolumeId: c.id, CapacityRange: &csi.CapacityRange{RequiredBytes: 32 * mib}})
			n.must(err)
			m.size(32 * mib)
			if test.readOnly {
				c.cap = mountCap("ext4", reader)
			}
			n.fake.failOnce("growfs", test.refuses)
			n.fake.grown = nil
			n.must(c.stageWith(leftKey))
			if got := n.fake.grownHow(m.node); !slices.Equal(got, []string{"mounted"}) {
				t.Errorf("grown %v, want as it is mounted only", got)
			}
			n.must(c.unstage())
			n.must(c.delete())
			n.must(v.delete())
		})
	}
}
