package main

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/csi-loop/csi-loop/cmd/csi-loop/survey"
	"github.com/csi-loop/csi-loop/internal/roottest"
)

// ask runs one of the commands that look, with the flags of the place's driver.
func (p place) ask(t *testing.T, want int, command string, more ...string) string {
	t.Helper()
	c := spawn(t, nil, append(append([]string{command}, p.args()[1:]...), more...)...)
	if code := c.wait(); code != want {
		t.Fatalf("%s: exit status %d, want %d; %s\n%s", command, code, want, c.errors(), c.stdout.String())
	}
	return c.stdout.String()
}

func (p place) volumes(t *testing.T) map[string]survey.Volume {
	t.Helper()
	var list []survey.Volume
	if err := json.Unmarshal([]byte(p.ask(t, 0, "volumes", "-o", "json")), &list); err != nil {
		t.Fatal(err)
	}
	byName := map[string]survey.Volume{}
	for _, v := range list {
		byName[v.Name] = v
	}
	return byName
}

// doctor returns what is worse than a note about the place's pool, and leaves the
// machine's own troubles out.
func (p place) doctor(t *testing.T, more ...string) (*diagnosis, []string) {
	t.Helper()
	c := spawn(t, nil, append(append([]string{"doctor", "-o", "json"}, p.args()[1:]...), more...)...)
	code := c.wait()
	var d diagnosis
	if err := json.Unmarshal(c.stdout.Bytes(), &d); err != nil {
		t.Fatalf("%v: %s %s", err, c.stdout.String(), c.errors())
	}
	if want := map[bool]int{true: exitUnwell, false: 0}[d.Problems > 0]; code != want {
		t.Errorf("exit status %d with %d problems; %s", code, d.Problems, c.errors())
	}
	var bad []string
	for _, f := range d.Findings {
		machine := f.Subject == "capabilities" || f.Subject == "kubelet" || f.Subject == "loop driver" || strings.HasPrefix(f.Subject, "program ")
		if (f.Level == survey.Warning || f.Level == survey.Problem) && !machine {
			bad = append(bad, fmt.Sprintf("%s %s: %s", f.Level, f.Subject, f.Message))
		}
	}
	return &d, bad
}

// csiVolume is a volume of a test, and its paths.
type csiVolume struct {
	id, staging, target string
	capability          *csi.VolumeCapability
}

func (p place) create(t *testing.T, name string, block bool) csiVolume {
	t.Helper()
	c := &csi.VolumeCapability{
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
		AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{}},
	}
	if block {
		c.AccessType = &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}}
	}
	resp, err := csi.NewControllerClient(dial(t, p.socket)).CreateVolume(t.Context(), &csi.CreateVolumeRequest{
		Name: name, CapacityRange: &csi.CapacityRange{RequiredBytes: 16 << 20}, VolumeCapabilities: []*csi.VolumeCapability{c},
	})
	if err != nil {
		t.Fatal(err)
	}
	v := csiVolume{resp.GetVolume().GetVolumeId(), filepath.Join(p.dir, name, "staging"), filepath.Join(p.dir, name, "target"), c}
	if err := os.MkdirAll(v.staging, 0o700); err != nil {
		t.Fatal(err)
	}
	return v
}

func (p place) up(t *testing.T, v csiVolume) {
	t.Helper()
	node := csi.NewNodeClient(dial(t, p.socket))
	if _, err := node.NodeStageVolume(t.Context(), &csi.NodeStageVolumeRequest{VolumeId: v.id, StagingTargetPath: v.staging, VolumeCapability: v.capability}); err != nil {
		t.Fatal(err)
	}
	if _, err := node.NodePublishVolume(t.Context(), &csi.NodePublishVolumeRequest{VolumeId: v.id, StagingTargetPath: v.staging, TargetPath: v.target, VolumeCapability: v.capability}); err != nil {
		t.Fatal(err)
	}
}

func (p place) down(t *testing.T, v csiVolume) {
	t.Helper()
	node := csi.NewNodeClient(dial(t, p.socket))
	if _, err := node.NodeUnpublishVolume(t.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: v.id, TargetPath: v.target}); err != nil {
		t.Error(err)
	}
	// A program with a mount namespace of its own may keep a copy of the mount for
	// a while. A CO repeats the call.
	deadline := time.Now().Add(time.Minute)
	for {
		_, err := node.NodeUnstageVolume(t.Context(), &csi.NodeUnstageVolumeRequest{VolumeId: v.id, StagingTargetPath: v.staging})
		if err == nil {
			return
		}
		if status.Code(err) != codes.Aborted || time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

func TestListsWithAndWithoutTheDriver(t *testing.T) {
	roottest.Require(t)
	p := newPlace(t)
	s := spawn(t, nil, p.args()...)
	s.waitFor("Serving")
	files, raw := p.create(t, "files", false), p.create(t, "raw", true)
	idle := p.create(t, "idle", true)
	p.up(t, files)
	p.up(t, raw)
	if _, err := csi.NewControllerClient(dial(t, p.socket)).CreateSnapshot(t.Context(), &csi.CreateSnapshotRequest{
		Name: "before", SourceVolumeId: idle.id, Parameters: map[string]string{},
	}); err != nil {
		t.Fatal(err)
	}

	check := func(when string) {
		t.Helper()
		all := p.volumes(t)
		for name, want := range map[string]survey.Volume{
			"files": {State: survey.Published, Filesystem: "ext4", StagingPath: files.staging, Targets: []string{files.target}},
			"raw":   {State: survey.Published, StagingPath: raw.staging, Targets: []string{raw.target}},
			"idle":  {State: survey.Available},
		} {
			got := all[name]
			if wantDevices := map[string]int{"idle": 0}; len(got.Devices) != 1 && wantDevices[name] != len(got.Devices) || got.Size != 16<<20 || got.Allocated < 16<<20 {
				t.Errorf("%s: %s: %+v", when, name, got)
			}
			got = survey.Volume{State: got.State, Filesystem: got.Filesystem, StagingPath: got.StagingPath, Targets: got.Targets, Problems: got.Problems}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("%s: %s: %s", when, name, diff)
			}
		}
		if out := p.ask(t, 0, "snapshots"); !strings.Contains(out, ".before ") || !strings.Contains(out, idle.id) || !strings.Contains(out, survey.Ready) {
			t.Errorf("%s: snapshots:\n%s", when, out)
		}
		devices := p.ask(t, 0, "devices", "-o", "wide")
		for _, v := range []csiVolume{files, raw} {
			if !strings.Contains(devices, v.id) || !strings.Contains(devices, v.target) {
				t.Errorf("%s: %s is not among the devices:\n%s", when, v.id, devices)
			}
		}
		if _, bad := p.doctor(t); len(bad) > 0 {
			t.Errorf("%s: %q", when, bad)
		}
	}
	check("while it runs")
	s.stop()
	check("while it is down")

	s = spawn(t, nil, p.args()...)
	s.waitFor("Serving")
	p.down(t, files)
	p.down(t, raw)
	s.stop()
	if out := p.ask(t, 0, "devices"); strings.Count(out, "\n") != 1 {
		t.Errorf("devices at the end:\n%s", out)
	}
}

// expect looks for one finding with each of the texts, and for no others.
func expect(t *testing.T, bad []string, want ...string) {
	t.Helper()
	for _, w := range want {
		if i := slices.IndexFunc(bad, func(s string) bool { return strings.Contains(s, w) }); i >= 0 {
			bad = slices.Delete(bad, i, i+1)
		} else {
			t.Errorf("nothing is found with %q", w)
		}
	}
	if len(bad) > 0 {
		t.Errorf("found as well: %q", bad)
	}
}

func TestDoctorFindsWhatIsWrong(t *testing.T) {
	roottest.Require(t)
	p := newPlace(t)
	s := spawn(t, nil, p.args()...)
	s.waitFor("Serving")
	staged, broken, truncated, attached := p.create(t, "staged", false), p.create(t, "broken", true), p.create(t, "truncated", true), p.create(t, "attached", true)
	p.up(t, staged)
	s.stop()

	image := func(name string) string { return filepath.Join(p.pool, "volumes", name, "disk.img") }
	loop := roottest.Losetup(t, image("attached"))
	detached := false
	detach := func() {
		if !detached {
			detached = true
			if out, err := exec.Command("losetup", "-d", loop).CombinedOutput(); err != nil {
				t.Errorf("%v: %s", err, out)
			}
		}
	}
	defer detach()
	for _, err := range []error{
		os.WriteFile(filepath.Join(p.pool, "volumes", "broken", "volume.json"), []byte("{}"), 0o600),
		os.Truncate(image("truncated"), 1<<20),
		os.Mkdir(filepath.Join(p.pool, ".gone-x-1"), 0o700),
		os.Chmod(filepath.Join(p.pool, "pool.json"), 0o644),
		exec.Command("umount", staged.target).Run(),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	_, bad := p.doctor(t)
	rest := []string{
		"problem volume " + broken.id + ": refused",
		"problem volume " + truncated.id + ": ImageTruncated",
		"warning device " + loop + ": it shows volume " + attached.id,
		"warning volume " + staged.id + ": it is published at " + staged.target + " on record, and not shown there",
	}
	expect(t, bad, append(rest, "warning pool default: .gone-x-1", "warning pool default: pool.json can be read")...)
	d, bad := p.doctor(t, "--repair")
	expect(t, bad, rest...)
	if diff := cmp.Diff(map[string]string{"default": ""}, d.Repaired); diff != "" {
		t.Error(diff)
	}

	detach()
	s = spawn(t, nil, p.args()...)
	s.waitFor("Serving")
	// Beside a driver the pools are its own.
	if err := os.Mkdir(filepath.Join(p.pool, ".gone-y-1"), 0o700); err != nil {
		t.Fatal(err)
	}
	d, _ = p.doctor(t, "--repair")
	if !strings.Contains(d.Repaired["default"], "in use by another csi-loop process") {
		t.Errorf("repaired beside a driver: %v", d.Repaired)
	}
	p.down(t, staged)
	s.stop()
}

func TestDoctorOfPoolsThatAreNotThere(t *testing.T) {
	roottest.Require(t)
	p := newPlace(t)
	p.pool += "-missing"
	_, bad := p.doctor(t)
	expect(t, bad, "problem pool default: pool is unusable")
	if _, err := os.Stat(p.pool); !os.IsNotExist(err) {
		t.Errorf("it made the pool: %v", err)
	}
	p.ask(t, exitFailure, "volumes")
}

// doctor sees a filesystem that takes no more writes, and one that is smaller than its
// device, and neither on a volume that is well.
func TestDoctorSeesFilesystems(t *testing.T) {
	roottest.Require(t)
	p := newPlace(t)
	s := spawn(t, nil, p.args()...)
	s.waitFor("Serving")
	well, stopped, small := p.create(t, "well", false), p.create(t, "stopped", false), p.create(t, "small", false)
	for _, v := range []csiVolume{well, stopped, small} {
		p.up(t, v)
	}
	if _, bad := p.doctor(t); len(bad) > 0 {
		t.Errorf("nothing is wrong yet: %q", bad)
	}
	roottest.Run(t, "mount", "-o", "remount,ro", stopped.staging)
	// The controller's half only: the node's is to come.
	if _, err := csi.NewControllerClient(dial(t, p.socket)).ControllerExpandVolume(t.Context(), &csi.ControllerExpandVolumeRequest{
		VolumeId: small.id, CapacityRange: &csi.CapacityRange{RequiredBytes: 32 << 20}, VolumeCapability: small.capability,
	}); err != nil {
		t.Fatal(err)
	}
	roottest.Run(t, "losetup", "--set-capacity", strings.TrimSpace(roottest.Run(t, "findmnt", "--noheadings", "--output=SOURCE", "--mountpoint", small.staging)))
	_, bad := p.doctor(t)
	text := strings.Join(bad, "\n")
	for _, want := range []string{"problem volume " + stopped.id + ": its filesystem at", "warning volume " + small.id + ": its filesystem at"} {
		if !strings.Contains(text, want) {
			t.Errorf("doctor does not say %q:\n%s", want, text)
		}
	}
	if strings.Contains(text, well.id) {
		t.Errorf("a volume that is well: %s", text)
	}
	roottest.Run(t, "mount", "-o", "remount,rw", stopped.staging)
	for _, v := range []csiVolume{well, stopped, small} {
		p.down(t, v)
	}
	s.stop()
}
