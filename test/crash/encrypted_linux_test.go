package crash

import (
	"os"
	"testing"

	"github.com/csi-loop/csi-loop/internal/roottest"
	"github.com/csi-loop/csi-loop/pkg/crypt"
)

// TestKillEncrypted ends the driver at every call in the life of an encrypted volume.
func TestKillEncrypted(t *testing.T) {
	t.Parallel()
	encrypted(t, killEverywhere)
}

// TestErrorsEncrypted makes every call in the life of an encrypted volume fail once.
func TestErrorsEncrypted(t *testing.T) {
	t.Parallel()
	encrypted(t, failEverywhere)
}

// encrypted is kinds for encrypted volumes. It needs dm-crypt, which the virtual machines
// of make test-encryption have.
func encrypted(t *testing.T, test func(t *testing.T, s *site, k kind)) {
	t.Helper()
	roottest.Require(t)
	c, err := crypt.New(crypt.Options{PBKDF: "pbkdf2"})
	must(t, err)
	if err := c.Available(); err != nil && os.Getenv("CSI_LOOP_VM") == "" {
		t.Skip(err)
	} else if err != nil {
		t.Fatal(err)
	}
	shortenLeases(t)
	for _, k := range []kind{encryptedExt4, encryptedBlock} {
		onSite(t, "ext4", k, test)
	}
}
