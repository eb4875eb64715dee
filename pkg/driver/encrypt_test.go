package driver

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/csi-loop/csi-loop/pkg/crypt"
	"github.com/csi-loop/csi-loop/pkg/image"
)

// fakeCrypt says whether there is dm-crypt; nothing can be mapped with it.
type fakeCrypt struct {
	encrypter
	err error
}

func (f *fakeCrypt) Available() error { return f.err }

func withCrypt(t *testing.T, err error) *node {
	n := newFake(t)
	n.d.crypt = &fakeCrypt{err: err}
	return n
}

func (n *node) tryCreate(name string, c *csi.VolumeCapability, params map[string]string, src *csi.VolumeContentSource) (*csi.Volume, error) {
	resp, err := n.ctrl.CreateVolume(n.t.Context(), &csi.CreateVolumeRequest{
		Name: name, CapacityRange: &csi.CapacityRange{RequiredBytes: 16 * mib}, VolumeCapabilities: []*csi.VolumeCapability{c},
		Parameters: params, VolumeContentSource: src,
	})
	return resp.GetVolume(), err
}

func TestNoEncryptionWithoutDMCrypt(t *testing.T) {
	n := withCrypt(t, fmt.Errorf("%w: no such thing", crypt.ErrUnavailable))
	params := map[string]string{"encrypted": "true"}
	_, err := n.tryCreate("v", blockCap(legacy), params, nil)
	code(t, err, codes.ResourceExhausted) // Kubernetes chooses another node
	if made := n.store.List(); len(made) > 0 {
		t.Errorf("made %v", made)
	}
	resp, err := n.ctrl.GetCapacity(t.Context(), &csi.GetCapacityRequest{Parameters: params})
	if err != nil || resp.GetAvailableCapacity() != 0 {
		t.Errorf("capacity %v, %v", resp, err)
	}
	if _, err := n.tryCreate("v", blockCap(legacy), map[string]string{"encrypted": "false"}, nil); err != nil {
		t.Error(err)
	}

	// A volume that was made while there was dm-crypt exists: it must not be made again
	// elsewhere.
	n.d.crypt = &fakeCrypt{}
	have, err := n.tryCreate("secret", blockCap(legacy), params, nil)
	n.must(err)
	n.d.crypt = &fakeCrypt{err: crypt.ErrUnavailable}
	again, err := n.tryCreate("secret", blockCap(legacy), params, nil)
	if err != nil || again.GetVolumeId() != have.GetVolumeId() {
		t.Errorf("%v, %v", again, err)
	}
	_, err = n.tryCreate("copy", blockCap(legacy), params, volume{id: have.GetVolumeId()}.asSource())
	code(t, err, codes.ResourceExhausted)
	_, err = n.client.NodeStageVolume(t.Context(), &csi.NodeStageVolumeRequest{
		VolumeId: have.GetVolumeId(), StagingTargetPath: filepath.Join(n.dir, "staging"), VolumeCapability: blockCap(legacy), Secrets: map[string]string{"passphrase": leftKey},
	})
	code(t, err, codes.FailedPrecondition) // what the kubelet takes for final: nothing is attached
}

func TestEncryptionParameters(t *testing.T) {
	n := withCrypt(t, nil)
	for _, params := range []map[string]string{
		{"encrypted": "yes please"},
		{"encryptedDiscard": "true"},
		{"encryptedDiscard": "true", "encrypted": "false", "allocation": "thin"},
		{"encryptedDiscard": "true", "encrypted": "true"},
		{"encrypted": "true", "template": "golden"},
	} {
		_, err := n.tryCreate("v", blockCap(legacy), params, nil)
		code(t, err, codes.InvalidArgument)
	}
	_, err := n.client.NodePublishVolume(t.Context(), &csi.NodePublishVolumeRequest{
		VolumeId: "inline", TargetPath: filepath.Join(n.dir, "inline"), VolumeCapability: mountCap("ext4", oneWriter),
		VolumeContext: map[string]string{ephemeralKey: "true", "size": "16Mi", "encrypted": "true"},
	})
	code(t, err, codes.InvalidArgument)
}

// A tenant gets the size that he asked for, whatever the header takes.
func TestEncryptedSizes(t *testing.T) {
	n := withCrypt(t, nil)
	params := map[string]string{"encrypted": "true"}
	before, err := n.ctrl.GetCapacity(t.Context(), &csi.GetCapacityRequest{})
	n.must(err)
	less, err := n.ctrl.GetCapacity(t.Context(), &csi.GetCapacityRequest{Parameters: params})
	n.must(err)
	if got := before.GetAvailableCapacity() - less.GetAvailableCapacity(); got < image.HeaderSize || got > image.HeaderSize+mib {
		t.Errorf("the header takes %d bytes of capacity", got)
	}
	v, err := n.tryCreate("v", blockCap(legacy), params, nil)
	n.must(err)
	if v.GetCapacityBytes() != 16*mib {
		t.Errorf("%d bytes", v.GetCapacityBytes())
	}
	if st, err := os.Stat(filepath.Join(n.pool[0].Path, "volumes", "v", "disk.img")); err != nil || st.Size() != 16*mib+image.HeaderSize {
		t.Errorf("image: %v, %v", st, err)
	}
	again, err := n.tryCreate("v", blockCap(legacy), params, nil)
	if err != nil || again.GetVolumeId() != v.GetVolumeId() || again.GetCapacityBytes() != 16*mib {
		t.Errorf("%v, %v", again, err)
	}
	_, err = n.tryCreate("v", blockCap(legacy), nil, nil)
	code(t, err, codes.AlreadyExists)
	grown, err := n.ctrl.ControllerExpandVolume(t.Context(), &csi.ControllerExpandVolumeRequest{VolumeId: v.GetVolumeId(), CapacityRange: &csi.CapacityRange{RequiredBytes: 24 * mib, LimitBytes: 24 * mib}})
	if err != nil || grown.GetCapacityBytes() != 24*mib {
		t.Errorf("%v, %v", grown, err)
	}
	if got := n.reported(v.GetVolumeId()); got.Size != 24*mib || got.Encryption != "luks2" {
		t.Errorf("reported as %+v", got)
	}
}

// A copy is what its source is: neither is plain text taken for encrypted nor the other
// way round.
func TestEncryptedCopies(t *testing.T) {
	n := withCrypt(t, nil)
	params := map[string]string{"encrypted": "true"}
	secret, err := n.tryCreate("secret", blockCap(legacy), params, nil)
	n.must(err)
	plain, err := n.tryCreate("plain", blockCap(legacy), nil, nil)
	n.must(err)
	for _, test := range []struct {
		of     string
		params map[string]string
		want   codes.Code
	}{
		{secret.GetVolumeId(), params, codes.OK},
		{secret.GetVolumeId(), nil, codes.InvalidArgument},
		{plain.GetVolumeId(), params, codes.InvalidArgument},
		{plain.GetVolumeId(), nil, codes.OK},
	} {
		made, err := n.ctrl.CreateSnapshot(t.Context(), &csi.CreateSnapshotRequest{Name: "s", SourceVolumeId: test.of})
		n.must(err)
		if got := made.GetSnapshot().GetSizeBytes(); got != 16*mib {
			t.Errorf("the snapshot has %d bytes", got)
		}
		for name, src := range map[string]*csi.VolumeContentSource{
			"snapshot": {Type: &csi.VolumeContentSource_Snapshot{Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: made.GetSnapshot().GetSnapshotId()}}},
			"volume":   {Type: &csi.VolumeContentSource_Volume{Volume: &csi.VolumeContentSource_VolumeSource{VolumeId: test.of}}},
		} {
			v, err := n.tryCreate("copy-"+name, blockCap(legacy), test.params, src)
			code(t, err, test.want)
			if err == nil {
				if v.GetCapacityBytes() != 16*mib {
					t.Errorf("the copy has %d bytes", v.GetCapacityBytes())
				}
				_, err = n.ctrl.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: v.GetVolumeId()})
				n.must(err)
			}
		}
		n.deleteSnapshot(made.GetSnapshot().GetSnapshotId())
	}
}

// Nothing is taken for empty but what is certainly so.
func TestContentOf(t *testing.T) {
	const size = image.HeaderSize + 4*mib
	with := func(places map[int64]string) *os.File {
		f, err := os.Create(filepath.Join(t.TempDir(), "disk.img"))
		if err == nil {
			err = f.Truncate(size)
		}
		for at, text := range places {
			if err == nil {
				_, err = f.WriteAt([]byte(text), at)
			}
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = f.Close() })
		return f
	}
	for name, test := range map[string]struct {
		f    *os.File
		want content
	}{
		"nothing but a hole":              {with(nil), contentNone},
		"zeros that were written":         {with(map[int64]string{image.HeaderSize + mib: string(make([]byte, mib))}), contentNone},
		"an interrupted header":           {with(map[int64]string{0: "LUKS\xba\xbe\x00\x02", 32 << 10: "random"}), contentNone},
		"a header of version 1":           {with(map[int64]string{0: "LUKS\xba\xbe\x00\x01"}), contentDamaged},
		"a header of another size":        {with(map[int64]string{0: "LUKS\xba\xbe\x00\x02\x00\x00\x00\x00\x00\x00\x80\x00"}), contentDamaged},
		"data behind the header's place":  {with(map[int64]string{image.HeaderSize: "x"}), contentDamaged},
		"data at the end":                 {with(map[int64]string{size - 1: "x"}), contentDamaged},
		"data after zeros in one extent":  {with(map[int64]string{image.HeaderSize: string(make([]byte, 3*mib)) + "x"}), contentDamaged},
		"a damaged header and data":       {with(map[int64]string{0: "LUKS\xba\xbe\x00\x02", image.HeaderSize + mib: "x"}), contentDamaged},
		"a filesystem without encryption": {with(map[int64]string{1024 + 56: "\x53\xef", image.HeaderSize + mib: "x"}), contentDamaged},
	} {
		got, err := contentOf(context.Background(), "pool.volume", test.f)
		if err != nil || got != test.want {
			t.Errorf("%s: %v, %v, want %v", name, got, err, test.want)
		}
	}
}
