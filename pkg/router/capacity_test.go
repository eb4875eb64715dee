package router

import (
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
)

// A node that is about to link for the first time is not full: the sidecar keeps what an
// earlier controller had it publish.
func TestCapacityOfANodeThatIsLinking(t *testing.T) {
	c := newCluster(t)
	s := onChannel(c.router, "a")
	_, err := c.router.table.admit(s)
	must(t, err)
	ask := func() error {
		_, err := c.csi.GetCapacity(t.Context(), &csi.GetCapacityRequest{AccessibleTopology: c.node("a").topology()[0]})
		return err
	}
	code(t, ask(), codes.Unavailable, `"a"`)
	c.router.table.join(s, map[string]*pool{"": newPool("", "", false)})
	must(t, ask()) // it has no such pool
}
