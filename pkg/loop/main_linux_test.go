package loop

import (
	"os"
	"testing"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

func TestMain(m *testing.M) {
	if os.Getenv(childVariable) != "" {
		os.Exit(child())
	}
	roottest.Main(m)
}
