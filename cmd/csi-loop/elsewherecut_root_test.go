package main

import (
	"bytes"
	"crypto/rand"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

// A node that goes in the middle of a copy, and comes back, does no harm: nothing of the
// copy is to be seen or costs space, and the repeated call makes it.
func TestNodeGoesWhileCopying(t *testing.T) {
	roottest.Require(t)
	p := newPairAt(t, [2]string{"xfs", "ext4"}, 4<<20)
	a, b := p.nodes[0], p.nodes[1]
	const size = 16 << 20
	id := a.create("v", "", size, nil, nil)
	data := make([]byte, size)
	_, _ = rand.Read(data)
	p.must(os.WriteFile(a.image(id), data, 0o600))
	made, err := p.ctrl.CreateSnapshot(t.Context(), &csi.CreateSnapshotRequest{Name: "s", SourceVolumeId: id})
	p.must(err)
	room := func() int64 {
		r, err := p.ctrl.GetCapacity(t.Context(), &csi.GetCapacityRequest{AccessibleTopology: b.requirement().GetRequisite()[0]})
		p.must(err)
		return r.GetAvailableCapacity()
	}
	before := room()
	for name, src := range map[string]*csi.VolumeContentSource{"restored": source(made.GetSnapshot().GetSnapshotId(), ""), "cloned": source("", id)} {
		for who, goes := range map[string]*pairNode{"sender": a, "receiver": b} {
			t.Run(name+", "+who, func(t *testing.T) {
				name := name + "-" + who
				asked := make(chan error, 1)
				go func() {
					_, err := b.try(name, "", size, src, nil)
					asked <- err
				}()
				eventually(t, "the copy is on its way", func() error { return b.arriving(data) })
				goes.stop()
				if err := <-asked; err == nil {
					t.Fatal("the copy was made: the test shows nothing")
				}
				if _, err := os.Stat(filepath.Join(b.pool, "volumes", name)); !errors.Is(err, os.ErrNotExist) {
					t.Errorf("half of it is a volume: %v", err)
				}
				goes.start()
				again := b.create(name, "", size, src, nil)
				if got, err := os.ReadFile(b.image(again)); err != nil || !bytes.Equal(got, data) {
					t.Errorf("it differs: %v", err)
				}
				a.clean()
				b.clean()
				_, err := p.ctrl.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: again})
				p.must(err)
				eventually(t, "its space is free", func() error {
					if now := room(); now < before-1<<20 {
						return errors.New("it is not all")
					}
					return nil
				})
			})
		}
	}
}

// arriving fails until the first part of the data is in a file that is no volume yet.
func (n *pairNode) arriving(data []byte) error {
	found, err := filepath.Glob(n.pool + "/.new-*/disk.img")
	if err != nil || len(found) == 0 {
		return errors.Join(err, errors.New("no file"))
	}
	f, err := os.Open(found[0])
	if err != nil {
		return err
	}
	defer f.Close()
	got := make([]byte, 64<<10)
	if _, err := f.ReadAt(got, 0); err != nil || !bytes.Equal(got, data[:len(got)]) {
		return errors.Join(err, errors.New("no data"))
	}
	return nil
}
