package driver

import (
	"os"
	"path/filepath"
	"testing"

	"google.golang.org/grpc/codes"

	"github.com/csi-loop/csi-loop/pkg/mount"
)

// A filesystem that stopped after an error was not meant to be read-only.
func TestMeantReadOnly(t *testing.T) {
	for name, test := range map[string]struct {
		m    mount.Mount
		want bool
	}{
		"writable":               {m: mount.Mount{Options: []string{"rw", "relatime"}}},
		"mounted for reading":    {m: mount.Mount{ReadOnly: true, Options: []string{"ro"}, SuperOptions: []string{"ro"}}, want: true},
		"a bind for reading":     {m: mount.Mount{ReadOnly: true, Options: []string{"ro"}, SuperOptions: []string{"rw"}}, want: true},
		"stopped":                {m: mount.Mount{ReadOnly: true, Options: []string{"rw"}, SuperOptions: []string{"rw", "emergency_ro"}}},
		"stopped, before 6.14":   {m: mount.Mount{ReadOnly: true, Options: []string{"rw"}, SuperOptions: []string{"ro"}}},
		"nobody says more":       {m: mount.Mount{ReadOnly: true}, want: true},
		"stopped, and read-only": {m: mount.Mount{ReadOnly: true, Options: []string{"ro"}, SuperOptions: []string{"rw", "emergency_ro"}}, want: true},
	} {
		if got := meantReadOnly(test.m); got != test.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// A raw block volume whose record was lost still has its publications: an access mode for
// one target takes no second one, and the same one again is no second one.
func TestLostStateOfAPublishedRawVolume(t *testing.T) {
	n := newFake(t)
	v := n.create("pvc-1", 16*mib, blockCap(oneWriter), nil).up("a")
	// The kubelet binds each publication once more.
	own := filepath.Join(n.dir, "volumeDevices", "pvc-1", "dev", "a")
	n.must(os.MkdirAll(filepath.Dir(own), 0o750))
	r, _ := n.d.state.get(v.id)
	info, err := n.fake.Status(t.Context(), r.Device.ref())
	n.must(err)
	n.must(n.fake.Bind(t.Context(), mount.BindSpec{Source: info.Path, Target: own}))
	for range 2 {
		n.loseState()
		code(t, v.publish("b", false), codes.FailedPrecondition)
		code(t, v.publish("a", true), codes.AlreadyExists)
		n.must(v.publish("a", false))
	}
	code(t, v.unstage(), codes.FailedPrecondition)
	n.must(fakeMounts{n.fake}.Remove(t.Context(), own))
	n.must(v.unpublish("a"))
	n.must(v.publish("b", false))
	v.down("b")

	// Of a writable device and one for reading beside it.
	v = n.create("pvc-2", 16*mib, blockCap(manyWriters), nil).up("a")
	n.must(v.publish("r", true))
	n.loseState()
	n.must(v.publish("r", true))
	code(t, v.publish("r", false), codes.AlreadyExists)
	code(t, v.publish("a", true), codes.AlreadyExists)
	n.must(v.publish("a", false))
	n.must(v.publish("b", false))
	v.down("a", "b", "r")
}

func TestIsKubeletsOwn(t *testing.T) {
	const dir = "/var/lib/kubelet/plugins/kubernetes.io/csi/volumeDevices/"
	for path, want := range map[string]bool{
		dir + "pvc-1/dev/pod":         true,
		dir + "publish/pvc-1/pod":     false,
		dir + "publish/dev/pod":       false,
		dir + "staging/pvc-1":         false,
		"/somewhere/else/dev/pod":     false,
		dir + "pvc-1/data/vol_data":   false,
		dir + "pvc-1/dev/pod/further": false,
	} {
		if got := isKubeletsOwn(path); got != want {
			t.Errorf("%s: %t", path, got)
		}
	}
}
