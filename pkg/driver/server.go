package driver

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"k8s.io/klog/v2"
)

// Listen opens the CSI socket. The endpoint is unix:///dir/name.sock (also
// unix:/dir/name.sock or the bare path); CSI wants the name to end in .sock. A
// socket that a dead process left is replaced; one that somebody answers on is
// refused. Only its owner may connect.
func Listen(ctx context.Context, endpoint string) (net.Listener, error) {
	path, err := socketPath(endpoint)
	if err != nil {
		return nil, err
	}
	if err := clearSocket(ctx, path); err != nil {
		return nil, fmt.Errorf("endpoint %s: %w", endpoint, err)
	}
	old := syscall.Umask(0o177) // the socket must never be open to others, not even for a moment
	l, err := (&net.ListenConfig{}).Listen(ctx, "unix", path)
	syscall.Umask(old)
	if err != nil {
		return nil, fmt.Errorf("endpoint %s: %w", endpoint, err)
	}
	return l, nil
}

// socketPath takes the path out of an endpoint and checks it.
func socketPath(endpoint string) (string, error) {
	path, ok := strings.CutPrefix(endpoint, "unix:")
	if !ok && strings.Contains(endpoint, ":") {
		return "", fmt.Errorf("endpoint %q: only UNIX sockets are supported, as in unix:///run/csi/csi-loop.sock", endpoint)
	}
	path = filepath.Clean(strings.Replace(path, "//", "", 1))
	switch {
	case !filepath.IsAbs(path):
		return "", fmt.Errorf("endpoint %q: the path of the socket must be absolute, as in unix:///run/csi/csi-loop.sock", endpoint)
	case !strings.HasSuffix(path, ".sock"):
		return "", fmt.Errorf("endpoint %q: CSI wants the name of a socket to end in .sock", endpoint)
	case len(path) > 107:
		return "", fmt.Errorf("endpoint %q: the path has %d bytes and a UNIX socket's can have 107: choose a shorter directory", endpoint, len(path))
	}
	return path, nil
}

// clearSocket removes the socket of a process that is gone.
func clearSocket(ctx context.Context, path string) error {
	st, err := os.Lstat(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return os.MkdirAll(filepath.Dir(path), 0o750)
	case err != nil:
		return err
	case st.Mode()&os.ModeSocket == 0:
		return fmt.Errorf("%s exists and is not a socket: remove it or choose another endpoint", path)
	}
	conn, err := (&net.Dialer{Timeout: 2 * time.Second}).DialContext(ctx, "unix", path)
	if err == nil {
		_ = conn.Close()
		return fmt.Errorf("another process serves on %s: stop it or choose another endpoint", path)
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("cannot tell whether %s is still in use: %w", path, err)
	}
	return os.Remove(path)
}

// window is the flow control window of the connections, in bytes.
const window = 1 << 20

// stopTime is how long Serve lets running calls finish by default.
const stopTime = 30 * time.Second

// Serve answers all CSI calls on l until ctx ends, then lets running calls finish
// for at most grace (0: 30 s) before it cancels them, and waits for those to
// undo what they did. It returns nil after an orderly stop.
func (d *Driver) Serve(ctx context.Context, l net.Listener, grace time.Duration) error {
	return d.serve(ctx, l, grace, d.register)
}

// register adds all services.
func (d *Driver) register(r grpc.ServiceRegistrar) {
	csi.RegisterIdentityServer(r, &identityServer{d: d, plugin: PluginCapabilities()})
	registerAdmin(r, d)
	d.RegisterController(r)
	csi.RegisterNodeServer(r, &nodeServer{d: d})
}

// ServeNode is Serve for a node whose Controller service is reached by another way:
// only the Identity and Node services are there.
func (d *Driver) ServeNode(ctx context.Context, l net.Listener, grace time.Duration) error {
	plugin := slices.DeleteFunc(PluginCapabilities(), func(c *csi.PluginCapability) bool {
		return slices.Contains(controllerServices, c.GetService().GetType())
	})
	return d.serve(ctx, l, grace, func(r grpc.ServiceRegistrar) {
		csi.RegisterIdentityServer(r, &identityServer{d: d, plugin: plugin})
		registerAdmin(r, d)
		csi.RegisterNodeServer(r, &nodeServer{d: d})
	})
}

// controllerServices are what RegisterController adds.
var controllerServices = []csi.PluginCapability_Service_Type{
	csi.PluginCapability_Service_CONTROLLER_SERVICE, csi.PluginCapability_Service_GROUP_CONTROLLER_SERVICE, csi.PluginCapability_Service_SNAPSHOT_METADATA_SERVICE,
}

// RegisterController adds the Controller service, and those that belong to it
// (GroupController, SnapshotMetadata), to a server of the caller's, who
// must give it Interceptor, and see all calls ended before Close.
func (d *Driver) RegisterController(r grpc.ServiceRegistrar) {
	csi.RegisterControllerServer(r, &controllerServer{d: d})
	csi.RegisterGroupControllerServer(r, &groupServer{d: d})
	csi.RegisterSnapshotMetadataServer(r, &metadataServer{d: d})
}

// Interceptor is what turns errors of this package into gRPC statuses, and logs.
func (d *Driver) Interceptor(logger klog.Logger) grpc.UnaryServerInterceptor {
	return (&running{tell: d.cfg.Running}).intercept(logger, d.cfg.Observe)
}

func (d *Driver) serve(ctx context.Context, l net.Listener, grace time.Duration, register func(grpc.ServiceRegistrar)) error {
	if grace == 0 {
		grace = stopTime
	}
	logger := klog.FromContext(ctx)
	calls := &running{tell: d.cfg.Running}
	// Windows of a fixed size: growing them costs a ping for each call, and CSI
	// messages are small.
	options := []grpc.ServerOption{grpc.UnaryInterceptor(calls.intercept(logger, d.cfg.Observe)), grpc.InitialWindowSize(window), grpc.InitialConnWindowSize(window)}
	if d.cfg.Stats != nil {
		options = append(options, grpc.StatsHandler(d.cfg.Stats))
	}
	srv := grpc.NewServer(options...)
	register(srv)

	failed := make(chan error, 1)
	go func() { failed <- srv.Serve(l) }()
	select {
	case err := <-failed:
		srv.Stop() // connections outlive a listener that fails
		calls.wg.Wait()
		return fmt.Errorf("serve: %w", err)
	case <-ctx.Done():
	}
	logger.Info("Stopping: no new calls, running ones may finish", "grace", grace.String())
	stopGracefully(srv, grace)
	calls.wg.Wait()
	if err := <-failed; err != nil && !errors.Is(err, grpc.ErrServerStopped) {
		return fmt.Errorf("serve: %w", err)
	}
	return nil
}

// stopGracefully waits for running calls, and cancels them after grace.
func stopGracefully(srv *grpc.Server, grace time.Duration) {
	done := make(chan struct{})
	go func() {
		srv.GracefulStop()
		close(done)
	}()
	timer := time.NewTimer(grace)
	defer timer.Stop()
	select {
	case <-done:
	case <-timer.C:
		srv.Stop()
		<-done
	}
}
