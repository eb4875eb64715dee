// Package roottest is what tests that need root have in common.
//
// Such a test works on the running kernel: it binds loop devices, mounts file
// systems and opens device nodes. The package gives it three things:
//
//   - Require skips the test without root, and fails it when root was promised;
//   - Pool mounts a scratch file system of a given type;
//   - Main, called from TestMain, fails the package when a test left anything.
//
// Only leftovers of this test binary count. Other programs may bind loop
// devices and mount file systems on the same kernel at the same time, so a
// leftover is recognised by the temporary directory that Main makes.
package roottest

import (
	"os"
	"testing"
)

// Variable is the environment variable that promises root: set to "1" it turns
// a skip by Require into a failure, so that CI cannot skip by accident.
const Variable = "CSI_LOOP_ROOT_TESTS"

// Require skips the test when the process is not root. With
// CSI_LOOP_ROOT_TESTS=1 it fails the test instead.
func Require(tb testing.TB) {
	tb.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv(Variable) == "1" {
		tb.Fatalf("%s=1 but the test does not run as root", Variable)
	}
	tb.Skipf("needs root (set %s=1 to make this a failure)", Variable)
}
