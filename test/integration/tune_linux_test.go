package integration

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/csi-loop/csi-loop/pkg/cgroup"
	"github.com/csi-loop/csi-loop/test/docs"
)

func (v *volume) modify(parameters map[string]string) error {
	ctx, cancel := v.call()
	defer cancel()
	_, err := v.controller().ControllerModifyVolume(ctx, &csi.ControllerModifyVolumeRequest{VolumeId: v.id, MutableParameters: parameters})
	return err
}

// attr reads a file of the volume's device below /sys/block.
func (v *volume) attr(name string) string {
	v.t.Helper()
	b, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(v.device()), name))
	must(v.t, err)
	return strings.TrimSpace(string(b))
}

// readAheadBefore is what the volume's device read ahead before the driver set it, in KiB,
// by the record of its staging.
func (v *volume) readAheadBefore() string {
	v.t.Helper()
	number := strings.TrimPrefix(v.device(), "/dev/loop")
	files, err := filepath.Glob(v.state + "/*/*.json")
	must(v.t, err)
	for _, file := range files {
		var record struct {
			VolumeID        string           `json:"volumeID"`
			ReadAheadBefore map[string]int64 `json:"readAheadBefore"`
		}
		b, err := os.ReadFile(file)
		must(v.t, err)
		must(v.t, json.Unmarshal(b, &record))
		if before, ok := record.ReadAheadBefore[number]; ok && record.VolumeID == v.id {
			return strconv.FormatInt(before>>10, 10)
		}
	}
	v.t.Fatalf("no record of what loop%s read ahead before", number)
	return ""
}

// podCgroup makes the cgroup of a pod below one of the test's own, which it returns
// first. ok is false where version 1 has the io controller: never in test/vm.
func podCgroup(t *testing.T, uid string) (root, pod string, ok bool) {
	t.Helper()
	if err := cgroup.NewPods("").Supported(); err != nil {
		if os.Getenv("CSI_LOOP_VM") != "" {
			t.Fatal(err)
		}
		t.Log(err, "- only what needs no limits is tested; make test-kernels tests all")
		return t.TempDir(), "", false
	}
	parent := cgroup.DefaultRoot
	var made []string
	t.Cleanup(func() {
		for _, dir := range slices.Backward(made) {
			if err := os.Remove(dir); err != nil {
				t.Error(err)
			}
		}
	})
	for _, name := range []string{fmt.Sprintf("csi-loop-test-%d", time.Now().UnixNano()), "kubepods", "burstable", "pod" + uid} {
		must(t, os.WriteFile(filepath.Join(parent, "cgroup.subtree_control"), []byte("+io"), 0o600))
		parent = filepath.Join(parent, name)
		must(t, os.Mkdir(parent, 0o755))
		made = append(made, parent)
	}
	return made[0], parent, true
}

// TestModifyLive: what ControllerModifyVolume sets is on the device and in the pod's
// cgroup when it has answered, after the driver was killed, and after the volume was
// staged anew.
func TestModifyLive(t *testing.T) {
	const uid = "0a1b2c3d-1111-2222-3333-444455556666"
	shown := docs.Take(t, "../..")
	grep, cat := shown(`grep -r --include=io.max "$(cat /sys/block/loopN/dev) " /sys/fs/cgroup`), shown("cat /sys/block/loopN/queue/read_ahead_kb")
	for _, k := range []kind{ext4, block} {
		t.Run(k.name, func(t *testing.T) {
			root, pod, limits := podCgroup(t, uid)
			s := newSite(t, siteConfig{args: []string{"--cgroup-root=" + root}})
			v := s.volume(k, "tuned")
			v.context = map[string]string{"csi.storage.k8s.io/pod.uid": uid}
			must(t, v.create())
			must(t, v.stage())
			before := v.attr("queue/read_ahead_kb")
			must(t, v.publish(0, false))
			// holds asserts what is in force.
			holds := func(when, readAheadKiB, ioMax string) {
				t.Helper()
				if got := v.attr("queue/read_ahead_kb"); got != readAheadKiB {
					t.Errorf("%s: reads %s KiB ahead, want %s", when, got, readAheadKiB)
				}
				if !limits {
					return
				}
				if ioMax != "" {
					ioMax = v.attr("dev") + " " + ioMax
				}
				b, err := os.ReadFile(filepath.Join(pod, "io.max"))
				must(t, err)
				if got := strings.TrimSpace(string(b)); got != ioMax {
					t.Errorf("%s: io.max is %q, want %q", when, got, ioMax)
				}
			}
			holds("nothing was asked for", before, "")
			must(t, v.modify(map[string]string{"writeBandwidth": "10Mi", "readIOPS": "max", "readAhead": "1Mi", "trim": "false"}))
			holds("modified", "1024", "rbps=max wbps=10485760 riops=max wiops=max")
			must(t, v.modify(map[string]string{"readIOPS": "500"}))
			const both = "rbps=max wbps=10485760 riops=500 wiops=max"
			holds("modified again", "1024", both)
			ask := func(command string) string {
				t.Helper()
				out, err := exec.Command("bash", "-c", strings.ReplaceAll(command, "loopN", filepath.Base(v.device()))).CombinedOutput()
				if err != nil {
					t.Errorf("%v: %s", err, out)
				}
				return strings.TrimSpace(string(out))
			}
			if got := ask(cat); got != "1024" {
				t.Errorf("the page's command says that it reads %s KiB ahead", got)
			}
			if limits {
				if got, want := ask(grep), pod+"/io.max:"+v.attr("dev")+" "+both; got != want {
					t.Errorf("the page's command says %q, want %q", got, want)
				}
			}
			if err := v.modify(map[string]string{"writeBandwidth": "max", "readAhead": "5"}); err == nil {
				t.Error("a read-ahead of 5 bytes was taken")
			}
			holds("refused", "1024", both)

			s.kill()
			if limits { // somebody made the cgroup anew meanwhile
				must(t, os.WriteFile(filepath.Join(pod, "io.max"), []byte(v.attr("dev")+" wbps=max riops=max"), 0o600))
			}
			s.start()
			holds("killed and started", "1024", both)

			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			health, err := s.node().NodeGetVolumeHealth(ctx, &csi.NodeGetVolumeHealthRequest{VolumeId: v.id})
			must(t, err)
			told := strings.Contains(fmt.Sprint(health.GetVolumeHealth().GetHealthStatuses()), "TuningNotInForce")
			if told == limits {
				t.Errorf("limits can be set: %v, the health is %v", limits, health.GetVolumeHealth().GetHealthStatuses())
			}

			must(t, v.unpublish(0))
			holds("unpublished", "1024", "")
			must(t, v.unstage())
			must(t, v.stage())
			must(t, v.publish(0, false))
			holds("staged anew", "1024", both)

			// The number's next volume reads ahead as this one would have without its
			// parameter. Another process may take the number first.
			number := func(v *volume) string { return filepath.Base(v.device()) }
			for attempt := 1; ; attempt++ {
				tuned, want := number(v), v.readAheadBefore()
				must(t, v.unpublish(0))
				must(t, v.unstage())
				next := s.volume(k, fmt.Sprintf("next-%d", attempt))
				must(t, next.create())
				must(t, next.stage())
				same := number(next) == tuned
				if got := next.attr("queue/read_ahead_kb"); same && got != want {
					t.Errorf("the next volume reads %s KiB ahead, want %s", got, want)
				}
				must(t, next.unstage())
				must(t, next.remove())
				if same {
					break
				}
				if attempt == 50 {
					t.Fatal("the number always went to somebody else")
				}
				must(t, v.stage())
				must(t, v.publish(0, false))
			}
			must(t, v.remove())
		})
	}
}
