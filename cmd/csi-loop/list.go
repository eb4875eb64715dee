package main

import (
	"context"
	"errors"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"k8s.io/klog/v2"

	"github.com/csi-loop/csi-loop/cmd/csi-loop/survey"
)

// list looks, and prints what show gives.
func (s *surveyCommand) list(c *cobra.Command, show func(*survey.Site) (rows [][]string, all any)) error {
	if err := s.check("text", "wide", "json"); err != nil {
		return err
	}
	cfg, err := s.config()
	if err != nil {
		return err
	}
	if len(cfg.Pools) == 0 {
		return usagef("no pool: give --pool=NAME=PATH or --config, as to csi-loop serve")
	}
	site, err := survey.Look(c.Context(), cfg)
	if err != nil {
		return err
	}
	if err := told(c.Context(), site); err != nil {
		return err
	}
	rows, all := show(site)
	if s.output == "json" {
		return printJSON(c.OutOrStdout(), all)
	}
	return printTable(c.OutOrStdout(), rows)
}

// told says what could not be looked at. It is an error when no pool could be: an
// empty list would say that there are no volumes.
func told(ctx context.Context, site *survey.Site) error {
	var pools []error
	for _, p := range site.Pools {
		if p.Err != nil {
			pools = append(pools, p.Err)
		}
	}
	if len(pools) == len(site.Pools) {
		return errors.Join(pools...)
	}
	for _, err := range append(pools, site.Blind...) {
		klog.FromContext(ctx).Error(err, "The list is not complete")
	}
	return nil
}

func newVolumesCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "volumes",
		Short: "List the volumes of this node",
		Long: `List the volumes of this node: those of its pools, and images that are mapped now.

The states: available; attached (a loop device shows it, and no record says why);
staged; published (shown to at least one pod); refused (its record is damaged).`,
		Args: cobra.NoArgs,
	}
	s := newSurveyCommand(c, "text, wide or json")
	c.RunE = func(c *cobra.Command, _ []string) error {
		return failed(s.list(c, func(site *survey.Site) ([][]string, any) {
			return volumeRows(site.Volumes, s.output == "wide"), notNil(site.Volumes)
		}))
	}
	return c
}

// notNil is a list that JSON shows as one, also when it is empty.
func notNil[T any](list []T) []T { return append([]T{}, list...) }

func volumeRows(volumes []survey.Volume, wide bool) [][]string {
	head := []string{"ID", "POOL", "SIZE", "ALLOCATED", "TYPE", "STATE", "DEVICES"}
	if wide {
		head = append(head, "NAME", "ALLOCATION", "BLOCK", "DIRECT-IO", "CREATED", "STAGED-AT", "PUBLISHED-AT", "PROBLEMS")
	}
	rows := [][]string{head}
	for _, v := range volumes {
		kind := v.Filesystem
		switch {
		case v.State == survey.Refused:
		case v.MappedImage != "":
			kind = "mapped"
		case kind == "":
			kind = "raw"
		}
		if v.Encryption != "" {
			kind += " in " + v.Encryption
		}
		row := []string{v.ID, v.Pool, bytesOr(v.Size), bytesOr(v.Allocated), kind, v.State, strings.Join(v.Devices, ",")}
		if wide {
			created := ""
			if v.Created != nil {
				created = v.Created.Format(time.RFC3339)
			}
			name := v.Name
			if v.MappedImage != "" {
				name = v.MappedImage
			}
			row = append(row, name, string(v.Allocation), numberOr(v.BlockSize), v.DirectIO, created, v.StagingPath, strings.Join(v.Targets, ","), strings.Join(v.Problems, "; "))
		}
		rows = append(rows, row)
	}
	return rows
}

func newSnapshotsCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "snapshots",
		Short: "List the snapshots of this node",
		Long: `List the snapshots of this node. ALLOCATED counts shared blocks too.

The states: ready; refused (its record is damaged); damaged (its image is);
unfinished (part of a group snapshot that is under way, or was interrupted).`,
		Args: cobra.NoArgs,
	}
	s := newSurveyCommand(c, "text, wide or json")
	c.RunE = func(c *cobra.Command, _ []string) error {
		return failed(s.list(c, func(site *survey.Site) ([][]string, any) {
			return snapshotRows(site.Snapshots, s.output == "wide"), notNil(site.Snapshots)
		}))
	}
	return c
}

func snapshotRows(snapshots []survey.Snapshot, wide bool) [][]string {
	head := []string{"ID", "POOL", "SOURCE", "SIZE", "ALLOCATED", "CREATED", "STATE"}
	if wide {
		head = append(head, "NAME", "GROUP", "TYPE", "REFLINKED", "PROBLEM")
	}
	rows := [][]string{head}
	for _, v := range snapshots {
		created, kind := "", v.Filesystem
		if v.Created != nil {
			created = v.Created.Format(time.RFC3339)
			if kind == "" {
				kind = "raw"
			}
		}
		row := []string{v.ID, v.Pool, v.Source, bytesOr(v.Size), bytesOr(v.Allocated), created, v.State}
		if wide {
			row = append(row, v.Name, v.Group, kind, strconv.FormatBool(v.Reflinked), v.Problem)
		}
		rows = append(rows, row)
	}
	return rows
}

// bytesOr shows a size, and nothing for what is not known.
func bytesOr(n int64) string {
	if n == 0 {
		return ""
	}
	return survey.Bytes(n)
}

func numberOr(n int) string {
	if n == 0 {
		return ""
	}
	return strconv.Itoa(n)
}

func newDevicesCommand() *cobra.Command {
	all := false
	c := &cobra.Command{
		Use:   "devices",
		Short: "List the loop devices of this node",
		Long: `List the loop devices of this node that show images of csi-loop, with the byte range
that each shows and where it is mounted, or its node is shown.`,
		Args: cobra.NoArgs,
	}
	s := newSurveyCommand(c, "text, wide or json")
	c.Flags().BoolVar(&all, "all", false, "those of other programs too")
	c.RunE = func(c *cobra.Command, _ []string) error {
		return failed(s.list(c, func(site *survey.Site) ([][]string, any) {
			var devices []survey.Device
			for _, d := range site.Devices {
				if all || d.State != survey.Foreign {
					devices = append(devices, d)
				}
			}
			return deviceRows(devices, s.output == "wide"), notNil(devices)
		}))
	}
	return c
}

func deviceRows(devices []survey.Device, wide bool) [][]string {
	head := []string{"DEVICE", "VOLUME", "SIZE", "OFFSET", "ACCESS", "STATE", "MOUNTS"}
	if wide {
		head = append(head, "DISKSEQ", "LIMIT", "BLOCK", "DIRECT-IO", "AUTOCLEAR", "DISCARD", "MAPPING", "TAG", "IMAGE")
	}
	rows := [][]string{head}
	for _, d := range devices {
		access := "read-write"
		if d.ReadOnly {
			access = "read-only"
		}
		row := []string{d.Path, d.Volume, survey.Bytes(d.Size), strconv.FormatInt(d.Offset, 10), access, d.State, strings.Join(d.Mounts, ",")}
		if wide {
			row = append(row, strconv.FormatUint(d.DiskSeq, 10), bytesOr(d.SizeLimit), numberOr(d.BlockSize),
				strconv.FormatBool(d.DirectIO), strconv.FormatBool(d.Autoclear), strconv.FormatBool(d.Discard), d.Mapping, d.Tag, d.Image)
		}
		rows = append(rows, row)
	}
	return rows
}
