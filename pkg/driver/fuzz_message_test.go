package driver

import (
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/csi-loop/csi-loop/pkg/image"
)

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
			key, value := g.attribute(string(field.Name()))
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
		return protoreflect.ValueOfInt64(pick(g, 0, 1, -1, 1<<62, mib, 8*mib))
	case protoreflect.BytesKind:
		return protoreflect.ValueOfBytes([]byte{g.byte()})
	}
	return field.Default()
}

// text gives a string to a field, by the field's name.
func (g *callMaker) text(field string) string {
	none := []string{"", strings.Repeat("x", 200)}
	switch {
	case strings.Contains(field, "group_snapshot_id"):
		return pick(g, slices.Concat(g.groups, none, g.snapshots, g.ids)...)
	case strings.Contains(field, "snapshot_id"):
		return pick(g, slices.Concat(g.snapshots, none, g.groups, g.ids)...)
	case strings.Contains(field, "volume_id"):
		return pick(g, slices.Concat(g.ids, none, g.snapshots)...)
	case field == "staging_target_path":
		return pick(g, append(g.paths()[:2:2], "", "relative", "/", "/nonexistent")...)
	case strings.HasSuffix(field, "path"):
		return pick(g, append(g.paths()[2:], "", "relative", "/", "/nonexistent/x", "/\x00", "/"+strings.Repeat("x", 4096), g.paths()[0])...)
	case field == "name":
		return g.word("v", "w", "../x", "A/b.c", strings.Repeat("x", 128), strings.Repeat("x", 129), "", "\x00")
	case field == "key", field == "value":
		key, value := g.attribute(field)
		return pick(g, key, value)
	}
	return g.word("", makeToken("v"), "node-a")
}

// word is one of some words, or one that nobody thought of.
func (g *callMaker) word(words ...string) string {
	if b := g.byte(); b < 0xf0 {
		return words[int(b)%len(words)]
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

// attributeKeys are those of parameters and attributes. Scripts have their numbers: what
// is new comes at the end.
var attributeKeys = []string{
	paramAllocation, paramPool, paramDirectIO, paramBlockSize, paramMkfsOptions, paramFilesystem,
	attrImage, attrOffset, attrSizeLimit, attrReadOnly, attrExposeImage, ephemeralKey, paramSize, "topology.csi-loop.io/node", "unknown",
	paramTemplate, paramEncrypted, paramEncryptedDiscard, paramSourceNode, attrPartition,
	paramFreezeTimeout, paramCopyInUse, paramIndependent,
	paramReadIOPS, paramWriteIOPS, paramReadBandwidth, paramWriteBandwidth, paramReadAhead, paramTrim,
	podUIDKey, kubernetesPrefix + "pvc/name",
}

// mutableKeys are those of mutable parameters.
var mutableKeys = []string{
	paramReadIOPS, paramWriteIOPS, paramReadBandwidth, paramWriteBandwidth, paramReadAhead, paramTrim, kubernetesPrefix + "pvc/name", paramPool, "unknown",
}

// attribute is an entry of a map, by the field's name.
func (g *callMaker) attribute(field string) (key, value string) {
	switch field {
	case "secrets":
		key = g.word(secretPassphrase, "unknown")
	case "mutable_parameters":
		key = g.word(mutableKeys...)
	default:
		key = g.word(attributeKeys...)
	}
	return key, g.word(g.values(key)...)
}

// values are those that a key is given.
func (g *callMaker) values(key string) []string {
	images := g.n.dirs[0]
	switch key {
	case paramAllocation:
		return []string{"thin", "thick", ""}
	case paramPool:
		return []string{"default", "other"}
	case paramTemplate:
		return []string{"v", "w", ""}
	case attrImage:
		return []string{images + "/disk.img", images + "/absent", images + "/../pool/pool.json", "/etc/passwd"}
	case attrOffset, attrSizeLimit, paramSize, paramBlockSize:
		return []string{"4096", "512", "1Mi", "-1", "1e30", "0", "16Mi"}
	case attrReadOnly, attrExposeImage, ephemeralKey, paramEncrypted, paramEncryptedDiscard, paramCopyInUse, paramIndependent, paramTrim:
		return []string{"true", "false", "1"}
	case paramMkfsOptions:
		return []string{"-m 1", "-L x", "-d /etc", "-E lazy_itable_init=1"}
	case paramFilesystem:
		return []string{"ext4", "ext2", "xfs", "btrfs"}
	case paramSourceNode:
		return []string{"preferred", "required"}
	case attrPartition:
		return []string{"1", "0", "129", "-1"}
	case paramFreezeTimeout:
		return []string{"10s", "0s", "-1h", "2h", "1ns"}
	case paramReadIOPS, paramWriteIOPS, paramReadBandwidth, paramWriteBandwidth:
		return []string{unlimited, "1Mi", "1048576", "1", "-1", "1e30"}
	case paramReadAhead:
		return []string{"128Ki", "0", "4095", "-1", "1Ti"}
	case secretPassphrase:
		return []string{"correct horse", "battery staple", "short", strings.Repeat("x", 4097)}
	}
	return []string{"node-a", "auto", "on"}
}

// takeInRequest is a request of an operator.
func (g *callMaker) takeInRequest() TakeInRequest {
	r := TakeInRequest{
		Name: g.word("v", "w", "../x", ""), Template: g.byte()%2 == 1, Raw: g.byte()%2 == 0,
		File:   pick(g, "disk.img", "absent", "../pool/volumes/v/disk.img", "../pool/pool.json", ".", ""),
		Method: image.Method(g.word(string(image.Copy), string(image.Move), string(image.Reflink), "steal")),
		Pool:   g.word("", "default", "other"), Allocation: g.word("", "thin", "thick"), DirectIO: g.word("", "on", "off"),
		Partition: pick(g, 0, 1, -1, 1<<20), BlockSize: pick(g, 0, 512, 4096, 3, -1, 1<<30),
		Offset: pick(g, 0, mib, 512, 1, -1, 1<<62), Length: pick(g, 0, mib, 512, 1, -1, 1<<62), Size: pick(g, 0, 8*mib, 1, -1, 1<<62),
		Dev: pick[uint64](g, 0, 1), Ino: pick[uint64](g, 0, 1), Cancel: g.byte()%4 == 3,
	}
	if r.File != "" {
		r.File = filepath.Join(g.n.dirs[0], r.File)
	}
	return r
}

// Scripts reach every call that a driver serves, and every key that is told of.
func TestFuzzCallsReachEverything(t *testing.T) {
	g := newCallMaker(t)
	server := grpc.NewServer()
	g.n.d.register(server)
	for service, info := range server.GetServiceInfo() {
		for _, m := range info.Methods {
			name := "/" + service + "/" + m.Name
			if !slices.Contains(callNumbers, name) {
				t.Errorf("%s is not among the steps", name)
				continue
			}
			g.rest = nil
			g.step(name)
		}
	}
	for _, name := range callNumbers {
		if _, ok := g.answers[name]; !ok && name != kernelRefuses && name != driverStarts {
			t.Errorf("%s is not served, or its step does not call it", name)
		}
	}
	g.takeBack()
	for where, all := range parameters {
		for _, p := range all {
			if !slices.Contains(attributeKeys, p.Name) || where == AttributesClass && !slices.Contains(mutableKeys, p.Name) {
				t.Errorf("%s is not among the keys", p.Name)
			}
		}
	}
}
