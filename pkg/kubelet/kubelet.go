// Package kubelet registers the driver with the node's kubelet: it serves the
// plugin registration service on a socket in the kubelet's plugins_registry
// directory, which the kubelet watches. No sidecar is needed for that.
//
// Invariants:
//
//   - The CSI socket answers before the registration socket appears, because the
//     kubelet calls it at once.
//   - A socket that an earlier process left is unlinked before a new one is made,
//     so that the kubelet notices. At a stop the socket stays: without it the
//     kubelet drops the driver from the node, and Kubernetes forgets the node's
//     free space, for as long as the pod is away.
//   - What the kubelet has against the driver ends Serve: the pod is started again,
//     which is how the kubelet is asked again.
package kubelet

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"

	"google.golang.org/grpc"
	"k8s.io/klog/v2"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"
)

// versions are those of CSI that the driver speaks, in the kubelet's words.
var versions = []string{"1.0.0"}

// maxPath is what a UNIX socket's address can hold, in bytes.
const maxPath = 107

// Plugin is what is registered.
type Plugin struct {
	// Driver is the name of the CSI driver.
	Driver string
	// Endpoint is the path of the CSI socket as the kubelet sees it.
	Endpoint string
	// Dir is the kubelet's plugins_registry directory as this process sees it.
	Dir string
}

// Socket is the path of the registration socket. It is the same at each start: the
// kubelet refuses a second registration of a driver that is still there.
func (p Plugin) Socket() string { return filepath.Join(p.Dir, p.Driver+"-reg.sock") }

// Check says what is wrong with the plugin, as far as can be told without the kubelet.
func (p Plugin) Check() error {
	switch {
	case !filepath.IsAbs(p.Dir):
		return fmt.Errorf("registration directory %q: the path is not absolute", p.Dir)
	case !filepath.IsAbs(p.Endpoint):
		return fmt.Errorf("kubelet endpoint %q: the path is not absolute", p.Endpoint)
	case len(p.Socket()) > maxPath:
		return fmt.Errorf("registration socket %s: the path has %d bytes and a UNIX socket's can have %d", p.Socket(), len(p.Socket()), maxPath)
	case len(p.Endpoint) > maxPath:
		return fmt.Errorf("kubelet endpoint %s: the path has %d bytes and a UNIX socket's can have %d", p.Endpoint, len(p.Endpoint), maxPath)
	}
	return nil
}

// Serve registers the plugin and answers the kubelet until ctx ends, which is no
// error, or until the kubelet refuses the driver, which is.
func (p Plugin) Serve(ctx context.Context) error {
	l, err := p.listen(ctx)
	if err != nil {
		return err
	}
	srv := grpc.NewServer()
	s := &server{plugin: p, logger: klog.FromContext(ctx), refused: make(chan error, 1)}
	registration.RegisterRegistrationServer(srv, s)
	var wg sync.WaitGroup
	defer wg.Wait()
	failed := make(chan error, 1)
	wg.Go(func() { failed <- srv.Serve(l) })
	defer srv.Stop()
	select {
	case <-ctx.Done():
		return nil
	case err := <-s.refused:
		return err
	case err := <-failed:
		return fmt.Errorf("registration with the kubelet: %w", err)
	}
}

// listen replaces the socket that an earlier process left.
func (p Plugin) listen(ctx context.Context) (net.Listener, error) {
	if err := p.Check(); err != nil {
		return nil, err
	}
	path := p.Socket()
	st, err := os.Lstat(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
	case err != nil:
		return nil, fmt.Errorf("registration with the kubelet: %w", err)
	case st.Mode()&os.ModeSocket == 0:
		return nil, fmt.Errorf("registration with the kubelet: %s exists and is not a socket: remove it", path)
	default:
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("registration with the kubelet: %w", err)
		}
	}
	l, err := (&net.ListenConfig{}).Listen(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("registration with the kubelet: %w: is %s the kubelet's plugins_registry?", err, p.Dir)
	}
	if u, ok := l.(*net.UnixListener); ok {
		u.SetUnlinkOnClose(false) // see the package comment
	}
	// The kubelet runs as root, as does the driver.
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("registration with the kubelet: %w", err), l.Close())
	}
	return l, nil
}

// server answers the kubelet.
type server struct {
	registration.UnimplementedRegistrationServer
	plugin  Plugin
	logger  klog.Logger
	refused chan error // capacity 1
}

// GetInfo says what to register.
func (s *server) GetInfo(context.Context, *registration.InfoRequest) (*registration.PluginInfo, error) {
	return &registration.PluginInfo{
		Type: registration.CSIPlugin, Name: s.plugin.Driver, Endpoint: s.plugin.Endpoint, SupportedVersions: versions,
	}, nil
}

// NotifyRegistrationStatus is the kubelet's verdict.
func (s *server) NotifyRegistrationStatus(_ context.Context, status *registration.RegistrationStatus) (*registration.RegistrationStatusResponse, error) {
	if status.GetPluginRegistered() {
		s.logger.Info("Registered with the kubelet", "driver", s.plugin.Driver, "endpoint", s.plugin.Endpoint)
		return &registration.RegistrationStatusResponse{}, nil
	}
	select {
	case s.refused <- fmt.Errorf("the kubelet refuses the driver %q at %s: %s", s.plugin.Driver, s.plugin.Endpoint, status.GetError()):
	default:
	}
	return &registration.RegistrationStatusResponse{}, nil
}
