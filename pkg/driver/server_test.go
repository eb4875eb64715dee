package driver

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"k8s.io/klog/v2"
)

func TestListen(t *testing.T) {
	dir := socketDir(t)
	for name, c := range map[string]struct{ endpoint, says string }{
		"TCP":           {"tcp://127.0.0.1:5000", "UNIX"},
		"host and port": {"127.0.0.1:5000", "UNIX"},
		"relative":      {"unix:csi.sock", "absolute"},
		"another name":  {"unix://" + dir + "/csi", ".sock"},
		"too long":      {"unix://" + dir + "/" + strings.Repeat("x", 120) + ".sock", "107"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := Listen(t.Context(), c.endpoint); err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("got %v, want it to say %q", err, c.says)
			}
		})
	}
	path := filepath.Join(dir, "csi.sock")
	l, err := Listen(t.Context(), "unix://"+path)
	if err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("socket %v %v, want mode 0600", st.Mode(), err)
	}
	if _, err := Listen(t.Context(), "unix://"+path); err == nil || !strings.Contains(err.Error(), "another process") {
		t.Errorf("a live socket: %v", err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false) // as if the process was killed
	_ = l.Close()
	if l, err = Listen(t.Context(), "unix:"+path); err != nil {
		t.Fatalf("a dead socket is not replaced: %v", err)
	}
	_ = l.Close()
	if err := os.WriteFile(path, []byte("data"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(t.Context(), path); err == nil || !strings.Contains(err.Error(), "not a socket") {
		t.Errorf("a file: %v", err)
	}
	if b, _ := os.ReadFile(path); string(b) != "data" {
		t.Error("the file was touched")
	}
}

// slowIdentity blocks in Probe until released, or until its context ends.
type slowIdentity struct {
	csi.UnimplementedIdentityServer
	entered, release chan struct{}
}

func (s slowIdentity) Probe(ctx context.Context, _ *csi.ProbeRequest) (*csi.ProbeResponse, error) {
	close(s.entered)
	select {
	case <-s.release:
		return &csi.ProbeResponse{}, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func TestStopLetsCallsFinish(t *testing.T) {
	for name, c := range map[string]struct {
		released bool
		grace    time.Duration
		want     codes.Code
	}{
		"a call that ends":        {true, time.Minute, codes.OK},
		"a call that does not":    {false, 10 * time.Millisecond, codes.Unavailable},
		"a call with no patience": {false, time.Nanosecond, codes.Unavailable},
	} {
		t.Run(name, func(t *testing.T) {
			calls := &running{}
			s := slowIdentity{entered: make(chan struct{}), release: make(chan struct{})}
			srv := grpc.NewServer(grpc.UnaryInterceptor(calls.intercept(klog.Background(), nil)))
			csi.RegisterIdentityServer(srv, s)
			path := filepath.Join(socketDir(t), "csi.sock")
			l, err := Listen(t.Context(), path)
			if err != nil {
				t.Fatal(err)
			}
			served := make(chan error, 1)
			go func() { served <- srv.Serve(l) }()
			conn := dial(t, path)
			defer conn.Close()
			got := make(chan error, 1)
			go func() {
				_, err := csi.NewIdentityClient(conn).Probe(context.Background(), &csi.ProbeRequest{})
				got <- err
			}()
			<-s.entered
			if c.released {
				close(s.release)
			}
			stopGracefully(srv, c.grace)
			calls.wg.Wait()
			if err := <-served; err != nil {
				t.Error(err)
			}
			if err := <-got; status.Code(err) != c.want && status.Code(err) != codes.Canceled {
				t.Errorf("call answered %v, want %s", err, c.want)
			}
		})
	}
}

// panicking panics in Probe.
type panicking struct {
	csi.UnimplementedIdentityServer
}

func (panicking) Probe(context.Context, *csi.ProbeRequest) (*csi.ProbeResponse, error) {
	panic("oh no")
}

func TestPanicIsInternal(t *testing.T) {
	calls := &running{}
	_, err := calls.intercept(klog.Background(), nil)(t.Context(), &csi.ProbeRequest{}, &grpc.UnaryServerInfo{FullMethod: "/csi.v1.Identity/Probe"},
		func(ctx context.Context, req any) (any, error) {
			return panicking{}.Probe(ctx, req.(*csi.ProbeRequest))
		})
	code(t, err, codes.Internal)
	if !strings.Contains(err.Error(), "BUG") {
		t.Errorf("message %v", err)
	}
}

func TestNewRefuses(t *testing.T) {
	n := newFake(t)
	for name, c := range map[string]struct {
		change func(*Config)
		says   string
	}{
		"no node ID":         {func(c *Config) { c.NodeID = "" }, "node ID"},
		"node ID too long":   {func(c *Config) { c.NodeID = strings.Repeat("n", 64) }, "node ID"},
		"node ID with blank": {func(c *Config) { c.NodeID = "a b" }, "node ID"},
		"driver name":        {func(c *Config) { c.Name = "Driver_1" }, "driver name"},
		"default pool":       {func(c *Config) { c.DefaultPool = "fast" }, "fast"},
		"state dir in use":   {func(*Config) {}, "--state-dir"},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := n.cfg
			c.change(&cfg)
			if _, err := newDriver(cfg, n.store, nil, n.fake, n.fake, fakeMounts{n.fake}, n.fake, n.fake); err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("got %v, want it to say %q", err, c.says)
			}
		})
	}
}

// TestCrashBetweenMountAndRecord: the filesystem is mounted, the record says only
// that it was about to be.
func TestCrashBetweenMountAndRecord(t *testing.T) {
	forget := func(n *node, v volume) {
		r, _ := n.d.state.get(v.id)
		r.Device = binding{}
		n.must(n.d.state.put(r))
	}
	t.Run("found by the next start", func(t *testing.T) {
		n := newFake(t)
		v := n.create("pvc-1", 16*mib, mountCap("ext4", manyWriters), nil)
		n.must(v.stage())
		forget(n, v)
		n.restart()
		// Nobody was told that it is staged, and it may have to grow yet.
		if r, ok := n.d.state.get(v.id); ok || len(n.fake.mounts) > 0 {
			t.Errorf("record %+v, mounts %v", r, n.fake.mounts)
		}
		n.must(v.stage())
		v.down()
	})
	t.Run("found by the repeated call", func(t *testing.T) {
		n := newFake(t)
		v := n.create("pvc-1", 16*mib, mountCap("ext4", manyWriters), nil)
		n.must(v.stage())
		forget(n, v)
		n.must(v.stage())
		v.down()
	})
	t.Run("found by unstage", func(t *testing.T) {
		n := newFake(t)
		v := n.create("pvc-1", 16*mib, mountCap("ext4", manyWriters), nil)
		n.must(v.stage())
		forget(n, v)
		code(t, v.delete(), codes.FailedPrecondition)
		v.down()
	})
	t.Run("before the mount", func(t *testing.T) {
		n := newFake(t)
		v := n.create("pvc-1", 16*mib, mountCap("ext4", manyWriters), nil)
		n.must(n.d.state.put(stageRecord{VolumeID: v.id, StagingPath: v.staging()}))
		n.must(v.unstage())
		n.must(n.d.state.put(stageRecord{VolumeID: v.id, StagingPath: v.staging()}))
		n.must(v.delete())
		if left := n.d.state.list(); len(left) > 0 {
			t.Errorf("left %+v", left)
		}
	})
}
