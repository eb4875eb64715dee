package driver

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	"github.com/csi-loop/csi-loop/pkg/loop"
	"github.com/csi-loop/csi-loop/pkg/mount"
)

// FuzzCalls makes a series of CSI calls out of bytes, over fake devices and a real
// pool. Each call is answered with a code that CSI knows, whatever it asks for,
// and what the series made can be taken back by the calls that do so.
func FuzzCalls(f *testing.F) {
	methods := unaryMethods(f)
	// Calls are separated by 0xff, and begin with the number of the method.
	script := func(calls ...string) []byte {
		var b []byte
		for _, c := range calls {
			name, choices, _ := strings.Cut(c, " ")
			i := slices.IndexFunc(methods, func(m protoreflect.MethodDescriptor) bool { return string(m.Name()) == name })
			if i < 0 {
				f.Fatalf("no method %s", name)
			}
			b = append(append(append(b, byte(i)), choices...), 0xff)
		}
		return b
	}
	for _, m := range methods {
		f.Add(script("CreateVolume", "NodeStageVolume", "NodePublishVolume", string(m.Name())))
		if testing.Short() {
			continue
		}
		f.Add(script(string(m.Name())))
		f.Add(script("CreateVolume", string(m.Name())))
		f.Add(script("CreateVolume", "NodeStageVolume", string(m.Name())))
	}
	raw := "CreateVolume \x00\x00\x00\x00\x02" // name, limit, required, one capability: block
	failing := append([]byte{byte(len(methods))}, 0xff)
	f.Add(slices.Concat(script("CreateVolume"), failing, script("NodeStageVolume", "NodePublishVolume"), failing, script("NodeUnpublishVolume", "NodeUnstageVolume")))
	f.Add(script(raw, "NodeStageVolume", "NodePublishVolume", "ControllerExpandVolume \x00\x00\x02", "NodeExpandVolume"))
	// Published twice, once read-only: volume, context, staging, target, capability, read-only.
	f.Add(script(raw, "NodeStageVolume", "NodePublishVolume", "NodePublishVolume \x00\x00\x00\x01\x00\x00\x01", "NodeUnpublishVolume"))
	// An inline ephemeral volume: at the end two attributes.
	f.Add(script("NodePublishVolume \x02\x00\x00\x00\x01\x00\x00\x00\x02\x0a\x00\x0b\x06", "NodeUnpublishVolume \x02"))
	// A mapped one.
	f.Add(script("NodeStageVolume \x01\x00\x00\x02\x00\x00\x01\x06\x00", "NodePublishVolume \x01", "NodeUnpublishVolume \x01"))
	// A second one while the first is staged: by its name nothing of the first is ended.
	f.Add(script("CreateVolume", "NodeStageVolume", "CreateVolume \x01"))
	f.Fuzz(func(t *testing.T, script []byte) {
		n := newFake(t)
		g := &callMaker{n: n, ids: []string{"nonsense", "mapped-1", "inline-1"}, capability: mountCap("", manyWriters)}
		disk := filepath.Join(n.dirs[0], "disk.img")
		g.must(os.WriteFile(disk, nil, 0o600))
		g.must(os.Truncate(disk, 4*mib))
		for _, p := range g.paths() {
			g.must(os.MkdirAll(filepath.Dir(p), 0o750))
		}
		for i, call := range bytes.Split(script, []byte{0xff}) {
			if i == 16 || len(call) == 0 {
				break
			}
			g.rest = call
			if i := int(g.byte()) % (len(methods) + 1); i < len(methods) {
				g.call(methods[i])
			} else { // the kernel refuses something once
				n.fake.failOnce(pick(g, "unmount", "bind", "mount", "growfs", "device", "check"), mount.ErrBusy)
				n.fake.failOnce(pick(g, "detach", "attach", "drop"), loop.ErrBusy)
			}
		}
		clear(n.fake.fail)
		g.takeBack()
	})
}

// unaryMethods are the calls of all services that the CSI specification has.
func unaryMethods(f *testing.F) []protoreflect.MethodDescriptor {
	f.Helper()
	file, err := protoregistry.GlobalFiles.FindFileByPath(csi.File_csi_proto.Path())
	if err != nil {
		f.Fatal(err)
	}
	var methods []protoreflect.MethodDescriptor
	for i := range file.Services().Len() {
		all := file.Services().Get(i).Methods()
		for j := range all.Len() {
			if m := all.Get(j); !m.IsStreamingServer() {
				methods = append(methods, m)
			}
		}
	}
	return methods
}

// callMaker turns bytes into calls. A byte that is 0, or not there, gives what is
// most likely to succeed.
type callMaker struct {
	n    *node
	rest []byte
	ids  []string // those that calls may name
	// capability is that of the last call, which the next is likely to have too.
	capability *csi.VolumeCapability
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

// call makes one call and checks its answer.
func (g *callMaker) call(m protoreflect.MethodDescriptor) {
	t := g.n.t
	t.Helper()
	req, resp := newMessage(t, m.Input()), newMessage(t, m.Output())
	g.fill(req.ProtoReflect(), 0)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	err := g.n.conn.Invoke(ctx, fmt.Sprintf("/%s/%s", m.Parent().FullName(), m.Name()), req, resp)
	switch s := status.Convert(err); {
	case err == nil:
	case s.Code() == codes.Unknown, s.Code() == codes.Internal, s.Code() == codes.DeadlineExceeded, s.Code() == codes.DataLoss:
		t.Errorf("%s(%v): %v", m.Name(), req, err)
	case s.Message() == "" || len(s.Details()) > 0:
		t.Errorf("%s(%v): %v: want a message and no details", m.Name(), req, err)
	}
	if created, ok := resp.(*csi.CreateVolumeResponse); ok && err == nil {
		g.ids = append([]string{created.GetVolume().GetVolumeId()}, g.ids...)
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

// fill gives a message's fields values.
func (g *callMaker) fill(m protoreflect.Message, depth int) {
	if depth > 6 {
		return
	}
	fields := m.Descriptor().Fields()
	chosen := map[string]bool{}
	for i := range fields.Len() {
		field := fields.Get(i)
		if one := field.ContainingOneof(); one != nil {
			if chosen[string(one.FullName())] || int(g.byte())%one.Fields().Len() != 0 && i < fields.Len()-1 {
				continue
			}
			chosen[string(one.FullName())] = true
		}
		g.set(m, field, depth)
	}
}

func (g *callMaker) set(m protoreflect.Message, field protoreflect.FieldDescriptor, depth int) {
	switch {
	case field.IsMap():
		for range int(g.byte()) % 4 {
			key, value := g.attribute()
			if field.MapValue().Kind() == protoreflect.StringKind {
				m.Mutable(field).Map().Set(protoreflect.ValueOfString(key).MapKey(), protoreflect.ValueOfString(value))
			}
		}
	case field.IsList():
		if field.Kind() != protoreflect.MessageKind {
			for range int(g.byte()) % 3 {
				m.Mutable(field).List().Append(g.scalar(field))
			}
			return
		}
		// One capability is what a request usually has; nothing else is needed.
		count := int(g.byte()) % 3
		if field.Name() == "volume_capabilities" {
			count = 1 + count%2
		}
		for range count {
			g.message(m.Mutable(field).List().AppendMutable().Message(), depth)
		}
	case field.Kind() == protoreflect.MessageKind:
		switch field.Name() {
		case "accessibility_requirements", "volume_content_source":
			if g.byte()%4 != 1 {
				return
			}
		}
		g.message(m.Mutable(field).Message(), depth)
	default:
		m.Set(field, g.scalar(field))
	}
}

// message fills a message, from what real clients send where that is known.
func (g *callMaker) message(m protoreflect.Message, depth int) {
	switch to := m.Interface().(type) {
	case *csi.VolumeCapability:
		g.capability = pick(g, g.capability,
			mountCap("", manyWriters), blockCap(manyWriters), mountCap("ext4", manyWriters, "noatime"), mountCap("", oneWriter),
			blockCap(reader), mountCap("", reader), mountCap("ext4", legacy, "ro"), mountCap("ext2", manyWriters, "context=\"a,b\""),
			mountCap("", manyWriters, "bind"), mountCap("ntfs", manyWriters), &csi.VolumeCapability{},
		)
		proto.Merge(to, g.capability)
		if g.byte()%8 == 7 {
			g.fill(m, depth+1)
		}
	case *csi.CapacityRange:
		// Never the default size: it would only make the test slow.
		to.LimitBytes = pick(g, 16*mib, 8*mib, 1, -1, 1<<62)
		to.RequiredBytes = pick(g, 8*mib, mib, 9*mib, 1, mib+1, -1, 1<<62)
	default:
		g.fill(m, depth+1)
	}
}

// scalar gives a value to a field that is one.
func (g *callMaker) scalar(field protoreflect.FieldDescriptor) protoreflect.Value {
	switch field.Kind() { //nolint:exhaustive // CSI has no other kinds in its requests
	case protoreflect.StringKind:
		return protoreflect.ValueOfString(g.text(string(field.Name())))
	case protoreflect.BoolKind:
		return protoreflect.ValueOfBool(g.byte()%2 == 1)
	case protoreflect.EnumKind:
		return protoreflect.ValueOfEnum(protoreflect.EnumNumber(g.byte() % 16))
	case protoreflect.Int32Kind:
		return protoreflect.ValueOfInt32(pick[int32](g, 0, 1, -1, 1<<30))
	case protoreflect.Int64Kind:
		return protoreflect.ValueOfInt64(pick[int64](g, 0, 1, -1, 1<<62))
	case protoreflect.BytesKind:
		return protoreflect.ValueOfBytes([]byte{g.byte()})
	}
	return field.Default()
}

// text gives a string to a field, by the field's name.
func (g *callMaker) text(field string) string {
	switch {
	case strings.HasSuffix(field, "volume_id"), strings.HasSuffix(field, "volume_ids"), strings.HasSuffix(field, "snapshot_id"):
		return pick(g, append(slices.Clone(g.ids), "", strings.Repeat("x", 200))...)
	case field == "staging_target_path":
		return pick(g, append(g.paths()[:2:2], "", "relative", "/", "/nonexistent")...)
	case strings.HasSuffix(field, "path"):
		return pick(g, append(g.paths()[2:], "", "relative", "/", "/nonexistent/x", "/\x00", "/"+strings.Repeat("x", 4096), g.paths()[0])...)
	case field == "name":
		return g.word("v", "w", "../x", "A/b.c", strings.Repeat("x", 128), strings.Repeat("x", 129), "", "\x00")
	case field == "key", field == "value":
		key, value := g.attribute()
		return pick(g, key, value)
	}
	return g.word("", makeToken("v"), "node-a")
}

// word is one of some words, or one that nobody thought of.
func (g *callMaker) word(words ...string) string {
	if i := int(g.byte()) % (len(words) + 1); i < len(words) {
		return words[i]
	}
	return g.raw()
}

// raw is a short string of the script's own.
func (g *callMaker) raw() string {
	n := min(int(g.byte()), len(g.rest), 40)
	s := string(g.rest[:n])
	g.rest = g.rest[n:]
	return strings.ToValidUTF8(s, "?") // protobuf carries nothing else
}

// paths are two staging paths, then targets.
func (g *callMaker) paths() []string {
	var all []string
	for _, p := range []string{"staging/a", "staging/b", "pods/a/mount", "pods/b/mount", "pods/c c/mount"} {
		all = append(all, filepath.Join(g.n.dir, p))
	}
	return all
}

// attribute is a parameter or an attribute.
func (g *callMaker) attribute() (key, value string) {
	images := g.n.dirs[0]
	key = g.word(paramAllocation, paramPool, paramDirectIO, paramBlockSize, paramMkfsOptions, paramFilesystem,
		attrImage, attrOffset, attrSizeLimit, attrReadOnly, ephemeralKey, paramSize, "topology.csi-loop.io/node", "unknown")
	switch key {
	case paramAllocation:
		value = g.word("thin", "thick", "")
	case paramPool:
		value = g.word("default", "other")
	case attrImage:
		value = g.word(images+"/disk.img", images+"/absent", images+"/../pool/pool.json", "/etc/passwd")
	case attrOffset, attrSizeLimit, paramSize, paramBlockSize:
		value = g.word("4096", "512", "1Mi", "-1", "1e30", "0", "16Mi")
	case attrReadOnly, ephemeralKey:
		value = g.word("true", "false")
	case paramMkfsOptions:
		value = g.word("-m 1", "-L x", "-d /etc", "-E lazy_itable_init=1")
	case paramFilesystem:
		value = g.word("ext4", "ext2", "xfs", "btrfs")
	default:
		value = g.word("node-a", "auto", "on")
	}
	return key, value
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
	for _, id := range g.ids {
		if _, err := n.ctrl.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: id}); err != nil {
			t.Errorf("delete %q: %v", id, err)
		}
	}
	if left := n.store.List(); len(left) > 0 {
		t.Errorf("volumes are left: %v", left)
	}
	if left := n.d.state.list(); len(left) > 0 {
		t.Errorf("records are left: %v", left)
	}
}

// usedByOther says whether another volume is staged or published at path.
func (g *callMaker) usedByOther(id, path string) bool {
	return slices.ContainsFunc(g.n.d.state.list(), func(r stageRecord) bool {
		_, published := r.Targets[path]
		return r.VolumeID != id && (published || r.StagingPath == path)
	})
}
