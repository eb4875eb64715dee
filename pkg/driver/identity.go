package driver

import (
	"context"
	"errors"
	"fmt"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// identityServer is the CSI Identity service.
type identityServer struct {
	csi.UnimplementedIdentityServer
	d      *Driver
	plugin []*csi.PluginCapability
}

// GetPluginInfo names the driver and its version.
func (s *identityServer) GetPluginInfo(context.Context, *csi.GetPluginInfoRequest) (*csi.GetPluginInfoResponse, error) {
	return &csi.GetPluginInfoResponse{Name: s.d.cfg.Name, VendorVersion: s.d.cfg.Version}, nil
}

// GetPluginCapabilities: PluginCapabilities, as far as the services are there.
func (s *identityServer) GetPluginCapabilities(context.Context, *csi.GetPluginCapabilitiesRequest) (*csi.GetPluginCapabilitiesResponse, error) {
	return &csi.GetPluginCapabilitiesResponse{Capabilities: s.plugin}, nil
}

// PluginCapabilities are those of the whole driver: a controller, also of groups, lists
// of changed blocks, volumes bound to a node, growth while mounted.
func PluginCapabilities() []*csi.PluginCapability {
	service := func(t csi.PluginCapability_Service_Type) *csi.PluginCapability {
		return &csi.PluginCapability{Type: &csi.PluginCapability_Service_{Service: &csi.PluginCapability_Service{Type: t}}}
	}
	return []*csi.PluginCapability{
		service(csi.PluginCapability_Service_CONTROLLER_SERVICE),
		service(csi.PluginCapability_Service_GROUP_CONTROLLER_SERVICE),
		service(csi.PluginCapability_Service_SNAPSHOT_METADATA_SERVICE),
		service(csi.PluginCapability_Service_VOLUME_ACCESSIBILITY_CONSTRAINTS),
		{Type: &csi.PluginCapability_VolumeExpansion_{
			VolumeExpansion: &csi.PluginCapability_VolumeExpansion{Type: csi.PluginCapability_VolumeExpansion_ONLINE},
		}},
	}
}

// Probe answers not ready until the reconcile at start-up is done, then
// FAILED_PRECONDITION when no pool can be used and nothing is staged. One bad pool among others is for
// the health calls to tell: a restart would not mend it, and the others serve on.
func (s *identityServer) Probe(ctx context.Context, _ *csi.ProbeRequest) (*csi.ProbeResponse, error) {
	select {
	case <-s.d.up:
	default:
		return &csi.ProbeResponse{Ready: wrapperspb.Bool(false)}, nil
	}
	if err := s.d.Ready(ctx); err != nil {
		return nil, preconditionf("%v", err)
	}
	return &csi.ProbeResponse{Ready: wrapperspb.Bool(true)}, nil
}

// Ready tells why no call can be served: no pool can be used and nothing is staged.
func (d *Driver) Ready(ctx context.Context) error {
	// Side by side: one that hangs is no reason to wait.
	pools := d.images.Pools()
	answers := make(chan error, len(pools))
	for _, p := range pools {
		go func() {
			if err := p.Check(ctx); err != nil {
				answers <- fmt.Errorf("pool %q: %w", p.Name(), err)
				return
			}
			answers <- nil
		}()
	}
	var errs []error
	for range pools {
		err := <-answers
		if err == nil {
			return nil
		}
		errs = append(errs, err)
	}
	if len(d.state.list()) > 0 {
		// What is staged is served from records and the kernel, and must be.
		return nil
	}
	return fmt.Errorf("no pool can be used: %w", errors.Join(errs...))
}
