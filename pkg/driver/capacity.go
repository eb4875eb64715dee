package driver

import (
	"context"
	"slices"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/csi-loop/csi-loop/pkg/image"
)

// reachable says whether a volume of this node satisfies the topology asked
// for: RESOURCE_EXHAUSTED when not, the code that makes Kubernetes choose anew.
func (d *Driver) reachable(t *csi.TopologyRequirement) error {
	if len(t.GetRequisite()) == 0 || slices.ContainsFunc(t.GetRequisite(), d.matches) {
		return nil
	}
	return exhaustedf("node %q is in none of the topologies asked for, its segment is %s=%s", d.cfg.NodeID, d.topologyKey(), d.cfg.NodeID)
}

// matches says whether this node lies in a topology.
func (d *Driver) matches(t *csi.Topology) bool {
	for key, value := range t.GetSegments() {
		if key != d.topologyKey() || value != d.cfg.NodeID {
			return false
		}
	}
	return true
}

// topology is this node's.
func (d *Driver) topology() *csi.Topology {
	return &csi.Topology{Segments: map[string]string{d.topologyKey(): d.cfg.NodeID}}
}

// GetCapacity says how large one more volume may be, in the pool and with the
// allocation asked for.
func (s *controllerServer) GetCapacity(_ context.Context, req *csi.GetCapacityRequest) (*csi.GetCapacityResponse, error) {
	p, err := parseParams(req.GetParameters())
	if err != nil {
		return nil, err
	}
	fsType := p.fsType
	if caps := req.GetVolumeCapabilities(); len(caps) > 0 {
		acc, err := parseAccesses(caps, fsType)
		if err != nil {
			return nil, err
		}
		fsType = acc.fsType
	}
	if t := req.GetAccessibleTopology(); t != nil && !s.d.matches(t) {
		return &csi.GetCapacityResponse{}, nil
	}
	pool, ok := s.d.images.Pool(s.d.poolName(p.pool))
	if !ok {
		// Another node may have a pool of that name; this one has no room in it.
		return &csi.GetCapacityResponse{}, nil
	}
	if p.template != "" {
		if _, err := pool.Template(p.template); err != nil {
			// Another node may have the template; this one can make no volume of it.
			return &csi.GetCapacityResponse{}, nil //nolint:nilerr // as above
		}
	}
	free := pool.Capacity(p.allocation)
	if p.encryption.Type != "" {
		if err := s.d.canEncrypt(p.encryption); err != nil {
			// Another node may have dm-crypt.
			return &csi.GetCapacityResponse{}, nil //nolint:nilerr // as above
		}
		free = max(0, free-image.HeaderSize)
	}
	return &csi.GetCapacityResponse{
		AvailableCapacity: free,
		MaximumVolumeSize: wrapperspb.Int64(free),
		MinimumVolumeSize: wrapperspb.Int64(max(image.MinimumSize(fsType), sizeUnit)),
	}, nil
}
