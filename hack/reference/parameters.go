package main

import (
	"strings"

	"github.com/csi-loop/csi-loop/internal/reference"
	"github.com/csi-loop/csi-loop/pkg/driver"
)

// parameters writes the page about classes and attributes.
func parameters(dir string) error {
	p := reference.NewPage("Parameters of classes and volumes", `
A key that is not listed is refused by name, so that a misspelt one makes no volume that nobody asked for. Kubernetes wants all values as text:
`+"`\"4096\"`, `\"true\"`."+` Sizes of volumes are rounded up to the next MiB, and to the least that the filesystem can have, and reported so.`)
	for _, section := range []struct {
		where       driver.Where
		title, text string
	}{
		{driver.StorageClass, "StorageClass", "A StorageClass may also have the parameters of a VolumeAttributesClass: what a volume has until it is given such a class."},
		{driver.AttributesClass, "VolumeAttributesClass", "They may change while the volume is in use, and take effect at once. What a class does not name stays as it is. " +
			"Limits need cgroup version 2 on the node, see [operations](../operations.md#limits-read-ahead-and-trims)."},
		{driver.SnapshotClass, "VolumeSnapshotClass and VolumeGroupSnapshotClass", "How a volume in use is stopped, and what the snapshot is made of."},
		{driver.MappedVolume, "Attributes of a mapped volume", "A pre-provisioned volume can show a range of an image in a directory that the operator allowed with `--image-dir`: a " +
			"partition of a disk image, a filesystem behind a header. These are `volumeAttributes` of its PersistentVolume. It is never formatted, grown or deleted, " +
			"and symbolic links, hard links, `..` and devices do not lead out of the directory."},
		{driver.EphemeralVolume, "Attributes of an inline ephemeral volume", "`volumeAttributes` of a pod's `csi` volume; its filesystem is the `fsType` there. `--ephemeral-max-size` switches such volumes on " +
			"and bounds their size, `--ephemeral-max-volumes` their number on the node, `--ephemeral-pool` the pools."},
	} {
		p.Printf("\n## %s\n\n%s\n", section.title, section.text)
		var rows [][]string
		for _, x := range driver.Parameters(section.where) {
			rows = append(rows, []string{reference.Code(x.Name), x.Values, reference.Code(x.Default), strings.TrimSpace(x.Text)})
		}
		p.Table([]string{"Key", "Values", "Default", ""}, rows)
	}
	return p.Write(dir, "parameters.md")
}
