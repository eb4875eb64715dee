package crypt

import (
	"testing"
	"time"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

const mib = int64(1) << 20

// cheap spares the tests the work that makes guessing dear.
var cheap = Options{PBKDF: "pbkdf2", Time: time.Millisecond}

func TestMain(m *testing.M) { roottest.Main(m) }
