package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

// place is what a driver needs on disk.
type place struct{ dir, pool, socket, state string }

// newPlace makes the directories. Sockets want short paths, which t.TempDir's
// are not always.
func newPlace(t *testing.T) place {
	t.Helper()
	dir, err := os.MkdirTemp("", "s") //nolint:usetesting // its path is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	p := place{dir, filepath.Join(dir, "pool"), filepath.Join(dir, "run", "csi.sock"), filepath.Join(dir, "state")}
	if err := os.Mkdir(p.pool, 0o700); err != nil {
		t.Fatal(err)
	}
	return p
}

// args start a driver there. Later flags win over earlier ones.
func (p place) args(more ...string) []string {
	return append([]string{"serve", "--endpoint=unix://" + p.socket, "--node-id=node", "--pool=default=" + p.pool, "--state-dir=" + p.state}, more...)
}

// replace changes one of args.
func replace(args []string, flag, value string) []string {
	out := []string{}
	for _, a := range args {
		if strings.HasPrefix(a, flag+"=") {
			a = flag + "=" + value
		}
		out = append(out, a)
	}
	return out
}

func dial(t *testing.T, socket string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func probe(t *testing.T, socket string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	resp, err := csi.NewIdentityClient(dial(t, socket)).Probe(ctx, &csi.ProbeRequest{})
	if err != nil || !resp.GetReady().GetValue() {
		t.Fatalf("Probe: %v, %v", resp, err)
	}
}

func TestServeStartsAndStops(t *testing.T) {
	roottest.Require(t)
	p := newPlace(t)
	s := spawn(t, []string{"CSILOOP_SERVICE_HOST=10.0.0.1"}, p.args("-v=1")...)
	s.waitFor("Serving")
	probe(t, p.socket)
	if st, err := os.Stat(p.socket); err != nil || st.Mode().Perm()&0o077 != 0 {
		t.Errorf("socket: %v, %v", st, err)
	}
	s.stop()
	if _, err := os.Lstat(p.socket); !os.IsNotExist(err) {
		t.Errorf("the socket stays: %v", err)
	}
	var lines []string
	for line := range strings.Lines(s.errors()) {
		if strings.Contains(line, "Serving") {
			lines = append(lines, line)
		}
	}
	serving := strings.Join(lines, "")
	for _, want := range []string{"version=", `endpoint="unix://` + p.socket, `node="node"`, "default=" + p.pool} {
		if !strings.Contains(serving, want) {
			t.Errorf("%q is not in %q", want, serving)
		}
	}
	if len(lines) != 1 {
		t.Errorf("not one line: %q", serving)
	}
	if !strings.Contains(s.errors(), "CSILOOP_SERVICE_HOST") {
		t.Errorf("the variable that means nothing is not told: %s", s.errors())
	}
}

func TestServeLogsJSON(t *testing.T) {
	roottest.Require(t)
	p := newPlace(t)
	s := spawn(t, nil, p.args("--logging-format=json", "-v=4")...)
	s.waitFor("Serving")
	probe(t, p.socket)
	s.stop()
	for line := range strings.Lines(s.errors()) {
		var entry struct {
			Msg string `json:"msg"`
		}
		if err := json.Unmarshal([]byte(line), &entry); err != nil || entry.Msg == "" {
			t.Errorf("not a JSON entry: %q: %v", line, err)
		}
	}
	if !strings.Contains(s.errors(), `"method":"Probe"`) {
		t.Error("-v=4 does not show calls")
	}
}

func TestServeFromEnvironmentAndFile(t *testing.T) {
	roottest.Require(t)
	p := newPlace(t)
	file := writeConfig(t, "nodeID: of-the-file\nstateDir: "+p.state+"\npools: [{name: default, reserve: 1Mi}]\n")
	s := spawn(t, []string{"CSI_ENDPOINT=unix://" + p.socket, "CSILOOP_NODE_ID=of-the-environment", "CSILOOP_POOL=default=" + p.pool}, "serve", "--config="+file)
	s.waitFor(`node="of-the-environment"`)
	s.stop()
}

// One disk that is missing is no reason not to serve the volumes of the others.
func TestServeWithoutOneOfThePools(t *testing.T) {
	roottest.Require(t)
	p := newPlace(t)
	s := spawn(t, nil, p.args("--pool=second="+p.dir+"/second", "--image-dir="+t.TempDir())...)
	s.waitFor("Serving")
	probe(t, p.socket)
	s.stop()
	for _, want := range []string{
		"A pool is absent", `pool="second"`, "create it, or mount its disk", `absentPools=["second=` + p.dir + `/second"]`, `pools=["default=` + p.pool + `"]`,
	} {
		if !strings.Contains(s.errors(), want) {
			t.Errorf("%q is not in %q", want, s.errors())
		}
	}
}

// Every way to fail at the start is one line that says what to do, and exit
// status 1. What needs no root is in TestConfigurationMistakes.
func TestStartFailures(t *testing.T) {
	roottest.Require(t)
	for name, c := range map[string]struct {
		args func(t *testing.T, p place) []string
		want []string
	}{
		"pool is missing": {
			func(_ *testing.T, p place) []string { return replace(p.args(), "--pool", "default="+p.dir+"/none") },
			[]string{`pool "default"`, "/none", "create it, or mount its disk"},
		},
		"all pools are missing": {
			func(_ *testing.T, p place) []string {
				return append(replace(p.args(), "--pool", "default="+p.dir+"/none"), "--pool=second="+p.dir+"/second")
			},
			[]string{`pool "default"`, "/none", `pool "second"`, "/second", "mount its disk"},
		},
		"pool is not a directory": {
			func(t *testing.T, p place) []string {
				file := writeConfig(t, "")
				return replace(p.args(), "--pool", "default="+file)
			},
			[]string{`pool "default"`, "not a directory"},
		},
		"pool is read-only": {
			func(t *testing.T, p place) []string {
				dir := roottest.Pool(t, "ext4", 64<<20)
				roottest.Run(t, "mount", "-o", "remount,ro", dir)
				return replace(p.args(), "--pool", "default="+dir)
			},
			[]string{`pool "default"`, "read-only"},
		},
		"pool is open to others": {
			func(t *testing.T, p place) []string {
				if err := os.Chmod(p.pool, 0o777); err != nil {
					t.Fatal(err)
				}
				return p.args()
			},
			[]string{`pool "default"`, "others may write to it", "chmod"},
		},
		"pool directory has other things in it": {
			func(t *testing.T, p place) []string {
				if err := os.WriteFile(filepath.Join(p.pool, "thesis.txt"), nil, 0o600); err != nil {
					t.Fatal(err)
				}
				return p.args()
			},
			[]string{"not empty", "thesis.txt", "use an empty directory"},
		},
		"pool is on another file system than expected": {
			func(t *testing.T, p place) []string {
				return p.args("--config=" + writeConfig(t, "pools: [{name: default, expect: {filesystem: zfs}}]"))
			},
			[]string{`pool "default"`, "expected zfs", "disk mounted?"},
		},
		"pool is not a mount point": {
			func(t *testing.T, p place) []string {
				return p.args("--config=" + writeConfig(t, "pools: [{name: default, expect: {mountPoint: true}}]"))
			},
			[]string{"not a mount point", "disk mounted?"},
		},
		"pool is expected and not there": {
			func(t *testing.T, p place) []string {
				return p.args("--config=" + writeConfig(t, "pools: [{name: default, expect: {existing: true}}]"))
			},
			[]string{"existing pool is expected"},
		},
		"two names for one directory": {
			func(t *testing.T, p place) []string {
				if err := os.Symlink(p.pool, p.dir+"/link"); err != nil {
					t.Fatal(err)
				}
				return p.args("--pool=second=" + p.dir + "/link")
			},
			[]string{"same directory"},
		},
		"pool is in use": {
			func(t *testing.T, p place) []string {
				spawn(t, nil, p.args()...).waitFor("Serving")
				return replace(replace(p.args(), "--state-dir", p.dir+"/state2"), "--endpoint", "unix://"+p.dir+"/2.sock")
			},
			[]string{"in use by another csi-loop", "stop that one"},
		},
		"state directory is in use": {
			func(t *testing.T, p place) []string {
				spawn(t, nil, p.args()...).waitFor("Serving")
				return replace(replace(p.args(), "--pool", "default="+newPlace(t).pool), "--endpoint", "unix://"+p.dir+"/2.sock")
			},
			[]string{"state directory", "another csi-loop", "--state-dir"},
		},
		"somebody listens on the socket": {
			func(t *testing.T, p place) []string {
				spawn(t, nil, p.args()...).waitFor("Serving")
				return replace(newPlace(t).args(), "--endpoint", "unix://"+p.socket)
			},
			[]string{"another process serves on", "stop it or choose another endpoint"},
		},
		"the socket is a file": {
			func(_ *testing.T, p place) []string {
				return replace(p.args(), "--endpoint", "unix://"+p.socketFile(t))
			},
			[]string{"not a socket", "remove it or choose another"},
		},
		"the endpoint is not a UNIX socket": {
			func(_ *testing.T, p place) []string { return replace(p.args(), "--endpoint", "tcp://0.0.0.0:9000") },
			[]string{"only UNIX sockets", "unix:///"},
		},
		"the endpoint is relative": {
			func(_ *testing.T, p place) []string { return replace(p.args(), "--endpoint", "unix://csi.sock") },
			[]string{"must be absolute"},
		},
		"the endpoint does not end in .sock": {
			func(_ *testing.T, p place) []string { return replace(p.args(), "--endpoint", "unix:///run/csi") },
			[]string{"end in .sock"},
		},
		"image directory is missing": {
			func(_ *testing.T, p place) []string { return p.args("--image-dir=" + p.dir + "/images") },
			[]string{"--image-dir", "/images", "no such file or directory", "make it"},
		},
		"image directory is the pool": {
			func(_ *testing.T, p place) []string { return p.args("--image-dir=" + p.pool) },
			[]string{`overlaps pool "default"`},
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := spawn(t, nil, c.args(t, newPlace(t))...)
			if code := s.wait(); code != exitFailure {
				t.Errorf("exit status %d, want %d", code, exitFailure)
			}
			got := s.complaint()
			for _, want := range c.want {
				if !strings.Contains(got, want) {
					t.Errorf("it says %q, want %q in it", got, want)
				}
			}
			t.Log(got)
		})
	}
}

// socketFile puts a plain file where a socket would be.
func (p place) socketFile(t *testing.T) string {
	t.Helper()
	path := filepath.Join(p.dir, "file.sock")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestNoLoopControl(t *testing.T) {
	roottest.Require(t)
	p := newPlace(t)
	// A mount namespace as on a machine without the module: the driver makes the
	// node itself where only that is missing.
	script := `mount --make-rprivate / && mount -t tmpfs none /dev && mount -t tmpfs none /sys/class/misc && exec "$@"`
	cmd := exec.Command("unshare", append([]string{"-m", "sh", "-c", script, "sh", "/proc/" + strconv.Itoa(os.Getpid()) + "/exe"}, p.args()...)...)
	s := spawnCommand(t, cmd, nil)
	if code := s.wait(); code != exitFailure {
		t.Errorf("exit status %d, want %d", code, exitFailure)
	}
	got := s.complaint()
	for _, want := range []string{"no loop control device", "modprobe loop", "/dev"} {
		if !strings.Contains(got, want) {
			t.Errorf("it says %q, want %q in it", got, want)
		}
	}
	t.Log(got)
}

func TestStaleSocketIsReplaced(t *testing.T) {
	roottest.Require(t)
	p := newPlace(t)
	s := spawn(t, nil, p.args()...)
	s.waitFor("Serving")
	s.signal(syscall.SIGKILL)
	s.wait()
	if _, err := net.Dial("unix", p.socket); err == nil {
		t.Fatal("somebody answers")
	}
	if _, err := os.Lstat(p.socket); err != nil {
		t.Fatalf("the socket is not stale: %v", err)
	}
	s = spawn(t, nil, p.args()...)
	s.waitFor("Serving")
	probe(t, p.socket)
	s.stop()
}

// slowMkfs is a directory with a mkfs.ext4 that says when it runs, and first runs
// a command.
func slowMkfs(t *testing.T, before string) (dir, mark string) {
	t.Helper()
	dir = t.TempDir()
	mark = filepath.Join(dir, "runs")
	program := strings.TrimSpace(roottest.Run(t, "sh", "-c", "PATH=$PATH:/usr/sbin:/sbin command -v mkfs.ext4"))
	script := fmt.Sprintf("#!/bin/sh\nfor last; do :; done\ncase $last in\n-V) ;;\n*) echo > %s; %s ;;\nesac\nexec %s \"$@\"\n", mark, before, program)
	if err := os.WriteFile(filepath.Join(dir, "mkfs.ext4"), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	return dir, mark
}

// createSlowly starts a driver and a CreateVolume that is inside mkfs when it returns.
func createSlowly(t *testing.T, before string, args ...string) (s *child, p place, result chan error) {
	t.Helper()
	p = newPlace(t)
	dir, mark := slowMkfs(t, before)
	s = spawn(t, []string{"PATH=" + dir + ":" + os.Getenv("PATH")}, p.args(args...)...)
	s.waitFor("Serving")
	controller := csi.NewControllerClient(dial(t, p.socket))
	result = make(chan error, 1)
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(cancel)
	go func() {
		_, err := controller.CreateVolume(ctx, &csi.CreateVolumeRequest{
			Name:          "slow",
			CapacityRange: &csi.CapacityRange{RequiredBytes: 32 << 20},
			VolumeCapabilities: []*csi.VolumeCapability{{
				AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{FsType: "ext4"}},
				AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
			}},
		})
		result <- err
	}()
	deadline := time.Now().Add(20 * time.Second)
	for {
		if _, err := os.Stat(mark); err == nil {
			return s, p, result
		}
		if time.Now().After(deadline) {
			t.Fatalf("mkfs does not run; errors: %s", s.errors())
		}
		time.Sleep(2 * time.Millisecond)
	}
}

func TestStopLetsARunningCallFinish(t *testing.T) {
	roottest.Require(t)
	s, p, result := createSlowly(t, "sleep 1")
	s.signal(syscall.SIGTERM)
	if err := <-result; err != nil {
		t.Errorf("the running call: %v", err)
	}
	if code := s.wait(); code != 0 {
		t.Errorf("exit status %d; errors: %s", code, s.errors())
	}
	if _, err := os.Stat(filepath.Join(p.pool, "volumes", "slow", "volume.json")); err != nil {
		t.Errorf("the volume: %v", err)
	}
}

func TestStopCancelsACallThatTakesTooLong(t *testing.T) {
	roottest.Require(t)
	s, p, result := createSlowly(t, "exec sleep 60", "--stop-timeout=200ms")
	start := time.Now()
	s.signal(syscall.SIGTERM)
	if err := <-result; status.Code(err) == codes.OK {
		t.Error("the call succeeded")
	}
	if code := s.wait(); code != 0 {
		t.Errorf("exit status %d; errors: %s", code, s.errors())
	}
	if took := time.Since(start); took > 20*time.Second {
		t.Errorf("the stop took %s", took)
	}
	entries, err := os.ReadDir(p.pool)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), ".") {
			t.Errorf("the cancelled call left %s", e.Name())
		}
	}
}

func TestSecondSignalStopsAtOnce(t *testing.T) {
	roottest.Require(t)
	s, _, result := createSlowly(t, "exec sleep 60")
	s.signal(syscall.SIGTERM)
	s.waitFor("Stopping")
	s.signal(syscall.SIGINT)
	start := time.Now()
	if code := s.wait(); code != exitFailure {
		t.Errorf("exit status %d, want %d", code, exitFailure)
	}
	if took := time.Since(start); took > 10*time.Second {
		t.Errorf("it took %s", took)
	}
	if err := <-result; status.Code(err) != codes.Unavailable {
		t.Errorf("the call: %v", err)
	}
}
