package driver

import (
	"context"
	"path/filepath"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"
)

// nodeServer is the CSI Node service.
type nodeServer struct {
	csi.UnimplementedNodeServer
	d *Driver
}

// nodeRPCs are the optional calls this service answers.
var nodeRPCs = []csi.NodeServiceCapability_RPC_Type{
	csi.NodeServiceCapability_RPC_STAGE_UNSTAGE_VOLUME,
	csi.NodeServiceCapability_RPC_GET_VOLUME_STATS,
	csi.NodeServiceCapability_RPC_EXPAND_VOLUME,
	csi.NodeServiceCapability_RPC_SINGLE_NODE_MULTI_WRITER,
	csi.NodeServiceCapability_RPC_GET_VOLUME_HEALTH,
	csi.NodeServiceCapability_RPC_GET_STORAGE_HEALTH,
}

// NodeGetCapabilities lists nodeRPCs.
func (s *nodeServer) NodeGetCapabilities(context.Context, *csi.NodeGetCapabilitiesRequest) (*csi.NodeGetCapabilitiesResponse, error) {
	caps := make([]*csi.NodeServiceCapability, len(nodeRPCs))
	for i, t := range nodeRPCs {
		caps[i] = &csi.NodeServiceCapability{Type: &csi.NodeServiceCapability_Rpc{Rpc: &csi.NodeServiceCapability_RPC{Type: t}}}
	}
	return &csi.NodeGetCapabilitiesResponse{Capabilities: caps}, nil
}

// NodeGetInfo names the node, its topology and how many volumes it can attach.
func (s *nodeServer) NodeGetInfo(context.Context, *csi.NodeGetInfoRequest) (*csi.NodeGetInfoResponse, error) {
	return &csi.NodeGetInfoResponse{
		NodeId:             s.d.cfg.NodeID,
		MaxVolumesPerNode:  int64(s.d.table.Limit()),
		AccessibleTopology: s.d.topology(),
	}, nil
}

// maxPath is what a path and the zero behind it may have, in bytes (PATH_MAX).
const maxPath = 4096

// cleanPath checks a path that a CO gave and takes a trailing slash off it. What
// cannot be meant is refused: relative paths, and ones that climb.
func cleanPath(field, path string) (string, error) {
	clean := filepath.Clean(path)
	switch {
	case path == "":
		return "", invalidf("%s is missing", field)
	case !filepath.IsAbs(path):
		return "", invalidf("%s %q is not an absolute path", field, path)
	case clean != path && clean+"/" != path:
		return "", invalidf("%s %q has empty, . or .. elements", field, path)
	case clean == "/":
		return "", invalidf("%s is the root directory", field)
	case strings.ContainsRune(path, 0):
		return "", invalidf("%s %q has a zero byte", field, path)
	case len(path) >= maxPath:
		return "", invalidf("%s: %d bytes are more than %d", field, len(path), maxPath-1)
	}
	return clean, nil
}
