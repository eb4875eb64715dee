package driver

import (
	"context"
	"net"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"k8s.io/klog/v2"
)

// listen makes a socket beside the node's own, and a client for it.
func (n *node) listen(name string) (net.Listener, *grpc.ClientConn) {
	n.t.Helper()
	path := filepath.Join(filepath.Dir(n.socket), name)
	l, err := Listen(n.t.Context(), path)
	n.must(err)
	conn, err := grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	n.must(err)
	n.t.Cleanup(func() { n.must(conn.Close()) })
	return l, conn
}

// In node mode the socket has no Controller service, and does not say it has.
func TestServeNode(t *testing.T) {
	n := newFake(t)
	var observed []string
	n.cfg.Observe = func(method, code string, _ time.Duration) { observed = append(observed, method+" "+code) }
	n.restart()
	l, conn := n.listen("n.sock")
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- n.d.ServeNode(ctx, l, 0) }()
	caps, err := csi.NewIdentityClient(conn).GetPluginCapabilities(t.Context(), &csi.GetPluginCapabilitiesRequest{})
	n.must(err)
	if slices.ContainsFunc(caps.GetCapabilities(), func(c *csi.PluginCapability) bool {
		return c.GetService().GetType() == csi.PluginCapability_Service_CONTROLLER_SERVICE
	}) {
		t.Error("it says it has a Controller service")
	}
	_, err = csi.NewControllerClient(conn).GetCapacity(t.Context(), &csi.GetCapacityRequest{})
	code(t, err, codes.Unimplemented)
	_, err = csi.NewNodeClient(conn).NodeGetInfo(t.Context(), &csi.NodeGetInfoRequest{})
	n.must(err)
	_, err = csi.NewNodeClient(conn).NodeGetVolumeStats(t.Context(), &csi.NodeGetVolumeStatsRequest{})
	code(t, err, codes.InvalidArgument)
	cancel()
	n.must(<-done)
	if want := []string{"GetPluginCapabilities OK", "NodeGetInfo OK", "NodeGetVolumeStats InvalidArgument"}; !slices.Equal(observed, want) {
		t.Errorf("observed %v, want %v", observed, want)
	}
}

// On a server of somebody else's the Controller service answers with the same codes.
func TestRegisterController(t *testing.T) {
	n := newFake(t)
	l, conn := n.listen("c.sock")
	srv := grpc.NewServer(grpc.UnaryInterceptor(n.d.Interceptor(klog.Background())), grpc.WaitForHandlers(true))
	n.d.RegisterController(srv)
	done := make(chan error, 1)
	go func() { done <- srv.Serve(l) }()
	client := csi.NewControllerClient(conn)
	_, err := client.ControllerExpandVolume(t.Context(), &csi.ControllerExpandVolumeRequest{VolumeId: "x", CapacityRange: &csi.CapacityRange{RequiredBytes: 1}})
	code(t, err, codes.NotFound)
	caps, err := client.ControllerGetCapabilities(t.Context(), &csi.ControllerGetCapabilitiesRequest{})
	n.must(err)
	if len(caps.GetCapabilities()) != len(ControllerCapabilities()) {
		t.Error(caps)
	}
	srv.GracefulStop()
	n.must(<-done)
}
