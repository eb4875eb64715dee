package driver

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/csi-loop/csi-loop/internal/roottest"
	"github.com/csi-loop/csi-loop/pkg/image"
)

// golden makes an image with a filesystem.
func (n *node) golden(name string, argv ...string) string {
	n.t.Helper()
	path := filepath.Join(n.dirs[0], name)
	n.must(os.WriteFile(path, nil, 0o600))
	n.must(os.Truncate(path, 20*mib+512))
	roottest.Run(n.t, append(argv, path)...)
	return path
}

func (n *node) takeIn(r TakeInRequest) (TakeInProgress, error) {
	for {
		p, err := Admin{Conn: n.conn}.TakeIn(n.t.Context(), r)
		if err != nil || p.Done {
			return p, err
		}
	}
}

func TestTakeIn(t *testing.T) {
	n := newFake(t)
	path := n.golden("old.img", "mkfs.ext4", "-q", "-F", "-b", "1024")
	before, err := os.ReadFile(path)
	n.must(err)
	r := TakeInRequest{Name: "shop-data", File: path, Method: image.Copy}
	for range 2 {
		p, err := n.takeIn(r)
		n.must(err)
		want := TakenIn{
			ID: image.VolumeID(n.store.Pools()[0].ID(), "shop-data"), Pool: "default", Size: 21 * mib, Filesystem: "ext4", BlockSize: 1024,
			Allocation: "thick", Driver: DefaultName, Topology: "topology.csi-loop.io/node", Node: "node-a",
		}
		if *p.Volume != want {
			t.Errorf("%+v", p.Volume)
		}
	}
	after, err := os.ReadFile(path)
	n.must(err)
	got, err := os.ReadFile(filepath.Join(n.pool[0].Path, "volumes/shop-data/disk.img"))
	n.must(err)
	if !bytes.Equal(before, after) || !bytes.Equal(got[:len(before)], before) {
		t.Error("the content was changed")
	}
	cut := filepath.Join(n.dirs[0], "cut.img")
	n.must(os.WriteFile(cut, before[:2*mib], 0o600))
	for name, c := range map[string]struct {
		r    TakeInRequest
		says string
	}{
		"no filesystem":     {TakeInRequest{Name: "x", File: path, Offset: mib, Method: image.Copy}, "--raw"},
		"cut filesystem":    {TakeInRequest{Name: "x", File: cut, Method: image.Copy}, "it was cut"},
		"no partition":      {TakeInRequest{Name: "x", File: path, Partition: 1, Method: image.Copy}, "no partition table"},
		"block size":        {TakeInRequest{Name: "x", File: path, BlockSize: 4096, Method: image.Copy}, "cannot show"},
		"missing":           {TakeInRequest{Name: "x", File: path + "?", Method: image.Copy}, "does not see"},
		"directory":         {TakeInRequest{Name: "x", File: n.dir, Method: image.Copy}, "regular"},
		"another file":      {TakeInRequest{Name: "x", File: path, Dev: 1, Ino: 1, Method: image.Copy}, "another file"},
		"both":              {TakeInRequest{Name: "x", File: path, Partition: 1, Offset: 1, Method: image.Copy}, "not both"},
		"an image of ours":  {TakeInRequest{Name: "x", File: filepath.Join(n.pool[0].Path, "volumes/shop-data/disk.img"), Method: image.Move}, "lies in pool"},
		"another size":      {TakeInRequest{Name: "shop-data", File: path, Size: 64 * mib, Method: image.Copy}, "different"},
		"another pool":      {TakeInRequest{Name: "x", File: path, Pool: "none", Method: image.Copy}, "no pool"},
		"moved template":    {TakeInRequest{Name: "x", File: path, Template: true, Method: image.Move}, "copy"},
		"no such way":       {TakeInRequest{Name: "x", File: path, Method: "steal"}, "none of"},
		"no such allocated": {TakeInRequest{Name: "x", File: path, Allocation: "fat", Method: image.Copy}, "neither thick nor thin"},
	} {
		if _, err := n.takeIn(c.r); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v", name, err)
		}
	}
	raw, err := n.takeIn(TakeInRequest{Name: "raw", File: path, Offset: mib, Length: mib, Raw: true, Method: image.Copy, Allocation: "thin"})
	n.must(err)
	if raw.Volume.Filesystem != "" || raw.Volume.BlockSize != 512 || raw.Volume.Size != mib {
		t.Errorf("%+v", raw.Volume)
	}
	volume{n: n, id: image.VolumeID(n.store.Pools()[0].ID(), "shop-data"), cap: mountCap("ext4", oneWriter)}.up("pod").down("pod")
	n.must(volume{n: n, id: raw.Volume.ID}.delete())
	n.halt()
	if _, err := (Admin{Conn: n.conn}).Templates(t.Context(), ""); err == nil {
		t.Error("an answer without a driver")
	}
}

// refusing is a node that answers everything with one error.
type refusing struct{ err error }

func (r refusing) operate(context.Context, string, []byte) (any, error) { return nil, r.err }

// TestOnlySilenceIsNotServed: who answers that it cannot is there, and what it says is
// shown; only a connection that cannot be made means that nobody is.
func TestOnlySilenceIsNotServed(t *testing.T) {
	socket := filepath.Join(socketDir(t), "csi.sock")
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := (Admin{Conn: conn}).Templates(t.Context(), ""); !errors.Is(err, ErrNotServed) {
		t.Errorf("without a socket: %v", err)
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer(grpc.UnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
		return handle(ctx, req)
	}))
	registerAdmin(s, refusing{status.Error(codes.Unavailable, "the pool is not mounted")})
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	// A client of its own: the first one waits before it tries again.
	second, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	if _, err := (Admin{Conn: second}).Templates(t.Context(), ""); err == nil || errors.Is(err, ErrNotServed) || !strings.Contains(err.Error(), "the pool is not mounted") {
		t.Errorf("it answers that it cannot: %v", err)
	}
	s.Stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestTakeInChangedFile: a golden image that was built again is no silent success.
func TestTakeInChangedFile(t *testing.T) {
	n := newFake(t)
	path := n.golden("golden.img", "mkfs.ext4", "-q", "-F")
	r := TakeInRequest{Name: "golden", File: path, Template: true, Method: image.Copy}
	_, err := n.takeIn(r)
	n.must(err)
	n.must(os.Remove(path))
	n.golden("golden.img", "mkfs.ext4", "-q", "-F")
	_, err = n.takeIn(r)
	if err == nil || !strings.Contains(err.Error(), image.ErrIncompatible.Error()) || !strings.Contains(err.Error(), "remove the template first") {
		t.Errorf("built again: %v", err)
	}
	n.must(Admin{Conn: n.conn}.RemoveTemplate(t.Context(), "", "golden"))
	_, err = n.takeIn(r)
	n.must(err)
}

// TestTakeInEndedUnseen: how a request ended whose asker went away is no answer to one who
// asks anew, of a file that has changed since.
func TestTakeInEndedUnseen(t *testing.T) {
	n := newFake(t)
	path := n.golden("golden.img", "mkfs.ext4", "-q", "-F")
	unseen := func(r TakeInRequest, end error) {
		t.Helper()
		wish, err := json.Marshal(r)
		n.must(err)
		key := image.DirName(r.Name)
		if r.Template {
			key = "template/" + key
		}
		job, err := n.d.jobs.join(t.Context(), key, adminTakeIn, string(wish), func() (func(context.Context) error, error) {
			return func(context.Context) error { return end }, nil
		})
		n.must(err)
		<-job.done
	}
	for _, template := range []bool{true, false} {
		r := TakeInRequest{Name: "golden", File: path, Template: template, Method: image.Copy}
		_, err := n.takeIn(r)
		n.must(err)
		unseen(r, nil)
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		n.must(err)
		_, err = f.WriteAt([]byte("other"), 100)
		n.must(errors.Join(err, f.Close()))
		r.Begin = true
		if _, err := n.takeIn(r); err == nil || !strings.Contains(err.Error(), image.ErrIncompatible.Error()) {
			t.Errorf("template: %t: asked anew: %v", template, err)
		}
	}
	r := TakeInRequest{Name: "attached", File: path, Method: image.Copy}
	unseen(r, preconditionf("it is attached"))
	r.Begin = true
	_, err := n.takeIn(r)
	n.must(err)
}

// TestTakeInFromThePoolsMount: a file in a pool's directory for that is moved, and what
// else lies in the pool is not.
func TestTakeInFromThePoolsMount(t *testing.T) {
	n := newFake(t)
	path := n.golden("old.img", "mkfs.ext4", "-q", "-F")
	incoming := filepath.Join(n.pool[0].Path, image.Incoming)
	n.must(os.MkdirAll(incoming, 0o700))
	inside := filepath.Join(incoming, "old.img")
	n.must(os.Rename(path, inside))
	for _, lies := range []string{"incoming.img", "volumes/incoming"} {
		lies = filepath.Join(n.pool[0].Path, lies)
		n.must(os.WriteFile(lies, make([]byte, mib), 0o600))
		if _, err := n.takeIn(TakeInRequest{Name: "x", File: lies, Raw: true, Method: image.Copy}); err == nil || !strings.Contains(err.Error(), "may lie in "+incoming) {
			t.Errorf("%s: %v", lies, err)
		}
		n.must(os.Remove(lies))
	}
	p, err := n.takeIn(TakeInRequest{Name: "moved", File: inside, Method: image.Move})
	n.must(err)
	if _, err := os.Lstat(inside); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the file: %v", err)
	}
	n.must(volume{n: n, id: p.Volume.ID}.delete())
}

func TestVolumesOfATemplate(t *testing.T) {
	n := newFake(t)
	path := n.golden("golden.img", "mkfs.ext4", "-q", "-F")
	class := map[string]string{"template": "golden"}
	create := func(name string, size int64, params map[string]string) (*csi.Volume, error) {
		return n.copy(name, nil, size, mountCap("ext4", oneWriter), params)
	}
	room := func() int64 {
		r, err := n.ctrl.GetCapacity(t.Context(), &csi.GetCapacityRequest{Parameters: class})
		n.must(err)
		return r.GetAvailableCapacity()
	}
	_, err := create("early", 0, class)
	code(t, err, codes.ResourceExhausted)
	if !strings.Contains(err.Error(), "csi-loop template add") || room() != 0 {
		t.Errorf("%v, room for %d bytes", err, room())
	}
	_, err = n.takeIn(TakeInRequest{Name: "golden", File: path, Template: true, Method: image.Auto})
	n.must(err)
	if room() == 0 {
		t.Error("no room")
	}
	for range 2 {
		made, err := create("v", 0, class)
		n.must(err)
		if made.GetCapacityBytes() != 21*mib || made.GetContentSource() != nil {
			t.Errorf("%v", made)
		}
	}
	made, err := create("larger", 64*mib, map[string]string{"template": "golden", "allocation": "thin"})
	n.must(err)
	if all := n.fresh().Templates; len(all) != 1 || all[0].Name != "golden" || all[0].Pool != "default" || all[0].Size != 21*mib || all[0].Volumes != 2 {
		t.Errorf("reported: %+v", all)
	}
	for name, c := range map[string]struct {
		size   int64
		params map[string]string
		code   codes.Code
	}{
		"smaller":       {mib, class, codes.OutOfRange},
		"formatted":     {0, map[string]string{"template": "golden", "mkfsOptions": "-N 1000"}, codes.InvalidArgument},
		"no name":       {0, map[string]string{"template": ""}, codes.InvalidArgument},
		"other blocks":  {0, map[string]string{"template": "golden", "blockSize": "512"}, codes.InvalidArgument},
		"another one":   {0, map[string]string{"template": "silver"}, codes.ResourceExhausted},
		"v without one": {21 * mib, nil, codes.AlreadyExists},
	} {
		wanted := "bad"
		if c.code == codes.AlreadyExists {
			wanted = "v"
		}
		_, err := create(wanted, c.size, c.params)
		if err == nil {
			t.Errorf("%s: made", name)
			continue
		}
		code(t, err, c.code)
	}
	all, err := Admin{Conn: n.conn}.Templates(t.Context(), "")
	n.must(err)
	if len(all) != 1 || all[0].Name != "golden" || all[0].Volumes != 2 || all[0].Filesystem != "ext4" {
		t.Errorf("%+v", all)
	}
	if _, err := (Admin{Conn: n.conn}).Templates(t.Context(), "none"); err == nil || !strings.Contains(err.Error(), `no pool "none"`) {
		t.Errorf("of a pool that is none: %v", err)
	}
	n.must(Admin{Conn: n.conn}.RemoveTemplate(t.Context(), "", "golden"))
	if err := (Admin{Conn: n.conn}).RemoveTemplate(t.Context(), "", "golden"); err == nil || errors.Is(err, ErrNotServed) {
		t.Errorf("removed again: %v", err)
	}
	_, err = create("v", 0, class)
	n.must(err) // it exists
	volume{n: n, id: made.GetVolumeId(), cap: mountCap("ext4", oneWriter)}.up("pod").down("pod")
	for _, each := range n.store.List() {
		n.must(volume{n: n, id: each.ID}.delete())
	}
}
