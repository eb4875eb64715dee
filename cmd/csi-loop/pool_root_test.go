package main

import (
	"context"
	"os"
	"strings"
	"testing"

	"github.com/csi-loop/csi-loop/internal/roottest"
	"github.com/csi-loop/csi-loop/pkg/image"
	"github.com/csi-loop/csi-loop/pkg/loop"
)

// A pool with an image that a loop device shows keeps its identity.
func TestReinitAttached(t *testing.T) {
	roottest.Require(t)
	ctx := context.Background()
	dir := t.TempDir() + "/p"
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	store, err := image.Open(ctx, []image.Config{{Name: "default", Path: dir}}, image.WithRefresh(0))
	if err != nil {
		t.Fatal(err)
	}
	p := store.Pools()[0]
	v, err := p.Create(ctx, image.Spec{Name: "a", Size: image.MiB})
	if err != nil {
		t.Fatal(err)
	}
	f, err := p.OpenImage(ctx, v.ID, false)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	loops, err := loop.New(ctx, loop.WithWarm(0))
	if err != nil {
		t.Fatal(err)
	}
	defer loops.Close()
	d, err := loops.Attach(ctx, f, loop.Mapping{BlockSize: 4096, Autoclear: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := store.Close(); err != nil {
		t.Fatal(err)
	}
	if _, _, err = run(t, "", "pool", "reinit", dir, "--yes"); err == nil || !strings.Contains(err.Error(), d.Path()) {
		t.Error(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	roottest.WaitUnbound(t, dir)
	if _, _, err = run(t, "", "pool", "reinit", dir, "--yes"); err != nil {
		t.Error(err)
	}
}
