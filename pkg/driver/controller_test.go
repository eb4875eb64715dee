package driver

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/csi-loop/csi-loop/pkg/image"
)

func TestCreateVolumeRefuses(t *testing.T) {
	n := newFake(t)
	ok := func() *csi.CreateVolumeRequest {
		return &csi.CreateVolumeRequest{
			Name: "pvc-1", CapacityRange: &csi.CapacityRange{RequiredBytes: 16 * mib},
			VolumeCapabilities: []*csi.VolumeCapability{mountCap("ext4", legacy)},
		}
	}
	param := func(k, v string) func(*csi.CreateVolumeRequest) {
		return func(r *csi.CreateVolumeRequest) { r.Parameters = map[string]string{k: v} }
	}
	for name, c := range map[string]struct {
		change func(*csi.CreateVolumeRequest)
		code   codes.Code
		says   string // must be in the message
	}{
		"no name":                   {func(r *csi.CreateVolumeRequest) { r.Name = "" }, codes.InvalidArgument, "name"},
		"name too long":             {func(r *csi.CreateVolumeRequest) { r.Name = strings.Repeat("x", 129) }, codes.InvalidArgument, "128"},
		"control character in name": {func(r *csi.CreateVolumeRequest) { r.Name = "a\x01b" }, codes.InvalidArgument, "U+0001"},
		"no capabilities":           {func(r *csi.CreateVolumeRequest) { r.VolumeCapabilities = nil }, codes.InvalidArgument, "volume_capabilities"},
		"capability without kind":   {func(r *csi.CreateVolumeRequest) { r.VolumeCapabilities[0].AccessType = nil }, codes.InvalidArgument, "access_type"},
		"capability without mode":   {func(r *csi.CreateVolumeRequest) { r.VolumeCapabilities[0].AccessMode = nil }, codes.InvalidArgument, "access_mode"},
		"writers on many nodes": {func(r *csi.CreateVolumeRequest) {
			r.VolumeCapabilities[0] = mountCap("ext4", csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER)
		}, codes.InvalidArgument, "one node"},
		"unknown filesystem": {func(r *csi.CreateVolumeRequest) { r.VolumeCapabilities[0] = mountCap("zfs", legacy) }, codes.InvalidArgument, "zfs"},
		"block and mount": {func(r *csi.CreateVolumeRequest) {
			r.VolumeCapabilities = append(r.VolumeCapabilities, blockCap(legacy))
		}, codes.InvalidArgument, "either"},
		"two filesystems": {func(r *csi.CreateVolumeRequest) {
			r.VolumeCapabilities = append(r.VolumeCapabilities, mountCap("xfs", legacy))
		}, codes.InvalidArgument, "either"},
		"volume mount group":   {func(r *csi.CreateVolumeRequest) { r.VolumeCapabilities[0].GetMount().VolumeMountGroup = "5" }, codes.InvalidArgument, "volume_mount_group"},
		"negative size":        {func(r *csi.CreateVolumeRequest) { r.CapacityRange.RequiredBytes = -1 }, codes.InvalidArgument, "negative"},
		"required above limit": {func(r *csi.CreateVolumeRequest) { r.CapacityRange.LimitBytes = mib }, codes.InvalidArgument, "above"},
		"no MiB in range": {func(r *csi.CreateVolumeRequest) {
			r.CapacityRange = &csi.CapacityRange{RequiredBytes: 16*mib + 1, LimitBytes: 17*mib - 1}
		}, codes.OutOfRange, "multiples"},
		"above the address space": {func(r *csi.CreateVolumeRequest) { r.CapacityRange.RequiredBytes = 1<<63 - 1 }, codes.OutOfRange, "largest"},
		"limit below the filesystem's minimum": {func(r *csi.CreateVolumeRequest) {
			r.VolumeCapabilities[0] = mountCap("xfs", legacy)
			r.CapacityRange = &csi.CapacityRange{RequiredBytes: 16 * mib, LimitBytes: 299 * mib}
		}, codes.OutOfRange, "314572800"},
		"larger than the pool":       {func(r *csi.CreateVolumeRequest) { r.CapacityRange.RequiredBytes = 1 << 60 }, codes.ResourceExhausted, "space"},
		"unknown parameter":          {param("alocation", "thin"), codes.InvalidArgument, `"alocation"`},
		"bad allocation":             {param("allocation", "fat"), codes.InvalidArgument, `"allocation"`},
		"bad direct I/O":             {param("directIO", "yes"), codes.InvalidArgument, `"directIO"`},
		"bad block size":             {param("blockSize", "8192"), codes.InvalidArgument, `"blockSize"`},
		"odd block size":             {param("blockSize", "1000"), codes.InvalidArgument, `"blockSize"`},
		"empty pool":                 {param("pool", ""), codes.InvalidArgument, `"pool"`},
		"unknown pool":               {param("pool", "fast"), codes.InvalidArgument, `"pool"`},
		"mkfs option that is a file": {param("mkfsOptions", "/dev/sda"), codes.InvalidArgument, `"mkfsOptions"`},
		"mkfs option not allowed":    {param("mkfsOptions", "-F"), codes.InvalidArgument, `"mkfsOptions"`},
		"mutable parameters":         {func(r *csi.CreateVolumeRequest) { r.MutableParameters = map[string]string{"a": "b"} }, codes.InvalidArgument, "mutable"},
		"content source": {func(r *csi.CreateVolumeRequest) {
			r.VolumeContentSource = &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Volume{Volume: &csi.VolumeContentSource_VolumeSource{}}}
		}, codes.InvalidArgument, "volume_content_source"},
		"another node": {func(r *csi.CreateVolumeRequest) {
			r.AccessibilityRequirements = &csi.TopologyRequirement{Requisite: []*csi.Topology{{Segments: map[string]string{"topology.csi-loop.io/node": "node-b"}}}}
		}, codes.ResourceExhausted, "node-a"},
		"unknown topology key": {func(r *csi.CreateVolumeRequest) {
			r.AccessibilityRequirements = &csi.TopologyRequirement{Requisite: []*csi.Topology{{Segments: map[string]string{"zone": "a"}}}}
		}, codes.ResourceExhausted, "topology.csi-loop.io/node"},
	} {
		t.Run(name, func(t *testing.T) {
			req := ok()
			c.change(req)
			_, err := n.ctrl.CreateVolume(t.Context(), req)
			code(t, err, c.code)
			if !strings.Contains(err.Error(), c.says) {
				t.Errorf("message %q does not name %q", err, c.says)
			}
		})
	}
	if got := n.store.List(); len(got) != 0 {
		t.Errorf("refused requests left volumes: %v", got)
	}
	if entries, err := os.ReadDir(n.pool[0].Path + "/volumes"); err != nil || len(entries) != 0 {
		t.Errorf("refused requests left files: %v %v", entries, err)
	}
}

func TestCreateVolumeSizes(t *testing.T) {
	n := newFake(t)
	for name, c := range map[string]struct {
		given *csi.CapacityRange
		cap   *csi.VolumeCapability
		want  int64
	}{
		"exact":                   {&csi.CapacityRange{RequiredBytes: 16 * mib, LimitBytes: 16 * mib}, blockCap(legacy), 16 * mib},
		"one byte more":           {&csi.CapacityRange{RequiredBytes: 16*mib + 1}, blockCap(legacy), 17 * mib},
		"one byte":                {&csi.CapacityRange{RequiredBytes: 1}, blockCap(legacy), mib},
		"one byte of ext2":        {&csi.CapacityRange{RequiredBytes: 1}, mountCap("ext2", legacy), mib},
		"one byte of ext4":        {&csi.CapacityRange{RequiredBytes: 1}, mountCap("ext4", legacy), 8 * mib},
		"the least, exactly":      {&csi.CapacityRange{RequiredBytes: 1, LimitBytes: 8 * mib}, mountCap("ext4", legacy), 8 * mib},
		"limit below the default": {&csi.CapacityRange{LimitBytes: 20*mib + 5}, blockCap(legacy), 20 * mib},
		"nothing asked":           {nil, blockCap(legacy), defaultSize},
	} {
		t.Run(name, func(t *testing.T) {
			for range 2 { // a repeated call finds what the first one made
				resp, err := n.ctrl.CreateVolume(t.Context(), &csi.CreateVolumeRequest{
					Name: t.Name(), CapacityRange: c.given, VolumeCapabilities: []*csi.VolumeCapability{c.cap},
					Parameters: map[string]string{"allocation": "thin"},
				})
				n.must(err)
				v := resp.GetVolume()
				if v.GetCapacityBytes() != c.want {
					t.Errorf("size %d, want %d", v.GetCapacityBytes(), c.want)
				}
				if got := v.GetAccessibleTopology()[0].GetSegments()["topology.csi-loop.io/node"]; got != "node-a" {
					t.Errorf("topology %q", got)
				}
			}
		})
	}
}

// What was asked for is no less than what is made, and as little more as can be.
func TestSizesOfFilesystems(t *testing.T) {
	for name, c := range map[string]struct {
		filesystem              string
		from                    int64 // size of a copy's source; 0 for a new volume
		required, limit, wanted int64 // 0 wanted is OUT_OF_RANGE
	}{
		"xfs":                                  {"xfs", 0, 1, 0, 300 * mib},
		"xfs, one more":                        {"xfs", 0, 300*mib + 1, 0, 301 * mib},
		"xfs, limit":                           {"xfs", 0, 1, 300*mib - 1, 0},
		"btrfs":                                {"btrfs", 0, mib, 0, 109 * mib},
		"raw block":                            {"", 0, 1, 0, mib},
		"copy in the words of its source":      {"xfs", 300 * mib, 16 * mib, 300 * mib, 300 * mib},
		"copy, smaller":                        {"xfs", 400 * mib, 16 * mib, 0, 300 * mib}, // refused later
		"copy of btrfs":                        {"btrfs", 109 * mib, 1, 0, 109 * mib},
		"copy of btrfs, larger":                {"btrfs", 109 * mib, 110 * mib, 0, 256 * mib},
		"copy of btrfs, larger, limit":         {"btrfs", 109 * mib, 110 * mib, 255 * mib, 0},
		"copy of btrfs that grew":              {"btrfs", 256 * mib, 110 * mib, 0, 256 * mib},
		"copy of btrfs that grew, limit":       {"btrfs", 256 * mib, 110 * mib, 255 * mib, 0},
		"copy of larger btrfs":                 {"btrfs", 300 * mib, 300 * mib, 0, 300 * mib},
		"copy of larger btrfs, larger":         {"btrfs", 300 * mib, 301 * mib, 0, 301 * mib},
		"copy of larger btrfs, much too small": {"btrfs", 300 * mib, 1, 0, 109 * mib}, // refused later
	} {
		t.Run(name, func(t *testing.T) {
			asked := capacity{required: c.required, limit: c.limit}
			size, err := asked.size(image.MinimumSize(c.filesystem))
			if c.from != 0 {
				size, err = asked.copySize(image.Spec{Size: c.from, Filesystem: c.filesystem})
			}
			refused := err != nil && codeOf(err) == codes.OutOfRange
			if refused != (c.wanted == 0) || size != c.wanted {
				t.Errorf("%d, %v, want %d", size, err, c.wanted)
			}
		})
	}
}

func TestCreateVolumeAgain(t *testing.T) {
	n := newFake(t)
	n.create("pvc-1", 16*mib, mountCap("ext4", legacy), nil)
	ask := func(size, limit int64, c *csi.VolumeCapability, params map[string]string) error {
		_, err := n.ctrl.CreateVolume(t.Context(), &csi.CreateVolumeRequest{
			Name: "pvc-1", CapacityRange: &csi.CapacityRange{RequiredBytes: size, LimitBytes: limit},
			VolumeCapabilities: []*csi.VolumeCapability{c}, Parameters: params,
		})
		return err
	}
	// What Kubernetes adds, and spelling out a default, change nothing.
	code(t, ask(16*mib, 0, mountCap("", manyWriters), map[string]string{"csi.storage.k8s.io/pvc/name": "x", "allocation": "thick"}), codes.OK)
	code(t, ask(10*mib, 20*mib, mountCap("ext4", reader), nil), codes.OK)
	for name, err := range map[string]error{
		"larger":        ask(17*mib, 0, mountCap("ext4", legacy), nil),
		"limit smaller": ask(mib, 15*mib, mountCap("ext4", legacy), nil),
		"filesystem":    ask(16*mib, 0, mountCap("ext3", legacy), nil),
		"raw":           ask(16*mib, 0, blockCap(legacy), nil),
		"allocation":    ask(16*mib, 0, mountCap("ext4", legacy), map[string]string{"allocation": "thin"}),
		"block size":    ask(16*mib, 0, mountCap("ext4", legacy), map[string]string{"blockSize": "512"}),
		"direct I/O":    ask(16*mib, 0, mountCap("ext4", legacy), map[string]string{"directIO": "off"}),
		"mkfs options":  ask(16*mib, 0, mountCap("ext4", legacy), map[string]string{"mkfsOptions": "-i 8192"}),
	} {
		t.Run(name, func(t *testing.T) { code(t, err, codes.AlreadyExists) })
	}
	if got := len(n.store.List()); got != 1 {
		t.Errorf("%d volumes, want 1", got)
	}
}

func TestDeleteVolume(t *testing.T) {
	n := newFake(t)
	v := n.create("pvc-1", 16*mib, mountCap("ext4", legacy), nil)
	for name, id := range map[string]string{
		"malformed": "no-such-volume", "of no pool": "../../etc", "gone": v.id + "x", "other words": strings.Repeat("ü", 64),
	} {
		t.Run(name, func(t *testing.T) { code(t, volume{n: n, id: id}.delete(), codes.OK) })
	}
	// A pool that is not configured may well hold the volume.
	code(t, volume{n: n, id: "aaaaaaaaaaaaaaaaaaaa.pvc-1"}.delete(), codes.Unavailable)
	code(t, volume{n: n}.delete(), codes.InvalidArgument)

	n.must(v.stage())
	code(t, v.delete(), codes.FailedPrecondition)
	n.must(v.unstage())
	n.must(v.delete())
	n.must(v.delete())
	if got := n.store.List(); len(got) != 0 {
		t.Errorf("left %v", got)
	}
}

func TestListVolumes(t *testing.T) {
	n := newFake(t)
	list := func(token string, limit int32) (*csi.ListVolumesResponse, error) {
		return n.ctrl.ListVolumes(t.Context(), &csi.ListVolumesRequest{StartingToken: token, MaxEntries: limit})
	}
	var made []volume
	for i := range 7 {
		made = append(made, n.create(fmt.Sprintf("pvc-%d", i), mib, blockCap(legacy), nil))
	}
	var got []string
	token := ""
	for {
		resp, err := list(token, 3)
		n.must(err)
		for _, e := range resp.GetEntries() {
			got = append(got, e.GetVolume().GetVolumeId())
		}
		// A page's last volume may go before the next page is asked for.
		if len(got) == 3 {
			n.must(volume{n: n, id: got[2]}.delete())
		}
		if token = resp.GetNextToken(); token == "" {
			break
		}
	}
	if len(got) != len(made) {
		t.Errorf("pages show %v", got)
	}
	_, err := list("nonsense", 0)
	code(t, err, codes.Aborted)
	_, err = list("", -1)
	code(t, err, codes.InvalidArgument)
}

func TestGetCapacity(t *testing.T) {
	n := newFake(t)
	ask := func(params map[string]string, t *csi.Topology) *csi.GetCapacityResponse {
		resp, err := n.ctrl.GetCapacity(n.t.Context(), &csi.GetCapacityRequest{Parameters: params, AccessibleTopology: t})
		n.must(err)
		return resp
	}
	free := ask(map[string]string{"csi.storage.k8s.io/fstype": "xfs"}, nil)
	if free.GetAvailableCapacity() <= 0 || free.GetMaximumVolumeSize().GetValue() != free.GetAvailableCapacity() {
		t.Errorf("capacity %v", free)
	}
	if got := free.GetMinimumVolumeSize().GetValue(); got != 300*mib {
		t.Errorf("minimum %d, want that of xfs", got)
	}
	here := &csi.Topology{Segments: map[string]string{"topology.csi-loop.io/node": "node-a"}}
	there := &csi.Topology{Segments: map[string]string{"topology.csi-loop.io/node": "node-b"}}
	if ask(nil, here).GetAvailableCapacity() == 0 {
		t.Error("nothing on this node")
	}
	if ask(nil, there).GetAvailableCapacity() != 0 {
		t.Error("capacity on another node")
	}
	if ask(map[string]string{"pool": "other"}, here).GetAvailableCapacity() != 0 {
		t.Error("capacity in a pool that is not here")
	}
	_, err := n.ctrl.GetCapacity(t.Context(), &csi.GetCapacityRequest{Parameters: map[string]string{"pol": "x"}})
	code(t, err, codes.InvalidArgument)
}

func TestValidateVolumeCapabilities(t *testing.T) {
	n := newFake(t)
	v := n.create("pvc-1", 16*mib, mountCap("ext4", legacy), nil)
	ask := func(c *csi.VolumeCapability, params map[string]string) (confirmed bool, message string) {
		resp, err := n.ctrl.ValidateVolumeCapabilities(t.Context(), &csi.ValidateVolumeCapabilitiesRequest{
			VolumeId: v.id, VolumeCapabilities: []*csi.VolumeCapability{c}, Parameters: params,
		})
		n.must(err)
		return resp.GetConfirmed() != nil, resp.GetMessage()
	}
	if ok, why := ask(mountCap("", manyWriters), nil); !ok {
		t.Errorf("not confirmed: %s", why)
	}
	for name, c := range map[string]*csi.VolumeCapability{
		"block": blockCap(legacy), "xfs": mountCap("xfs", legacy),
		"many nodes": mountCap("ext4", csi.VolumeCapability_AccessMode_MULTI_NODE_SINGLE_WRITER),
	} {
		if ok, why := ask(c, nil); ok || why == "" {
			t.Errorf("%s: confirmed %v, message %q", name, ok, why)
		}
	}
	if ok, _ := ask(mountCap("ext4", legacy), map[string]string{"allocation": "thin"}); ok {
		t.Error("parameters that differ are confirmed")
	}
}

// TestValidateCopies: a copy is confirmed with the parameters that it was made with, and
// with no others.
func TestValidateCopies(t *testing.T) {
	n := newFake(t)
	v := n.create("v", 16*mib, mountCap("ext4", oneWriter), map[string]string{"mkfsOptions": "-N 1000", "blockSize": "512"})
	s, err := v.snapshot("s")
	n.must(err)
	params := map[string]string{"allocation": "thin", "mkfsOptions": "-N 2000"}
	made, err := n.copy("c", fromSnapshot(s.GetSnapshotId()), 16*mib, mountCap("ext4", oneWriter), params)
	n.must(err)
	for _, c := range []struct {
		id        string
		params    map[string]string
		confirmed bool
	}{
		{made.GetVolumeId(), params, true},
		{made.GetVolumeId(), map[string]string{"allocation": "thin", "blockSize": "512"}, true},
		{made.GetVolumeId(), map[string]string{"allocation": "thin", "blockSize": "4096"}, false},
		{made.GetVolumeId(), map[string]string{"allocation": "thin", "mkfsOptions": "--nonsense"}, false},
		{made.GetVolumeId(), map[string]string{"allocation": "thick"}, false},
		{v.id, map[string]string{"blockSize": "512"}, false}, // no copy
		{v.id, map[string]string{"mkfsOptions": "-N 1000"}, false},
		{v.id, map[string]string{"mkfsOptions": "-N 1000", "blockSize": "512"}, true},
	} {
		resp, err := n.ctrl.ValidateVolumeCapabilities(t.Context(), &csi.ValidateVolumeCapabilitiesRequest{
			VolumeId: c.id, VolumeCapabilities: []*csi.VolumeCapability{mountCap("ext4", oneWriter)}, Parameters: c.params,
		})
		n.must(err)
		if got := resp.GetConfirmed() != nil; got != c.confirmed {
			t.Errorf("%s, %v: confirmed %v: %s", c.id, c.params, got, resp.GetMessage())
		}
	}
}

func TestExpandImage(t *testing.T) {
	n := newFake(t)
	v := n.create("pvc-1", 16*mib, mountCap("ext4", legacy), nil)
	grow := func(id string, required, limit int64) (int64, error) {
		resp, err := n.ctrl.ControllerExpandVolume(t.Context(), &csi.ControllerExpandVolumeRequest{
			VolumeId: id, CapacityRange: &csi.CapacityRange{RequiredBytes: required, LimitBytes: limit},
		})
		return resp.GetCapacityBytes(), err
	}
	size, err := grow(v.id, 20*mib+1, 0)
	code(t, err, codes.OK)
	if size != 21*mib {
		t.Errorf("size %d", size)
	}
	if size, err = grow(v.id, 10*mib, 0); err != nil || size != 21*mib {
		t.Errorf("smaller than it is: %d %v", size, err)
	}
	_, err = grow(v.id, 0, 20*mib)
	code(t, err, codes.OutOfRange)
	_, err = grow(v.id, 1<<60, 0)
	code(t, err, codes.ResourceExhausted)
	_, err = grow(v.id+"x", 30*mib, 0)
	code(t, err, codes.NotFound)
	_, err = n.ctrl.ControllerExpandVolume(t.Context(), &csi.ControllerExpandVolumeRequest{VolumeId: v.id})
	code(t, err, codes.InvalidArgument)
}

func TestBusyVolumeIsAborted(t *testing.T) {
	n := newFake(t)
	v := n.create("pvc-1", 16*mib, mountCap("ext4", legacy), nil)
	unlock, err := n.d.lockVolume(v.id, "Test")
	n.must(err)
	code(t, v.stage(), codes.Aborted)
	code(t, v.delete(), codes.Aborted)
	_, err = n.ctrl.CreateVolume(t.Context(), &csi.CreateVolumeRequest{Name: "pvc-1", VolumeCapabilities: []*csi.VolumeCapability{v.cap}})
	code(t, err, codes.Aborted)
	n.create("pvc-2", 16*mib, mountCap("ext4", legacy), nil) // nobody else waits
	unlock()
	n.must(v.stage())
	n.must(v.unstage())
}

func TestStatusTableIsTotal(t *testing.T) {
	if got := codeOf(errors.New("anything")); got != codes.Internal {
		t.Errorf("unknown error is %s", got)
	}
	for _, s := range sentinelCodes {
		if got := codeOf(fmt.Errorf("wrapped: %w", s.err)); got != s.code {
			t.Errorf("%v: %s, want %s", s.err, got, s.code)
		}
	}
}
