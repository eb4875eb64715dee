package main

import "testing"

func TestVersionsDependOnModulesOnly(t *testing.T) {
	const a = "module m\n\ngo 1.26\n\nrequire (\n\ta v1\n)\n\nrequire (\n\tb v2 // indirect\n\tc v1 // indirect\n)\n"
	const moved = "module m\n\ngo 1.26\n\nrequire (\n\ta v1\n\tb v2\n)\n\nrequire c v1 // indirect\n"
	const newer = "module m\n\ngo 1.26\n\nrequire (\n\ta v1\n\tb v3\n)\n\nrequire c v1 // indirect\n"
	if x, y := string(versions([]byte(a))), string(versions([]byte(moved))); x != y {
		t.Errorf("a direct import changes the versions: %q, %q", x, y)
	}
	if x, y := string(versions([]byte(moved))), string(versions([]byte(newer))); x == y {
		t.Error("a newer module does not change the versions")
	}
}
