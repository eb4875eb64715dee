package router

import (
	"context"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// askTime is how long a node may take to say how much room it has, before its last
// word is used instead.
const askTime = 5 * time.Second

// GetCapacity asks the node that the topology means. While it is away its last word
// counts, for Grace; then it has no room, so that nothing is scheduled there.
func (s *controllerServer) GetCapacity(ctx context.Context, req *csi.GetCapacityRequest) (*csi.GetCapacityResponse, error) {
	poolName, thin := req.GetParameters()[paramPool], req.GetParameters()[paramAllocation] == "thin"
	if req.GetAccessibleTopology() == nil {
		return total(s.r.table.rooms(poolName, thin)), nil
	}
	name, ok := s.r.nodeOf(req.GetAccessibleTopology())
	if !ok {
		return &csi.GetCapacityResponse{}, nil
	}
	room, known := s.r.table.roomAt(name, poolName, thin)
	switch {
	case !known && s.r.sinceStart() < Grace:
		// Nothing is known yet; the sidecar keeps what it has published.
		return nil, unavailablef("node %q has not linked since this controller started", name)
	case !known || room.session == nil && room.away >= Grace:
		return &csi.GetCapacityResponse{}, nil
	case room.session == nil:
		return capacity(room.free, room.free), nil
	case room.free == 0 && !s.r.table.hasPool(name, poolName):
		// There is no such pool, or it is a copy of another node's.
		return &csi.GetCapacityResponse{}, nil
	}
	asking, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	resp, err := call(asking, room.session, "GetCapacity", req, csi.ControllerClient.GetCapacity)
	switch status.Code(err) {
	case codes.Unavailable, codes.DeadlineExceeded:
		if ctx.Err() == nil {
			return capacity(room.free, room.free), nil
		}
	default:
	}
	return resp, err
}

func capacity(available, largest int64) *csi.GetCapacityResponse {
	return &csi.GetCapacityResponse{AvailableCapacity: available, MaximumVolumeSize: wrapperspb.Int64(largest)}
}

// total is the room of the whole cluster, by the nodes' last word.
func total(rooms []room) *csi.GetCapacityResponse {
	var sum, largest int64
	for _, room := range rooms {
		if room.session == nil && room.away >= Grace {
			continue
		}
		sum += room.free
		largest = max(largest, room.free)
	}
	return capacity(sum, largest)
}
