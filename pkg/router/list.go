package router

import (
	"context"
	"encoding/base64"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const (
	// pageMost bounds a page that the caller does not bound, so that the answer
	// stays below the 4 MiB that a sidecar takes.
	pageMost = 5000
	// maxToken bounds a node's token, in bytes.
	maxToken = 1 << 10
	// tokenPrefix begins the tokens of lists, before they are encoded.
	tokenPrefix = "at:"
)

// position is where in the cluster's list a page begins: in a node's own list,
// behind the node's token. Nodes are in the order of their names.
type position struct{ node, token string }

func (p position) encode() string {
	return base64.RawURLEncoding.EncodeToString([]byte(tokenPrefix + p.node + "\x00" + p.token))
}

func parsePosition(token string) (position, error) {
	if token == "" {
		return position{}, nil
	}
	raw, err := base64.RawURLEncoding.DecodeString(token)
	rest, ok := strings.CutPrefix(string(raw), tokenPrefix)
	node, inner, cut := strings.Cut(rest, "\x00")
	p := position{node, inner}
	if err != nil || !ok || !cut || node == "" || p.encode() != token {
		return position{}, status.Errorf(codes.Aborted, "starting_token %q is not one of ours: start the list again", token)
	}
	return p, nil
}

// everybody lists the links of all nodes, or says which are missing: a list that
// leaves out what is on a node that is away would say that it is gone.
func (r *Router) everybody(ctx context.Context) ([]*session, error) {
	if _, ok := r.cfg.Roster.Registered(); !ok {
		return nil, unavailablef("the nodes of the cluster are not known yet")
	}
	if missing := r.missing(); len(missing) > 0 {
		return nil, unavailablef("the list would not be whole: not linked: %s", some(missing))
	}
	var sessions []*session
	for _, p := range r.table.all() {
		if p.session == nil {
			return nil, unavailablef("the list would not be whole: not linked: %s", p.node)
		}
		sessions = append(sessions, p.session)
	}
	return sessions, ctx.Err()
}

// pages puts a list together from the nodes' lists. fetch asks one node for at most
// limit entries behind its token; those of pools that are another node's (copies) are
// left out. Nodes that come or go between two pages neither repeat nor hide
// what is on others.
func pages[Entry any](
	ctx context.Context, r *Router, token string, limit int32, id func(Entry) string,
	fetch func(ctx context.Context, s *session, token string, limit int32) ([]Entry, string, error),
) (entries []Entry, next string, err error) {
	if limit < 0 {
		return nil, "", invalidf("max_entries %d is negative", limit)
	}
	if limit == 0 || limit > pageMost {
		limit = pageMost
	}
	at, err := parsePosition(token)
	if err != nil {
		return nil, "", err
	}
	sessions, err := r.everybody(ctx)
	if err != nil {
		return nil, "", err
	}
	for _, s := range sessions {
		switch {
		case s.id.Node < at.node:
			continue
		case s.id.Node > at.node:
			at = position{node: s.id.Node}
		}
		for more := true; more; more = at.token != "" {
			left := limit - int32(len(entries))
			if left == 0 {
				return entries, at.encode(), nil
			}
			part, nodeNext, err := fetch(ctx, s, at.token, left)
			if err == nil {
				part, err = only(r, s, part, id)
			}
			if err != nil {
				return nil, "", wholeOr(err, s)
			}
			if len(part) > int(left) || nodeNext != "" && nodeNext == at.token || len(nodeNext) > maxToken {
				return nil, "", unavailablef("the list would not be whole: node %q does not keep to pages", s.id.Node)
			}
			entries = append(entries, part...)
			at.token = nodeNext
		}
	}
	return entries, "", nil
}

// wholeOr is a node's error as that of a list: what one node cannot say makes the
// list not whole. A token that the node does not know is the caller's to begin
// anew.
func wholeOr(err error, s *session) error {
	switch status.Code(err) {
	case codes.Aborted, codes.Canceled, codes.DeadlineExceeded, codes.InvalidArgument:
		return err
	default:
		return unavailablef("the list would not be whole: node %q: %s", s.id.Node, status.Convert(err).Message())
	}
}

// here says whether an ID's pool is the node's.
func (r *Router) here(s *session, id string) bool {
	poolID, ok := poolOf(id)
	return ok && r.table.owns(s, poolID)
}

// still says that a link is its node's, after an answer that came over it was looked at.
func (r *Router) still(s *session) error {
	if !r.table.links(s) {
		return unavailablef("the link to node %q ended before its answer was looked at", s.id.Node)
	}
	return nil
}

// ListVolumes lists the volumes of all nodes.
func (s *controllerServer) ListVolumes(ctx context.Context, req *csi.ListVolumesRequest) (*csi.ListVolumesResponse, error) {
	entries, next, err := pages(ctx, s.r, req.GetStartingToken(), req.GetMaxEntries(), volumeOf,
		func(ctx context.Context, n *session, token string, limit int32) ([]*csi.ListVolumesResponse_Entry, string, error) {
			resp, err := call(ctx, n, "ListVolumes", &csi.ListVolumesRequest{StartingToken: token, MaxEntries: limit}, csi.ControllerClient.ListVolumes)
			return resp.GetEntries(), resp.GetNextToken(), err
		})
	if err != nil {
		return nil, err
	}
	return &csi.ListVolumesResponse{Entries: entries, NextToken: next}, nil
}

// ControllerListVolumeHealth lists what is wrong with the volumes of all nodes.
func (s *controllerServer) ControllerListVolumeHealth(ctx context.Context, req *csi.ControllerListVolumeHealthRequest) (*csi.ControllerListVolumeHealthResponse, error) {
	entries, next, err := pages(ctx, s.r, req.GetStartingToken(), req.GetMaxEntries(), (*csi.VolumeHealth).GetVolumeId,
		func(ctx context.Context, n *session, token string, limit int32) ([]*csi.VolumeHealth, string, error) {
			resp, err := call(ctx, n, "ControllerListVolumeHealth", &csi.ControllerListVolumeHealthRequest{StartingToken: token, MaxEntries: limit}, csi.ControllerClient.ControllerListVolumeHealth)
			return resp.GetEntries(), resp.GetNextToken(), err
		})
	if err != nil {
		return nil, err
	}
	return &csi.ControllerListVolumeHealthResponse{Entries: entries, NextToken: next}, nil
}

// ListSnapshots goes to one node when the request names a snapshot or a volume, and
// otherwise lists those of all nodes.
func (s *controllerServer) ListSnapshots(ctx context.Context, req *csi.ListSnapshotsRequest) (*csi.ListSnapshotsResponse, error) {
	none := gone(&csi.ListSnapshotsResponse{})
	own := func(n *session, resp *csi.ListSnapshotsResponse) (err error) {
		resp.Entries, err = only(s.r, n, resp.GetEntries(), snapshotOf)
		return err
	}
	switch {
	case req.GetSnapshotId() != "":
		return byID(ctx, s.r, "ListSnapshots", "snapshot", req.GetSnapshotId(), req, csi.ControllerClient.ListSnapshots, none, own)
	case req.GetSourceVolumeId() != "":
		return byID(ctx, s.r, "ListSnapshots", "volume", req.GetSourceVolumeId(), req, csi.ControllerClient.ListSnapshots, none, own)
	}
	entries, next, err := pages(ctx, s.r, req.GetStartingToken(), req.GetMaxEntries(), snapshotOf,
		func(ctx context.Context, n *session, token string, limit int32) ([]*csi.ListSnapshotsResponse_Entry, string, error) {
			resp, err := call(ctx, n, "ListSnapshots", &csi.ListSnapshotsRequest{StartingToken: token, MaxEntries: limit}, csi.ControllerClient.ListSnapshots)
			return resp.GetEntries(), resp.GetNextToken(), err
		})
	if err != nil {
		return nil, err
	}
	return &csi.ListSnapshotsResponse{Entries: entries, NextToken: next}, nil
}

func volumeOf(e *csi.ListVolumesResponse_Entry) string { return e.GetVolume().GetVolumeId() }

func snapshotOf(e *csi.ListSnapshotsResponse_Entry) string { return e.GetSnapshot().GetSnapshotId() }

// only drops the entries whose pool is another node's. A link that ended meanwhile is an
// error: whose its node's pools are now nobody can say.
func only[Entry any](r *Router, s *session, entries []Entry, id func(Entry) string) ([]Entry, error) {
	kept := entries[:0:0]
	for _, e := range entries {
		if r.here(s, id(e)) {
			kept = append(kept, e)
		}
	}
	return kept, r.still(s)
}
