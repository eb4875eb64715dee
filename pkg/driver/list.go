package driver

import (
	"context"
	"encoding/base64"
	"sort"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/csi-loop/csi-loop/pkg/image"
)

// Tokens of a list name the last entry of the page before, so that volumes
// which come and go between two pages neither repeat nor hide others.
const tokenPrefix = "after:"

func makeToken(lastID string) string {
	return base64.RawURLEncoding.EncodeToString([]byte(tokenPrefix + lastID))
}

// parseToken returns the ID a page starts after. A token that this driver did
// not make is ABORTED, as CSI asks for.
func parseToken(token string) (string, error) {
	if token == "" {
		return "", nil
	}
	raw, err := base64.RawURLEncoding.DecodeString(token)
	id, ok := strings.CutPrefix(string(raw), tokenPrefix)
	if err != nil || !ok || id == "" || makeToken(id) != token {
		return "", abortedf("starting_token %q is not one of ours: start the list again", token)
	}
	return id, nil
}

// pageLimit is the most entries in one answer: what fits in a message of the size
// that gRPC clients accept by default, with room.
const pageLimit = 10000

// page cuts the part of all (ordered by ID) that lies behind token, at most limit of
// them (0: as many as fit), and makes the token of the next page.
func page[T any](all []T, id func(T) string, token string, limit int32) ([]T, string, error) {
	if limit < 0 {
		return nil, "", invalidf("max_entries %d is negative", limit)
	}
	after, err := parseToken(token)
	if err != nil {
		return nil, "", err
	}
	if after != "" {
		all = all[sort.Search(len(all), func(i int) bool { return id(all[i]) > after }):]
	}
	if limit == 0 {
		limit = pageLimit
	}
	if int(limit) >= len(all) {
		return all, "", nil
	}
	all = all[:limit]
	return all, makeToken(id(all[limit-1])), nil
}

func volumeID(v image.Volume) string { return v.ID }

// persistent drops the inline ephemeral volumes, which no CO lists.
func persistent(volumes []image.Volume) []image.Volume {
	kept := volumes[:0:0]
	for _, v := range volumes {
		if v.Ephemeral == nil {
			kept = append(kept, v)
		}
	}
	return kept
}

// ListVolumes lists the volumes of all pools of this node, ordered by ID.
func (s *controllerServer) ListVolumes(_ context.Context, req *csi.ListVolumesRequest) (*csi.ListVolumesResponse, error) {
	volumes, next, err := page(persistent(s.d.images.List()), volumeID, req.GetStartingToken(), req.GetMaxEntries())
	if err != nil {
		return nil, err
	}
	resp := &csi.ListVolumesResponse{NextToken: next}
	for _, v := range volumes {
		resp.Entries = append(resp.Entries, &csi.ListVolumesResponse_Entry{
			Volume: s.d.csiVolume(v), Status: &csi.ListVolumesResponse_VolumeStatus{},
		})
	}
	return resp, nil
}
