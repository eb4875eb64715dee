package driver

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/csi-loop/csi-loop/pkg/crypt"
	"github.com/csi-loop/csi-loop/pkg/loop"
	"github.com/csi-loop/csi-loop/pkg/mount"
)

// What a script has besides calls.
const (
	kernelRefuses = "kernel refuses" // something, once
	driverStarts  = "driver starts"  // anew
)

// callNumbers are the steps that scripts may have. Scripts lie in testdata, and have the
// numbers: what is new comes at the end.
var callNumbers = slices.Concat(
	ofService("csi.v1.Identity", "GetPluginInfo", "GetPluginCapabilities", "Probe"),
	ofService("csi.v1.Controller", "CreateVolume", "DeleteVolume", "ControllerPublishVolume", "ControllerUnpublishVolume", "ValidateVolumeCapabilities",
		"ListVolumes", "ControllerListVolumeHealth", "ControllerGetVolumeHealth", "GetCapacity", "ControllerGetCapabilities", "CreateSnapshot",
		"DeleteSnapshot", "ListSnapshots", "GetSnapshot", "ControllerExpandVolume", "ControllerGetVolume", "ControllerModifyVolume"),
	ofService("csi.v1.GroupController", "GroupControllerGetCapabilities", "CreateVolumeGroupSnapshot", "DeleteVolumeGroupSnapshot", "GetVolumeGroupSnapshot"),
	ofService("csi.v1.Node", "NodeStageVolume", "NodeUnstageVolume", "NodePublishVolume", "NodeUnpublishVolume", "NodeGetVolumeStats", "NodeGetVolumeHealth",
		"NodeGetStorageHealth", "NodeExpandVolume", "NodeGetCapabilities", "NodeGetInfo"),
	[]string{kernelRefuses, driverStarts},
	ofService("csi.v1.SnapshotMetadata", "GetMetadataAllocated", "GetMetadataDelta"),
	ofService(adminService, adminTakeIn, adminTemplates, adminRemoveTemplate),
)

func ofService(service string, methods ...string) (all []string) {
	for _, m := range methods {
		all = append(all, "/"+service+"/"+m)
	}
	return all
}

// script is a series of steps in bytes: each begins with its number and ends with 0xff.
// What follows a step's name and a blank are choices.
func script(t testing.TB, steps ...string) (b []byte) {
	t.Helper()
	for _, step := range steps {
		name, choices, _ := strings.Cut(step, "|")
		i := slices.IndexFunc(callNumbers, func(m string) bool { return m == name || strings.HasSuffix(m, "/"+name) })
		if i < 0 {
			t.Fatalf("no step %s", name)
		}
		b = append(append(append(b, byte(i)), choices...), 0xff)
	}
	return b
}

// FuzzCalls makes a series of calls out of bytes, over fake devices and a real pool.
// Each call is answered with a code that CSI knows, whatever it asks for, and what the
// series made can be taken back by the calls that do so. The files in testdata are
// scripts by what they do.
func FuzzCalls(f *testing.F) {
	for i, m := range callNumbers {
		f.Add(append(script(f, "CreateVolume", "NodeStageVolume", "NodePublishVolume"), byte(i)))
		if testing.Short() {
			continue
		}
		f.Add([]byte{byte(i)})
		f.Add(append(script(f, "CreateVolume"), byte(i)))
		f.Add(append(script(f, "CreateVolume", "NodeStageVolume", "CreateSnapshot", "CreateVolumeGroupSnapshot|\x00\x01"), script(f, m)...))
	}
	raw := "CreateVolume|\x00\x00\x00\x00\x02" // name, limit, required, one capability: block
	f.Add(script(f, "CreateVolume", kernelRefuses, "NodeStageVolume", "NodePublishVolume", kernelRefuses, "NodeUnpublishVolume", "NodeUnstageVolume"))
	f.Add(script(f, raw, "NodeStageVolume", "NodePublishVolume", "ControllerExpandVolume|\x00\x00\x02", "NodeExpandVolume"))
	// Published twice, once read-only: volume, context, staging, target, capability, read-only.
	f.Add(script(f, raw, "NodeStageVolume", "NodePublishVolume", "NodePublishVolume|\x00\x00\x00\x01\x00\x00\x01", "NodeUnpublishVolume"))
	// An inline ephemeral volume: at the end two attributes.
	f.Add(script(f, "NodePublishVolume|\x02\x00\x00\x00\x01\x00\x00\x00\x02\x0a\x00\x0b\x06", "NodeUnpublishVolume|\x02"))
	// A mapped one.
	f.Add(script(f, "NodeStageVolume|\x01\x00\x00\x02\x00\x00\x01\x06\x00", "NodePublishVolume|\x01", "NodeUnpublishVolume|\x01"))
	// A second one while the first is staged: by its name nothing of the first is ended.
	f.Add(script(f, "CreateVolume", "NodeStageVolume", "CreateVolume|\x01"))
	f.Fuzz(func(t *testing.T, script []byte) {
		g := newCallMaker(t)
		for i, step := range bytes.Split(script, []byte{0xff}) {
			if i == 16 || len(step) == 0 {
				break
			}
			g.rest = step
			g.step(callNumbers[int(g.byte())%len(callNumbers)])
		}
		clear(g.n.fake.fail)
		g.takeBack()
	})
}

// callMaker turns bytes into calls. A byte that is 0, or not there, gives what is
// most likely to succeed.
type callMaker struct {
	n    *node
	rest []byte
	// What calls may name; what was made last comes first.
	ids, snapshots, groups []string
	// capability is that of the last call, which the next is likely to have too.
	capability *csi.VolumeCapability
	// answers are the last codes, by call.
	answers map[string]codes.Code
}

func newCallMaker(t *testing.T) *callMaker {
	n, mappings := newFakeMappings(t)
	mappings.size(16 * mib)
	n.mappings = oneMapping{mappings}
	n.d.crypt = n.mappings
	g := &callMaker{n: n, ids: []string{"nonsense", "mapped-1", "inline-1"}, capability: mountCap("", manyWriters), answers: map[string]codes.Code{}}
	disk := filepath.Join(n.dirs[0], "disk.img")
	g.must(os.WriteFile(disk, nil, 0o600))
	g.must(os.Truncate(disk, 4*mib))
	for _, p := range g.paths() {
		g.must(os.MkdirAll(filepath.Dir(p), 0o750))
	}
	return g
}

// oneMapping has one mapping at a time: all of the fake's are one node.
type oneMapping struct{ *fakeMappings }

func (o oneMapping) Open(ctx context.Context, device string, passphrase []byte, s crypt.OpenSpec) (crypt.Mapping, error) {
	if len(o.over) > 0 {
		return crypt.Mapping{}, crypt.ErrBusy
	}
	return o.fakeMappings.Open(ctx, device, passphrase, s)
}

func (g *callMaker) must(err error) {
	g.n.t.Helper()
	g.n.must(err)
}

func (g *callMaker) byte() byte {
	if len(g.rest) == 0 {
		return 0
	}
	b := g.rest[0]
	g.rest = g.rest[1:]
	return b
}

// pick chooses one of some values.
func pick[T any](g *callMaker, from ...T) T { return from[int(g.byte())%len(from)] }

func (g *callMaker) step(name string) {
	g.n.t.Helper()
	switch {
	case name == driverStarts:
		g.n.restart()
	case name == kernelRefuses:
		g.n.fake.failOnce(pick(g, "unmount", "bind", "mount", "growfs", "device", "check", "freeze", "sync", "readahead"), mount.ErrBusy)
		g.n.fake.failOnce(pick(g, "detach", "attach", "drop"), loop.ErrBusy)
	case strings.HasPrefix(name, "/"+adminService+"/"):
		g.operate(name)
	default:
		g.call(name)
	}
}

// call makes one call of CSI and checks its answer.
func (g *callMaker) call(name string) {
	t := g.n.t
	t.Helper()
	service, method, _ := strings.Cut(name[1:], "/")
	found, err := protoregistry.GlobalFiles.FindDescriptorByName(protoreflect.FullName(service + "." + method))
	g.must(err)
	m, ok := found.(protoreflect.MethodDescriptor)
	if !ok {
		t.Fatalf("%s is a %T", name, found)
	}
	req := newMessage(t, m.Input())
	g.fill(req.ProtoReflect(), 0)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if m.IsStreamingServer() {
		g.answered(name, req, g.stream(ctx, name, req, m.Output()))
		return
	}
	resp := newMessage(t, m.Output())
	err = g.n.conn.Invoke(ctx, name, req, resp)
	g.answered(name, req, err)
	if err != nil {
		return
	}
	switch made := resp.(type) {
	case *csi.CreateVolumeResponse:
		g.ids = slices.Insert(g.ids, 0, made.GetVolume().GetVolumeId())
	case *csi.CreateSnapshotResponse:
		g.snapshots = slices.Insert(g.snapshots, 0, made.GetSnapshot().GetSnapshotId())
	case *csi.CreateVolumeGroupSnapshotResponse:
		g.groups = slices.Insert(g.groups, 0, made.GetGroupSnapshot().GetGroupSnapshotId())
		for _, s := range made.GetGroupSnapshot().GetSnapshots() {
			g.snapshots = append(g.snapshots, s.GetSnapshotId())
		}
	}
}

// answered checks how a call ended.
func (g *callMaker) answered(name string, req any, err error) {
	t := g.n.t
	t.Helper()
	s := status.Convert(err)
	g.answers[name] = s.Code()
	switch {
	case err == nil:
	case s.Code() == codes.Unknown, s.Code() == codes.Internal, s.Code() == codes.DeadlineExceeded, s.Code() == codes.DataLoss:
		t.Errorf("%s(%v): %v", name, req, err)
	case s.Message() == "" || len(s.Details()) > 0:
		t.Errorf("%s(%v): %v: want a message and no details", name, req, err)
	}
}

// stream makes a call that is answered with many messages. What they list is in order,
// within the snapshot, and no more at once than was asked for.
func (g *callMaker) stream(ctx context.Context, name string, req proto.Message, answer protoreflect.MessageDescriptor) error {
	t := g.n.t
	t.Helper()
	s, err := g.n.conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, name)
	g.must(err)
	g.must(s.SendMsg(req))
	g.must(s.CloseSend())
	limit := 0
	if l, ok := req.(interface{ GetMaxResults() int32 }); ok {
		limit = int(l.GetMaxResults())
	}
	for end := int64(0); ; {
		resp := newMessage(t, answer)
		err := s.RecvMsg(resp)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		got, ok := resp.(interface {
			GetVolumeCapacityBytes() int64
			GetBlockMetadata() []*csi.BlockMetadata
		})
		if !ok {
			t.Fatalf("%T", resp)
		}
		if n := len(got.GetBlockMetadata()); limit > 0 && n > limit {
			t.Errorf("%s(%v): %d results at once", name, req, n)
		}
		for _, b := range got.GetBlockMetadata() {
			if b.GetByteOffset() < end || b.GetSizeBytes() <= 0 || b.GetSizeBytes() > got.GetVolumeCapacityBytes()-b.GetByteOffset() {
				t.Errorf("%s(%v): %v behind %d, of %d bytes", name, req, b, end, got.GetVolumeCapacityBytes())
			}
			end = b.GetByteOffset() + b.GetSizeBytes()
		}
	}
}

// operate makes one call of the operator's service and checks its answer.
func (g *callMaker) operate(name string) {
	t := g.n.t
	t.Helper()
	var ask any
	switch name[strings.LastIndex(name, "/")+1:] {
	case adminTakeIn:
		ask = g.takeInRequest()
	case adminTemplates:
		ask = g.word("", "default", "other")
	case adminRemoveTemplate:
		ask = []string{g.word("", "default", "other"), g.word("v", "w", "")}
	}
	req, err := json.Marshal(ask)
	g.must(err)
	if g.byte() == 1 {
		req = []byte(g.raw())
	}
	for {
		var resp wrapperspb.BytesValue
		err := g.n.conn.Invoke(t.Context(), name, wrapperspb.Bytes(req), &resp)
		g.answered(name, string(req), err)
		if err != nil || !strings.HasSuffix(name, "/"+adminTakeIn) {
			return
		}
		var p TakeInProgress
		g.must(json.Unmarshal(resp.GetValue(), &p))
		if p.Volume != nil {
			g.ids = slices.Insert(g.ids, 0, p.Volume.ID)
		}
		if r, ok := ask.(TakeInRequest); p.Done || ok && r.Cancel {
			return
		}
	}
}

func newMessage(t *testing.T, d protoreflect.MessageDescriptor) proto.Message {
	t.Helper()
	kind, err := protoregistry.GlobalTypes.FindMessageByName(d.FullName())
	if err != nil {
		t.Fatal(err)
	}
	return kind.New().Interface()
}

// takeBack ends everything by the calls that are there for it, and looks that
// nothing is left. What is mounted at a path may be another volume's, and is not
// unmounted in the name of this one; after the first pass nobody has it.
func (g *callMaker) takeBack() {
	n, t := g.n, g.n.t
	for range 2 {
		for _, id := range g.ids {
			for _, target := range g.paths() {
				_, err := n.client.NodeUnpublishVolume(t.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: id, TargetPath: target})
				if code := status.Code(err); code != codes.OK && code != codes.NotFound && (code != codes.FailedPrecondition || !g.usedByOther(id, target)) {
					t.Errorf("unpublish %q at %q: %v", id, target, err)
				}
			}
		}
		for _, id := range g.ids {
			for _, staging := range g.paths() {
				_, err := n.client.NodeUnstageVolume(t.Context(), &csi.NodeUnstageVolumeRequest{VolumeId: id, StagingTargetPath: staging})
				if err != nil && status.Code(err) != codes.NotFound {
					t.Errorf("unstage %q at %q: %v", id, staging, err)
				}
			}
		}
	}
	g.deleteAll()
	if left := n.d.state.list(); len(left) > 0 {
		t.Errorf("records are left: %v", left)
	}
}

// deleteAll deletes what is in the pool, by the calls that are there for it.
func (g *callMaker) deleteAll() {
	n, t := g.n, g.n.t
	for _, id := range g.groups {
		if _, err := csi.NewGroupControllerClient(n.conn).DeleteVolumeGroupSnapshot(t.Context(), &csi.DeleteVolumeGroupSnapshotRequest{GroupSnapshotId: id}); err != nil {
			t.Errorf("delete group %q: %v", id, err)
		}
	}
	for _, id := range g.snapshots {
		if _, err := n.ctrl.DeleteSnapshot(t.Context(), &csi.DeleteSnapshotRequest{SnapshotId: id}); err != nil {
			t.Errorf("delete snapshot %q: %v", id, err)
		}
	}
	for _, id := range g.ids {
		if _, err := n.ctrl.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: id}); err != nil {
			t.Errorf("delete %q: %v", id, err)
		}
	}
	templates, err := Admin{Conn: n.conn}.Templates(t.Context(), "")
	g.must(err)
	for _, made := range templates {
		g.must(Admin{Conn: n.conn}.RemoveTemplate(t.Context(), made.Pool, made.Name))
	}
	if left := n.store.List(); len(left) > 0 {
		t.Errorf("volumes are left: %v", left)
	}
	if left := n.store.ListSnapshots(); len(left) > 0 {
		t.Errorf("snapshots are left: %v", left)
	}
	for _, dir := range []string{"volumes", "snapshots", "groups", "templates"} {
		left, err := os.ReadDir(filepath.Join(n.pool[0].Path, dir))
		if err != nil && !os.IsNotExist(err) || len(left) > 0 {
			t.Errorf("%s: %v are left, %v", dir, left, err)
		}
	}
}

// usedByOther says whether another volume is staged or published at path.
func (g *callMaker) usedByOther(id, path string) bool {
	return slices.ContainsFunc(g.n.d.state.list(), func(r stageRecord) bool {
		_, published := r.Targets[path]
		return r.VolumeID != id && (published || r.StagingPath == path)
	})
}
